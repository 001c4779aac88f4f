"""The pictures of a report. Each comes with a table of what it shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..power import Power, PowerPoint
from ..table import seconds
from ..verdict import Verdict
from .axes import WIDTH, apart, canvas, count, decades, share, si, speedup_axis, spread, ticks
from .curves import DENSITY, Curve
from .history import Series
from .roofline import Roofline
from .svg import COLOURS, SERIES, render

_INK, _MUTED, _SURFACE = COLOURS["ink"], COLOURS["muted"], COLOURS["surface"]
MOST_CURVES = len(SERIES)


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
    figure, axes = canvas()
    axes.set_xscale("log")
    speedup_axis(axes, [1.0] + [p.low for p in probes] + [p.high for p in probes])
    low, high = found.crossing.interval
    if low is not None:
        axes.axvspan(low, high, color=COLOURS["unsure"], alpha=0.22, linewidth=0)
    if found.crossing.estimate is not None:
        axes.axvline(found.crossing.estimate, color=COLOURS["unsure"], linewidth=1.5)
    lows, highs = [p.low for p in probes], [p.high for p in probes]
    axes.fill_between(sizes, lows, highs, color=COLOURS["candidate"], alpha=0.2, linewidth=0)
    axes.plot(sizes, [p.speedup for p in probes], "o-", color=COLOURS["candidate"], linewidth=2, markersize=5, gid="probes")
    write = share if found.axis == DENSITY else count
    ticks(axes.xaxis, spread(sizes, 5), (lambda v: f"{100 * v:.2g} %") if found.axis == DENSITY else count)
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
    figure, axes = canvas(height=300, above=28)
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
    ticks(axes.xaxis, decades(left, right), lambda v: f"{v:g}")
    ticks(axes.yaxis, decades(*axes.get_ylim()), lambda v: si(v).strip(), gap=11)
    axes.set_xlabel("useful FLOPs for each byte", loc="right")
    axes.set_title("useful FLOP/s", loc="left", x=-32 / (WIDTH - 56), fontsize=12, color=_MUTED)
    rows = tuple(
        (
            s.id,
            f"{s.intensity:.3g}",
            f"{si(s.rate)}FLOP/s",
            f"{si(s.baseline_rate)}FLOP/s" if s.baseline_rate else "-",
            f"{si(s.bytes_per_s)}B/s",
            f"{100 * found.share(s):.0f} %" if found.share(s) else "-",
        )
        for s in spots
    )
    tips = {
        "candidates": [f"{row[0]}: {row[2]}" for row in rows],
        "baselines": [f"{s.id}, baseline: {si(s.baseline_rate)}FLOP/s of the same work" for s in rivals],
    }
    best = max(spots, key=lambda s: s.rate)
    finding = f"{si(best.rate)}FLOP/s of useful work at best, in {best.id}"
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
    figure, axes = canvas()
    speedup_axis(axes, [p.low for p in points] + [p.high for p in points])
    axes.set_xlim(-0.7, len(points) - 0.3)
    axes.vlines(x, [p.low for p in points], [p.high for p in points], color=COLOURS["candidate"], alpha=0.35, linewidth=2)
    stored = len(points) - found.open
    speedups = [p.speedup for p in points]
    axes.plot(x[:stored], speedups[:stored], "o", color=COLOURS["candidate"], markersize=4, gid="stored")
    now = {"markerfacecolor": _SURFACE, "markeredgecolor": COLOURS["candidate"], "markersize": 6, "markeredgewidth": 1.5}
    axes.plot(x[stored:], speedups[stored:], "o", **now, gid="now")
    bounds = [0, *(step.index for step in found.steps), stored]
    for first, last in zip(bounds, bounds[1:]) if found.steps else ():
        level = math.exp(sum(math.log(p.speedup) for p in points[first:last]) / (last - first))
        axes.hlines(level, first - 0.3, last - 0.7, color=_INK, linewidth=1.5)
    low, high = axes.get_ylim()
    if found.floor != 1.0 and low <= found.floor <= high:
        axes.axhline(found.floor, color=_INK, linewidth=1, linestyle=(0, (1, 2)))
        place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "right"}
        axes.annotate("floor", (len(points) - 0.4, found.floor), **place, color=_MUTED, fontsize=10)
    for step in found.steps:
        colour = COLOURS["good" if step.speedup > 1 else "bad"]
        axes.axvline(step.index - 0.5, color=colour, linewidth=1.5, linestyle=(0, (3, 2)))
        right = step.index > len(points) / 2
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "ha": "right" if right else "left"}
        text = f"{100 * (step.speedup - 1):+.0f} %"
        axes.annotate(text, (step.index - 0.5, 1), (-5 if right else 5, 9), **place, color=colour, fontweight="bold", fontsize=11)
    shown = sorted({0, len(points) - 1, *(step.index for step in found.steps)})
    ticks(axes.xaxis, apart(shown, len(points) / 4.5), lambda i: points[round(i)].label)
    rows = tuple(
        (p.label, p.time[:10], f"{p.speedup:.2f}x", f"{p.low:.2f} to {p.high:.2f}", seconds(p.baseline_s), seconds(p.candidate_s))
        for p in points
    )
    finding = "; ".join(step.words for step in found.steps) or f"no step in {stored} runs"
    said = [f"{row[0]}, {row[1]}: {row[2]} ({row[3]})" for row in rows]
    tips = {"stored": said[:stored], "now": said[stored:]} if found.open else {"stored": said}
    svg = render(figure, key, f"History of {found.id}", f"{finding}.", tips)
    header = ("commit", "measured", "speedup", "95 % interval", "baseline", "candidate")
    return Picture(found.id, finding, svg, header, rows)


def power(found: Power, key: str) -> Picture:
    """Share of slowdowns found against their size, for at most MOST_CURVES curves; at 0 they are false alarms."""
    curves = found.curves()
    points = [p for curve in curves.values() for p in curve]
    most = 100 * max(max(p.slowdown for p in points), 0.01)
    figure, axes = canvas(height=280)
    axes.set_ylim(-4, 108)
    axes.set_xlim(-0.05 * most, 1.05 * most)
    axes.axhline(95, color=_MUTED, linewidth=1, linestyle=(0, (3, 2)))
    tips = {}
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[SERIES[number]]
        x = [100 * p.slowdown + (number - (len(curves) - 1) / 2) * 0.011 * most for p in curve]
        axes.vlines(x, [100 * p.low for p in curve], [100 * p.high for p in curve], color=colour, alpha=0.4, linewidth=2)
        shares = [100 * p.share for p in curve]
        axes.plot(x, shares, "o-", color=colour, linewidth=1.3, markersize=3.5, label=_short(name), gid=f"curve{number}")
        tips[f"curve{number}"] = [f"{name}, {100 * p.slowdown:.3g} % slower: {_share_words(p)}" for p in curve]
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 0.04), frameon=False, labelcolor=_INK, fontsize=10, handlelength=1.2,
        labelspacing=0.25, borderpad=0,
    )  # fmt: skip
    ticks(axes.yaxis, [0, 50, 95], lambda v: f"{v:.0f} %", gap=11)
    ticks(axes.xaxis, apart(sorted({100 * p.slowdown for p in points}), most / 9), lambda v: f"{v:.3g} %")
    axes.set_xlabel("slowdown", loc="right")
    rows = tuple(
        (name, f"{100 * p.slowdown:.3g} %", str(p.runs), str(p.caught), _share_words(p))
        for name, curve in curves.items()
        for p in curve
    )
    title, finding = _gate_words(found), _power_words(curves)
    svg = render(figure, key, f"Power of the gate: {title}", f"{finding}.", tips)
    return Picture(title, finding, svg, ("", "slowdown", "gates", "found", "share (95 % interval)"), rows)


def _gate_words(found: Power) -> str:
    gate = _GATES.get(found.policy.get("name"), str(found.policy.get("name", "gate")))
    where = f"on {found.machine['class']}" if found.machine else "on simulated noise"
    return f"{gate[0].upper()}{gate[1:]}, {where}"


_GATES = {"TwoStage": "two-stage", "Sequential": "sequential"}


def _power_words(curves: Mapping[str, Sequence[PowerPoint]]) -> str:
    """The worst rate of false alarms, and the least slowdown that every curve finds."""
    parts = []
    alarms = [p for curve in curves.values() for p in curve if p.slowdown == 0]
    if alarms:
        worst = max(alarms, key=lambda p: p.share)
        parts.append(f"false alarms {100 * worst.share:.1f} % at worst, at most {100 * max(p.high for p in alarms):.1f} %")
    least = [next((p.slowdown for p in curve if p.slowdown > 0 and p.share >= 0.95), None) for curve in curves.values()]
    if None in least:
        parts.append(f"{len(least) - least.count(None)} of {len(least)} curves reach 95 %")
    else:
        parts.append(f"slowdowns of {100 * max(least):.3g} % are found at least 95 % of the time")
    return "; ".join(parts)


def _share_words(point: PowerPoint) -> str:
    return f"{100 * point.share:.1f} % ({100 * point.low:.1f} to {100 * point.high:.1f} %)"


def _short(name: str, most: int = 30) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def _ceilings(axes, found: Roofline, left: float, right: float) -> None:
    if found.bytes_per_s:
        knee = min(right, found.flops_per_s / found.bytes_per_s) if found.flops_per_s else right
        axes.plot([left, knee], [left * found.bytes_per_s, knee * found.bytes_per_s], color=_MUTED, linewidth=1.5)
    if found.flops_per_s:
        start = max(left, found.flops_per_s / found.bytes_per_s) if found.bytes_per_s else left
        axes.plot([start, right], [found.flops_per_s] * 2, color=_MUTED, linewidth=1.5)
        axes.annotate(
            f"{si(found.flops_per_s)}FLOP/s measured", (right, found.flops_per_s), (0, 5),
            textcoords="offset points", ha="right", va="bottom", color=_MUTED, fontsize=10,
        )  # fmt: skip
