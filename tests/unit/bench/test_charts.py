"""Charts: what is drawn lies inside, names do not lie on each other, and text is escaped."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnet_opt.bench import charts

NASTY = '<script>alert("x")</script> & more'


def drawn(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def point(name: str, x: float, y: float, size: float = 1.0, colour: int = 0) -> charts.Point:
    return charts.Point(
        name=name, colour=colour, x=x, y=y, low=y - 1, high=y + 1, size=size, detail="detail"
    )


def names(svg: str) -> list[tuple[float, float, str]]:
    return [
        (float(text.attrib["x"]), float(text.attrib["y"]), text.text or "")
        for text in drawn(svg).iter("text")
        if text.attrib["class"] == "name"
    ]


class TestScatter:
    @pytest.mark.parametrize("width", [330, 872])
    def test_names_of_points_with_the_same_accuracy_do_not_lie_on_each_other(
        self, width: int
    ) -> None:
        points = [point(f"Runtime {index}", 2.0 + 0.05 * index, 93.4) for index in range(8)]
        svg = charts.scatter(points, front=[0], x_title="x", y_title="y", width=width)
        found = names(svg)
        assert len(found) == 8
        for index, (x, y, text) in enumerate(found):
            assert len(text) * 4 < x < width - len(text) * 3
            for other_x, other_y, other in found[index + 1 :]:
                # A letter of this size is hardly wider than 7 pixels, and lines are 13 high.
                apart = abs(x - other_x) >= 7 * (len(text) + len(other)) / 2
                assert apart or abs(y - other_y) >= 13, (text, other)

    def test_areas_stand_for_sizes(self) -> None:
        svg = charts.scatter(
            [point("a", 1.0, 90, size=4e6), point("b", 9.0, 90, size=16e6)],
            front=[0],
            x_title="x",
            y_title="y",
            width=600,
        )
        radii = [
            float(c.attrib["r"]) for c in drawn(svg).iter("circle") if c.attrib["class"] == "bubble"
        ]
        assert max(radii) == pytest.approx(2 * min(radii))

    def test_the_front_goes_through_its_points(self) -> None:
        points = [point("a", 1.0, 90), point("b", 2.0, 95), point("c", 3.0, 92)]
        svg = charts.scatter(points, front=[0, 1], x_title="x", y_title="y", width=600)
        (front,) = re.findall(r'class="front" d="([^"]+)"', svg)
        centres = re.findall(r'class="dot" cx="([\d.]+)" cy="([\d.]+)"', svg)
        (a, b) = (centres[0], centres[1])
        assert front == f"M{a[0]} {a[1]}H{b[0]}V{b[1]}"


@given(
    low=st.floats(1e-6, 1e6),
    ratio=st.floats(1.001, 1e6),
    logarithmic=st.booleans(),
    count=st.integers(2, 9),
)
def test_ticks_are_round_and_inside(
    low: float, ratio: float, logarithmic: bool, count: int
) -> None:
    high = low * ratio
    scale = charts.Scale(low=low, high=high, start=0, end=100, logarithmic=logarithmic)
    ticks = scale.ticks(count)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 3 * count + 6
    span = high - low
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in ticks)
    assert all(-0.01 <= scale(tick) <= 100.01 for tick in ticks)


@pytest.mark.parametrize(
    ("value", "figure", "number"),
    [
        (0, "0", "0"),
        (2.0, "2.00", "2"),
        (13.46, "13.5", "13.5"),
        (600.0, "600", "600"),
        (1250.4, "1250", "1250"),
        (0.01234, "0.0123", "0.0123"),
        (-0.5, "-0.500", "-0.5"),
    ],
)
def test_numbers(value: float, figure: str, number: str) -> None:
    assert (charts.figure(value), charts.number(value)) == (figure, number)


class TestQuantiles:
    def test_every_value_of_a_small_sample_at_its_rank(self) -> None:
        assert charts.quantiles([1.0, 2.0, 3.0, 4.0], 10) == [
            (0.25, 1.0),
            (0.5, 2.0),
            (0.75, 3.0),
            (0.875, 4.0),
        ]

    def test_of_a_large_one_both_ends_and_more_of_the_upper_half(self) -> None:
        values = [float(index) for index in range(100_000)]
        found = charts.quantiles(values, 400)
        assert len(found) <= 400
        assert (found[0][1], found[-1][1]) == (0.0, 99_999.0)
        assert sum(share > 0.5 for share, _ in found) > 250
        assert all(share < 1 for share, _ in found)


def test_bars_are_as_long_as_their_values() -> None:
    rows = [
        charts.Bar(name="one", parts=[("int8", "INT8", 1.0), ("float", "float", 3.0)], text="4 ms"),
        charts.Bar(name="two", parts=[("int8", "INT8", 2.0)], text="2 ms"),
    ]
    bars = [
        (bar.attrib["class"], float(bar.attrib["width"]))
        for bar in drawn(charts.bars(rows, title="t", width=400)).iter("rect")
    ]
    assert [kind for kind, _ in bars] == ["part k-int8", "part k-float", "part k-int8"]
    one = bars[0][1]
    assert [width / one for _, width in bars] == pytest.approx([1, 3, 2], rel=0.01)


def test_lines_and_intervals_are_where_their_values_are() -> None:
    line = charts.Line(name="l", colour=1, points=[(0, 1.0), (1, 1.5), (2, 2.0)])
    svg = charts.lines([line], x_title="x", y_title="y", width=400)
    (path,) = re.findall(r'class="line" d="M([^"]+)"', svg)
    xs, ys = zip(*(map(float, pair.split()) for pair in path.split("L")), strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] > ys[1] > ys[2]
    row = charts.Interval(name="i", colour=0, value=2.0, low=1.0, high=4.0, text="2 [1, 4]")
    svg = charts.intervals([row], title="t", width=400)
    (low, high) = re.findall(r'whisker thick" d="M([\d.]+) [\d.]+H([\d.]+)', svg)[0]
    (at,) = re.findall(r'circle class="dot" cx="([\d.]+)"', svg)
    (one,) = re.findall(r'class="one" d="M([\d.]+)', svg)
    assert float(at) == pytest.approx((float(low) + float(high)) / 2, abs=0.2)
    assert one == low


@pytest.mark.parametrize("width", [330, 872])
def test_text_is_escaped(width: int) -> None:
    made = [
        charts.scatter(
            [point(NASTY, 1.0, 2.0)], front=[0], x_title=NASTY, y_title=NASTY, width=width
        ),
        charts.lines(
            [charts.Line(name=NASTY, colour=0, points=[(0, 1), (1, 2)], marks=[(0, 1, NASTY)])],
            x_title=NASTY,
            y_title=NASTY,
            width=width,
            x_ticks=[(0, NASTY)],
            events=[(0.5, NASTY)],
        ),
        charts.bars(
            [charts.Bar(name=NASTY, parts=[("int8", NASTY, 1.0)], text=NASTY)],
            title=NASTY,
            width=width,
        ),
        charts.intervals(
            [charts.Interval(name=NASTY, colour=0, value=1, low=0.5, high=2, text=NASTY)],
            title=NASTY,
            width=width,
        ),
    ]
    for svg in made:
        root = drawn(svg)
        assert {element.tag for element in root.iter()} <= {
            "circle", "g", "path", "rect", "svg", "text", "title",
        }  # fmt: skip
        assert NASTY in [element.text for element in root.iter("title")] or NASTY in [
            element.text for element in root.iter("text")
        ]
        numbers = re.findall(r' (?:x|y|cx|cy|r|width|height)="([^"]+)"', svg)
        assert all(math.isfinite(float(number)) for number in numbers)
