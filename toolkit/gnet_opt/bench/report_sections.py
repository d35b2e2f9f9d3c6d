"""The sections of the report: what was measured, or else why it is not there."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from gnet_opt.bench import charts
from gnet_opt.bench.accuracy import wilson
from gnet_opt.bench.layers import module_of
from gnet_opt.bench.report_parts import (
    MULTI_STREAM,
    NARROW,
    OFFLINE,
    SERVER,
    SINGLE_STREAM,
    Section,
    View,
    both,
    bytes_of,
    constraints,
    escaped,
    kind_legend,
    legend,
    listing,
    milliseconds,
    named,
    p50,
    row,
    share_of,
    table,
)
from gnet_opt.runtime import INTEGERS

_QUANTILES = ((0, "least"), (50, "50"), (90, "90"), (99, "99"), (99.9, "99.9"), (99.99, "99.99"))
_MOST_POINTS = 400
"""Points of a line; a screen does not show more."""

_KINDS = {"int8": "INT8 layers", "float": "layers in float"}
_STEPS = {
    "decode": "decoding the file",
    "resize": "resizing",
    "normalize": "normalising",
    "infer": "inference",
}


def sections(documents: Sequence[Mapping[str, Any]], views: Sequence[View]) -> list[Section]:
    """All sections in the order of the page; those without data have the reason for it."""
    return [
        _overview(views),
        _trade_off(views),
        _latency(views),
        _ratios(documents, views),
        _throughput(views),
        _kinds(views),
        _modules(views),
        _end_to_end(views),
        _start_and_size(views),
        _sweep(views),
        _energy(views),
        _soak(views),
        _environment(documents, views),
    ]


def _overview(views: Sequence[View]) -> Section:
    timed = [view for view in views if view.scenario(SINGLE_STREAM)]
    best = min(timed, key=p50).label if timed else ""
    rows = []
    for view in views:
        found, accuracy = view.scenario(SINGLE_STREAM), view.data["accuracy"]
        top1 = scored = "–"
        if view.top1 is not None:
            low, high = wilson(min(view.top1, 100.0), accuracy["images"])
            top1 = f"{view.top1:.2f}\u00a0%<small>[{low:.1f}, {high:.1f}]</small>"
            scored = f"{accuracy['images']}<small>{escaped(accuracy['semantics'])}</small>"
        cells = ["–"] * 5
        if found:
            cells = [charts.figure(found[f"p{percent}_ms"]) for percent in (50, 90, 99)]
            if "device_p50_ms" in found:
                cells[0] += f"<small>{charts.figure(found['device_p50_ms'])} on the device</small>"
            cells += [str(found["n"]), share_of(found["spread"])]
        rows.append(
            row(
                named(view),
                [
                    *cells,
                    top1,
                    scored,
                    bytes_of(view.data["file_bytes"]),
                    bytes_of(view.data["peak_rss_bytes"]),
                ],
                best=view.label == best and len(views) > 1,
            )
        )
    columns = (
        "",
        "p50, ms",
        "p90, ms",
        "p99, ms",
        "n",
        "spread",
        "top-1 [95 %]",
        "scored",
        "files",
        "peak memory",
    )
    notes = dict.fromkeys(note for view in views for note in view.data.get("notes", ()))
    text = (
        "Single pictures, one after the other (MLPerf's single-stream). Spread is that of the "
        "medians of the rounds: (slowest − fastest) / median. Scored: the pictures that top-1 is "
        "of, with this machine's kernels (native) or by reference semantics. Files are what the "
        "device needs to run it."
    )
    body = f'<p class="soft">{text}</p>{table(columns, rows)}'
    if notes:
        body += f'<div class="soft">{listing([escaped(note) for note in notes])}</div>'
    return Section(title="At a glance", body=body)


def _trade_off(views: Sequence[View]) -> Section:
    title = "Accuracy, latency and size"
    ready = [view for view in views if view.top1 is not None and view.scenario(SINGLE_STREAM)]
    if not ready:
        return Section(
            title=title,
            missing="it needs single-stream times, and bundles that were scored (quantize --eval).",
        )
    body = (
        '<p class="soft">Up and to the left is better; the area of a circle is the size of the '
        "files, and the vertical line the 95 % interval of the accuracy.</p>"
    )
    models = dict.fromkeys(view.data["model"] for view in ready)
    for model in models:
        those = [view for view in ready if view.data["model"] == model]
        points = []
        for view in those:
            accuracy, found = view.data["accuracy"], view.scenario(SINGLE_STREAM)
            top1 = view.top1 or 0.0
            low, high = wilson(min(top1, 100.0), accuracy["images"])
            points.append(
                charts.Point(
                    name=view.label,
                    colour=view.colour,
                    x=found["p50_ms"],
                    y=top1,
                    low=low,
                    high=high,
                    size=view.data["file_bytes"],
                    detail=f"top-1 {top1:.2f} %, p50 {charts.figure(found['p50_ms'])} ms, "
                    f"{bytes_of(view.data['file_bytes'])}",
                )
            )
        front = _front(points)
        best = " and ".join(points[index].name for index in front)
        if len(points) == 1:
            said = ""
        elif len(front) == 1:
            said = f"No other result is faster than {best}, or more accurate."
        else:
            said = f"No other result beats {best} (the dashed line) in both."
        drawn = both(
            partial(
                charts.scatter,
                points,
                front=front,
                x_title="p50 of a picture, ms",
                y_title="top-1, %",
            )
        )
        heading = f"<h3>{escaped(model)}</h3>" if len(models) > 1 else ""
        body += f'<figure>{heading}<p class="soft">{escaped(said)}</p>{drawn}</figure>'
    return Section(title=title, body=body)


def _front(points: Sequence[charts.Point]) -> list[int]:
    """The places of the points that no other one beats in both, from left to right."""
    best, found = -math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i].x, -points[i].y)):
        if points[index].y > best:
            best = points[index].y
            found.append(index)
    return found


def _latency(views: Sequence[View]) -> Section:
    title = "How times are distributed"
    scenario = next(
        (s for s in (SINGLE_STREAM, MULTI_STREAM) if any(view.scenario(s) for view in views)), None
    )
    if scenario is None:
        return Section(title=title, missing="neither single- nor multi-stream was measured.")
    timed = [view for view in views if view.scenario(scenario)]
    series, longest = [], 0.0
    for view in timed:
        found = view.scenario(scenario)
        samples = sorted(time / 1e6 for entry in found["rounds"] for time in entry["samples_ns"])
        told = charts.quantiles(samples, _MOST_POINTS)
        points = [(_place(100 * share), time) for share, time in told]
        longest = max(longest, points[-1][0])
        ranks = {percent: math.ceil(percent / 100 * len(samples)) for percent in (50, 90, 99)}
        marks = [
            (
                _place(100 * rank / len(samples)),
                found[f"p{percent}_ms"],
                f"{view.label}: p{percent} {milliseconds(found, percent)}",
            )
            for percent, rank in ranks.items()
            if rank < len(samples)
        ]
        series.append(charts.Line(name=view.label, colour=view.colour, points=points, marks=marks))
    ticks = [(_place(percent), text) for percent, text in _QUANTILES if _place(percent) <= longest]
    what = "picture" if scenario == SINGLE_STREAM else "query of eight pictures"
    drawn = both(
        partial(
            charts.lines,
            series,
            x_title=f"percent at least as fast ({scenario})",
            y_title=f"time of a {what}, ms",
            x_ticks=ticks,
        )
    )
    text = (
        "Every time that was measured, in order: a flat line is a steady runtime, and what rises "
        "on the right is the tail. Dots mark p50, p90 and p99."
    )
    return Section(
        title=title, body=f'<p class="soft">{text}</p>{legend(timed)}<figure>{drawn}</figure>'
    )


def _place(percent: float) -> float:
    """Where a percentile stands: each further nine is as far again."""
    return -math.log10(1 - percent / 100)


def _ratios(documents: Sequence[Mapping[str, Any]], views: Sequence[View]) -> Section:
    title = "How many times as fast"
    body = ""
    for run, document in enumerate(documents):
        comparison = document["comparison"]
        own = {view.data["name"]: view for view in views if view.run == run}
        over = own.get(comparison["over"])
        for scenario in (SINGLE_STREAM, MULTI_STREAM, OFFLINE):
            rows = [
                charts.Interval(
                    name=own[name].label,
                    colour=own[name].colour,
                    value=ratio["median"],
                    low=ratio["low"],
                    high=ratio["high"],
                    text=f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
                )
                for name, ratio in comparison.get(scenario, {}).items()
                if name in own
            ]
            if over is None or not rows:
                continue
            axis = f"times as fast as {over.label}"
            drawn = both(partial(charts.intervals, rows, title=axis))
            which = f"run {run + 1}, " if len(documents) > 1 else ""
            body += f"<figure><h3>{which}{scenario}</h3>{drawn}</figure>"
    if not body:
        return Section(title=title, missing="one result alone has nothing to be compared with.")
    text = (
        "Ratios are taken within each round, in which all met the same machine: the median, and "
        "in brackets the least and the greatest of all rounds. Where the bar reaches over the "
        "dashed line at 1, nothing can be told apart."
    )
    return Section(title=title, body=f'<p class="soft">{text}</p>{body}')


def _throughput(views: Sequence[View]) -> Section:
    title = "Throughput"
    rows = []
    for view in views:
        multi, offline, server = (view.scenario(s) for s in (MULTI_STREAM, OFFLINE, SERVER))
        if not (multi or offline or server):
            continue
        cells = ["–"] * 3
        if multi:
            cells[0] = f"{charts.figure(multi['p99_ms'])} ms<small>n {multi['n']}</small>"
        if offline:
            cells[1] = (
                f"{charts.figure(offline['metric']['value'])}"
                f"<small>spread {share_of(offline['spread'])}</small>"
            )
        if server:
            cells[2] = (
                f"{charts.figure(server['metric']['value'])}"
                f"<small>of {len(server['rounds'])} rates tried, bound "
                f"{charts.figure(server['bound_ms'])} ms</small>"
            )
        rows.append(row(named(view), cells))
    if not rows:
        return Section(
            title=title, missing="only single pictures were measured; see bench --scenario all."
        )
    text = (
        "Multi-stream: p99 of queries of eight pictures. Offline: all pictures at once. Server: "
        "queries arrive by chance (Poisson), and the figure is the highest rate tried at which no "
        "more than one in a hundred exceeded the bound."
    )
    columns = ("", "multi-stream, p99", "offline, pictures a second", "server, queries a second")
    return Section(title=title, body=f'<p class="soft">{text}</p>{table(columns, rows)}')


def _kinds(views: Sequence[View]) -> Section:
    title = "What the time goes to"
    told = [view for view in views if view.data["profile"]]
    if not told:
        return Section(title=title, missing="no runtime told the time of its layers.")
    rows, names = [], dict(_KINDS)
    for view in told:
        parts = _by_kind(view.data["profile"])
        names |= {kind: name for kind, name, _ in parts if kind not in names}
        total = sum(value for _, _, value in parts)
        share = view.data["profile"]["macs_int8_share"]
        rows.append(
            charts.Bar(
                name=f"{view.label}: {share_of(share)} of MACs in INT8",
                parts=parts,
                text=f"{charts.figure(total / 1e3)} ms",
            )
        )
    used = {kind for row in rows for kind, _, value in row.parts if value}
    legend = [(kind, name) for kind, name in names.items() if kind in used]
    drawn = both(partial(charts.bars, rows, title="Time by executed precision and kind"))
    sentences = "".join(
        f"<h3>{escaped(view.label)}</h3>"
        + listing([escaped(sentence) for sentence in view.data["profile"]["sentences"]])
        for view in told
        if view.data["profile"]["sentences"]
    )
    text = (
        "What the runtime executes, not what the file says: layers by the precision of the kernel "
        "that ran, and what is no layer by kind. The sum of the medians of all nodes, timed by "
        "the runtime itself, which costs a little; so it is not the p50 above."
    )
    body = f'<p class="soft">{text}</p>{kind_legend(legend)}<figure>{drawn}</figure>'
    if sentences:
        body += (
            "<details><summary>What holds each of them back</summary>"
            f'<div class="soft">{sentences}</div></details>'
        )
    return Section(title=title, body=body)


def _by_kind(profile: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Kind, title and microseconds: INT8 layers, layers in float, then the groups."""
    parts = [(kind, name, _layers_of(profile["layers"], kind)) for kind, name in _KINDS.items()]
    return [*parts, *_groups(profile)]


