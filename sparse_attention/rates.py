"""What dispatch knows about the machine: rates of its cost model and measured break-even lengths.

The table of a machine class is a JSON file, `machines/cpu-zen4-2c.json`: the user's own in the cache folder (written by
`python -m sparse_attention.breakeven calibrate`), else the one shipped with the package, else `GENERIC`. It is read once, when
the first call is planned.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1
ENGINES = ("tile", "gather", "dense")
DTYPES = ("float32", "bfloat16", "float16", "float64")


class Rate(NamedTuple):
    """What an engine spends, in nanoseconds: on a call, a query row, a pair, a pair's element (of head_dim), an element of a
    mask, and a key's element, once and again where there is a single query.
    """

    call: float
    row: float
    pair: float
    element: float
    mask: float = 0.0
    key: float = 0.0
    lone_key: float = 0.0

    def time(self, work: Work, head_dim: int) -> float:
        per_element = work.pairs * self.element + work.keys * self.key + work.lone_keys * self.lone_key
        return self.call + work.rows * self.row + work.pairs * self.pair + work.masked * self.mask + head_dim * per_element


class Work(NamedTuple):
    """What the terms of a rate multiply: query rows, pairs as the engine counts them, elements of a mask, keys that it prepares
    beforehand, and keys of calls with a single query.
    """

    rows: int
    pairs: int
    masked: int = 0
    keys: int = 0
    lone_keys: int = 0


class Crossing(NamedTuple):
    """Where the sparse engines begin to beat the dense one on one pattern, measured with as many queries as keys.

    family: the pattern's repr. heads: batch * heads. Dense is faster at lengths dense_from..low, sparse from high on; what lies
    between could not be told, and `estimate` lies there. None: no such length was found.
    """

    family: str
    dtype: str
    head_dim: int
    heads: int
    threads: int
    dense_from: int | None
    low: int | None
    high: int | None
    estimate: float | None

    def winner(self, length: int) -> str | None:
        """"sparse" or "dense" where one of them was measured to be the faster, else None."""
        if self.high is not None and length >= self.high:
            return "sparse"
        if self.low is not None and self.dense_from <= length <= self.low:
            return "dense"
        return None


@dataclass(frozen=True, eq=False)
class Table:
    """rates: {(threads, dtype): {engine: Rate}}. source: the file, or "built in"."""

    machine_class: str
    source: str
    rates: Mapping[tuple[int, str], Mapping[str, Rate]]
    crossings: Mapping[tuple[str, str, int, int], tuple[Crossing, ...]]

    def rates_for(self, threads: int, dtype: str) -> tuple[int, Mapping[str, Rate]]:
        """The rates of the nearest number of threads that was measured, and that number; of float32 for other dtypes."""
        measured = {t for t, d in self.rates if d == dtype}
        if not measured:
            dtype = "float32"
            measured = {t for t, d in self.rates if d == dtype}
        nearest = min(measured, key=lambda t: (abs(math.log(t / threads)), t))
        return nearest, self.rates[nearest, dtype]

    def crossing(self, family: str, dtype: str, head_dim: int, threads: int, heads: int) -> Crossing | None:
        """The crossing measured for this family with the nearest number of heads, up to half or twice as many."""
        found = self.crossings.get((family, dtype, head_dim, threads), ())
        near = [c for c in found if heads <= 2 * c.heads and c.heads <= 2 * heads]
        return min(near, key=lambda c: abs(math.log(c.heads / heads)), default=None)


# One core of an AMD EPYC 9004 (Zen 4, AVX-512), float32, torch 2.13, head_dim 64 and 128, 1 to 1,024 queries. Only ratios
# matter. `tile` counts the pairs of the lanes that it computes, `gather` allowed pairs, `dense` what SDPA computes.
GENERIC = Table(
    "any",
    "built in",
    {
        (1, "float32"): {
            "tile": Rate(call=3_200, row=36, pair=0.0, element=0.040),
            "gather": Rate(call=2_300, row=42, pair=0.4, element=0.085),
            "dense": Rate(call=7_000, row=60, pair=0.0, element=0.0485, mask=0.6),
        }
    },
    {},
)

# One H100, bfloat16, head_dim 128 (shared/facts/h100.md and docs/cuda.md): 4 * head_dim FLOPs a pair at 560 TFLOP/s in tiles, at 590
# causal and about a third of that with a mask; `gather` reads keys and values at 7.7 TB/s from the L2 cache (docs/implementation.md).
# `call` is what a launch costs once the host is ahead. In float32, where neighbouring rows share keys in L1, `gather` reads twice as many
# bytes a second; `dense` is SDPA's kernel without TF32; `tile` is never chosen.
_HALF = {
    "tile": Rate(call=9_000, row=0.01, pair=0.0, element=7.1e-6),
    "gather": Rate(call=9_000, row=0.5, pair=0.0, element=5.2e-4),
    "dense": Rate(call=9_000, row=0.01, pair=0.0, element=6.8e-6, mask=1.8e-3),
}
_SINGLE = {
    "tile": Rate(call=9_000, row=0.01, pair=0.0, element=1.0),
    "gather": Rate(call=9_000, row=0.5, pair=0.0, element=5.8e-4),
    "dense": Rate(call=9_000, row=0.01, pair=5.0e-3, element=4.6e-5, mask=2.5e-3),
}
GENERIC_CUDA = Table("cuda", "built in", {(1, "float32"): _SINGLE, (1, "bfloat16"): _HALF, (1, "float16"): _HALF}, {})


@cache
def table(device: str = "cpu") -> Table:
    """The table of this machine. A file that cannot be used is passed over with a warning that says why."""
    from sparse_attention.breakeven.machine import machine_class

    here = machine_class(device)
    for path in files(here):
        try:
            return load(path, here)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} is ignored: {error}", stacklevel=2)
    return GENERIC if device == "cpu" else GENERIC_CUDA


def files(machine_class: str) -> Iterator[Path]:
    """Files to try, best first: the user's, then the shipped ones; in each folder the class itself before equal processors
    with other numbers of cores (a process pinned to one core is on the same machine).
    """
    for folder in (user_folder(), Path(__file__).parent / "machines"):
        exact = folder / file_name(machine_class)
        near = [path for path in folder.glob(file_name(_processor(machine_class) + "/*")) if path != exact]
        yield exact
        yield from sorted(near, key=lambda path: (abs(_cores(path.stem) - _cores(machine_class)), path.name))


def user_folder() -> Path:
    """Where the user's own tables are kept: beside the compiled libraries."""
    from sparse_attention._build import cache_folder

    return cache_folder() / "machines"


