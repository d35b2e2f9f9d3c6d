"""A sustained run: whether the latency of the first minute is that of the tenth.

Processors are allowed to be fast for a while and are held back when they get warm. A short
measurement shows the first; a device in use lives with the second.
"""

from __future__ import annotations

import contextlib
import math
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from gnet_opt.bench import heat
from gnet_opt.bench.figures import percentile_ms
from gnet_opt.bench.process import TIMEOUT
from gnet_opt.errors import ConfigError
from gnet_opt.progress import Progress, silent

MOST_BINS = 120
"""A soak is cut into so many bins, or fewer where they would be shorter than a second."""

LEAST_BINS = 8
"""With fewer bins nothing is said about throttling."""

START, SETTLED = 0.1, 0.25
"""The first tenth of the bins is the start, and the last quarter what the latency settles to."""

NOTABLE = 0.03
"""Least relative change that is one, the same by which a warm-up calls times steady."""

NOISE = 4.0
"""How many standard errors of the difference of the two medians a change must have, too."""

_BLIND = "Neither the clock nor throttle events can be read here."
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")


class Worker(Protocol):
    """What can be asked to measure; `gnet_opt.bench.process.WorkerProcess` is one."""

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sensors:
    """What the machine tells at one moment.

    Attributes:
        temperature_c: Of the hottest processor sensor, None where there is none.
        frequency_mhz: The clock of the fastest CPU, None where it is not told.
        throttle_count: See `gnet_opt.bench.heat.read_throttle_count`.
    """

    temperature_c: float | None
    frequency_mhz: float | None
    throttle_count: int | None


