"""What calibration leaves on the disk: the machine's table, and the runs of one that was cut short."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparse_attention import rates
from sparse_attention.breakeven.store import Run
from sparse_attention.rates import Table

KIND = "calibration"
Runs = Mapping[str, Run]  # "rates" or "crossings" and the number of threads, as "rates/1"


def stored(runs: Runs) -> dict[str, Any]:
    """For the disk."""
    return {"kind": KIND, "runs": {name: run.as_dict() for name, run in runs.items()}}


def load_runs(path: str) -> Runs:
    """What `stored` made; ValueError for another file."""
    try:
        data = json.loads(Path(path).read_text())
        if data["kind"] != KIND:
            raise ValueError(f"its kind is {data['kind']!r}")
        return {name: Run.from_dict(run) for name, run in data["runs"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no calibration that was cut short: {error!r}") from error


def keep_others(data: dict[str, Any], path: Path, wanted: Iterable[tuple[str, str, int]]) -> int:
    """Take over the crossings of the families that were not wanted now from the table in a file; returns how many."""
    try:
        rates.load(path, data["class"])
        theirs = json.loads(path.read_text())
    except (OSError, ValueError):
        return 0
    if theirs["class"] != data["class"]:
        return 0
    measured = set(wanted)
    kept = [entry for entry in theirs["crossings"] if (entry["family"], entry["dtype"], entry["head_dim"]) not in measured]
    data["crossings"] += kept
    return len(kept)


def write(data: Mapping[str, Any], path: Path) -> Table:
    """Put a table into a file, all of it or nothing, and return it as dispatch will see it."""
    found = rates.parse(data, data["class"], str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.stem, suffix=".partial", delete=False) as f:
        json.dump(data, f, indent=1)
        f.write("\n")
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)
    return found
