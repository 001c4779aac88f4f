"""Axes of the pictures: their size, the places of their ticks and how numbers are written on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .svg import COLOURS, SETTINGS

WIDTH, HEIGHT = 358, 240  # CSS pixels: what a phone of 390 shows


def canvas(height: int = HEIGHT, above: int = 12):
    """A figure and its axes, with `above` pixels over them."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        axes = figure.add_axes((44 / WIDTH, 44 / height, (WIDTH - 56) / WIDTH, (height - 44 - above) / height))
        axes.grid(axis="y", linewidth=1)
    return figure, axes


def speedup_axis(axes, values: Sequence[float]) -> None:
    """A logarithmic axis of speedups; break-even is drawn where it lies on it."""
    finite = [v for v in values if 0 < v < math.inf] or [1.0]
    room = max((max(finite) / min(finite)) ** 0.1, 1.04)
    low, high = min(finite) / room, max(finite) * room
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    if low <= 1.0 <= high:
        axes.axhline(1.0, color=COLOURS["muted"], linewidth=1.5)
    ticks(axes.yaxis, _levels(low, high), lambda v: f"{v:.3g}x" if v >= 0.1 else f"{v:.2g}x", gap=11)


def _levels(low: float, high: float, most: int = 7) -> list[float]:
    """At most `most` round speedups: evenly apart where the range is narrow, powers of two or four where it is wide."""
    for digits in range(-3, 3) if high / low < 4 else ():
        for step in (m * 10.0**digits for m in (1, 2, 5)):
            found = [round(n * step, 3) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
            if len(found) <= most:
                return found
    exponents = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    stride = math.ceil(len(exponents) / most)
    return [2.0**n for n in exponents if n % stride == 0]


def ticks(axis, values: Sequence[float], write, gap: float = 4) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_major_locator(NullLocator())
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(list(values), [write(v) for v in values])
    axis.set_tick_params(pad=gap)


def spread(values: Sequence[float], most: int) -> list[float]:
    """The ends of the ascending values and, about evenly between them on a logarithmic axis, at most `most` - 1 more."""
    gap = math.log(values[-1] / values[0]) / most
    return apart(values, gap, math.log)


def apart(values: Sequence[float], gap: float, place: Callable[[float], float] = float) -> list[float]:
    """The ends of the ascending values, and between them those that keep `gap` from the ones before and from the end."""
    first, last = values[0], values[-1]
    kept = [first]
    for value in values[1:-1]:
        if min(place(value) - place(kept[-1]), place(last) - place(value)) >= gap:
            kept.append(value)
    return kept if last == first else [*kept, last]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten in the range; where it holds fewer than two, 1, 2 and 5 of each."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [m * 10.0**n for n in exponents for m in factors if low <= m * 10.0**n <= high]
        if len(found) >= 2:
            break
    return found


def count(value: float) -> str:
    """64, 1.5K, 16K, 1M: what is about a power of two as it is said, else the number."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if value >= size and value % (size // 8) == 0:
            return f"{value / size:g}{unit}"
    return f"{value:.4g}"


def share(value: float) -> str:
    return f"{100 * value:.3g} %"


def si(value: float) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "
