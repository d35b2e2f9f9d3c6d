"""Reading `results.json`, as `gnet-opt bench` writes it, from whoever sent it.

What is read here is shown in a report and compared by a CI job, so nothing in it is trusted: every
value that is used later has its type checked first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gnet_opt.errors import ConfigError

SCHEMA = "gnet-opt/bench/1"

_LARGEST = 1e18
"""No time, size or count of a benchmark is larger, and every one up to it is a finite float."""

_LEAST = 1e-9
"""No time, rate or ratio is smaller; so the quotient of any two is a finite float, too."""


_FOREIGN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""What no text has: control characters but tab and newline, and halves of surrogate pairs."""


@dataclass(frozen=True)
class _Is:
    """A value for which a rule holds.

    Attributes:
        what: The rule in words, after "must be".
        holds: The rule.
    """

    what: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class _Or:
    """Null, or a value of a shape."""

    shape: Any


@dataclass(frozen=True)
class _Each:
    """A table with any keys, whose values have one shape."""

    shape: Any


@dataclass(frozen=True)
class _List:
    """A list whose entries have one shape."""

    shape: Any
    least: int = 0


def _is_number(value: Any) -> bool:
    # In Python True is a number, too.
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and -_LARGEST <= value <= _LARGEST


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and value >= 0


def _is_text(value: Any) -> bool:
    # Half of a surrogate pair can stand in JSON, but in no file that is written later; and a
    # terminal obeys what follows an escape.
    return isinstance(value, str) and not _FOREIGN.search(value)


_TEXT = _Is("a text", _is_text)
_BOOL = _Is("true or false", lambda value: isinstance(value, bool))
_NUMBER = _Is("a number", _is_number)
_AMOUNT = _Is("a number of at least 0", lambda value: _is_number(value) and value >= 0)
_POSITIVE = _Is("a number above 0", lambda value: _is_number(value) and value >= _LEAST)
_COUNT = _Is("a whole number of at least 0", _is_count)
_SIZE = _Is("a whole number of at least 1", lambda value: _is_count(value) and value >= 1)
_SAMPLES = _List(_SIZE, least=1)

# A key that ends with "?" may be missing; keys that are not named here may be there.
_HOST = {
    "frequencies_mhz": _Each(_AMOUNT),
    "governors": _List(_TEXT),
    "load1": _Or(_AMOUNT),
    "memory_available_bytes": _Or(_COUNT),
    "temperatures_c": _Each(_NUMBER),
    "throttle_count": _Or(_COUNT),
    "turbo": _Or(_BOOL),
}
_ENVIRONMENT = {
    "affinity": _List(_COUNT),
    "constraint": _Or({"cpus?": _Or(_List(_COUNT)), "label?": _TEXT, "memory_bytes?": _Or(_SIZE)}),
    "control?": _TEXT,
    "end": _HOST,
    "machine": {
        "architecture": _TEXT,
        "board": _TEXT,
        "cores": _SIZE,
        "cpu": _TEXT,
        "instructions": _List(_TEXT),
        "system": _TEXT,
    },
    "remote?": _Or(
        {
            "board": _TEXT,
            "host": _TEXT,
            "name": _TEXT,
            "notes": _List(_TEXT),
            "power_mode": _TEXT,
            "python": _TEXT,
            "reconnections": _COUNT,
            "results_sha256": _TEXT,
        }
    ),
    "start": _HOST,
    "tools": _Each(_TEXT),
    "unstable": _List(_TEXT),
}
_ACCURACY = {
    "agreement": _AMOUNT,
    "drop": _Or({"ci95": _List(_NUMBER, least=2), "value": _NUMBER}),
    "float": _Or({"top1": _AMOUNT}),
    "images": _SIZE,
    "quantized": _Or({"top1": _AMOUNT}),
    "semantics": _TEXT,
}
_PROFILE = {
    "groups": _List({"kind": _TEXT, "microseconds": _AMOUNT, "title": _TEXT}),
    "layers": _List({"microseconds": _AMOUNT, "name": _TEXT, "precision": _TEXT}),
    "macs_int8_share": _AMOUNT,
    "runs": _SIZE,
    "sentences": _List(_TEXT),
}
_RAIL = {
    "busy_watts": _Or(_NUMBER),
    "idle_watts": _Or(_NUMBER),
    "joules_per_inference": _Or(_NUMBER),
    "name": _TEXT,
    "source": _TEXT,
}
_BIN = {
    "count": _COUNT,
    "frequency_mhz": _Or(_AMOUNT),
    "p50_ms": _POSITIVE,
    "p99_ms": _POSITIVE,
    "start_s": _AMOUNT,
    "temperature_c": _Or(_NUMBER),
    "throttle_count": _Or(_COUNT),
}
_SETTING = {
    "batch": _SIZE,
    "p90_ms": _List(_POSITIVE),
    "pictures_per_second": _List(_POSITIVE, 1),
    "streams": _SIZE,
    "threads": _Or(_SIZE),
}
_STEPS = ("decode_ns", "resize_ns", "normalize_ns", "infer_ns")
_METRIC = {"better": _TEXT, "name": _TEXT, "value": _AMOUNT}
_STREAM = {
    "device_p50_ms?": _POSITIVE,
    "metric": _METRIC,
    "n": _SIZE,
    "p50_ms": _POSITIVE,
    "p90_ms": _POSITIVE,
    "p99_ms": _POSITIVE,
    "rounds": _List(
        {"control_ns?": _SAMPLES, "device_ns?": _SAMPLES, "samples_ns": _SAMPLES}, least=1
    ),
    "rounds_ms": _List(_POSITIVE, least=1),
    "spread": _AMOUNT,
}
_SCENARIOS = {
    "multi-stream?": {**_STREAM, "query_pictures": _SIZE},
    "offline?": {
        "metric": _METRIC,
        "rounds": _List({"control_ns?": _SAMPLES, "elapsed_ns": _SIZE, "pictures": _SIZE}, least=1),
        "spread": _AMOUNT,
    },
    "server?": {
        "bound_ms": _AMOUNT,
        "metric": _METRIC,
        "rounds": _List({"late": _COUNT, "offered_qps": _POSITIVE, "samples_ns": _SAMPLES}, 1),
    },
    "single-stream?": _STREAM,
}
_SUBJECT = {
    "accuracy": _Or(_ACCURACY),
    "artifact_sha256": _Each(_TEXT),
    "backend": _TEXT,
    "backend_version": _TEXT,
    "cold_start_ms": _List(_AMOUNT),
    "end_to_end": _Or(
        {"pictures": _SIZE, "source?": _TEXT, **{step: _List(_COUNT, 1) for step in _STEPS}}
    ),
    "energy": _Or({"joules_per_inference?": _Or(_NUMBER), "note": _TEXT, "rails": _List(_RAIL)}),
    "file_bytes": _COUNT,
    "first_ms": _List(_AMOUNT),
    "load_ms": _List(_AMOUNT),
    "model": _TEXT,
    "model_sha256": _TEXT,
    "name": _TEXT,
    "native": _BOOL,
    "notes?": _List(_TEXT),
    "peak_rss_bytes": _Or(_COUNT),
    "precision": _TEXT,
    "profile": _Or(_PROFILE),
    "scenarios": _SCENARIOS,
    "soak": _Or({"bins": _List(_BIN), "seconds": _AMOUNT, "verdict?": _TEXT}),
    "sweep?": _Or({"settings": _List(_SETTING, least=1)}),
    "target": _TEXT,
    "threads": _Or(_SIZE),
    "warm_up": {"count": _COUNT, "seconds": _AMOUNT, "steady": _BOOL},
}
_DOCUMENT = {
    "comparison": {"over": _TEXT},
    "created": _TEXT,
    "environment": _ENVIRONMENT,
    "settings": {
        "latency_bound_ms": _Or(_AMOUNT),
        "rounds": _SIZE,
        "scenarios": _List(_TEXT),
        "seconds": _AMOUNT,
        "seed": _Is("a whole number", lambda value: isinstance(value, int) and _is_number(value)),
        "threads": _Or(_SIZE),
    },
    "subjects": _List(_SUBJECT, least=1),
    "version": _TEXT,
}
_RATIO = {"high": _POSITIVE, "low": _POSITIVE, "median": _POSITIVE}