def file_name(machine_class: str) -> str:
    return machine_class.replace("/", "-") + ".json"


def load(path: Path, machine_class: str) -> Table:
    """The table in a file. ValueError says why it cannot be used on a machine of this class."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    return parse(data, machine_class, str(path))


def parse(data: Any, machine_class: str, source: str) -> Table:
    """The table of a file's content; ValueError for what cannot be one, with the place."""
    _expect(isinstance(data, dict), "it holds no object")
    _expect(data.get("schema") == SCHEMA, f"schema is {data.get('schema')!r}, this version reads {SCHEMA}")
    theirs = data.get("class")
    _expect(isinstance(theirs, str), f"class is {theirs!r}, expected a machine class")
    _expect(_processor(theirs) == _processor(machine_class), f"it is of {theirs}, this is {machine_class}")
    rates: dict[tuple[int, str], dict[str, Rate]] = {}
    for place, entry in _entries(data, "rates"):
        key = _whole(entry, "threads", place), _one_of(entry, "dtype", DTYPES, place)
        rates[key] = {engine: _rate(entry.get(engine), f"{place}.{engine}") for engine in ENGINES}
    _expect(any(dtype == "float32" for _, dtype in rates), "rates have no float32")
    crossings: dict[tuple[str, str, int, int], tuple[Crossing, ...]] = {}
    for place, entry in _entries(data, "crossings"):
        found = _crossing(entry, place)
        key = found.family, found.dtype, found.head_dim, found.threads
        crossings[key] = (*crossings.get(key, ()), found)
    return Table(theirs, source, rates, crossings)


def _rate(entry: Any, place: str) -> Rate:
    _expect(isinstance(entry, dict) and set(entry) == set(Rate._fields), f"{place} is {entry!r}, expected {Rate._fields}")
    for name, value in entry.items():
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1e9
        _expect(good, f"{place}.{name} is {value!r}, expected nanoseconds from 0 to 1e9")
    rate = Rate(**entry)
    _expect(rate.time(Work(1024, 1024 * 1024), 64) > 0, f"{place} says that work takes no time")
    return rate


def _crossing(entry: dict, place: str) -> Crossing:
    from sparse_attention.patterns.text import parse as parse_pattern

    family = entry.get("family")
    try:
        known = repr(parse_pattern(family)) == family
    except ValueError:
        known = False
    _expect(known, f"{place}.family is {family!r}, expected the repr of a pattern")
    dense_from, low, high = (_whole(entry, name, place, optional=True) for name in ("dense_from", "low", "high"))
    _expect((low is None) == (dense_from is None), f"{place} has low {low!r} but dense_from {dense_from!r}")
    ends = [end for end in (dense_from, low) if end is not None]
    ascending = ends == sorted(ends) and (high is None or not ends or ends[-1] < high)
    _expect(ascending, f"{place} has dense_from {dense_from}, low {low} and high {high}, expected them to ascend")
    estimate = entry.get("estimate")
    if estimate is not None:
        number = isinstance(estimate, (int, float)) and not isinstance(estimate, bool)
        inside = number and (low or 1) <= estimate <= (high or math.inf)
        _expect(inside, f"{place}.estimate is {estimate!r}, expected it between low, {low}, and high, {high}")
    sizes = [_whole(entry, name, place) for name in ("head_dim", "heads", "threads")]
    return Crossing(family, _one_of(entry, "dtype", DTYPES, place), *sizes, dense_from, low, high, estimate)


def _entries(data: dict, name: str) -> list[tuple[str, dict]]:
    listed = data.get(name)
    good = isinstance(listed, list) and all(isinstance(entry, dict) for entry in listed)
    _expect(good, f"{name} is no list of objects")
    return [(f"{name}[{n}]", entry) for n, entry in enumerate(listed)]


def _whole(entry: dict, name: str, place: str, optional: bool = False) -> int | None:
    value = entry.get(name)
    if value is None and optional:
        return None
    good = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31
    _expect(good, f"{place}.{name} is {value!r}, expected a positive integer")
    return value


def _one_of(entry: dict, name: str, choices: tuple[str, ...], place: str) -> str:
    _expect(entry.get(name) in choices, f"{place}.{name} is {entry.get(name)!r}, expected one of {', '.join(choices)}")
    return entry[name]


def _expect(good: bool, why_not: str) -> None:
    if not good:
        raise ValueError(why_not)


def _processor(machine_class: str) -> str:
    """A machine class without its number of cores."""
    return re.sub(r"/\d+c$", "", machine_class)


def _cores(name: str) -> int:
    found = re.search(r"(\d+)c$", name)
    return int(found[1]) if found else 0
