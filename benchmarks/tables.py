"""Write the tables of both READMEs from the result files: `python benchmarks/tables.py`.

`README.md` of the project gets the main job, the OpenVINO paths and the short table of quantizers,
`benchmarks/README.md` all that was measured of the quantizers and of the runtimes.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import runtime_tables
from gnet_opt.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")

RUNTIMES = {
    "reference": "reference semantics",
    "openvino": "OpenVINO",
    "openvino-avx2": "OpenVINO limited to AVX2",
    "onnxruntime": "ONNX Runtime",
}
"""Columns of the quantizers' accuracy."""

DEFAULTS = ("ort-usual", "ort-default", "nncf-default")
"""Quantizers as people type them; what is none of these was chosen to be better."""


def accuracy_table(result: dict[str, Any]) -> str:
    """The README's table of accuracy and latency, in Markdown."""
    lines = [
        "| network, target | pictures | float top-1 | INT8 top-1 | drop, points [95 %] "
        "| agreement | SQNR | latency p50, float → INT8 | model |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["builds"]:
        a, latency, sizes = row["accuracy"], row["latency"], row["sizes"]
        low, high = a["drop"]["ci95"]
        if latency:
            before, after = (latency["results"][k]["p50_ms"] for k in ("float", "quantized"))
            ratio = latency["speedup"]["quantized"]["median"]
            time = f"{before:.1f} → {after:.1f} ms ({ratio:.1f} times as fast)"
        else:
            time = "not measured here"
        lines.append(
            f"| {row['model']['name']}, `{row['target']}` | {a['images']}, {a['semantics']} "
            f"| {a['float']['top1']:.2f} % | {a['quantized']['top1']:.2f} % "
            f"| {a['drop']['value']:+.2f} [{low:+.2f}, {high:+.2f}] | {a['agreement']:.1f} % "
            f"| {a['sqnr_db']:.1f} dB | {time} "
            f"| {sizes['float'] / 1e6:.1f} → {sizes['quantized'] / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


def conditions(result: dict[str, Any], file: Path) -> str:
    """What the accuracy table was measured with."""
    latencies = [row["latency"] for row in result["builds"] if row["latency"]]
    samples = [r["n"] for latency in latencies for r in latency["results"].values()]
    spread = max(r["spread"] for latency in latencies for r in latency["results"].values())
    slowest = max(row["after_export_seconds"] for row in result["builds"])
    memory = max(row["peak_rss_bytes"] for row in result["builds"])
    versions = result["builds"][0]["tools"]
    return (
        f"Measured on {result['created'][:10]} with two cores of an {result['machine']['cpu']} "
        f"({', '.join(i for i in result['machine']['instructions'] if 'vnni' in i or 'amx' in i)})"
        f", OpenVINO {versions['openvino']}, ONNX Runtime {versions['onnxruntime']}. Latency: "
        f"batch 1, two threads, float32 against INT8 in interleaved rounds, each in its own "
        f"process, n = {min(samples)} to {max(samples)}, spread of rounds at most "
        f"{100 * spread:.0f} %. From calibration to the measured latency, evaluation left out, a "
        f"build took at most {slowest:.0f} s and {memory / 1e9:.1f} GB. "
        f"Source: [`{file.relative_to(ROOT)}`]({file.relative_to(ROOT)})."
    )


def openvino_table(files: list[Path]) -> str:
    """The README's table of speed against the usual path, in Markdown."""
    lines = [
        "| network, kernels | our float | usual float | our INT8 | usual INT8 (NNCF) "
        "| our INT8 against our float | against NNCF's INT8 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        for name, measured in result["networks"].items():
            p50 = {k: v["p50_ms"] for k, v in measured["latency"]["results"].items()}
            against = measured["our INT8 against"]
            cells = [f"{p50[k]:.1f} ms" for k in ("our float", "usual float", "our INT8")]
            cells.append(f"{p50['usual INT8 (NNCF)']:.1f} ms")
            for other in ("our float", "usual INT8 (NNCF)"):
                r = against[other]
                cells.append(f"**{r['median']:.2f}** [{r['low']:.2f}, {r['high']:.2f}]")
            lines.append(f"| {name}, {result['kernels']} | " + " | ".join(cells) + " |")
    sources = ", ".join(f"[`{f.relative_to(ROOT)}`]({f.relative_to(ROOT)})" for f in files)
    return "\n".join(lines) + f"\n\nSource: {sources}."


def quantizers_accuracy(network: dict[str, Any]) -> str:
    """Accuracy of every quantizer's result by every runtime, in Markdown.

    Args:
        network: One network of the result file of `quantizers.py`.
    """
    lines = [
        "| made by | convolutions in INT8: OpenVINO, ONNX Runtime | "
        + " | ".join(RUNTIMES.values())
        + " |",
        "| --- " * (2 + len(RUNTIMES)) + "|",
    ]
    for row in network["variants"]:
        if row["status"] != "done":
            lines.append(f"| {_label(row)} | {row['status']}: {row['reason']}" + " |" * 5)
            continue
        cells = [_accuracy(row["accuracy"].get(runtime)) for runtime in RUNTIMES]
        counts = [
            str(row["int8_convolutions"].get(runtime, "–"))
            for runtime in ("openvino", "onnxruntime")
        ]
        lines.append(
            f"| {_label(row)} | {', '.join(counts)} of {network['convolutions']} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def quantizers_speed(network: dict[str, Any]) -> str:
    """Latency of every quantizer's result, and what it took to make it, in Markdown."""
    lines = [
        "| made by | OpenVINO: p50, times ours | ONNX Runtime: p50, times ours | quantized in "
        "| whole process | peak memory | file |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in network["variants"]:
        if row["status"] != "done":
            continue
        times = [_p50(network, row["name"], runtime) for runtime in ("openvino", "onnxruntime")]
        made = ["–"] * 3
        if "seconds" in row:
            made = [f"{row['seconds']:.1f} s", f"{row['process_seconds']:.1f} s"]
            made.append(_gigabytes(row["peak_rss_bytes"]))
        cells = [*times, *made, f"{row['bytes'] / 1e6:.1f} MB"]
        lines.append(f"| {_label(row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quantizers_cost(cost: dict[str, Any]) -> str:
    """Seconds and memory of quantizing with more pictures, in Markdown."""
    lines = [
        f"| made by, {cost['images']} pictures | quantized in | whole process | peak memory |",
        "| --- | --- | --- | --- |",
    ]
    for row in cost["variants"]:
        cells = []
        for key in ("seconds", "process_seconds"):
            cells.append(_range(row[key]) if key in row else "–")
        cells.append(_gigabytes(row["peak_rss_bytes"]["high"]) if "peak_rss_bytes" in row else "–")
        if row["status"] != "done":
            cells[0] = f"{row['status']}: {row['reason']}"
        lines.append(f"| {_label(row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quantizers_short(result: dict[str, Any]) -> str:
    """The README's table: every tool at its best, and ours."""
    lines = [
        "| network | made by | SQNR by reference semantics "
        "| OpenVINO: top-1 [95 %], agreement, SQNR | limited to AVX2: top-1, SQNR "
        "| OpenVINO: p50, times ours |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for network in result["networks"].values():
        for row in short_list(network["variants"]):
            measured = row["accuracy"]
            limited = measured.get("openvino-avx2")
            cells = [
                _sqnr(measured.get("reference")),
                _accuracy(measured["openvino"]),
                f"{limited['quantized']['top1']:.2f} %, {_sqnr(limited)}" if limited else "–",
                _p50(network, row["name"], "openvino"),
            ]
            lines.append(f"| {network['model']} | {_label(row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short_list(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows worth quoting: float, defaults, each peer's best, and all of ours.

    Of the recipes of one peer that are not its defaults the best are kept, by SQNR: the best of
    OpenVINO, and the best of OpenVINO limited to AVX2 where that is another.
    """
    done = [row for row in rows if row["status"] == "done"]
    kept = set()
    for peer in ("ort", "nncf", "modelopt"):
        own = [row for row in done if row["name"].startswith(f"{peer}-")]
        tuned = [row for row in own if row["name"] not in DEFAULTS]
        for runtime in ("openvino", "openvino-avx2"):
            scored = [row for row in tuned if runtime in row["accuracy"]]
            if scored:
                best = max(scored, key=lambda row: row["accuracy"][runtime]["sqnr_db"])
                kept.add(best["name"])
    return [
        row
        for row in done
        if row["name"] == "float"
        or row["name"] in kept | set(DEFAULTS)
        or row["name"].startswith("ours-")
    ]


def quantizers_conditions(result: dict[str, Any], source: str) -> str:
    """What the tables of quantizers were measured with.

    Args:
        result: The result file of `quantizers.py`.
        source: That file, relative to the README.
    """
    machine, versions = result["machine"], result["tools"] | result["tools_of_modelopt"]
    names = {
        "openvino": "OpenVINO",
        "onnxruntime": "ONNX Runtime",
        "nncf": "NNCF",
        "nvidia-modelopt": "ModelOpt",
    }
    # ModelOpt's environment has an ONNX Runtime of its own, which runs none of the results.
    versions |= result["tools"]
    tools = ", ".join(f"{name} {versions[key]}" for key, name in names.items() if key in versions)
    instructions = [i for i in machine["instructions"] if "vnni" in i or "amx" in i]
    sets = "; ".join(
        f"{network['model']}: {network['calibration']['images']} pictures to calibrate, "
        f"{network['evaluation']['images']} others to evaluate"
        for network in result["networks"].values()
    )
    text = (
        f"Measured on {result['created'][:10]} with {machine['cores']} cores of an "
        f"{machine['cpu']} ({', '.join(instructions)}), {tools}. {sets}."
    )
    rows = [
        (network["latency"], row)
        for network in result["networks"].values()
        if network["latency"]
        for row in network["latency"]["results"].values()
    ]
    if rows:
        counts = [row["n"] for _, row in rows]
        spread = max(_middle_half(row["rounds_ms"]) for _, row in rows)
        threads, rounds = rows[0][0]["threads"], rows[0][0]["rounds"]
        sittings = rows[0][0]["sittings"]
        text += (
            f" Latency: batch 1, {threads} thread{'s' if threads > 1 else ''}, {rounds} "
            f"interleaved rounds in {sittings} sittings, in each of which every result has a new "
            f"process of its own, n = {min(counts)} to {max(counts)}, the middle half of the "
            f"rounds within {100 * spread:.0f} %; ratios are medians over rounds."
        )
    return f"{text} Source: [`{source}`]({source})."


def quantizers_all(result: dict[str, Any], source: str) -> str:
    """All tables of the quantizers, for `benchmarks/README.md`."""
    parts = []
    for network in result["networks"].values():
        accuracy, speed = quantizers_accuracy(network), quantizers_speed(network)
        parts += [f"### {network['model']}", accuracy, speed]
        if network["cost"]:
            parts.append(quantizers_cost(network["cost"]))
    return "\n\n".join([*parts, quantizers_conditions(result, source)])


def quantizers_quoted(result: dict[str, Any], source: str) -> str:
    """The tables of the quantizers for the project's README."""
    costs = [network["cost"] for network in result["networks"].values() if network["cost"]]
    parts = [quantizers_short(result), *map(quantizers_cost, costs)]
    return "\n\n".join([*parts, quantizers_conditions(result, source)])


def write_tables() -> None:
    """Put the tables between their markers in both READMEs."""
    readme, own = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
    text = readme.read_text(encoding="utf-8")
    for file in sorted(RESULTS.glob("main_job-*.json"))[:1]:
        result = json.loads(file.read_text(encoding="utf-8"))
        text = _between(text, "main_job", f"{accuracy_table(result)}\n\n{conditions(result, file)}")
    files = sorted(RESULTS.glob("openvino_paths-*.json"))
    if files:
        text = _between(text, "openvino_paths", openvino_table(files))
    for file in sorted(RESULTS.glob("quantizers-*.json"))[:1]:
        result = json.loads(file.read_text(encoding="utf-8"))
        quoted = quantizers_quoted(result, str(file.relative_to(ROOT)))
        text = _between(text, "quantizers", quoted)
        full = quantizers_all(result, str(file.relative_to(own.parent)))
        own_text = _between(own.read_text(encoding="utf-8"), "quantizers", full)
        write_text(own, own_text)
    for file in sorted(RESULTS.glob("runtimes-*.json"))[:1]:
        _write_runtimes(file, own)
    write_text(readme, text)


def _write_runtimes(file: Path, own: Path) -> None:
    """Put the tables and pictures of the runtimes beside and into `benchmarks/README.md`."""
    result = json.loads(file.read_text(encoding="utf-8"))
    pictures = {}
    for name, network in result["networks"].items():
        pictures[name] = f"{file.stem}-{name}.svg"
        write_text(own.with_name(pictures[name]), runtime_tables.chart(network))
    content = runtime_tables.everything(result, str(file.relative_to(own.parent)), pictures)
    write_text(own, _between(own.read_text(encoding="utf-8"), "runtimes", content))


def _label(row: dict[str, Any]) -> str:
    return f"**gnet-opt, `{row['target']}`**" if row.get("target") else str(row["label"])


def _accuracy(measured: dict[str, Any] | None) -> str:
    """Top-1 with its interval, agreement with float, and SQNR; a dash where nothing ran."""
    if measured is None:
        return "–"
    low, high = measured["ci95"]
    return (
        f"{measured['quantized']['top1']:.2f} % [{low:.1f}, {high:.1f}], "
        f"{measured['agreement']:.1f} %, {_sqnr(measured)}"
    )


def _sqnr(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "–"
    return "identical" if measured["sqnr_db"] is None else f"{measured['sqnr_db']:.1f} dB"


def _p50(network: dict[str, Any], name: str, runtime: str) -> str:
    """The median time, and the median over rounds of its ratio to that of our `cpu` bundle."""
    results = network["latency"]["results"] if network["latency"] else {}
    row, ours = (results.get(f"{subject} by {runtime}") for subject in (name, "ours-cpu"))
    if row is None:
        return "–"
    text = f"{row['p50_ms']:.2f} ms"
    if ours is None:
        return text
    ratios = [a / b for a, b in zip(row["rounds_ms"], ours["rounds_ms"], strict=True)]
    return f"{text}, {statistics.median(ratios):.2f}"


def _middle_half(rounds: Sequence[float]) -> float:
    """The distance of the quartiles of the rounds' medians, relative to the median of all."""
    low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return (high - low) / middle


def _range(value: dict[str, float]) -> str:
    return f"{value['median']:.1f} s [{value['low']:.1f}, {value['high']:.1f}]"


def _gigabytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e9:.2f} GB"


def _between(text: str, name: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"A README has no markers <!-- {name} --> and <!-- /{name} -->.")
    return pattern.sub(lambda match: f"{match.group(1)}{content}\n{match.group(2)}", text)


if __name__ == "__main__":
    write_tables()