def read(path: Path) -> dict[str, Any]:
    """Read a result file.

    Returns:
        The document; every value that the schema names is there and has its type.

    Raises:
        ConfigError: The file cannot be read, or is no such document; the dotted path to the first
            wrong value is named.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}. Pass the results.json of a `gnet-opt bench` run."
        ) from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise ConfigError(
            f"{path} has the schema {schema!r}, and this version of gnet-opt reads {SCHEMA!r}. "
            "Pass the results.json of a `gnet-opt bench` run."
        )
    check(document, str(path))
    return dict(document)


def check(document: Any, where: str) -> None:
    """Check the types of a document.

    Args:
        document: What JSON gave.
        where: What to call it in messages.

    Raises:
        ConfigError: A value is missing or has the wrong type; its dotted path is named.
    """
    _check(document, _DOCUMENT, where)
    names = [subject["name"] for subject in document["subjects"]]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where}.subjects has two with the name {twice!r}.")
    comparison = document["comparison"]
    for scenario in _SCENARIOS:
        ratios = comparison.get(scenario.removesuffix("?"), {})
        _check(ratios, _Each(_RATIO), f"{where}.comparison.{scenario.removesuffix('?')}")


def _check(value: Any, shape: Any, where: str) -> None:
    if isinstance(shape, _Or):
        if value is not None:
            _check(value, shape.shape, where)
    elif isinstance(shape, _Is):
        if not shape.holds(value):
            _refuse(value, shape.what, where)
    elif isinstance(shape, _List):
        if not isinstance(value, list) or len(value) < shape.least:
            _refuse(value, f"a list of at least {shape.least}" if shape.least else "a list", where)
        for index, entry in enumerate(value):
            _check(entry, shape.shape, f"{where}[{index}]")
    elif isinstance(shape, _Each):
        if not isinstance(value, dict):
            _refuse(value, "a table", where)
        for key, entry in value.items():
            _check(key, _TEXT, f"{where} key")
            _check(entry, shape.shape, f"{where}.{key}")
    else:
        _check_table(value, shape, where)


def _check_table(value: Any, shape: Mapping[str, Any], where: str) -> None:
    if not isinstance(value, dict):
        _refuse(value, "a table", where)
    for key, inside in shape.items():
        name = key.removesuffix("?")
        if name in value:
            _check(value[name], inside, f"{where}.{name}")
        elif name == key:
            raise ConfigError(f"{where}.{name} is missing. Was the file cut off or edited?")


def _refuse(value: Any, what: str, where: str) -> NoReturn:
    shown = ascii(value)
    raise ConfigError(
        f"{where} must be {what}, not {shown if len(shown) <= 60 else shown[:57] + '...'}."
    )


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