def _groups(profile: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    return [(_kind(group), group["title"], group["microseconds"]) for group in profile["groups"]]


def _kind(group: Mapping[str, Any]) -> str:
    """The class of a group: a kind that the style sheet has a colour for."""
    known = ("concat", "elementwise", "lrn", "pool", "quantize", "reorder", "softmax")
    return group["kind"] if group["kind"] in known else "other"


def _layers_of(layers: Iterable[Mapping[str, Any]], kind: str) -> float:
    return sum(
        float(layer["microseconds"])
        for layer in layers
        if (layer["precision"] in INTEGERS) == (kind == "int8")
    )


def _modules(views: Sequence[View]) -> Section:
    title = "Time by Inception module"
    charted = []
    for view in views:
        profile = view.data["profile"]
        if not profile:
            continue
        modules: dict[str, list[Mapping[str, Any]]] = {}
        for layer in profile["layers"]:
            modules.setdefault(module_of(layer["name"]), []).append(layer)
        if len(modules) >= 3:  # as in gnet_opt.bench.layers
            charted.append((view, modules, _groups(profile)))
    if not charted:
        return Section(
            title=title, missing="no runtime told the time of layers whose names tell a module."
        )
    drawn, names = "", dict(_KINDS)
    for view, modules, groups in charted:
        rows = [
            (
                "stem and classifier" if name == "the rest" else name,
                [(kind, text, _layers_of(layers, kind)) for kind, text in _KINDS.items()],
            )
            for name, layers in modules.items()
        ]
        if groups:
            rows.append(("between the layers", groups))
            names |= {kind: name for kind, name, value in groups if value}
        made = [
            charts.Bar(
                name=name,
                parts=parts,
                text=f"{charts.figure(sum(value for _, _, value in parts) / 1e3)} ms",
            )
            for name, parts in rows
        ]
        chart = charts.bars(made, title=f"Time by module, {view.label}", width=NARROW + 50)
        drawn += f"<figure><h3>{named(view)}</h3>{chart}</figure>"
    text = (
        "Convolutions and the classifier by module; pools, concatenations and reorders do not say "
        "where they belong and stand at the end. Each picture has its own scale."
    )
    return Section(
        title=title,
        body=f'<p class="soft">{text}</p>{kind_legend(list(names.items()))}'
        f'<div class="pair">{drawn}</div>',
    )


def _end_to_end(views: Sequence[View]) -> Section:
    title = "From the file to the result"
    rows = []
    sources = []
    for view in views:
        found = view.data["end_to_end"]
        if not found:
            continue
        parts = [
            (step, name, statistics.median(found[f"{step}_ns"]) / 1e6)
            for step, name in _STEPS.items()
        ]
        total = sum(value for _, _, value in parts)
        inference = parts[-1][2] / total if total else 0.0
        rows.append(
            charts.Bar(
                name=f"{view.label}: {share_of(inference)} is inference",
                parts=parts,
                text=f"{charts.figure(total)} ms, n {found['pictures']}",
            )
        )
        sources.append(found.get("source") or "")
    if not rows:
        return Section(title=title, missing="decoding and resizing were not measured.")
    drawn = both(partial(charts.bars, rows, title="Time of each step"))
    files = "; ".join(dict.fromkeys(filter(None, map(str, sources))))
    text = "The median of each step of a picture file." + (f" Files: {files}." if files else "")
    return Section(
        title=title,
        body=f'<p class="soft">{escaped(text)}</p>{kind_legend(list(_STEPS.items()))}'
        f"<figure>{drawn}</figure>",
    )


def _start_and_size(views: Sequence[View]) -> Section:
    rows = [
        row(
            named(view),
            [
                _median_of(view.data["cold_start_ms"]),
                _median_of(view.data["load_ms"]),
                _median_of(view.data["first_ms"]),
                f"{view.data['warm_up']['count']}<small>"
                f"{charts.figure(view.data['warm_up']['seconds'])} s, "
                f"{'steady' if view.data['warm_up']['steady'] else 'not steady'}</small>",
                bytes_of(view.data["peak_rss_bytes"]),
                bytes_of(view.data["file_bytes"]),
            ],
        )
        for view in views
    ]
    columns = (
        "",
        "cold start, ms",
        "loading, ms",
        "first picture, ms",
        "warm-up, pictures",
        "peak memory",
        "files",
    )
    text = (
        "Cold start is from the start of a process to its first result, and holds loading (the "
        "runtime, then the model) and the first picture. Medians [least, greatest] over processes."
    )
    return Section(title="Start and size", body=f'<p class="soft">{text}</p>{table(columns, rows)}')


def _median_of(values: Sequence[float]) -> str:
    if not values:
        return "–"
    shown = charts.figure(statistics.median(values))
    least, greatest = charts.figure(min(values)), charts.figure(max(values))
    return f"{shown}<small>[{least}, {greatest}], n {len(values)}</small>"


def _sweep(views: Sequence[View]) -> Section:
    title = "Threads, streams and batch"
    swept = [view for view in views if view.data.get("sweep")]
    if not swept:
        return Section(title=title, missing="not asked for; see bench --sweep.")
    rows = []
    for view in swept:
        settings = view.data["sweep"]["settings"]
        rates = [statistics.median(each["pictures_per_second"]) for each in settings]
        for index, (each, rate) in enumerate(zip(settings, rates, strict=True)):
            rows.append(
                row(
                    named(view),
                    [
                        str(each["threads"]),
                        str(each["streams"]),
                        str(each["batch"]),
                        charts.figure(rate),
                        _median_of(each["p90_ms"]),
                    ],
                    best=index == rates.index(max(rates)),
                )
            )
    columns = ("", "threads", "streams", "batch", "pictures a second", "p90, ms")
    return Section(title=title, body=table(columns, rows))


def _energy(views: Sequence[View]) -> Section:
    title = "Energy"
    told = [view for view in views if view.data["energy"]]
    notes = list(dict.fromkeys(view.data["energy"]["note"] for view in told))
    rows = []
    for view in told:
        energy = view.data["energy"]
        rows += [
            row(
                named(view),
                [
                    escaped(rail["name"]) + f"<small>{escaped(rail['source'])}</small>",
                    *(
                        "–" if rail[key] is None else charts.figure(factor * rail[key])
                        for key, factor in (
                            ("joules_per_inference", 1e3),
                            ("idle_watts", 1.0),
                            ("busy_watts", 1.0),
                        )
                    ),
                ],
            )
            for rail in energy["rails"]
        ]
        total = energy.get("joules_per_inference")
        if total is not None and len(energy["rails"]) > 1:
            rows.append(row(named(view), ["total", charts.figure(1e3 * total), "–", "–"]))
    if not rows:
        return Section(
            title=title, missing=" ".join(notes) or "no counter of this machine was read."
        )
    columns = ("", "rail", "mJ a picture", "idle, W", "busy, W")
    text = f'<p class="soft">Idle power is subtracted. {escaped(" ".join(notes))}</p>'
    return Section(title=title, body=text + table(columns, rows))


def _soak(views: Sequence[View]) -> Section:
    title = "Under sustained load"
    told = [view for view in views if view.data["soak"] and view.data["soak"]["bins"]]
    if not told:
        return Section(title=title, missing="not asked for; see bench --soak 10m.")
    body = (
        '<p class="soft">Median (line) and p99 (dashed) of each stretch of time. Dotted vertical '
        "lines are where the CPU counted that it was slowed down for heat.</p>"
    )
    for view in told:
        soak = view.data["soak"]
        bins = soak["bins"]
        unit, scale = ("min", 60.0) if soak["seconds"] >= 180 else ("s", 1.0)
        series = [
            charts.Line(
                name=f"{view.label}, {percent}",
                colour=view.colour,
                points=[(each["start_s"] / scale, each[f"{percent}_ms"]) for each in bins],
                faint=percent == "p99",
            )
            for percent in ("p50", "p99")
        ]
        events = [(at / scale, "slowed down for heat") for at in _throttled(bins)]
        drawn = both(
            partial(
                charts.lines,
                series,
                x_title=f"time, {unit}",
                y_title="time of a picture, ms",
                events=events,
                height=240,
                from_zero=True,
            )
        )
        for key, what, colour in (
            ("temperature_c", "temperature, °C", 1),
            ("frequency_mhz", "clock, MHz", 6),
        ):
            points = [(b["start_s"] / scale, b[key]) for b in bins if b[key] is not None]
            if points:
                line = charts.Line(name=what, colour=colour, points=points)
                drawn += both(
                    partial(charts.lines, [line], x_title=f"time, {unit}", y_title=what, height=170)
                )
        verdict = soak.get("verdict")
        said = f'<p class="soft">{escaped(verdict)}</p>' if verdict else ""
        body += f"<figure><h3>{named(view)}</h3>{said}{drawn}</figure>"
    return Section(title=title, body=body)


def _throttled(bins: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    """Seconds at which the count of slow-downs had grown."""
    counts = [(each["start_s"], each["throttle_count"]) for each in bins]
    # It counts from the beginning of the soak on.
    known = [(0.0, 0), *((start, count) for start, count in counts if count is not None)]
    for (_, before), (start, count) in itertools.pairwise(known):
        if count > before:
            yield start


def _environment(documents: Sequence[Mapping[str, Any]], views: Sequence[View]) -> Section:
    body = ""
    for run, document in enumerate(documents):
        if len(documents) > 1:
            body += f"<h3>Run {run + 1}</h3>"
        facts = "".join(
            f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>"
            for name, text in _facts(document)
            if text
        )
        body += f"<dl>{facts}</dl>"
    rows = [
        row(
            named(view),
            [
                escaped(f"{view.data['backend']} {view.data['backend_version']}"),
                escaped(view.data["target"]),
                "<br>".join(
                    f"{escaped(path)} <code>{escaped(digest)}</code>"
                    for path, digest in {
                        "portable model": view.data["model_sha256"],
                        **view.data["artifact_sha256"],
                    }.items()
                ),
            ],
        )
        for view in views
    ]
    hashes = table(("", "runtime", "target", "SHA-256"), rows, kind="text")
    body += f"<details><summary>What was measured, by hash</summary>{hashes}</details>"
    return Section(title="Where and how", body=body)


def _facts(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The environment of a run, name by name."""
    environment, settings = document["environment"], document["settings"]
    machine, start, end = (environment[key] for key in ("machine", "start", "end"))
    yield "CPU", f"{machine['cpu']} ({machine['architecture']}, {machine['cores']} cores for us)"
    yield "board", machine["board"]
    yield "instructions", " ".join(machine["instructions"])
    yield "system", machine["system"]
    if remote := environment.get("remote"):
        name = "" if remote["name"] in remote["host"] else f"{remote['name']}, "
        yield "device", f"{name}reached over SSH at {remote['host']}"
        yield "power mode", remote["power_mode"]
        yield "before the run", " ".join(remote["notes"])
    yield "CPUs allowed", " ".join(map(str, environment["affinity"])) or "not known"
    yield "taken away", "; ".join(constraints([document])) or "nothing"
    threads = settings["threads"]
    yield "threads", "each runtime's own choice" if threads is None else str(threads)
    yield (
        "measured",
        f"{', '.join(settings['scenarios'])}; {settings['rounds']} rounds of at least "
        f"{charts.number(settings['seconds'])} s, seed {settings['seed']}",
    )
    yield "load, start to end", _change(start["load1"], end["load1"])
    yield "governor", ", ".join(start["governors"]) or "not told by this system"
    turbo = start["turbo"]
    yield "turbo", "not told by this system" if turbo is None else "on" if turbo else "off"
    heat = [
        f"{name} {_change(value, end['temperatures_c'].get(name))} °C"
        for name, value in start["temperatures_c"].items()
    ]
    yield "temperatures", ", ".join(heat) or "not told by this system"
    yield "slowed down for heat", _change(start["throttle_count"], end["throttle_count"])
    yield "memory available", bytes_of(start["memory_available_bytes"])
    yield "made", f"{document['created']} by gnet-opt {document['version']}"
    yield (
        "versions",
        ", ".join(f"{name} {number}" for name, number in sorted(environment["tools"].items())),
    )


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "not told by this system"
    return f"{charts.figure(before)} → {charts.figure(after)}"
