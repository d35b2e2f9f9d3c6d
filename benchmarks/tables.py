"""Write the tables of README.md from the result files: `python benchmarks/tables.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gnet_opt.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")


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


def write_tables() -> None:
    """Put the tables between their markers in README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for file in sorted(RESULTS.glob("main_job-*.json"))[:1]:
        result = json.loads(file.read_text(encoding="utf-8"))
        text = _between(text, "main_job", f"{accuracy_table(result)}\n\n{conditions(result, file)}")
    files = sorted(RESULTS.glob("openvino_paths-*.json"))
    if files:
        text = _between(text, "openvino_paths", openvino_table(files))
    write_text(readme, text)


def _between(text: str, name: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no markers <!-- {name} --> and <!-- /{name} -->.")
    return pattern.sub(lambda match: f"{match.group(1)}{content}\n{match.group(2)}", text)


if __name__ == "__main__":
    write_tables()
