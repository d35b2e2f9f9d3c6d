"""One HTML page that shows results of `gnet-opt bench`, to send to somebody.

It needs no script, no network and no other file, and follows the reader's light or dark mode. What
was not measured is said at the end, with the option that measures it. Everything from a document is
escaped; `gnet_opt.bench.results_file.read` has checked its types.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gnet_opt.bench import charts
from gnet_opt.bench.compare import environment_differences
from gnet_opt.bench.report_parts import (
    SINGLE_STREAM,
    View,
    constraints,
    escaped,
    listing,
    milliseconds,
    p50,
    ratios_of_rounds,
    share_of,
    strong,
    views_of,
)
from gnet_opt.bench.report_sections import sections

_STYLE = Path(__file__).with_name("report.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(documents: Sequence[Mapping[str, Any]]) -> str:
    """The page for one or more documents of the schema "gnet-opt/bench/1".

    Args:
        documents: What `gnet-opt bench` wrote; at least one.
    """
    views = views_of(documents)
    parts = sections(documents, views)
    shown = "".join(
        f"<section><h2>{escaped(section.title)}</h2>{section.body}</section>"
        for section in parts
        if section.body
    )
    missing = [
        f"{strong(section.title)}: {escaped(section.missing)}"
        for section in parts
        if section.missing
    ]
    if missing:
        shown += (
            "<section><h2>Not in this report</h2>"
            f'<div class="soft">{listing(missing)}</div></section>'
        )
    title = _headline(documents, views)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escaped(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{_header(documents, views, title)}{shown}{_footer(documents)}</main></body>"
        "</html>\n"
    )


def _headline(documents: Sequence[Mapping[str, Any]], views: Sequence[View]) -> str:
    """Who won, in one sentence, as far as the rounds can tell."""
    timed = [view for view in views if view.scenario(SINGLE_STREAM)]
    if not timed:
        return f"{len(views)} measured: {', '.join(view.label for view in views)}"
    if any(any(environment_differences(documents[0], other)) for other in documents[1:]):
        return f"{len(documents)} runs under different conditions, with {len(views)} results"
    order = sorted(timed, key=p50)
    best = order[0]
    time = f"{charts.figure(p50(best))}\u00a0ms a picture"
    if len(order) == 1:
        return f"{best.label}: {time}"
    if not _told_apart(best, order[1]):
        return f"{best.label} and {order[1].label} cannot be told apart: {time}"
    other = _reference(timed, best)
    ratios = ratios_of_rounds(best, other)
    times = f", {statistics.median(ratios):.2f} times as fast as {other.label}" if ratios else ""
    return f"{best.label} is fastest: {time}{times}"


def _reference(timed: Sequence[View], best: View) -> View:
    """What the best is compared with: the first of its run, as in the document, or the next one."""
    others = [view for view in timed if view is not best]
    return next((view for view in others if view.run == best.run), others[0])


def _told_apart(fast: View, slow: View) -> bool:
    """Whether one is faster in every round."""
    ratios = ratios_of_rounds(fast, slow)
    if ratios:
        return min(ratios) > 1.0
    one, other = (view.scenario(SINGLE_STREAM)["rounds_ms"] for view in (fast, slow))
    return bool(max(one) < min(other))


def _header(documents: Sequence[Mapping[str, Any]], views: Sequence[View], title: str) -> str:
    models = ", ".join(dict.fromkeys(view.data["model"] for view in views))
    when = " and ".join(dict.fromkeys(document["created"][:10] for document in documents))
    badges = []
    if any(document["environment"]["unstable"] for document in documents):
        badges.append(("warn", "unstable run"))
    else:
        badges.append(("good", "stable run"))
    for constraint in constraints(documents):
        badges.append(("warn", constraint))
    semantics = {view.data["accuracy"]["semantics"] for view in views if view.data["accuracy"]}
    for word in sorted(semantics):
        badges.append(("", f"accuracy: {'native' if word == 'native' else f'{word} semantics'}"))
    foreign = sorted({view.data["target"] for view in views if not view.data["native"]})
    if foreign:
        badges.append(("", "times of this machine, not of a device"))
    marks = "".join(
        f'<li class="{kind}">{escaped(text)}</li>' if kind else f"<li>{escaped(text)}</li>"
        for kind, text in badges
    )
    return (
        f'<header><p class="kicker">gnet-opt bench · {escaped(models)} · {escaped(when)}</p>'
        f"<h1>{escaped(title)}</h1>"
        f'<p class="lead">{escaped(" ".join(_lead(documents, views)))}</p>'
        f'<ul class="badges">{marks}</ul>{_notices(documents)}</header>'
    )


def _lead(documents: Sequence[Mapping[str, Any]], views: Sequence[View]) -> Iterator[str]:
    """Under what conditions the best was measured, and its accuracy."""
    timed = [view for view in views if view.scenario(SINGLE_STREAM)]
    best = min(timed, key=p50) if timed else views[0]
    machine = documents[best.run]["environment"]["machine"]
    where = machine["board"] or machine["cpu"] or machine["architecture"]
    how = f"{best.label}: measured" if len(views) > 1 else "Measured"
    if timed:
        found = best.scenario(SINGLE_STREAM)
        n = f"{found['n']:,}".replace(",", "\u202f")
        how = (
            f"{best.label}: the median of n = {n} pictures, one at a time, p90 "
            f"{milliseconds(found, 90)}, medians of rounds within {share_of(found['spread'])}; "
        )
        ratios = ratios_of_rounds(best, _reference(timed, best)) if len(timed) > 1 else []
        if ratios:
            how += f"times as fast in single rounds {min(ratios):.2f} to {max(ratios):.2f}; "
        how += "measured"
    threads = best.data["threads"]
    told = (
        "as many threads as the runtime chooses"
        if threads is None
        else f"{threads} thread{'s' if threads > 1 else ''}"
    )
    cores = f"{machine['cores']} core{'s' if machine['cores'] > 1 else ''}"
    yield f"{how} with {told} on {where} ({machine['architecture']}, {cores})."
    accuracy = best.data["accuracy"]
    if best.top1 is not None and accuracy["float"] and accuracy["drop"]:
        drop = accuracy["drop"]
        low, high = drop["ci95"][:2]
        yield (
            f"Its top\u20111 is {best.top1:.2f}\u00a0%, that of the float model "
            f"{accuracy['float']['top1']:.2f}\u00a0%: a drop of {drop['value']:+.2f} points "
            f"[{low:+.2f}, {high:+.2f}] on {accuracy['images']} pictures."
        )


def _notices(documents: Sequence[Mapping[str, Any]]) -> str:
    """Why the figures are to be doubted, before any figure is shown."""
    found = []
    for run, document in enumerate(documents):
        reasons = document["environment"]["unstable"]
        if reasons:
            which = f"Run {run + 1} was" if len(documents) > 1 else "This run was"
            shown = listing([escaped(reason) for reason in reasons[:3]])
            if reasons[3:]:
                rest = listing([escaped(reason) for reason in reasons[3:]])
                shown += f"<details><summary>{len(reasons) - 3} more</summary>{rest}</details>"
            found.append(
                f"<p>{which} not stable: read its figures as rough ones, and its ratios, which "
                f"are taken within rounds, before its times.</p>{shown}"
            )
    for run, document in enumerate(documents[1:], start=2):
        differences = [
            escaped(each.told("run 1", f"run {run}"))
            for each in environment_differences(documents[0], document)
        ]
        if differences:
            found.append(
                f"<p>Run {run} was measured under other conditions than run 1: times of the two "
                f"do not compare.</p>{listing(differences)}"
            )
    return "".join(f'<div class="notice">{text}</div>' for text in found)


def _footer(documents: Sequence[Mapping[str, Any]]) -> str:
    text = (
        "Every result ran in a process of its own, new in each round, and all took turns. Times "
        "are those of this machine under these conditions and of no other one. The raw samples are "
        "in results.json; compare two runs with gnet-opt compare."
    )
    return f"<footer>{escaped(text)} gnet-opt {escaped(documents[0]['version'])}.</footer>"