@dataclass(frozen=True, kw_only=True)
class Bin:
    """A stretch of a soak.

    Attributes:
        start_s: When it began, in seconds from the beginning.
        count: The number of runs in it.
        p50_ms: Their median.
        p99_ms: Their 99th percentile (nearest rank).
        temperature_c: Read in the middle of the bin, while the processor works.
        frequency_mhz: Read at the same time.
        throttle_count: Throttle events since the beginning of the soak, None where none are told.
    """

    start_s: float
    count: int
    p50_ms: float
    p99_ms: float
    temperature_c: float | None
    frequency_mhz: float | None
    throttle_count: int | None

    def to_dict(self) -> dict[str, Any]:
        """The bin as it stands in a result file."""
        return {
            "count": self.count,
            "frequency_mhz": self.frequency_mhz,
            "p50_ms": self.p50_ms,
            "p99_ms": self.p99_ms,
            "start_s": self.start_s,
            "temperature_c": self.temperature_c,
            "throttle_count": self.throttle_count,
        }


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a soak shows.

    Attributes:
        sentence: For people.
        slower: Settled latency over that of the start, minus 1; None for too few bins.
        since_s: When it changed, in seconds from the beginning; None where it did not.
    """

    sentence: str
    slower: float | None
    since_s: float | None


@dataclass(frozen=True, kw_only=True)
class Soak:
    """A sustained run of one subject.

    Attributes:
        seconds: How long it took.
        bins: In the order of time, at least one.
    """

    seconds: float
    bins: tuple[Bin, ...]

    @property
    def verdict(self) -> Verdict:
        """Whether the latency settled at more than it started with, see `judge`."""
        return judge(self.bins, self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """`soak` as it stands in a result file."""
        verdict = self.verdict
        return {
            "bins": [each.to_dict() for each in self.bins],
            "seconds": self.seconds,
            "since_s": verdict.since_s,
            "slower": verdict.slower,
            "verdict": verdict.sentence,
        }


def parse_duration(text: str) -> float:
    """Seconds from a text such as `90s`, `10m`, `1h` or `1h30m`.

    Raises:
        ConfigError: It is not written like that, or is nothing.
    """
    match = _DURATION.fullmatch(text.strip())
    hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if not total:
        raise ConfigError(f"{text!r} is no duration. Write it as 90s, 10m, 1h or 1h30m.")
    return total


def say_duration(seconds: float) -> str:
    """A duration for people, `3 min 20 s`, to the second."""
    whole = round(seconds)
    parts = ((whole // 3600, "h"), (whole % 3600 // 60, "min"), (whole % 60, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"


def read_sensors(root: Path = Path("/")) -> Sensors:
    """Read what the machine tells now; `root` is the root of the file system."""
    return Sensors(
        temperature_c=heat.hottest(heat.read_temperatures(root)),
        frequency_mhz=max(heat.read_frequencies(root).values(), default=None),
        throttle_count=heat.read_throttle_count(root),
    )


def soak(
    worker: Worker,
    duration: float,
    *,
    progress: Progress = silent,
    sensors: Callable[[], Sensors] = read_sensors,
    clock: Callable[[], float] = time.monotonic,
) -> Soak:
    """Run one subject back to back for a duration, and look at time, heat and clock as it goes.

    The worker is asked to measure one bin after the other; between two it rests for the
    milliseconds that the answer takes. The sensors are read by a thread of this process. An
    interrupt ends it at once, and nothing of it is kept: half a soak answers another question.

    Args:
        worker: A worker that has loaded its subject and is warm.
        duration: In seconds.
        progress: Shows the bins.
        sensors: Reads the machine.
        clock: Tells the time, in seconds.

    Raises:
        ConfigError: The duration is not positive.
        BackendError: The worker failed, died or gave no answer in time.
    """
    if not duration > 0:
        raise ConfigError(f"A soak of {duration:g} s is none. Pass a duration such as 10m.")
    count = max(1, min(MOST_BINS, int(duration)))
    length = duration / count
    events_before = sensors().throttle_count
    bins: list[Bin] = []
    started = clock()
    for end in progress([length * (index + 1) for index in range(count)], "Soaking", count):
        start_s = clock() - started
        left = end - start_s  # less than the length by what the bin before took too long
        if left < length / 2:
            continue  # a single run took longer than a bin
        request = {"count": 1, "do": "measure", "seconds": left}
        with _read_after(left / 2, sensors) as readings:
            answer = worker.ask(request, left + TIMEOUT)
        now = readings[0] if readings else sensors()
        bins.append(_bin(start_s, answer["samples_ns"], now, events_before))
    return Soak(seconds=clock() - started, bins=tuple(bins))


@contextlib.contextmanager
def _read_after(seconds: float, sensors: Callable[[], Sensors]) -> Iterator[list[Sensors]]:
    """Read the sensors after so many seconds, unless the block ends before."""
    readings: list[Sensors] = []
    timer = threading.Timer(seconds, lambda: readings.append(sensors()))
    timer.daemon = True
    timer.start()
    try:
        yield readings
    finally:
        timer.cancel()
        timer.join()


def _bin(start_s: float, samples: Sequence[int], now: Sensors, before: int | None) -> Bin:
    events = None
    if now.throttle_count is not None and before is not None:
        events = now.throttle_count - before
    return Bin(
        start_s=start_s,
        count=len(samples),
        p50_ms=statistics.median(samples) / 1e6,
        p99_ms=percentile_ms(samples, 99),
        temperature_c=now.temperature_c,
        frequency_mhz=now.frequency_mhz,
        throttle_count=events,
    )


def judge(bins: Sequence[Bin], seconds: float) -> Verdict:
    """Say whether the latency settled at more than it started with, since when, and why.

    The start is the median over the first tenth of the bins' medians, at least three of them, and
    the settled latency that over the last quarter. Settled is slower where the difference is more
    than `NOTABLE` of the start and more than `NOISE` standard errors. The standard error of the
    difference of two medians of m and n bins is 1.2533 sigma sqrt(1/m + 1/n), and sigma, the noise
    of a bin, comes from the differences of neighbours, which a slow change does not widen
    (J. von Neumann, "Distribution of the ratio of the mean square successive difference to the
    variance", Annals of Mathematical Statistics 12 (1941), 367-395; here with their median absolute
    value, so that a single disturbed bin does not count). The change is where two constants fit
    best by least absolute deviations (after D. V. Hinkley, "Inference about the change-point in a
    sequence of random variables", Biometrika 57 (1970), 1-17). A slow rise has no such point; there
    it is about the middle of the rise.

    It is called throttling only where the machine says so: an event was counted, or the clock fell
    by more than `NOTABLE`.

    Args:
        bins: In the order of time.
        seconds: How long the soak took.
    """
    length = say_duration(seconds)
    if len(bins) < LEAST_BINS:
        sentence = f"{length} are too short to tell of throttling. Soak for ten seconds or more."
        return Verdict(sentence=sentence, slower=None, since_s=None)
    first, last = max(3, round(START * len(bins))), max(3, round(SETTLED * len(bins)))
    medians = [each.p50_ms for each in bins]
    start, settled = statistics.median(medians[:first]), statistics.median(medians[-last:])
    error = 1.2533 * _noise(medians) * math.sqrt(1 / first + 1 / last)
    slower = settled / start - 1
    events = bins[-1].throttle_count
    clock = _clock_change(bins, first, last)
    if settled - start > max(NOTABLE * start, NOISE * error):
        since = bins[_change(medians)].start_s
        sentence = _slower(since, slower, events, clock)
        return Verdict(sentence=sentence, slower=slower, since_s=since)
    stayed = "the latency did not rise"
    if slower > 0:
        band = 100 * max(NOTABLE, NOISE * error / start)
        stayed = f"the latency rose by {100 * slower:.1f} %, which is within {band:.0f} % of noise"
    if events:
        sentence = f"{_events(events)} counted in {length}, but {stayed}."
    elif events is None and clock is None:
        sentence = f"No throttling seen in {length}: {stayed}. {_BLIND}"
    else:
        sentence = f"No throttling seen in {length}: {stayed}."
    return Verdict(sentence=sentence, slower=slower, since_s=None)


def _slower(
    since: float, slower: float, events: int | None, clock: tuple[float, float] | None
) -> str:
    after, much = f"after {say_duration(since)}", f"{100 * slower:.0f} % slower"
    seen, unseen = [], []
    if clock:
        fell = clock[1] < (1 - NOTABLE) * clock[0]
        seen += [f"the clock went from {clock[0]:.0f} to {clock[1]:.0f} MHz"] if fell else []
        unseen += [] if fell else ["the clock did not fall"]
    if events is not None:
        seen += [f"{_events(events)} counted"] if events else []
        unseen += [] if events else ["no throttle event was counted"]
    if seen:
        return f"Throttled {after}: {much}, and {' and '.join(seen)}."
    if unseen:
        return f"{much} {after}, but {' and '.join(unseen)}: look for another program."
    return f"{much} {after}: throttled, or disturbed by another program. {_BLIND}"


def _events(count: int) -> str:
    return "1 throttle event was" if count == 1 else f"{count} throttle events were"


def _clock_change(bins: Sequence[Bin], first: int, last: int) -> tuple[float, float] | None:
    """The clock at the start and when settled, in MHz; None where it is not told."""
    before = [each.frequency_mhz for each in bins[:first] if each.frequency_mhz is not None]
    after = [each.frequency_mhz for each in bins[-last:] if each.frequency_mhz is not None]
    return (statistics.median(before), statistics.median(after)) if before and after else None


def _noise(values: Sequence[float]) -> float:
    """The standard deviation of a value, from the differences of neighbours."""
    steps = [abs(after - before) for before, after in pairwise(values)]
    # 1.4826 makes a median absolute deviation a normal distribution's standard deviation, and a
    # difference has twice the variance of one value.
    return 1.4826 * statistics.median(steps) / math.sqrt(2)


def _change(values: Sequence[float]) -> int:
    """The index from which on another constant fits best."""

    def misfit(part: Sequence[float]) -> float:
        centre = statistics.median(part)
        return sum(abs(value - centre) for value in part)

    return min(
        range(1, len(values)), key=lambda index: misfit(values[:index]) + misfit(values[index:])
    )
