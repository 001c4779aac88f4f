"""The pictures of a report. Each comes with a table of what it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..power import PowerPoint
from ..table import seconds
from ..verdict import Verdict
from .curves import DENSITY, Curve
from .history import Series
from .roofline import Roofline
from .svg import COLOURS, SETTINGS, render

WIDTH, HEIGHT = 358, 240  # CSS pixels: what a phone of 390 shows
_INK, _MUTED, _GRID, _SURFACE = (COLOURS[name] for name in ("ink", "muted", "grid", "surface"))


@dataclass(frozen=True)
class Picture:
    title: str
    finding: str  # what it shows, in a sentence
    svg: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def curve(found: Curve, key: str) -> Picture:
    """Speedup against length or density, with the band of its intervals and the crossing."""
    probes = [p for p in found.crossing.probes if p.speedup is not None]
    sizes = [p.size for p in probes]
    figure, axes = _canvas()
    axes.set_xscale("log")
    _speedups(axes, [p.low for p in probes] + [p.high for p in probes])
    low, high = found.crossing.interval
    if low is not None:
        axes.axvspan(low, high, color=COLOURS["unsure"], alpha=0.22, linewidth=0)
    if found.crossing.estimate is not None:
        axes.axvline(found.crossing.estimate, color=COLOURS["unsure"], linewidth=1.5)
    axes.fill_between(sizes, [p.low for p in probes], [p.high for p in probes], color=COLOURS["candidate"], alpha=0.2, linewidth=0)
    axes.plot(sizes, [p.speedup for p in probes], "o-", color=COLOURS["candidate"], linewidth=2, markersize=5, gid="probes")
    write = _share if found.axis == DENSITY else _count
    _ticks(axes.xaxis, _spread(sizes, 5), write)
    axes.set_xlabel("share of the pairs that are kept" if found.axis == DENSITY else "length", loc="right")
    rows = tuple(
        (write(p.size), f"{p.speedup:.2f}x", f"{p.low:.2f} to {p.high:.2f}", str(p.blocks), _WORDS.get(p.verdict, "close to 1"))
        for p in probes
    )
    tips = {"probes": [f"{row[0]}: {row[1]} ({row[2]})" for row in rows]}
    title = f"Speedup against {found.axis}: {found.title}"
    svg = render(figure, key, title, f"{found.words}.", tips)
    return Picture(found.title, found.words, svg, (found.axis, "speedup", "95 % interval", "blocks", ""), rows)


_WORDS = {Verdict.PASS: "faster", Verdict.FAIL: "slower"}


def roofline(found: Roofline, key: str) -> Picture:
    """Useful FLOP/s against useful FLOPs a byte: candidates, the baselines' rate for the same work, and the ceilings."""
    spots = found.spots
    figure, axes = _canvas(height=300)
    axes.set_xscale("log")
    axes.set_yscale("log")
    x = [s.intensity for s in spots]
    rates = [r for s in spots for r in (s.rate, s.baseline_rate) if r] + ([found.flops_per_s] if found.flops_per_s else [])
    left, right = min(x) / 1.6, max(x) * 1.6
    if found.flops_per_s and found.bytes_per_s:
        left = min(left, found.flops_per_s / found.bytes_per_s / 1.6)
    axes.set_xlim(left, right)
    axes.set_ylim(min(rates) / 2, max(rates) * 2)
    _ceilings(axes, found, left, right)
    for s in spots:
        if s.baseline_rate:
            axes.plot([s.intensity] * 2, [s.baseline_rate, s.rate], color=COLOURS["baseline"], linewidth=1, alpha=0.7)
    rivals = [s for s in spots if s.baseline_rate]
    style = {"linestyle": "none", "markersize": 6}
    axes.plot(
        [s.intensity for s in rivals], [s.baseline_rate for s in rivals], "o", **style,
        markerfacecolor=_SURFACE, markeredgecolor=COLOURS["baseline"], gid="baselines",
    )  # fmt: skip
    axes.plot(x, [s.rate for s in spots], "o", **style, color=COLOURS["candidate"], gid="candidates")
    _ticks(axes.xaxis, _decades(left, right), _count)
    _ticks(axes.yaxis, _decades(*axes.get_ylim()), lambda v: f"{_si(v)}FLOP/s", gap=11)
    axes.set_xlabel("useful FLOPs for each byte", loc="right")
    rows = tuple(
        (
            s.id,
            f"{s.intensity:.3g}",
            f"{_si(s.rate)}FLOP/s",
            f"{_si(s.baseline_rate)}FLOP/s" if s.baseline_rate else "-",
            f"{_si(s.bytes_per_s)}B/s",
            f"{100 * share:.0f} %" if (share := found.share(s)) else "-",
        )
        for s in spots
    )
    tips = {
        "candidates": [f"{row[0]}: {row[2]}" for row in rows],
        "baselines": [f"{s.id}, baseline: {_si(s.baseline_rate)}FLOP/s of the same work" for s in rivals],
    }
    best = max(spots, key=lambda s: s.rate)
    finding = f"{_si(best.rate)}FLOP/s of useful work at best, in {best.id}"
    if found.share(best):
        finding += f": {100 * found.share(best):.0f} % of what the machine allows there"
    title = f"Roofline{f', {found.dtype}' if found.dtype else ''}"
    svg = render(figure, key, title, f"{finding}. Filled: candidate. Hollow: baseline, counting the same useful work.", tips)
    header = ("case", "FLOP/byte", "candidate", "baseline", "bytes", "of the ceiling")
    return Picture(title, finding, svg, header, rows)


