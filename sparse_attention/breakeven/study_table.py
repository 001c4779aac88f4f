"""A study in words and tables."""

from __future__ import annotations

from collections.abc import Iterable

from .crossing import Crossing
from .progress import duration
from .result import Result
from .study import Published, Study
from .table import seconds
from .verdict import Verdict


def sentence(found: Crossing) -> str:
    """The answer in words."""
    sizes = [probe.size for probe in found.probes]
    text = _SENTENCES[found.outcome](found, sizes) if sizes else "nothing measured"
    if found.islands and found.outcome != "islands":
        text += f"; not monotone: it wins at {_ranges(found.islands)} too"
    wrong = [probe for probe in found.probes if probe.verdict in (Verdict.WRONG, Verdict.SUSPICIOUS)]
    unjudged = [probe for probe in found.probes if probe.verdict is Verdict.NOT_EVALUATED]
    if wrong:
        text += f"; wrong at {wrong[0].size:g}: {wrong[0].reason}"
    if unjudged:
        text += f"; not evaluated at {', '.join(f'{p.size:g}' for p in unjudged)}: {unjudged[0].reason}"
    return f"{text}; {found.unfinished}" if found.unfinished else text


def _crosses(found: Crossing, sizes: list[float]) -> str:
    direction = "from" if found.wins > found.loses else "up to"
    return f"wins {direction} {found.estimate:.3g} [{_plain(found.interval[0])}, {_plain(found.interval[1])}]"


def _always(found: Crossing, sizes: list[float]) -> str:
    which, word = ("smallest", "from") if found.wins == sizes[0] else ("largest", "up to")
    return f"wins {word} the {which} size tried, {_plain(found.wins)}"


def _never(found: Crossing, sizes: list[float]) -> str:
    return f"loses at every size tried, {_plain(sizes[0])} to {_plain(sizes[-1])}"


def _only_islands(found: Crossing, sizes: list[float]) -> str:
    return f"no crossing: wins at {_ranges(found.islands)} only, of {_plain(sizes[0])} to {_plain(sizes[-1])}"


def _unknown(found: Crossing, sizes: list[float]) -> str:
    known = [f"wins at {_plain(found.wins)} and beyond"] if found.wins is not None else []
    known += [f"loses at {_plain(found.loses)}"] if found.loses is not None else []
    return "undecided: " + (", ".join(known) or "no size could be told")


_SENTENCES = {"crosses": _crosses, "always": _always, "never": _never, "islands": _only_islands, "unknown": _unknown}


def curve(found: Crossing) -> str:
    """The speedup at each size: `+` wins, `-` loses, `?` could not be told."""
    mark = {Verdict.PASS: "+", Verdict.FAIL: "-"}
    points = [f"{_plain(p.size)}: {p.speedup:.2f}x{mark.get(p.verdict, '?')}" for p in found.probes if p.speedup is not None]
    return "  ".join(points)


def text(crossings: Iterable[Crossing]) -> str:
    """One family a row, its curve below."""
    crossings = list(crossings)
    width = max((len(found.family) for found in crossings), default=0)
    lines = []
    for found in crossings:
        lines.append(f"{found.family.ljust(width)}  {sentence(found)}")
        if found.probes:
            lines.append(f"{'':{width}}  {curve(found)}")
    return "\n".join(lines)


def published_text(rows: Iterable[tuple[Published, list[Result]]]) -> str:
    """Printed figures and, beside them, the fastest candidate measured here."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row, _ in rows for name in row.figures))
    table = [["row", *columns, "dense here", "sparse here", "speedup here", "candidate", ""]]
    for row, found in rows:
        timed = [r for r in found if r.interval is not None and r.interval.blocks > 1]
        cells = [row.id, *(row.figures.get(name, "-") for name in columns)]
        if timed:
            best = max(timed, key=lambda r: r.speedup)
            interval = best.interval
            speedup = f"{interval.speedup:.2f}x [{interval.low:.2f}, {interval.high:.2f}]"
            cells += [seconds(best.baseline_s), seconds(best.candidate_s), speedup, best.id.rpartition("/")[2], best.reason]
        else:
            cells += ["-", "-", found[0].verdict.value, "", found[0].reason]
        table.append(cells)
    widths = [max(len(row[c]) for row in table) for c in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table)


def headline(study: Study) -> str:
    threads = study.settings.threads
    probes = sum(bool(record.blocks) for record in study.run.records.values())
    return (
        f"machine: {study.run.machine['class']}, {study.run.machine['cpu']}, {threads} thread{'s' * (threads > 1)}   "
        f"{probes} sizes in {len(study.run.evidence)} rounds, {duration(study.elapsed_s)}"
    )


def _ranges(islands: Iterable[tuple[float, float]]) -> str:
    return ", ".join(_plain(a) if a == b else f"{_plain(min(a, b))} to {_plain(max(a, b))}" for a, b in islands)


def _plain(size: float) -> str:
    return f"{size:g}"
