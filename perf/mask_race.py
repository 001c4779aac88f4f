"""The race of the ways to make a tree's mask, as a table: `python -m perf.mask_race [--device cuda] [--nodes 16 64 ...]`.

rebuild is EAGLE's loop over rows on the host, incremental the proposal of the seeds' guide done right, doubling plain PyTorch, fused one
launch. The sections are those of the guide (total, preallocation, mask, tolist, retrieve_indices), of the tree's whole layout, with the
device finished at both ends of each.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch

from perf.eagle_workloads import bushy
from sparse_attention import eagle
from sparse_attention.eagle.profile import SECTIONS

WAYS = {"rebuild": "rebuild", "incremental": "incremental", "doubling": "reference", "fused": "native"}
NODES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.mask_race", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES)
    parser.add_argument("--sections", type=int, nargs="+", default=(64, 1024), help="nodes of the trees whose sections are shown")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds for each figure (default: 0.2)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(masks(options.nodes, options.device, options.budget))
    for nodes in options.sections:
        print(f"\n{sections(nodes, options.device, options.budget)}")


def masks(sizes: Sequence[int], device: str, budget_s: float) -> str:
    """us of tree_mask by each way, and which is fastest with and without the fused one."""
    lines = [f"| nodes | {' | '.join(WAYS)} | fastest in PyTorch | fused over it |", "|--:|" + "--:|" * len(WAYS) + ":--|--:|"]
    for nodes in sizes:
        parents = bushy(nodes, 0).to(device)
        took = {way: _median_us(_profiled(eagle.tree_mask, budget_s, parents, impl=impl), "total") for way, impl in WAYS.items()}
        best = min((way for way in WAYS if way != "fused"), key=took.get)
        figures = " | ".join(f"{us:,.1f}" for us in took.values())
        lines.append(f"| {nodes:,} | {figures} | {best} | {took[best] / took['fused']:.1f}x |")
    return "\n".join(lines)


def sections(nodes: int, device: str, budget_s: float) -> str:
    """us of each section of assemble_tree, which makes the mask, the rows of paths and the links."""
    parents = bushy(nodes, 0).to(device)
    lines = [f"| {nodes:,} nodes | {' | '.join(SECTIONS)} |", "|:--|" + "--:|" * len(SECTIONS)]
    for way, impl in WAYS.items():
        found = _profiled(eagle.assemble_tree, budget_s, parents.clone(), parents, max_depth=20, impl=impl)
        figures = [f"{_median_us(found, name):,.1f}" if name in found.times else "" for name in SECTIONS]
        lines.append(f"| {way} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _profiled(call, budget_s: float, *args, **options) -> eagle.Profile:
    """Times of calls for about budget_s seconds, at least 3 and at most 200."""
    profile = eagle.Profile()
    call(*args, profile=profile, **options)
    profile.clear()
    while True:
        call(*args, profile=profile, **options)
        times = profile.times["total"]
        if len(times) >= 200 or (len(times) >= 3 and sum(times) > budget_s):
            return profile


def _median_us(profile: eagle.Profile, name: str) -> float:
    """The median over calls; a section that is entered more than once in a call counts with all of it."""
    times, calls = profile.times[name], len(profile.times["total"])
    each = len(times) // calls
    return 1e6 * statistics.median(sum(times[n * each : (n + 1) * each]) for n in range(calls))


if __name__ == "__main__":
    main()
