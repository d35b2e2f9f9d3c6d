"""The page: what it says, what it leaves out, and that nothing can be planted in it."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest

import result_documents as documents
from gnet_opt.bench import report
from gnet_opt.bench.report_parts import views_of

NASTY = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'&amp;"
TAGS = {
    "body", "br", "circle", "code", "dd", "details", "div", "dl", "dt", "figure", "footer", "g",
    "h1", "h2", "h3", "head", "header", "html", "li", "main", "meta", "p", "path", "rect",
    "section", "small", "span", "strong", "style", "summary", "svg", "table", "tbody", "td", "text",
    "th", "thead", "title", "tr", "ul",
}  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes and text of a page; every tag that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("br", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f"{data}\n"


def page_of(*made: dict[str, Any]) -> Page:
    return Page(report.render(made))


def headline(*made: dict[str, Any]) -> str:
    found = re.search(r"<h1>(.*?)</h1>", report.render(made))
    assert found is not None
    return found[1].replace("\u00a0", " ")


def headings(text: str) -> list[str]:
    return re.findall(r"<section><h2>(.*?)</h2>", text)


EVERYTHING = [
    "At a glance",
    "Accuracy, latency and size",
    "How times are distributed",
    "How many times as fast",
    "Throughput",
    "What the time goes to",
    "Time by Inception module",
    "From the file to the result",
    "Start and size",
    "Threads, streams and batch",
    "Energy",
    "Under sustained load",
    "Where and how",
]


class TestPage:
    def test_a_full_document_has_every_section(self) -> None:
        text = report.render([documents.full()])
        assert headings(text) == EVERYTHING
        page = Page(text)
        assert page.tags <= TAGS
        assert text.count("<svg") == text.count("</svg>") > 12

    def test_it_loads_nothing_and_runs_nothing(self) -> None:
        text = report.render([documents.full()])
        page = Page(text)
        policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
        assert ("meta", "content", policy) in page.attributes
        assert not [name for _, name, _ in page.attributes if name in ("src", "href", "style")]
        assert not [name for _, name, _ in page.attributes if name.startswith("on")]
        assert "url(" not in text
        assert "@import" not in text
        assert "http:" not in text
        assert "https:" not in text

    def test_what_was_not_measured_is_left_out_and_said(self) -> None:
        bare = documents.subject(2.0, accuracy=None, profile=None, end_to_end=None)
        text = report.render([documents.document(bare)])
        assert headings(text) == [
            "At a glance",
            "How times are distributed",
            "Start and size",
            "Where and how",
            "Not in this report",
        ]
        left_out = re.findall(r"<li><strong>(.*?)</strong>: (.*?)</li>", text)
        assert [name for name, _ in left_out] == [
            name for name in EVERYTHING if name not in headings(text)
        ]
        assert dict(left_out)["Under sustained load"] == "not asked for; see bench --soak 10m."

    def test_two_bundles_of_one_model_are_told_apart_by_what_differs(self) -> None:
        names = [f"demo-int8 openvino in {folder}" for folder in ("float32", "uint8")]
        made = [documents.subject(2.0, name=name) for name in names]
        labels = [view.label for view in views_of([documents.document(*made)])]
        assert labels == ["OpenVINO INT8 in float32", "OpenVINO INT8 in uint8"]
        made[1]["model"] = "other"
        assert [view.label for view in views_of([documents.document(*made)])] == names

    def test_where_a_remote_run_ran(self) -> None:
        there = documents.remote()
        made = documents.document(documents.subject(2.0), remote=there)
        text = report.render([made])
        assert "<dd>bench-7, reached over SSH at device.example:2222</dd>" in text
        assert "<dt>power mode</dt><dd>15W</dd>" in text
        assert "<dd>The power mode is 15W.</dd>" in text

    def test_a_subject_without_single_stream(self) -> None:
        full = documents.full()
        for subject in full["subjects"]:
            del subject["scenarios"]["single-stream"]
        full["comparison"].pop("single-stream")
        text = report.render([full])
        assert "4 measured: OpenVINO float32, ONNX Runtime float32, " in text
        assert "query of eight pictures, ms" in text

    def test_why_energy_is_missing(self) -> None:
        note = "No counter was found: looked in /sys/class/powercap."
        subject = documents.subject(2.0, energy={"note": note, "rails": []})
        assert f"<strong>Energy</strong>: {note}" in report.render([documents.document(subject)])


class TestHeadline:
    def test_who_won(self) -> None:
        found = headline(documents.full())
        assert re.fullmatch(
            r"OpenVINO INT8 is fastest: 2\.\d\d ms a picture, 5\.\d\d times as fast as OpenVINO "
            r"float32",
            found,
        )

    def test_nobody_where_the_rounds_cannot_tell(self) -> None:
        one = documents.subject(2.0, seed=1)
        two = documents.subject(2.0, seed=2, backend="onnxruntime")
        found = headline(documents.document(one, two))
        assert found.startswith(("OpenVINO INT8 and ONNX", "ONNX Runtime INT8 and OpenVINO"))
        assert " cannot be told apart: 2." in found

    def test_one_alone(self) -> None:
        assert headline(documents.document(documents.subject(2.0))).startswith("OpenVINO INT8: 2.")


class TestLabels:
    def test_a_stable_run_of_this_machine(self) -> None:
        text = report.render([documents.full()])
        assert '<li class="good">stable run</li><li>accuracy: native</li></ul>' in text
        assert 'class="notice"' not in text

    def test_everything_that_is_to_be_doubted_is_said_before_any_figure(self) -> None:
        subject = documents.subject(2.0, native=False)
        subject["accuracy"]["semantics"] = "reference"
        reasons = ["It was hot.", "It was busy.", "Rounds differ.", "The clock moved."]
        constraint = {"cpus": [0], "label": "constrained host", "memory_bytes": 512_000_000}
        made = documents.document(subject, unstable=reasons, constraint=constraint)
        text = report.render([made]).replace("\u00a0", " ")
        assert (
            '<li class="warn">unstable run</li>'
            '<li class="warn">constrained host: CPUs 0, 512 MB of memory</li>'
            "<li>accuracy: reference semantics</li>"
            "<li>times of this machine, not of a device</li>"
        ) in text
        before = text[: text.index("At a glance")]
        assert all(reason in before for reason in reasons)
        assert "reference" in text[text.index("At a glance") :]

    def test_n_and_spread_stand_beside_every_time(self) -> None:
        full = documents.full()
        rows = re.findall(r"<tr.*?</tr>", report.render([full]).replace("\u00a0", " "))
        for subject in full["subjects"]:
            found = subject["scenarios"]["single-stream"]
            spread = f"{100 * found['spread']:.0f} %"
            cells = f"<td>{found['n']}</td><td>{spread}</td>"
            assert [row for row in rows if cells in row]

    def test_who_is_not_beaten(self) -> None:
        text = report.render([documents.full()])
        assert "No other result is faster than OpenVINO INT8, or more accurate." in text
        worse = documents.full()
        worse["subjects"][2]["accuracy"]["quantized"]["top1"] = 92.0
        text = report.render([worse])
        assert re.search(
            r"beats OpenVINO INT8 and ONNX Runtime INT8 and OpenVINO float32 \(the", text
        )
        assert 'class="front"' in text

    def test_layers_are_counted_by_what_was_executed(self) -> None:
        made = documents.document(documents.subject(7.0))
        layers = made["subjects"][0]["profile"]["layers"]
        layers[1]["precision"] = "f32"
        text = report.render([made])
        widths = {
            kind: float(width)
            for kind, width in re.findall(
                r'<rect class="part k-(int8|float)"[^>]*width="([\d.]+)"[^>]*>'
                r"<title>OpenVINO INT8: ",
                text,
            )
        }
        assert widths["int8"] == pytest.approx(4 * widths["float"], rel=0.01)


class TestSeveralRuns:
    def test_names_stay_unique_and_runs_are_told_apart(self) -> None:
        text = report.render([documents.full(), documents.full()])
        assert "OpenVINO INT8, run 1" in text
        assert "OpenVINO INT8, run 2" in text
        assert "<h3>run 2, single-stream</h3>" in text
        assert "other conditions" not in text

    def test_two_models_on_one_backend_keep_their_own_names(self) -> None:
        one = documents.subject(2.0, name="one-int8 openvino")
        two = documents.subject(3.0, name="two-int8 openvino", model="two")
        text = report.render([documents.document(one, two)])
        assert "one-int8 openvino is fastest" in text
        assert "<h3>two</h3>" in text

    def test_runs_of_different_machines_are_not_compared_in_silence(self) -> None:
        other = documents.full()
        other["environment"]["machine"]["cpu"] = "Another CPU"
        text = report.render([documents.full(), other])
        before = text[: text.index("At a glance")]
        assert "<h1>2 runs under different conditions, with 8 results</h1>" in before
        assert "Run 2 was measured under other conditions than run 1" in before
        assert "cpu: A CPU in run 1, Another CPU in run 2" in before


def hostile(value: Any) -> Any:
    """Every text of a document is what somebody would plant."""
    if isinstance(value, dict):
        return {key: hostile(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [hostile(inside) for inside in value]
    return NASTY + value if isinstance(value, str) else value


def test_nothing_can_be_planted() -> None:
    full = documents.full()
    made = hostile(copy.deepcopy(full))
    for subject, own in zip(made["subjects"], full["subjects"], strict=True):
        subject["artifact_sha256"] = {NASTY: NASTY}
        subject["profile"]["groups"][0]["kind"] = NASTY
        for scenario, values in own["scenarios"].items():
            subject["scenarios"][scenario]["metric"] = values["metric"]
    made["environment"]["tools"] = {NASTY: NASTY}
    made["environment"]["start"]["temperatures_c"] = {NASTY: 40.0}
    made["environment"]["unstable"] = [NASTY] * 5
    made["environment"]["remote"] = hostile(documents.remote())
    made["environment"]["constraint"] = {"cpus": [0], "label": NASTY}
    names = [subject["name"] for subject in made["subjects"]]
    made["comparison"] = {
        "over": names[0],
        "single-stream": {name: {"high": 2.0, "low": 1.0, "median": 1.5} for name in names[1:]},
    }
    page = page_of(made, made)
    assert page.tags <= TAGS
    assert {name for _, name, _ in page.attributes} <= {
        "aria-label", "charset", "class", "content", "cx", "cy", "d", "height", "http-equiv",
        "lang", "name", "r", "role", "scope", "tabindex", "text-anchor", "viewbox", "width", "x",
        "y",
    }  # fmt: skip
    assert NASTY in page.text
