"""Charts as SVG texts, for a page without scripts.

A chart is drawn for a width in CSS pixels and not scaled, so that its text has the size of the text
around it; the page shows the one that fits. Colours are classes: the page's style sheet knows the
light and the dark ones. All text is escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

COLOURS = 8
"""Series colours that the style sheet has: classes `c0`, `c1` and so on."""

_LETTER = 8.0
"""Mean width of a bold letter of `.chart text` in a wide font (DejaVu Sans), in pixels."""

_LINE = 15.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point with its name beside it.

    Attributes:
        name: The text.
        colour: Number of the series.
        x: The abscissa, above 0.
        y: The ordinate.
        low: Lower end of the interval of `y`.
        high: Upper end.
        size: What the area of the circle stands for.
        detail: What else there is to know.
    """

    name: str
    colour: int
    x: float
    y: float
    low: float
    high: float
    size: float
    detail: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line through points, in the order of their abscissas.

    Attributes:
        name: What it is.
        colour: Number of the series.
        points: Pairs of abscissa and ordinate.
        marks: Those of them that get a dot, with a text for it.
        faint: Whether it is drawn as the lesser of two lines of one colour.
    """

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    marks: Sequence[tuple[float, float, str]] = ()
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of parts that follow each other.

    Attributes:
        name: The text above it.
        parts: Kind of each part (a class `k-KIND`), its title and its value.
        text: What stands at its end.
    """

    name: str
    parts: Sequence[tuple[str, str, float]]
    text: str


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A ratio with its interval.

    Attributes:
        name: The text above it.
        colour: Number of the series.
        value: The ratio.
        low: Lower end.
        high: Upper end.
        text: The same in words.
    """

    name: str
    colour: int
    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Scale:
    """From values to pixels.

    Attributes:
        low: Value at `start`.
        high: Value at `end`.
        start: In pixels.
        end: In pixels.
        logarithmic: Whether equal ratios are equally long, not equal differences.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Where a value is, in pixels."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values in the range."""
        if self.logarithmic:
            return _log_ticks(self.low, self.high, count)
        step = _round_step((self.high - self.low) / max(1, count))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def figure(value: float) -> str:
    """What was measured, with three digits that count: `2.00`, `13.4`, `1250`."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 6)}f}"


def number(value: float) -> str:
    """A round number, such as that of a tick, as short as it can be."""
    text = figure(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def scatter(
    points: Sequence[Point], *, front: Sequence[int], x_title: str, y_title: str, width: int
) -> str:
    """Named circles, with a line through those that no other one beats.

    Args:
        points: At least one.
        front: The places of those on the line, from left to right.
        x_title: Title of the abscissa, which is logarithmic where values are far apart.
        y_title: Title of the ordinate.
        width: In pixels.
    """
    height = max(300, min(420, width * 3 // 5))
    left, right, top, bottom = 46.0, width - 14.0, 34.0, height - 44.0
    xs = [point.x for point in points]
    x = _range(xs, left, right, padding=0.16, spread=2.5)
    lows, highs = [point.low for point in points], [point.high for point in points]
    low, high = min(lows), max(highs)
    pad = max(0.12 * (high - low), 0.25)
    y = Scale(low=low - pad, high=high + pad, start=bottom, end=top)
    largest = max(point.size for point in points) or 1.0
    radii = [max(4.0, 15.0 * math.sqrt(point.size / largest)) for point in points]
    drawn = [_axes(x, y, x_title, y_title, width, height)]
    if len(front) > 1:
        steps = [f"M{x(points[front[0]].x):.1f} {y(points[front[0]].y):.1f}"]
        steps += [f"H{x(points[i].x):.1f}V{y(points[i].y):.1f}" for i in front[1:]]
        drawn.append(f'<path class="front" d="{"".join(steps)}"/>')
    boxes = [
        (x(p.x) - r, y(p.y) - r, x(p.x) + r, y(p.y) + r) for p, r in zip(points, radii, strict=True)
    ]
    # The largest circle first, so that none hides behind another one.
    for index in sorted(range(len(points)), key=lambda i: -radii[i]):
        point, across, up = points[index], x(points[index].x), y(points[index].y)
        drawn.append(
            f'<g class="{_colour(point.colour)}">{_title(f"{point.name}: {point.detail}")}'
            f'<path class="whisker" d="M{across:.1f} {y(point.low):.1f}V{y(point.high):.1f}"/>'
            f'<circle class="bubble" cx="{across:.1f}" cy="{up:.1f}" r="{radii[index]:.1f}"/>'
            f'<circle class="dot" cx="{across:.1f}" cy="{up:.1f}" r="2.5"/></g>'
        )
    names = [_fitted(point.name, 0.6 * width) for point in points]
    for index, (across, up) in enumerate(_placed(names, boxes, (left, top - 18, right, bottom))):
        centre_x, centre_y = x(points[index].x), y(points[index].y)
        # A name that had to move away is tied to its circle.
        if abs(up - centre_y) > radii[index] + 2 * _LINE:
            end = up + 3 if up < centre_y else up - 11
            drawn.append(
                f'<path class="leader" d="M{centre_x:.1f} {centre_y:.1f}L{across:.1f} {end:.1f}"/>'
            )
        drawn.append(_text(across, up, names[index], "name", "middle"))
    return _svg(width, height, f"{y_title} against {x_title}", drawn)


def lines(
    series: Sequence[Line],
    *,
    x_title: str,
    y_title: str,
    width: int,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    events: Sequence[tuple[float, str]] = (),
    height: int = 300,
    from_zero: bool = False,
) -> str:
    """Lines over a common abscissa.

    Args:
        series: At least one, each with a point.
        x_title: Title of the abscissa.
        y_title: Title of the ordinate, which is logarithmic where values are far apart.
        width: In pixels.
        x_ticks: Values and texts on the abscissa, None for round values.
        events: Abscissas of vertical lines, with a text.
        height: In pixels.
        from_zero: Whether the ordinate begins at 0.
    """
    left, right, top, bottom = 52.0, width - 16.0, 34.0, height - 44.0
    xs = [point[0] for line in series for point in line.points]
    ys = [point[1] for line in series for point in line.points]
    x = Scale(low=min(xs), high=max(max(xs), min(xs) + 1e-9), start=left, end=right)
    y = _range(ys, bottom, top, padding=0.08, spread=4.0)
    if from_zero:
        y = Scale(low=0.0, high=1.1 * max(ys), start=bottom, end=top)
    drawn = [_axes(x, y, x_title, y_title, width, height, x_ticks)]
    for at, text in events:
        drawn.append(
            f'<path class="event" d="M{x(at):.1f} {top:.1f}V{bottom:.1f}">{_title(text)}</path>'
        )
    for line in series:
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in line.points)
        faint = " faint" if line.faint else ""
        marks = [
            f'<circle class="dot" cx="{x(a):.1f}" cy="{y(b):.1f}" r="4">{_title(text)}</circle>'
            for a, b, text in line.marks
        ]
        drawn.append(
            f'<g class="{_colour(line.colour)}">{_title(line.name)}'
            f'<path class="line{faint}" d="M{path}"/>{"".join(marks)}</g>'
        )
    return _svg(width, height, f"{y_title} against {x_title}", drawn)


def bars(rows: Sequence[Bar], *, title: str, width: int, longest: float | None = None) -> str:
    """Bars of parts, each with its name above it and its text behind it.

    Args:
        rows: At least one.
        title: What the picture shows.
        width: In pixels.
        longest: The value that fills the width, None for that of the longest bar.
    """
    room = max(len(row.text) for row in rows) * _LETTER + 10
    full = longest or max(sum(value for _, _, value in row.parts) for row in rows) or 1.0
    scale = Scale(low=0.0, high=full, start=1.0, end=max(60.0, width - room))
    drawn, top = [], 0.0
    for row in rows:
        drawn.append(_text(0, top + 12, _fitted(row.name, width), "name", "start"))
        along = 0.0
        for kind, name, value in row.parts:
            start, end = scale(along), scale(along + value)
            if end - start >= 0.3:
                drawn.append(
                    f'<rect class="part k-{kind}" x="{start:.1f}" y="{top + 18:.1f}" '
                    f'width="{end - start:.1f}" height="14">'
                    f"{_title(f'{row.name}, {name}: {figure(value)}')}</rect>"
                )
            along += value
        drawn.append(_text(scale(along) + 6, top + 29.5, row.text, "value", "start"))
        top += 42
    return _svg(width, math.ceil(top), title, drawn)


def intervals(rows: Sequence[Interval], *, title: str, width: int) -> str:
    """Ratios with their intervals on a logarithmic axis, and a line at 1.

    Args:
        rows: At least one.
        title: Title of the axis.
        width: In pixels.
    """
    low = min(1.0, *(row.low for row in rows))
    high = max(1.0, *(row.high for row in rows))
    edge = max((high / low) ** 0.06, 1.02)
    height = 42 * len(rows) + 44
    x = Scale(low=low / edge, high=high * edge, start=8.0, end=width - 8.0, logarithmic=True)
    bottom = height - 40.0
    drawn = [
        f'<path class="grid" d="M{x(tick):.1f} 0V{bottom:.1f}"/>'
        + _text(x(tick), bottom + 16, number(tick), "tick", "middle")
        for tick in _apart(x.ticks(width // 90), x)
    ]
    drawn.append(f'<path class="one" d="M{x(1.0):.1f} 0V{bottom:.1f}"/>')
    drawn.append(_text(width / 2, bottom + 34, title, "axis", "middle"))
    for index, row in enumerate(rows):
        top = 42 * index
        room = width - len(row.text) * _LETTER - 6
        drawn.append(_text(0, top + 13, _fitted(row.name, room), "name", "start"))
        drawn.append(_text(width, top + 13, row.text, "value", "end"))
        drawn.append(
            f'<g class="{_colour(row.colour)}">{_title(f"{row.name}: {row.text}")}'
            f'<path class="whisker thick" d="M{x(row.low):.1f} {top + 27}H{x(row.high):.1f}"/>'
            f'<circle class="dot" cx="{x(row.value):.1f}" cy="{top + 27}" r="5"/></g>'
        )
    return _svg(width, height, title, drawn)


def quantiles(values: Sequence[float], most: int) -> list[tuple[float, float]]:
    """Shares and values of a sorted sample, all of them or about `most`.

    Each share is that of the values up to this one, below 1 for the last one, too. Where values are
    left out, more of the upper ones stay: that is where a tail is.
    """
    count = len(values)
    steps = (1 - (1 - index / (most - 1)) ** 3 for index in range(most))
    places = range(count) if count <= most else sorted({round((count - 1) * s) for s in steps})
    return [(min(place + 1, count - 0.5) / count, values[place]) for place in places]


def _svg(width: int, height: int, title: str, drawn: Sequence[str]) -> str:
    return (
        f'<svg class="chart" role="img" aria-label="{html.escape(title)}" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}">{"".join(drawn)}</svg>'
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )


def _fitted(text: str, width: float) -> str:
    """A text, cut where it is wider than there is room."""
    most = max(4, int(width / _LETTER))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _title(text: str) -> str:
    return f"<title>{html.escape(text)}</title>"


def _colour(series: int) -> str:
    return f"c{series % COLOURS}"


def _axes(
    x: Scale,
    y: Scale,
    x_title: str,
    y_title: str,
    width: int,
    height: int,
    x_ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
    """Grid lines, ticks and titles: that of the ordinate stands above it, to be read upright."""
    drawn = [
        f'<path class="grid" d="M{x.start:.1f} {y(tick):.1f}H{x.end:.1f}"/>'
        + _text(x.start - 6, y(tick) + 4, number(tick), "tick", "end")
        for tick in y.ticks(max(3, height // 55))
    ]
    if x_ticks is None:
        x_ticks = [(tick, number(tick)) for tick in _apart(x.ticks(width // 80), x)]
    drawn += [
        f'<path class="grid" d="M{x(tick):.1f} {y.start:.1f}V{y.end:.1f}"/>'
        + _text(x(tick), y.start + 17, text, "tick", "middle")
        for tick, text in x_ticks
    ]
    drawn.append(f'<path class="base" d="M{x.start:.1f} {y.start:.1f}H{x.end:.1f}"/>')
    drawn.append(_text((x.start + x.end) / 2, height - 6, x_title, "axis", "middle"))
    drawn.append(_text(0, 13, y_title, "axis", "start"))
    return "".join(drawn)


def _range(
    values: Sequence[float], start: float, end: float, *, padding: float, spread: float
) -> Scale:
    """A scale with room around the values; logarithmic where they are `spread` times apart."""
    low, high = min(values), max(values)
    if low > 0 and high / low > spread:
        edge = (high / low) ** padding
        return Scale(low=low / edge, high=high * edge, start=start, end=end, logarithmic=True)
    edge = padding * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low=low - edge, high=high + edge, start=start, end=end)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(step for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten with as many steps between them as `count` allows."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > count and found:
            return found
        found = ticks
    if len(found) >= 2:
        return found
    # Less than a factor of two or so: equal steps are round enough.
    return Scale(low=low, high=high, start=0, end=1).ticks(count)


def _apart(ticks: Sequence[float], scale: Scale) -> list[float]:
    """Ticks whose texts do not touch."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or abs(scale(tick) - scale(kept[-1])) >= 38:
            kept.append(tick)
    return kept


