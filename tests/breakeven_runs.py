"""Stored runs of known speedups, for tests of what is said about history."""

import math

from sparse_attention.breakeven import Case, Run
from sparse_attention.breakeven.store import Block, Record


def block_of(number, speedup, rng, candidate_s=1e-3, sd=0.0, pairs=4):
    shift = math.exp(rng.gauss(0, sd))
    return Block(number, "sdpa", [candidate_s * speedup * shift] * pairs, [candidate_s] * pairs, [True] * pairs)


MACHINE = {"class": "cpu/zen4/2c", "cpu": "EPYC", "commit": "a" * 40, "dirty": False, "time": "2026-01-01T00:00:00Z"}
VERSIONS = {"torch": "2.13", "numpy": "2.0"}


def run_of(cases, threads=1, anchors=None, blocks=5, device="cpu", base=None, **machine):
    """A stored run whose cases are {id: [block, ...]}."""
    records = {name: Record(Case(name, "m:f"), {"status": "ok", "baselines": {"sdpa": 1.0}}, b) for name, b in cases.items()}
    found = anchors or [{"source": "numpy 2.0", "compute": 1e-3, "memory": 1e-2}] * blocks
    settings = {"threads": threads, "device": device, "base": base, "unjudged": ""}
    return Run({**MACHINE, "versions": VERSIONS, **machine}, settings, records, [{"anchor": a} for a in found])


def history(speedups, rng, blocks=5, sd=0.0, **machine):
    return [run_of({"a": [block_of(n, s, rng, sd=sd) for n in range(blocks)]}, **machine) for s in speedups]
