"""Tables for people, from the same values that --json prints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from gnet_opt.bench.charts import figure

if TYPE_CHECKING:
    from gnet_opt.bench.compare import Comparison
    from gnet_opt.preflight import Report
    from gnet_opt.sensitivity import LayerCost


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A plain table, numbers to the right of a left first column."""
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def listing(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of text, all columns to the left."""
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def comparison(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> Table:
    """The table that `quantize` ends with: float, the shipped precision, and the change."""
    rows: list[tuple[str, str, str, str]] = []
    accuracy, latency = manifest["accuracy"], manifest["latency"]
    if accuracy:
        before, after, drop = accuracy["float"], accuracy["quantized"], accuracy["drop"]
        if drop:
            low, high = (-drop["ci95"][1], -drop["ci95"][0])
            change = f"{0.0 - drop['value']:+.2f} points [{low:+.2f}, {high:+.2f}]"
            rows.append(("top-1, %", f"{before['top1']:.2f}", f"{after['top1']:.2f}", change))
            if before["top5"] is not None:
                change = f"{after['top5'] - before['top5']:+.2f} points"
                rows.append(("top-5, %", f"{before['top5']:.2f}", f"{after['top5']:.2f}", change))
        rows.append(("agreement with float, %", "", f"{accuracy['agreement']:.2f}", ""))
        rows.append(("SQNR of the logits, dB", "", _number(accuracy["sqnr_db"], "identical"), ""))
    if latency:
        before, after = latency["results"]["float"], latency["results"]["quantized"]
        ratio = latency["speedup"]["quantized"]
        change = f"{ratio['median']:.2f} times as fast [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        if ratio["low"] <= 1.0 <= ratio["high"]:
            change += ", equal within noise"
        rows.append(
            ("latency p50, ms", f"{before['p50_ms']:.2f}", f"{after['p50_ms']:.2f}", change)
        )
        rows.append(("latency p90, ms", f"{before['p90_ms']:.2f}", f"{after['p90_ms']:.2f}", ""))
    ratio_size = sizes["float"] / sizes["quantized"]
    rows.append(
        (
            "portable model, MB",
            f"{sizes['float'] / 1e6:.2f}",
            f"{sizes['quantized'] / 1e6:.2f}",
            f"{ratio_size:.2f} times as small",
        )
    )
    if sizes["compiled"]:
        rows.append(("compiled files, MB", "", f"{sizes['compiled'] / 1e6:.2f}", ""))
    title = f"{manifest['model']['name']} for {manifest['target']['name']}"
    return table(title, ("", "float", manifest["precision"].upper(), "change"), rows)


def decision(values: Mapping[str, Any]) -> list[Table | str]:
    """All candidates of `--precision auto` with their figures, and why one of them ships."""
    rows = []
    for row in values["candidates"]:
        accuracy, latency = row["accuracy"], row["latency"]
        drop = accuracy and accuracy["drop"]
        rows.append(
            (
                row["name"],
                f"{drop['value']:+.2f}" if drop else "",
                f"{accuracy['agreement']:.2f}" if accuracy else "",
                f"{100 * row['macs_int8_share']:.1f}",
                f"{latency['p50_ms']:.2f}" if latency else "",
                f"{latency['speedup']['median']:.2f}" if latency else "",
                "ships" if row["ships"] else row["why_not"],
            )
        )
    columns = (
        "candidate",
        "drop, points",
        "agreement, %",
        "INT8 MACs, %",
        "p50, ms",
        "speed against float",
        "",
    )
    shown: list[Table | str] = [listing("candidates", columns, rows)]
    for row in values["candidates"]:
        if row["float_layers"]:
            shown.append(f"{row['name']} keeps in float: {', '.join(row['float_layers'])}.")
    return [*shown, str(values["reason"])]


def compared_runs(found: Comparison) -> list[Table | str]:
    """Two runs of `bench` against each other: the verdicts, and what is to be known with them."""
    rows = [
        (
            row.subject if row.subject == row.other else f"{row.subject} / {row.other}",
            row.scenario,
            figure(row.a_ms),
            figure(row.b_ms),
            f"{100 * (row.ratio.value - 1):+.1f} "
            f"[{100 * (row.ratio.low - 1):+.1f}, {100 * (row.ratio.high - 1):+.1f}]",
            "" if row.control is None else f"{row.control:.2f}",
            row.ratio.verdict,
        )
        for row in found.rows
    ]
    change = "change of time, % [noise band]"
    columns = ("subject", "scenario", "A, ms", "B, ms", change, "control load, B/A", "B is")
    shown: list[Table | str] = [listing("B against A", columns, rows)]
    shown += [f"Differs: {difference}." for difference in found.differences]
    shown += [f"Differs, as allowed: {difference}." for difference in found.allowed]
    return [*shown, *found.notes]


def costs(title: str, values: Sequence[LayerCost]) -> Table:
    """What quantizing each layer alone costs, the costliest first."""
    total = sum(cost.noise for cost in values) or 1.0
    rows = [
        (
            cost.name,
            _number(cost.sqnr_db, "no error"),
            f"{100 * cost.noise / total:.1f}",
            f"{cost.agreement:.1f}",
            f"{cost.macs / 1e6:.1f}",
        )
        for cost in values
    ]
    columns = ("layer", "SQNR, dB", "share of the error, %", "agreement, %", "MMAC")
    return table(title, columns, rows)


def conditions(manifest: Mapping[str, Any]) -> str:
    """How the figures of `comparison` were measured, in sentences."""
    parts = []
    accuracy, latency = manifest["accuracy"], manifest["latency"]
    if accuracy:
        semantics = (
            "native on this machine" if accuracy["semantics"] == "native" else "reference semantics"
        )
        parts.append(
            f"Accuracy: {accuracy['images']} pictures of {accuracy['set']}, {semantics}; "
            "intervals are 95 %, paired."
        )
    if latency:
        result = latency["results"]["quantized"]
        spread = max(one["spread"] for one in latency["results"].values())
        before, after = (latency["results"][name]["backend"] for name in ("float", "quantized"))
        if before != after:
            before = f"float by {before}, {manifest['precision']} by {after}"
        parts.append(
            f"Latency: {before}, batch 1, {latency['threads']} threads, "
            f"{latency['rounds']} interleaved rounds, n = {result['n']}, each precision in a new "
            f"process of its own in each round, spread of rounds {100 * spread:.0f} %."
        )
        if spread > 0.1:
            parts.append("The machine was busy: rounds differ by more than 10 %.")
    return " ".join(parts)


def provenance(manifest: Mapping[str, Any]) -> Table:
    """What a bundle is, where it comes from and what was measured, a line each."""
    model, target, scheme = manifest["model"], manifest["target"], manifest["scheme"]
    calibration, accuracy = manifest["calibration"], manifest["accuracy"]
    latency, deferred = manifest["latency"], manifest["deferred"]
    precision = "float" if manifest["precision"] == "fp32" else manifest["precision"]
    rows = [
        ("model", f"{model['name']} ({model['architecture']}), {model['classes']} classes"),
        ("source", model["source"]),
        ("weights", f"SHA-256 {model['sha256']}"),
        ("target", f"{target['name']}, backend {target['backend']}"),
        ("precision", f"{precision}; {short(scheme)}" if scheme else precision),
        ("preprocess", short(manifest["preprocess"])),
        ("calibration", short({k: v for k, v in calibration.items() if k != "digest"})),
    ]
    if accuracy:
        drop, figures = accuracy["drop"], []
        if drop:
            low, high = drop["ci95"]
            figures.append(
                f"top-1 {accuracy['float']['top1']:.2f} % float, "
                f"{accuracy['quantized']['top1']:.2f} % {manifest['precision']}, "
                f"drop {drop['value']:+.2f} points [{low:+.2f}, {high:+.2f}]"
            )
        figures.append(f"agreement {accuracy['agreement']:.2f} %")
        figures.append(f"SQNR {_number(accuracy['sqnr_db'], 'infinite')} dB")
        where = f"{accuracy['images']} pictures of {accuracy['set']}, {accuracy['semantics']}"
        rows.append(("accuracy", f"{', '.join(figures)} ({where})"))
    if latency:
        before, after = latency["results"]["float"], latency["results"]["quantized"]
        rows.append(
            (
                "latency",
                f"p50 {before['p50_ms']:.2f} ms float, {after['p50_ms']:.2f} ms "
                f"{manifest['precision']}, {latency['threads']} threads, "
                f"{latency['machine']['cpu']}",
            )
        )
    golden = manifest["golden"]
    source = f"of {golden['set']} ({golden['source']})" if golden.get("set") else "drawn"
    inputs = f"{golden['images']} inputs, {source}; " if "source" in golden else ""
    tolerance = golden["tolerance"]["sqnr_db"]
    rows.append(
        (
            "golden",
            f"{inputs}outputs of {golden['semantics']} semantics, at least {tolerance:g} dB",
        )
    )
    if deferred:
        rows.append(("deferred", deferred["reason"]))
    rows.append(("created", manifest["created"]))
    rows.append(("tools", short(manifest["tools"])))
    return listing("bundle", ("", ""), rows)


def executed(report: Mapping[str, Any]) -> list[Any]:
    """What a runtime executes: a row a layer, the rest by kind, modules, and what it means."""

    def cost(microseconds: float) -> tuple[str, str]:
        return f"{microseconds:.0f}", f"{100 * microseconds / report['microseconds']:.1f}"

    layers = [
        (
            layer["name"],
            layer["stored"],
            layer["precision"] or (f"in {layer['inside']}" if layer["inside"] else "not seen"),
            "" if layer["macs"] is None else f"{layer['macs'] / 1e6:.1f}",
            *cost(layer["microseconds"]),
            layer["kernel"],
        )
        for layer in report["layers"]
    ]
    groups = [
        (
            group["title"],
            str(len(group["nodes"])),
            " ".join(sorted({node["precision"] for node in group["nodes"]})),
            *cost(group["microseconds"]),
            group["nodes"][0]["name"],
        )
        for group in report["groups"]
    ]
    modules = [
        (
            module["name"],
            f"{module['int8']} of {module['layers']}",
            "" if module["macs"] is None else f"{module['macs'] / 1e6:.1f}",
            *cost(module["microseconds"]),
        )
        for module in report["modules"]
    ]
    shown: list[Any] = [
        figures("layers", ("layer", "file", "runs in", "MMAC", "µs", "time, %", "kernel"), layers),
        figures("beside the layers", ("", "nodes", "run in", "µs", "time, %", "longest"), groups),
    ]
    if modules:
        columns = ("layers of", "in INT8", "MMAC", "µs", "time, %")
        shown.append(figures("modules", columns, modules))
    count = report["threads"]
    threads = f"{count} thread{'s' if count > 1 else ''}" if count else "its own choice of threads"
    conditions = (
        f"{report['backend']} {report['version']}, {threads}: "
        f"{report['microseconds'] / 1e3:.2f} ms a picture in all nodes, medians of "
        f"{report['runs']} runs in {len(report['rounds'])} rounds."
    )
    if report["macs"]:
        # Rounded down: a hundred percent means all.
        percent = math.floor(1000 * report["macs_int8_share"]) / 10
        conditions += f" {percent:.1f} % of the multiply-accumulates run in INT8."
    shown.append(conditions)
    shown.append("\n".join(f"- {sentence}" for sentence in report["sentences"]))
    return shown


def findings(linted: Mapping[str, Any]) -> list[Table | str]:
    """What the linter found, a row each, and what it amounts to in a sentence."""
    if not linted["quantized"]:
        return [
            f"{linted['file']} holds no quantization: it is a float model, and there is nothing "
            "to lint."
        ]
    if not linted["findings"]:
        return [f"No rule of {linted['rules']} is broken in {linted['file']}."]
    columns = ("severity", "rule", "node", "problem", "mend")
    rows = [[finding[key] or "(file)" for key in columns] for finding in linted["findings"]]
    return [
        listing("findings", columns, rows),
        f"Errors (refused, or computed otherwise than the file says): {linted['errors']}. "
        f"Slow (built, but not in INT8 or with copies): {linted['slow']}.",
    ]


def dla(report: Mapping[str, Any], *, every: bool) -> list[Table | str]:
    """What a DLA would take: by operator, what it leaves with the reasons, and what is needed.

    Args:
        report: As `gnet_opt.quantization.dla.Report.to_dict` gives it.
        every: Whether each layer has a row, not only those that are left to the GPU.
    """
    layers, splits = report["layers"], report["splits"]
    generations = [split["generation"] for split in splits]
    operators = {layer["operator"] for layer in layers}
    counts = []
    for operator in sorted(operators):
        same = [layer for layer in layers if layer["operator"] == operator]
        taken = [f"{sum(layer[name] for layer in same)} of {len(same)}" for name in generations]
        kinds = {x["precision"] for x in same if any(x[name] for name in generations)}
        macs = sum(layer["macs"] for layer in same)
        cost = f"{macs / 1e6:.1f}" if macs else ""
        counts.append((operator, *taken, " ".join(sorted(kinds)), cost))
    rows = [
        (
            layer["name"],
            layer["operator"],
            *("DLA" if layer[name] else "GPU" for name in generations),
            "; ".join(finding["problem"] for finding in layer["findings"]),
            " ".join(dict.fromkeys(finding["mend"] for finding in layer["findings"])),
        )
        for layer in layers
        if every or layer["findings"]
    ]
    shown: list[Table | str] = [
        figures("operators on a DLA", ("operator", *generations, "computed in", "MMAC"), counts)
    ]
    if rows:
        title = "every layer" if every else "left to the GPU"
        columns = ("layer", "operator", *generations, "problem", "mend")
        shown.append(listing(title, columns, rows))
    shown.append(
        listing(
            "needed for the network",
            ("problem", "mend"),
            [(need["problem"], need["mend"]) for need in report["needs"]],
        )
    )
    shown.append(
        listing(
            "targets",
            ("target", "DLA", "its TensorRT", "runs on the DLA"),
            [
                (
                    device["target"],
                    device["generation"] or "none",
                    device["tensorrt"],
                    "yes" if device["usable"] else "no",
                )
                for device in report["devices"]
            ],
        )
    )
    for split in splits:
        # Rounded down: a hundred percent means all.
        percent = math.floor(1000 * split["macs_share"]) / 10
        shown.append(
            f"DLA of {split['generation'].title()}: {split['layers']} of {len(layers)} layers with "
            f"{percent:.1f} % of the multiply-accumulates, in {_pieces(split['loadables'])}; "
            f"{split['gpu_layers']} are left to the GPU, in {_pieces(split['gpu_pieces'])}."
        )
    shown.append(
        "By NVIDIA's rules; nothing was built. TensorRT may cut in more places, and a convolution "
        "may be too large for the DLA's buffer. TensorRT up to 10.7 runs on a DLA (JetPack 5 and "
        "6), and 11.4.1 on that of AGX Orin (JetPack 7.2.2 or later)."
    )
    return shown


def board(report: Report) -> list[Table | str]:
    """What a Jetson says of itself, and what to do about it; nothing for another machine."""
    found = report.board
    if found is None:
        return []
    memory, mode = found.memory, found.power_mode
    rows = [
        ("model", found.model),
        ("target", report.target),
        ("Jetson Linux", found.l4t),
        ("JetPack", found.jetpack),
        ("TensorRT", found.tensorrt),
        ("TensorRT in Python", "yes" if found.tensorrt_python else "no"),
        ("trtexec", found.trtexec),
        ("GPU", "yes" if found.gpu else "no"),
        ("power mode", "" if mode is None else mode.name),
        ("power modes", " ".join(each.name for each in found.power_modes)),
        *(
            (
                f"clock {clock.name}",
                f"{clock.current / 1e6:.0f} MHz, {clock.minimum / 1e6:.0f} to "
                f"{clock.maximum / 1e6:.0f} {clock.governor}".rstrip(),
            )
            for clock in found.clocks
        ),
        ("memory", "" if memory is None else _of(memory.available, memory.total, "available")),
        *((f"swap {swap.name}", _of(swap.free, swap.size, "free")) for swap in found.swaps),
        *((f"storage {name}", f"{size / 1e9:.1f} GB free") for name, size in found.storage.items()),
        ("temperatures", ", ".join(f"{z.name} {z.celsius:.0f} °C" for z in found.zones)),
        ("desktop", " ".join(found.desktop) or "none runs"),
    ]
    said = [
        f"{title}:\n" + "\n".join(f"- {sentence}" for sentence in sentences)
        for title, sentences in (
            ("In the way of building an engine", report.blockers),
            ("Advice", report.advice),
        )
        if sentences
    ]
    return [
        listing("Jetson", ("", ""), [(key, value or "not found") for key, value in rows]),
        *(said or ["Ready to build and to time engines."]),
    ]


def figures(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table with figures to the right and text to the left."""
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    numbers = ("nodes", "MMAC", "µs", "time, %")
    for column in columns:
        justify: Any = "right" if column in numbers else "left"
        made.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def short(value: Any) -> str:
    """A value of a result as a person would write it in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {short(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return " ".join(short(item) for item in value)
    return "" if value is None else str(value)


def megabytes(size: int) -> str:
    """Bytes as megabytes with two digits."""
    return f"{size / 1e6:.2f} MB"


def durations(seconds: Mapping[str, float]) -> str:
    """How long each stage took, in one line."""
    stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items())
    return f"Time: {stages}."


def facts(values: Mapping[str, Any]) -> Table:
    """The facts of all stages, one a row."""
    rows = [
        (f"{stage}.{name}", _text(value))
        for stage, facts in values.items()
        for name, value in sorted(facts.items())
    ]
    return listing("facts", ("fact", "value"), rows)


def _pieces(count: int) -> str:
    return f"{count} piece{'' if count == 1 else 's'}"


def _of(part: int, whole: int, what: str) -> str:
    return f"{part / 1e9:.1f} of {whole / 1e9:.1f} GB {what}"


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.1f}"