def history(found: Series, key: str) -> Picture:
    """Speedup run after run, with the mean of each level and a mark at each step."""
    points = found.points
    x = range(len(points))
    figure, axes = _canvas()
    _speedups(axes, [p.low for p in points] + [p.high for p in points])
    axes.set_xlim(-0.7, len(points) - 0.3)
    axes.vlines(x, [p.low for p in points], [p.high for p in points], color=COLOURS["candidate"], alpha=0.35, linewidth=2)
    axes.plot(x, [p.speedup for p in points], "o", color=COLOURS["candidate"], markersize=4, gid="runs")
    bounds = [0, *(step.index for step in found.steps), len(points)]
    for first, last in zip(bounds, bounds[1:]) if found.steps else ():
        level = math.exp(sum(math.log(p.speedup) for p in points[first:last]) / (last - first))
        axes.hlines(level, first - 0.3, last - 0.7, color=_INK, linewidth=1.5)
    for step in found.steps:
        colour = COLOURS["good" if step.speedup > 1 else "bad"]
        axes.axvline(step.index - 0.5, color=colour, linewidth=1.5, linestyle=(0, (3, 2)))
        right = step.index > len(points) / 2
        axes.annotate(
            f"{100 * (step.speedup - 1):+.0f} %", (step.index - 0.5, 1), (-5 if right else 5, 9), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="right" if right else "left", va="top", color=colour, fontweight="bold",
        )  # fmt: skip
    shown = sorted({0, len(points) - 1, *(step.index for step in found.steps)})
    _ticks(axes.xaxis, _apart(shown, len(points) / 4.5), lambda i: points[round(i)].label)
    rows = tuple(
        (p.label, p.time[:10], f"{p.speedup:.2f}x", f"{p.low:.2f} to {p.high:.2f}", seconds(p.baseline_s), seconds(p.candidate_s))
        for p in points
    )
    finding = "; ".join(step.words for step in found.steps) or f"no step in {len(points)} runs"
    tips = {"runs": [f"{row[0]}, {row[1]}: {row[2]} ({row[3]})" for row in rows]}
    svg = render(figure, key, f"History of {found.id}", f"{finding}.", tips)
    header = ("commit", "measured", "speedup", "95 % interval", "baseline", "candidate")
    return Picture(found.id, finding, svg, header, rows)


