"""What the parts of the report have in common: subjects as they are shown, HTML, and numbers.

All text from a document goes through `escaped` on its way to the page, here or in `charts`.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gnet_opt.bench import charts

SINGLE_STREAM, MULTI_STREAM = "single-stream", "multi-stream"
OFFLINE, SERVER = "offline", "server"

WIDE = 872
"""Width of a chart on a page of full width, in CSS pixels."""

NARROW = 330
"""Width of a chart on a phone."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A subject as it is shown.

    Attributes:
        data: The subject of the document.
        label: A short name, unique on the page.
        colour: Number of its colour.
        run: Which document it is from, from 0.
    """

    data: Mapping[str, Any]
    label: str
    colour: int
    run: int

    def scenario(self, name: str) -> Any:
        """What was measured in a scenario, None where it was not."""
        return self.data["scenarios"].get(name)

    @property
    def top1(self) -> float | None:
        """The accuracy of what was measured, in percent."""
        accuracy = self.data["accuracy"]
        if accuracy is None:
            return None
        score = accuracy["quantized"] or accuracy["float"]
        return None if score is None else float(score["top1"])


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page, or why it is not there.

    Attributes:
        title: Its heading.
        body: HTML; empty where there is nothing to show.
        missing: Why there is nothing, a sentence.
    """

    title: str
    body: str = ""
    missing: str = ""


def views_of(documents: Sequence[Mapping[str, Any]]) -> list[View]:
    """All subjects, with names as short as they can be and still differ."""
    found = [
        (run, subject) for run, document in enumerate(documents) for subject in document["subjects"]
    ]
    labels = [f"{_backend(subject)} {_precision(subject)}" for _, subject in found]
    if len(set(zip(labels, (run for run, _ in found), strict=True))) < len(found):
        labels = [subject["name"] for _, subject in found]
        if len({subject["model"] for _, subject in found}) == 1:
            labels = [_without_model(subject) for _, subject in found]
    if len(set(labels)) < len(labels):
        labels = [f"{label}, run {run + 1}" for label, (run, _) in zip(labels, found, strict=True)]
    return [
        View(data=subject, label=label, colour=index, run=run)
        for index, (label, (run, subject)) in enumerate(zip(labels, found, strict=True))
    ]


def _without_model(subject: Mapping[str, Any]) -> str:
    """A subject's name, in which what `bench` begins names with is shorter."""
    start = f"{subject['model']}-{subject['precision']} {subject['backend']}"
    name = str(subject["name"])
    if not name.startswith(start):
        return name
    return f"{_backend(subject)} {_precision(subject)}{name.removeprefix(start)}"


def _backend(subject: Mapping[str, Any]) -> str:
    names = {
        "onnxruntime": "ONNX Runtime",
        "openvino": "OpenVINO",
        "tensorrt": "TensorRT",
        "tensorrt-rtx": "TensorRT-RTX",
    }
    return names.get(subject["backend"], str(subject["backend"]))


def _precision(subject: Mapping[str, Any]) -> str:
    names = {"int8": "INT8", "fp16": "FP16", "fp32": "float32"}
    return names.get(subject["precision"], str(subject["precision"]))


def p50(view: View) -> float:
    """The median of single pictures, in milliseconds; only for a view that has them."""
    return float(view.scenario(SINGLE_STREAM)["p50_ms"])


def ratios_of_rounds(fast: View, slow: View) -> list[float]:
    """How many times as fast one is in each round; nothing where they shared no rounds."""
    rounds = [view.scenario(SINGLE_STREAM)["rounds_ms"] for view in (fast, slow)]
    if fast.run != slow.run or len(rounds[0]) != len(rounds[1]):
        return []
    return [other / own for own, other in zip(*rounds, strict=True)]


def both(draw: Callable[..., str]) -> str:
    """A chart twice: one for screens, one for phones; the style sheet shows the one that fits."""
    return (
        f'<div class="wide">{draw(width=WIDE)}</div><div class="narrow">{draw(width=NARROW)}</div>'
    )


def legend(views: Sequence[View]) -> str:
    """The colours of subjects, above a chart."""
    entries = "".join(f"<li>{named(view)}</li>" for view in views)
    return f'<ul class="legend">{entries}</ul>'


def kind_legend(kinds: Sequence[tuple[str, str]]) -> str:
    """The colours of kinds (classes `k-KIND`), above a chart of bars."""
    entries = "".join(
        f'<li><span class="swatch k-{escaped(kind)}"></span>{escaped(name)}</li>'
        for kind, name in kinds
    )
    return f'<ul class="legend">{entries}</ul>'


def named(view: View) -> str:
    """A subject's colour and name."""
    colour = view.colour % charts.COLOURS
    return f'<span class="swatch c{colour}"></span>{escaped(view.label)}'


def table(columns: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    """A table in a box of its own, in which it scrolls where it is too wide."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    attribute = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll" tabindex="0"><table{attribute}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def row(name: str, cells: Sequence[str], *, best: bool = False) -> str:
    """A row of `table`; its cells are HTML."""
    inside = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr{" class=best" if best else ""}><th scope="row">{name}</th>{inside}</tr>'


def listing(entries: Sequence[str]) -> str:
    """A list; its entries are HTML."""
    return f"<ul>{''.join(f'<li>{entry}</li>' for entry in entries)}</ul>"


def strong(text: str) -> str:
    """A text in bold."""
    return f"<strong>{escaped(text)}</strong>"


def escaped(text: object) -> str:
    """A text as HTML."""
    return html.escape(str(text))


def share_of(share: float) -> str:
    """A share from 0 to 1 in percent: whole ones, and one digit below two."""
    digits = 0 if share >= 0.02 or not share else 1
    return f"{100 * share:.{digits}f}\u00a0%"


def bytes_of(count: int | None) -> str:
    """A size in the unit that fits; a dash where it is not known."""
    if count is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{charts.figure(count / size)}\u00a0{unit}"
    return f"{count}\u00a0B"


def milliseconds(scenario: Mapping[str, Any], percent: int) -> str:
    """A percentile of a scenario, with its unit."""
    return f"{charts.figure(scenario[f'p{percent}_ms'])}\u00a0ms"


def constraints(documents: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was taken away from the processes, in words; each once."""
    seen = set()
    for document in documents:
        constraint = document["environment"]["constraint"]
        if constraint:
            parts = [constraint.get("label") or "constrained host"]
            if constraint.get("cpus") is not None:
                parts.append(f"CPUs {' '.join(map(str, constraint['cpus']))}")
            if constraint.get("memory_bytes") is not None:
                parts.append(f"{bytes_of(constraint['memory_bytes'])} of memory")
            seen.add(": ".join([parts[0], ", ".join(parts[1:])]) if parts[1:] else parts[0])
    yield from sorted(seen)