_Box = tuple[float, float, float, float]


def _placed(
    names: Sequence[str], circles: Sequence[_Box], area: _Box
) -> Iterator[tuple[float, float]]:
    """Where the names of circles go, so that none lies on another name or, if it can be, a circle.

    Each takes the nearest free place above or below its circle, moved sideways into the area.
    """
    taken: list[_Box] = []
    for name, circle in zip(names, circles, strict=True):
        half = len(name) * _LETTER / 2
        centre = (circle[0] + circle[2]) / 2
        across = min(max(centre, area[0] + half), max(area[2] - half, area[0] + half))
        places = [
            y
            for step in range(24)
            for y in (circle[1] - 5 - step * _LINE, circle[3] + 12 + step * _LINE)
            if area[1] + 10 <= y <= area[3] - 2
        ] or [circle[1] - 5]
        boxes = {y: (across - half, y - 11, across + half, y + 3) for y in places}
        free = [y for y in places if not _hits(boxes[y], taken)]
        clear = [y for y in free if not _hits(boxes[y], circles)]
        chosen = (clear or free or places)[0]
        taken.append(boxes[chosen])
        yield across, chosen


def _hits(box: _Box, others: Sequence[_Box]) -> bool:
    left, top, right, bottom = box
    return any(
        left < other[2] and other[0] < right and top < other[3] and other[1] < bottom
        for other in others
    )