def power(name: str, points: Sequence[PowerPoint], key: str) -> Picture:
    """Share of slowdowns found against their size; at 0 it is the share of false alarms."""
    figure, axes = _canvas()
    x = [100 * p.slowdown for p in points]
    shares = [100 * p.share for p in points]
    axes.set_ylim(-4, 108)
    axes.set_xlim(-0.04 * max(x[-1], 1), 1.04 * max(x[-1], 1))
    axes.axhline(95, color=_MUTED, linewidth=1, linestyle=(0, (3, 2)))
    axes.vlines(x, [100 * p.low for p in points], [100 * p.high for p in points], color=COLOURS["candidate"], alpha=0.35, linewidth=4)
    axes.plot(x, shares, "o-", color=COLOURS["candidate"], linewidth=2, markersize=5, gid="rates")
    _ticks(axes.yaxis, [0, 50, 95], lambda v: f"{v:.0f} %", gap=11)
    _ticks(axes.xaxis, _apart(x, x[-1] / 9), lambda v: f"{v:.3g} %")
    axes.set_xlabel("slowdown", loc="right")
    rows = tuple(
        (f"{100 * p.slowdown:.3g} %", str(p.runs), str(p.caught), f"{100 * p.share:.1f} %", f"{100 * p.low:.1f} to {100 * p.high:.1f} %")
        for p in points
    )
    found = next((p for p in points if p.slowdown > 0 and p.low >= 0.95), None)
    alarms = next((p for p in points if p.slowdown == 0), None)
    parts = [f"false alarms {_bounded(alarms)}"] if alarms else []
    parts.append(f"finds {100 * found.slowdown:.3g} % with at least 95 % power" if found else "95 % power is not shown at any slowdown")
    finding = "; ".join(parts)
    svg = render(figure, key, f"Power of the gate: {name}", f"{finding}.", {"rates": [f"{r[0]} slower: {r[3]} ({r[4]})" for r in rows]})
    return Picture(name, finding, svg, ("slowdown", "gates", "found", "share", "95 % interval"), rows)


def _bounded(point: PowerPoint) -> str:
    return f"{100 * point.share:.1f} % (at most {100 * point.high:.1f} %)"


def _canvas(height: int = HEIGHT):
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        axes = figure.add_axes((44 / WIDTH, 44 / height, (WIDTH - 56) / WIDTH, (height - 56) / height))
        axes.grid(axis="y", linewidth=1)
    return figure, axes


def _speedups(axes, values: Sequence[float]) -> None:
    """A logarithmic axis of speedups that holds 1.0, where break-even is drawn."""
    finite = [v for v in values if 0 < v < math.inf] or [1.0]
    low, high = min([*finite, 1.0]), max([*finite, 1.0])
    room = max((high / low) ** 0.08, 1.03)
    low, high = low / room, high * room
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.axhline(1.0, color=_MUTED, linewidth=1.5)
    offered = [v for v in _LEVELS if low <= v <= high]
    if len(offered) < 3:
        offered = [v / 100 for v in range(50, 200, 2 if high / low < 1.2 else 5) if low <= v / 100 <= high]
    steps = math.ceil(len(offered) / 6)
    chosen = [v for v in offered if (offered.index(v) - offered.index(1.0)) % steps == 0]
    _ticks(axes.yaxis, chosen, lambda v: f"{v:.3g}x", gap=11)


_LEVELS = [2.0**n for n in range(-7, 0)] + [1.0] + [1.5] + [2.0**n for n in range(1, 11)]


def _ceilings(axes, found: Roofline, left: float, right: float) -> None:
    if found.bytes_per_s:
        knee = min(right, found.flops_per_s / found.bytes_per_s) if found.flops_per_s else right
        axes.plot([left, knee], [left * found.bytes_per_s, knee * found.bytes_per_s], color=_MUTED, linewidth=1.5)
    if found.flops_per_s:
        start = max(left, found.flops_per_s / found.bytes_per_s) if found.bytes_per_s else left
        axes.plot([start, right], [found.flops_per_s] * 2, color=_MUTED, linewidth=1.5)
        axes.annotate(
            f"{_si(found.flops_per_s)}FLOP/s measured", (right, found.flops_per_s), (0, 5),
            textcoords="offset points", ha="right", va="bottom", color=_MUTED,
        )  # fmt: skip


def _ticks(axis, values: Sequence[float], write, gap: float = 4) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_major_locator(NullLocator())
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(list(values), [write(v) for v in values])
    axis.set_tick_params(pad=gap)


def _spread(values: Sequence[float], most: int) -> list[float]:
    """At most `most` of the ascending values, about evenly apart on a logarithmic axis."""
    gap = math.log(values[-1] / values[0]) / most if values[-1] > values[0] else 0.0
    return [math.exp(v) for v in _apart([math.log(v) for v in values], gap)]


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """The last of the ascending values, and before it those that keep `gap` from each other."""
    kept = [values[-1]]
    for value in reversed(values[:-1]):
        if kept[-1] - value >= gap:
            kept.append(value)
    return kept[::-1]


def _decades(low: float, high: float) -> list[float]:
    exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    decades = [10.0**n for n in exponents]
    if len(decades) >= 2:
        return decades
    return [m * 10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5) if low <= m * 10.0**n <= high]


def _count(value: float) -> str:
    """64, 1.5K, 16K, 1M: powers of two as they are said."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _si(value: float) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "
