"""Draws the pictures of the README and the docs from the patterns themselves: python docs/pictures/draw.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import torch

import sparse_attention as sa
from sparse_attention.breakeven.power import Power
from sparse_attention.layout import layout

FOLDER = Path(__file__).parent
CELLS = 32  # a mask is drawn as CELLS x CELLS squares
PIXELS = 18  # of one square, GAP of them left empty: sharp when shown 96 pixels wide, at 1, 2 and 3 device pixels each
GAP = 3

# Middle tones over transparency, so that they read on white and on black.
ALLOWED = (0.18, 0.51, 0.97, 1.0)
OTHER = (0.5, 0.5, 0.5, 0.18)
PARTIAL = (0.18, 0.51, 0.97, 0.45)
TEXT = (0.49, 0.52, 0.56)

BLOCKS = torch.rand(CELLS, CELLS, generator=torch.Generator().manual_seed(1)) < 0.15
TREE = (-1, 0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 6, 6, 8, 9, 10, 11, 13, 13, 15, 16)


def scattered_pairs() -> sa.Csr:
    """Each query sees itself and, every twelfth time, any other key."""
    mask = torch.rand(CELLS, CELLS, generator=torch.Generator().manual_seed(2)) < 1 / 12
    mask |= torch.eye(CELLS, dtype=torch.bool)
    return sa.Csr(torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]), mask.nonzero()[:, 1])


# name -> (pattern, tokens a square stands for in each direction)
MASKS = {
    "Dense": (sa.Dense(), 1),
    "Causal": (sa.Causal(), 1),
    "SlidingWindow": (sa.SlidingWindow(8), 1),
    "Dilated": (sa.Dilated(5, 4), 1),
    "MultiScale": (sa.MultiScale(6, (1, 2, 4)), 1),
    "Strided": (sa.Strided(6), 1),
    "Fixed": (sa.Fixed(8, 2), 1),
    "LogSparse": (sa.LogSparse(), 1),
    "BlockSparse": (sa.BlockSparse(BLOCKS, 16), 16),
    "LiveBlocks": (sa.LiveBlocks(BLOCKS.flip(1), 16) & sa.Causal(), 16),
    "BigBird": (sa.BigBird(block=16, window=3, globals=2, random=3), 16),
    "Longformer": (sa.Longformer(3, 2), 1),
    "Sinks": (sa.Sinks(4), 1),
    "Documents": (sa.Documents((11, 5, 16)), 1),
    "Csr": (scattered_pairs(), 1),
    "Tree": (sa.Tree(TREE), 1),
    "Predicate": (sa.Predicate(lambda i, j: (j <= i) & ((i ^ j) % 4 == 0)), 1),
    "And": (sa.Documents((11, 5, 16)) & sa.Causal(), 1),
    "Or": ((sa.SlidingWindow(8) | sa.Sinks(4)) & sa.Causal(), 1),
}


def mask_of(name: str) -> np.ndarray:
    """bool [CELLS, CELLS]: what the picture of this name shows."""
    pattern, step = MASKS[name]
    return pattern.mask(CELLS * step, CELLS * step)[::step, ::step].numpy()


def squares(mask: np.ndarray) -> np.ndarray:
    """float [CELLS * PIXELS, CELLS * PIXELS, 4]"""
    colours = np.where(mask[:, :, None], ALLOWED, OTHER)
    image = np.kron(colours, np.ones((PIXELS, PIXELS, 1)))
    inside = np.arange(CELLS * PIXELS) % PIXELS < PIXELS - GAP
    return image * (inside[:, None] & inside)[:, :, None]


def draw_masks() -> None:
    for name in MASKS:
        matplotlib.image.imsave(FOLDER / f"{name}.png", squares(mask_of(name)))


def draw_tiles() -> None:
    """Which tiles a window visits, and what is computed of a partial one."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.5), layout="constrained")
    made = layout(sa.SlidingWindow(256), 1024, 1024)
    part = made.parts[0]
    count = part.row_start.numel() - 1
    image = np.zeros((count, count, 4))
    image[:] = OTHER
    for row in range(count):
        for first, tiles, mask in part.runs[part.row_start[row] : part.row_start[row + 1]].tolist():
            image[row, first : first + tiles] = ALLOWED if mask < 0 else PARTIAL
    left.imshow(image, extent=(0, 1024, 1024, 0), interpolation="nearest")
    left.set_title("SlidingWindow(256), 1,024 tokens: tiles", color=TEXT)
    _label(left, "key", "query", np.arange(0, 1025, 256), np.arange(0, 1025, 64))

    bits = _bits(part.masks[0])
    image = np.where(bits.T[:, :, None], ALLOWED, OTHER)
    right.imshow(image, extent=(0, 64, 64, 0), interpolation="nearest")
    for group in range(0, 64, 16):
        live = np.nonzero(bits[group : group + 16].any(0))[0]
        if live.size:
            box = plt.Rectangle((group + 0.3, live[0]), 15.4, live[-1] + 1 - live[0], fill=False, color="#e8590c", linewidth=2)
            right.add_patch(box)
    right.set_title("a partial tile, transposed: 16 lanes a group", color=TEXT)
    _label(right, "query (lane)", "key (row)", np.arange(0, 65, 16), np.arange(0, 65, 16))
    figure.savefig(FOLDER / "tiles.png", dpi=160, transparent=True)
    plt.close(figure)


def draw_power() -> None:
    """How often the gate of pull requests finds a slowdown: the measured rates of perf/proofs, a panel for each machine class."""
    proofs = FOLDER.parents[1] / "perf/proofs"
    folders = sorted({path.parent for path in proofs.glob("*/proof-two-stage-2*.json")})
    figure, panels = plt.subplots(len(folders), figsize=(7, 3.2 * len(folders)), constrained_layout=True, squeeze=False)
    for folder, axes in zip(folders, panels[:, 0]):
        _draw_power(folder, axes)
    figure.savefig(FOLDER / "power.png", dpi=160, transparent=True)
    plt.close(figure)


def _draw_power(folder: Path, axes) -> None:
    for name, style in (("two-stage", "--"), ("two-stage-0.01", "-")):
        stored = Power.load(max(folder.glob(f"proof-{name}-2*.json")))
        for colour, (case, points) in zip(("C0", "C1"), stored.curves().items()):
            points = [point for point in points if point.slowdown <= 0.1]
            x, y, low, high = ([100 * getattr(p, key) for p in points] for key in ("slowdown", "share", "low", "high"))
            axes.plot(x, y, style, color=colour, marker="o", markersize=3, label=f"{case}, {stored.policy['name']}")
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    _label(axes, "share of the tiles repeated, %", "gates that say FAIL, %", range(0, 11, 2), ())
    axes.yaxis.set_ticks(range(0, 101, 25))
    axes.yaxis.set_ticks((), minor=True)
    legend = axes.legend(frameon=False, labelcolor=TEXT, fontsize=8, loc="lower right", title=stored.machine["class"], title_fontsize=8)
    legend.get_title().set_color(TEXT)


def _bits(mask: torch.Tensor) -> np.ndarray:
    """bool [64, 64] of query row by key column, from one word a row."""
    words = mask.numpy().reshape(64).view(np.uint64)
    return (words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1) == 1


def _label(axes, x, y, major, minor):
    axes.set_xlabel(x, color=TEXT)
    axes.set_ylabel(y, color=TEXT)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(major)
        axis.set_ticks(minor, minor=True)
    axes.tick_params(which="both", colors=TEXT, length=0)
    axes.grid(which="both", color=TEXT, linewidth=0.4, alpha=0.5)
    for spine in axes.spines.values():
        spine.set_visible(False)


if __name__ == "__main__":
    draw_masks()
    draw_tiles()
    draw_power()
