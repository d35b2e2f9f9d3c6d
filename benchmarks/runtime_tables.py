"""The tables and pictures of `runtimes.py` in Markdown and SVG; `tables.py` puts them in place."""

from __future__ import annotations

import statistics
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any

_WIDTH, _LEFT, _RIGHT, _BAR, _GAP, _HEAD = 900, 300, 90, 15, 7, 34

_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f; }
.title { font-weight: 600; }
.float32 { fill: #8c959f; }
.int8 { fill: #2f81f7; }
.ours { font-weight: 600; }
.ours-bar { stroke: #24292f; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .ours-bar { stroke: #e6edf3; }
}
"""
"""Plain text and bars in both colour schemes; no background, so that the page's own shows."""


def table(network: dict[str, Any]) -> str:
    """Everything that was measured of one network, in Markdown.

    Args:
        network: One network of the result file of `runtimes.py`.
    """
    threads = list(network["threads"])
    heads = ["runtime", "precision", "top-1 [95 %], agreement, SQNR"]
    for count in threads:
        name = _threads(count)
        heads += [f"{name}: p50 / p90", "times ours", "pictures/s"]
    heads += ["start to first result", "peak memory", "model"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in network["variants"]:
        lines.append(f"| {' | '.join(_cells(network, row, threads))} |")
    return "\n".join(lines)


def conditions(result: dict[str, Any], source: str) -> str:
    """What the tables were measured with.

    Args:
        result: The result file of `runtimes.py`.
        source: That file, relative to the README.
    """
    machine = result["machine"]
    named = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch"}
    versions = [f"{name} {result['tools'][key]}" for key, name in named.items()]
    for name, environment in result["environments"].items():
        pinned = {r.partition("==")[0] for r in environment["requirements"]}
        versions += [f"{k} {v}" for k, v in environment["versions"].items() if k in pinned]
        if environment["problem"]:
            versions.append(f"{name}: {environment['problem']}")
    sets = "; ".join(
        f"{network['model']}: {network['calibration']['images']} pictures to calibrate, "
        f"{network['evaluation']['images']} others to evaluate"
        for network in result["networks"].values()
    )
    counts = [
        (row["n"], _middle_half(row["rounds_ms"]))
        for network in result["networks"].values()
        for measured in network["threads"].values()
        for row in measured["results"].values()
    ]
    instructions = [i for i in machine["instructions"] if "vnni" in i or "amx" in i]
    text = (
        f"Measured on {result['created'][:10]} with {machine['cores']} cores of an "
        f"{machine['cpu']} ({', '.join(instructions)}), {', '.join(dict.fromkeys(versions))}. "
        f"{sets}."
    )
    if counts:
        first = next(iter(result["networks"].values()))
        text += (
            f" Batch 1, {first['rounds']} interleaved rounds in each of {first['sittings']} "
            f"sittings, n = {min(n for n, _ in counts)} to {max(n for n, _ in counts)}; the "
            f"middle half of the rounds lies within {100 * max(s for _, s in counts):.0f} % for "
            f"every row. Load of the machine before and after: {result['load']['before']:.1f}, "
            f"{result['load']['after']:.1f}."
        )
    return f"{text} Source: [`{source}`]({source})."


def chart(network: dict[str, Any]) -> str:
    """Bars of the median latency, one panel a number of threads, fastest first, as SVG.

    It holds its own style for light and dark pages and needs no other file.
    """
    panels = [(count, _fastest(network, found)) for count, found in network["threads"].items()]
    height = sum(_HEAD + len(rows) * (_BAR + _GAP) + _GAP for _, rows in panels)
    root = ET.Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH} {height}",
        width=str(_WIDTH),
        height=str(height),
        role="img",
    )
    ET.SubElement(root, "title").text = f"Latency of {network['model']} by runtime"
    ET.SubElement(root, "style").text = _STYLE
    top = 0
    for count, rows in panels:
        top = _panel(root, f"{_threads(count)}: ms a picture (p50)", rows, top)
    return ET.tostring(root, encoding="unicode") + "\n"


def everything(result: dict[str, Any], source: str, pictures: dict[str, str]) -> str:
    """All tables, with their pictures, for `benchmarks/README.md`.

    Args:
        result: The result file of `runtimes.py`.
        source: That file, relative to the README.
        pictures: The SVG of each network, relative to the README.
    """
    parts = []
    for name, network in result["networks"].items():
        alternative = f"Latency of {network['model']} by runtime, from the table below"
        parts += [
            f"### {network['model']} by runtime",
            f"![{alternative}]({pictures[name]})",
            table(network),
        ]
    return "\n\n".join([*parts, conditions(result, source)])


def _cells(network: dict[str, Any], row: dict[str, Any], threads: Sequence[str]) -> list[str]:
    label = f"**{row['label']}**" if row["ours"] else row["label"]
    cells = [label, row["precision"]]
    if row["status"] != "done":
        return [
            *cells,
            f"{row['status']}: {_one_line(row['reason'])}",
            *[""] * (3 * len(threads) + 3),
        ]
    cells.append(_accuracy(row["accuracy"]))
    found = []
    for count in threads:
        measured = network["threads"][count]
        one = measured["results"].get(row["name"])
        if one is None:
            cells += [f"failed: {_one_line(measured['failed'][row['name']])}", "", ""]
            continue
        found.append(one)
        ratio = one.get("times_ours")
        cells += [
            f"{one['p50_ms']:.2f} / {one['p90_ms']:.2f} ms",
            f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "–",
            f"{one['pictures_per_second']:.1f}",
        ]
    peaks = [one["peak_rss_bytes"] for one in found if one["peak_rss_bytes"] is not None]
    cells += [
        _start(found[0]["cold_start_ms"]) if found else "–",
        f"{max(peaks) / 1e9:.2f} GB" if peaks else "–",
        f"{row['bytes'] / 1e6:.1f} MB",
    ]
    return cells


def _accuracy(measured: dict[str, Any]) -> str:
    low, high = measured["ci95"]
    sqnr = measured["sqnr_db"]
    noise = "identical" if sqnr is None else f"{sqnr:.1f} dB"
    return (
        f"{measured['quantized']['top1']:.2f} % [{low:.1f}, {high:.1f}], "
        f"{measured['agreement']:.1f} %, {noise}"
    )


def _start(starts: Sequence[float]) -> str:
    """The median start; the first one too where it took far longer, to compile."""
    ordered = sorted(starts)
    middle = ordered[len(ordered) // 2]
    text = f"{middle / 1e3:.2f} s"
    return f"{text} (first {starts[0] / 1e3:.1f} s)" if starts[0] > 2 * middle else text


def _threads(count: str) -> str:
    return f"{count} thread" if count == "1" else f"{count} threads"


def _one_line(text: str) -> str:
    """A reason as one cell of a table."""
    return " ".join(text.replace("|", "/").split())[:300]


def _middle_half(rounds: Sequence[float]) -> float:
    """The distance of the quartiles of the rounds' medians, relative to the median of all."""
    if len(rounds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return (high - low) / middle


def _fastest(
    network: dict[str, Any], measured: dict[str, Any]
) -> list[tuple[dict[str, Any], float]]:
    """Variants with their median, fastest first."""
    rows = [
        (row, measured["results"][row["name"]]["p50_ms"])
        for row in network["variants"]
        if row["name"] in measured["results"]
    ]
    return sorted(rows, key=lambda pair: pair[1])


def _panel(
    root: ET.Element, title: str, rows: Sequence[tuple[dict[str, Any], float]], top: int
) -> int:
    """Draw one group of bars; where the next begins."""
    _text(root, title, 0, top + 20, css="title")
    top += _HEAD
    longest = max((value for _, value in rows), default=1.0)
    for row, value in rows:
        middle = top + _BAR - 3
        label = f"{row['label']}, {row['precision']}"
        _text(root, label, _LEFT - 8, middle, css="ours" if row["ours"] else "", end=True)
        length = max(1.0, value / longest * (_WIDTH - _LEFT - _RIGHT))
        ET.SubElement(
            root,
            "rect",
            {"class": f"{row['precision']}{' ours-bar' if row['ours'] else ''}"},
            x=str(_LEFT),
            y=str(top),
            width=f"{length:.1f}",
            height=str(_BAR),
        )
        _text(root, f"{value:.1f}", _LEFT + length + 6, middle)
        top += _BAR + _GAP
    return top + _GAP


def _text(
    root: ET.Element, text: str, x: float, y: float, *, css: str = "", end: bool = False
) -> None:
    facts = {"x": f"{x:.1f}", "y": f"{y:.1f}"}
    if css:
        facts["class"] = css
    if end:
        facts["text-anchor"] = "end"
    ET.SubElement(root, "text", facts).text = text
