"""What is raced: a `Case` is a row of a table that any process can rebuild, a `Workload` is what it builds."""

from __future__ import annotations

import fnmatch
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


class Unavailable(Exception):
    """Raised by a builder whose case cannot run on this machine; the case is then NOT EVALUATED with this reason."""


class NotInBase(Unavailable):
    """Raised by a builder that races two revisions, whose base does not have the case: a new one, that has nothing to race."""


class NothingToCheck(LookupError):
    """What was asked for leaves nothing to check, or something that must be checked is gone."""


@dataclass(frozen=True)
class Case:
    """One race. `build` names a function ("package.module:function") that takes `args` and returns a `Workload`."""

    id: str
    build: str
    args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    floor: float = 1.0  # the least speedup over the baseline
    tags: tuple[str, ...] = ()
    share: str | None = None  # cases of equal share have the same inputs and baseline: it is timed once a round for all
    limit_s: float | None = None  # no baseline: the candidate is held against this time
    allowance_s: float = 0.0  # taken off the candidate's time before the ratio is formed
    columns: tuple[str, ...] = ()  # further rivals to time, for information

    def __post_init__(self):
        if self.build.count(":") != 1:
            raise ValueError(f"build must be 'package.module:function', got {self.build!r}")
        if not self.floor > 0:
            raise ValueError(f"floor must be a positive speedup, got {self.floor}")
        if self.limit_s is not None and self.share is not None:
            raise ValueError(f"a case with limit_s has no baseline to share, got share={self.share!r}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Case:
        return cls(**{**data, "tags": tuple(data["tags"]), "columns": tuple(data["columns"])})

    def load(self) -> Workload:
        """Build the workload in this process."""
        module, function = self.build.split(":")
        return getattr(importlib.import_module(module), function)(**self.args)


@dataclass
class Workload:
    """Callables of no arguments, over inputs that exist already.

    `check` takes the candidate's output and raises AssertionError when it is wrong for the inputs as they are now; without
    one the output must equal the first baseline's.
    The baseline is the fastest of `baselines`; the first is the default that its users would get.
    """

    candidate: Callable[[], Any]
    baselines: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    check: Callable[[Any], None] | None = None
    inputs: Sequence[Any] = ()  # changed in place between checks: an output kept from an earlier call is then wrong
    refresh: Callable[[int], None] | None = None  # changes the inputs, for a seed, where drawing new values is not enough
    prepare: Callable[[str], None] | None = None  # called with the name of a baseline before it is timed
    columns: Mapping[str, Callable[[], Callable[[], Any]]] = field(default_factory=dict)  # name -> maker of a rival
    work: Mapping[str, float] = field(default_factory=dict)  # that a call must do at least: flops, bytes, pairs, dense_pairs
    scale: float = 1.0  # multiplies the speedup: the ratio of work where rates rather than times are compared
    note: str = ""


def load_table(name: str) -> list[Case]:
    """The list "module:name" of cases (CASES, where no name is given); modules of the working folder are found too.

    Raises ValueError where there is none, NothingToCheck where it is empty.
    """
    module, _, attribute = name.partition(":")
    found = load_list(module, attribute or "CASES")
    if not all(isinstance(case, Case) for case in found):
        raise ValueError(f"table must be a list of Case, got {name!r} with {next(c for c in found if not isinstance(c, Case))!r}")
    if not found:
        raise NothingToCheck(f"no case is in the table {name!r}")
    return found


def load_list(module: str, attribute: str, folder: str = "") -> list[Any]:
    """A list of `module`, which may lie in `folder`, the working folder unless given. ValueError where there is none."""
    folder = folder or os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return list(getattr(importlib.import_module(module), attribute))
    except Exception as error:
        raise ValueError(f"table '{module}:{attribute}' cannot be loaded: {type(error).__name__}: {error}") from error


def select(cases: Iterable[Case], patterns: Iterable[str] = (), sizes: str = "default") -> list[Case]:
    """Cases whose id or a tag matches any shell pattern (all, without patterns); NothingToCheck for one that matches none.

    Cases tagged "full" are left out unless `sizes` is "full".
    """
    if sizes not in ("default", "full"):
        raise ValueError(f"sizes must be 'default' or 'full', got {sizes!r}")
    cases = list(cases)
    if repeated := [name for name, count in Counter(c.id for c in cases).items() if count > 1]:
        raise ValueError(f"ids must differ, got {repeated[0]!r} more than once")
    offered = [c for c in cases if sizes == "full" or "full" not in c.tags]
    chosen = set()
    for pattern in (patterns := list(patterns)):
        matches = {c.id for c in offered if any(fnmatch.fnmatchcase(name, pattern) for name in (c.id, *c.tags))}
        if not matches:
            raise NothingToCheck(f"no case of sizes {sizes!r} matches {pattern!r}")
        chosen |= matches
    return [c for c in offered if c.id in chosen or not patterns]
