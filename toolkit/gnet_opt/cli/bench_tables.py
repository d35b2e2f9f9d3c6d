"""The tables of `gnet-opt bench`, from the document that it writes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from gnet_opt.cli import render

_TITLES = {
    "single-stream": "single-stream: one picture after the other",
    "multi-stream": "multi-stream: queries of eight pictures",
    "offline": "offline: all pictures are there from the beginning",
    "server": "server: pictures arrive by chance and wait their turn",
}
_COLUMNS = {
    "device_p50_ms": "on the device, p50, ms",
    "metric": "pictures a second",
    "n": "n",
    "p50_ms": "p50, ms",
    "p90_ms": "p90, ms",
    "p99_ms": "p99, ms",
}
_STEPS = ("decode", "resize", "normalize", "infer")


def shown(document: Mapping[str, Any]) -> list[Table | str]:
    """All of a result file that people look at first."""
    subjects = document["subjects"]
    found: list[Table | str] = []
    for scenario in document["settings"]["scenarios"]:
        found.append(_scenario(scenario, subjects, document["comparison"].get(scenario, {})))
    found += [_processes(subjects), _end_to_end(subjects)]
    if any(subject["energy"] and subject["energy"]["rails"] for subject in subjects):
        found.append(_energy(subjects))
    found += [
        f"{subject['name']}, soak: {subject['soak']['verdict']}"
        for subject in subjects
        if subject["soak"]
    ]
    found += [_sweep(subject) for subject in subjects if subject["sweep"]]
    found += _layers([subject for subject in subjects if subject["profile"]])
    found.append(_conditions(document))
    for subject in subjects:
        found += [f"{subject['name']}: {note}" for note in subject["notes"]]
    found += sorted({subject["energy"]["note"] for subject in subjects if subject["energy"]})
    unstable = document["environment"]["unstable"]
    if unstable:
        found.append(
            "\n".join(["This run is unstable:", *(f"- {sentence}" for sentence in unstable)])
        )
    return found


def _scenario(name: str, subjects: Sequence[Mapping[str, Any]], ratios: Mapping[str, Any]) -> Table:
    measured = [(subject["name"], subject["scenarios"][name]) for subject in subjects]
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    if name == "server":
        columns = ("", "queries a second", "bound, ms", "rates tried")
        rows = [
            (
                subject,
                f"{found['metric']['value']:.1f}",
                f"{found['bound_ms']:.2f}",
                str(len(found["rounds"])),
            )
            for subject, found in measured
        ]
        return render.table(_TITLES[name], columns, rows)
    figures = ("metric",) if name == "offline" else ("p50_ms", "p90_ms", "p99_ms", "n")
    if any("device_p50_ms" in found for _, found in measured):
        figures = ("device_p50_ms", *figures)
    rows = [
        (
            subject,
            *(_figure(found.get(key)) for key in figures),
            f"{100 * found['spread']:.0f}",
            _ratio(ratios.get(subject)),
        )
        for subject, found in measured
    ]
    columns = ("", *(_COLUMNS[key] for key in figures), "spread, %", "times as fast [rounds]")
    return render.table(_TITLES[name], columns, rows)


def _figure(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return f"{value['value']:.1f}"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _ratio(ratio: Mapping[str, float] | None) -> str:
    if ratio is None:
        return ""
    text = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return text + (", equal within noise" if ratio["low"] <= 1.0 <= ratio["high"] else "")


def _processes(subjects: Sequence[Mapping[str, Any]]) -> Table:
    def middle(values: Sequence[float]) -> str:
        return f"{statistics.median(values):.0f}"

    rows = [
        (
            subject["name"],
            middle(subject["cold_start_ms"]),
            middle(subject["load_ms"]),
            middle(subject["first_ms"]),
            "" if subject["peak_rss_bytes"] is None else f"{subject['peak_rss_bytes'] / 1e6:.0f}",
            f"{subject['file_bytes'] / 1e6:.2f}",
        )
        for subject in subjects
    ]
    columns = (
        "",
        "process start to first result, ms",
        "load, ms",
        "first picture, ms",
        "peak memory, MB",
        "files, MB",
    )
    return render.table("processes", columns, rows)


def _end_to_end(subjects: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for subject in subjects:
        times = [statistics.median(subject["end_to_end"][f"{step}_ns"]) / 1e6 for step in _STEPS]
        rows.append((subject["name"], *(f"{time:.2f}" for time in (*times, sum(times)))))
    source = subjects[0]["end_to_end"]["source"]
    columns = ("", *(f"{step}, ms" for step in _STEPS), "together, ms")
    return render.table(f"from file to result, medians ({source})", columns, rows)


def _energy(subjects: Sequence[Mapping[str, Any]]) -> Table:
    """By rail, in millijoules and watts; the rails of the total are marked, and it comes last."""
    rows = []
    for subject in subjects:
        energy = subject["energy"] or {"rails": [], "joules_per_inference": None}
        rows += [
            (
                subject["name"],
                rail["name"],
                "in the total" if rail["in_total"] else "",
                f"{1e3 * rail['joules_per_inference']:.1f}",
                f"{rail['idle_watts']:.2f}",
                f"{rail['busy_watts']:.2f}",
            )
            for rail in energy["rails"]
        ]
        total = energy["joules_per_inference"]
        if total is not None and len(energy["rails"]) > 1:
            rows.append((subject["name"], "total", "", f"{1e3 * total:.1f}", "", ""))
    columns = ("", "rail", "", "a picture above idle, mJ", "idle, W", "busy, W")
    return render.listing("energy", columns, rows)


def _sweep(subject: Mapping[str, Any]) -> Table:
    best = subject["sweep"]["best"]
    rows = []
    for setting in subject["sweep"]["settings"]:
        keys = ("threads", "streams", "batch")
        marks = [
            name
            for name in ("latency", "throughput")
            if all(best[name][key] == setting[key] for key in keys)
        ]
        p90 = setting["p90_ms"]
        rows.append(
            (
                f"{setting['threads']} x {setting['streams']}",
                str(setting["batch"]),
                f"{statistics.median(setting['pictures_per_second']):.1f}",
                f"{statistics.median(p90):.2f}" if p90 else "",
                " and ".join(f"best {name}" for name in marks),
            )
        )
    columns = ("threads x streams", "batch", "pictures a second", "p90, ms", "")
    return render.table(f"sweep of {subject['name']}", columns, rows)


def _layers(subjects: Sequence[Mapping[str, Any]]) -> list[Table | str]:
    """Where the time goes: by kind, and by Inception module, a column a subject."""
    if not subjects:
        return []
    profiles = [subject["profile"] for subject in subjects]
    kinds = list(dict.fromkeys(kind for profile in profiles for kind in profile["time_shares"]))
    rows = [
        (
            kind.replace("_", " "),
            *(f"{100 * profile['time_shares'].get(kind, 0.0):.0f}" for profile in profiles),
        )
        for kind in kinds
    ]
    columns = ("", *(f"{subject['name']}, %" for subject in subjects))
    shown: list[Table | str] = [render.table("time by what runs", columns, rows)]
    modules = [{one["name"]: one for one in profile["modules"]} for profile in profiles]
    names = list(dict.fromkeys(name for found in modules for name in found))
    if names:
        rows = [(name, *(_module(found.get(name)) for found in modules)) for name in names]
        columns = ("layers of", *(f"{subject['name']}, µs" for subject in subjects))
        shown.append(render.table("time by module (layers in INT8)", columns, rows))
    return shown


def _module(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['microseconds']:.0f} ({found['int8']} of {found['layers']})"


def _conditions(document: Mapping[str, Any]) -> str:
    settings, environment = document["settings"], document["environment"]
    count = settings["threads"]
    threads = f"{count} thread{'s' if count > 1 else ''}" if count else "its own choice of threads"
    remote = environment.get("remote")
    where = f"Run on {remote['host']}: " if remote else ""
    text = (
        f"{where}{environment['machine']['cpu']}, {threads}, {settings['rounds']} rounds of at "
        f"least {settings['seconds']:g} s, each subject in a process of its own, new in each round."
    )
    constraint = environment["constraint"]
    if constraint:
        limits = []
        if constraint["cpus"] is not None:
            limits.append(f"CPUs {', '.join(map(str, constraint['cpus']))}")
        if constraint["memory_bytes"] is not None:
            limits.append(f"{constraint['memory_bytes'] / 2**20:.0f} MiB of memory")
        text += f" {constraint['label'].capitalize()}: {' and '.join(limits)}."
    return text
