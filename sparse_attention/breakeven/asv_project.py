"""The asv side of `ingest`: configuration, repository, benchmarks and machines, through asv's own library."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

SETTINGS = "SPARSE_ATTENTION_PERF_"  # variables that change what the benchmarks measure


class Project:
    """What an asv.conf.json describes; `results` overrides its results_dir."""

    def __init__(self, config: str | os.PathLike = "asv.conf.json", results: str | os.PathLike | None = None):
        if importlib.util.find_spec("asv") is None:
            raise ImportError("ingest writes through asv's own library: pip install asv")
        from asv.config import Config
        from asv.util import UserError

        path = Path(config).resolve()
        if not path.is_file():
            raise ValueError(f"config must be asv's configuration, got {os.fspath(config)!r}, which does not exist")
        self.root = path.parent
        try:
            self.conf = Config.load(str(path))
        except (UserError, ValueError) as error:
            raise ValueError(f"{path} is not asv's configuration: {error}") from error
        conf = self.conf
        conf.results_dir = str(Path(results).resolve() if results else self.root / conf.results_dir)
        conf.benchmark_dir = str(self.root / conf.benchmark_dir)
        if (self.root / conf.repo).is_dir():
            conf.repo = str(self.root / conf.repo)

    @property
    def results_dir(self) -> Path:
        return Path(self.conf.results_dir)

    @property
    def branches(self) -> list[str]:
        return [branch or "the default branch" for branch in self.conf.branches]

    def resolve(self, name: str) -> str | None:
        """The full hash of a commit; None where git knows none of that name."""
        from asv.repo import NoSuchNameError

        try:
            return self._repo.get_hash_from_name(name)
        except (NoSuchNameError, *self._failed):
            return None

    def on_branch(self, commit: str) -> bool:
        """Whether `asv publish` shows it."""
        return commit in self._branch_commits

    @cached_property
    def benchmarks(self) -> dict[str, dict[str, Any]]:
        """By name, found in a process of its own by the script with which asv finds them."""
        from asv.runner import BENCHMARK_RUN_SCRIPT
        from asv.util import load_json

        environment = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
        here = str(Path(__file__).parents[2])
        environment["ASV_PYTHONPATH"] = os.pathsep.join(filter(None, [here, environment.get("ASV_PYTHONPATH")]))
        with tempfile.TemporaryDirectory() as folder:
            found = os.path.join(folder, "found.json")
            command = [sys.executable, BENCHMARK_RUN_SCRIPT, "discover", self.conf.benchmark_dir, found]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
                raise ValueError(f"asv finds no benchmarks in {self.conf.benchmark_dir}: {said}")
            return {benchmark["name"]: benchmark for benchmark in load_json(found)}

    def benchmark(self, name: str) -> Mapping[str, Any]:
        """asv's description of the benchmark whose name ends so."""
        found = [benchmark for key, benchmark in self.benchmarks.items() if key.endswith(f".{name}")]
        if len(found) != 1:
            raise ValueError(f"{self.conf.benchmark_dir} must have one benchmark {name}, got {sorted(self.benchmarks)}")
        return found[0]

    def machine(self, name: str) -> dict[str, Any]:
        """asv's fields of a machine: those stored, since asv begins a new curve where one differs, else those that
        `asv machine --yes --machine NAME` makes, which is the name alone.
        """
        from asv.machine import Machine
        from asv.util import load_json

        stored = self.results_dir / name / "machine.json"
        try:
            return load_json(str(stored), Machine.api_version) if stored.exists() else {"machine": name}
        except self._failed as error:
            raise ValueError(f"{stored} is not asv's: {error}") from error

    def results(
        self,
        machine: Mapping[str, Any],
        python: str,
        versions: Mapping[str, str | None],
        commit: str,
        environment: str,
        variables: Mapping[str, str],
    ) -> Any:
        """Empty results, with the parameters that `asv run` has: pinned requirements by their version, others by name."""
        from asv.results import Results

        asked = self.conf.matrix.get("req", {})
        needed = {name: _pinned(versions.get(name)) if any(pins) else "" for name, pins in asked.items()}
        params = {**machine, "python": python, **needed}
        return Results(params, needed, commit, self._repo.get_date(commit), python, environment, variables)

    def file(self, machine: Mapping[str, Any], commit: str, environment: str) -> str:
        from asv.results import get_filename

        return get_filename(machine["machine"], commit, environment)

    def save_machine(self, fields: Mapping[str, Any], folder: str) -> None:
        from asv.machine import Machine

        machine = Machine()
        vars(machine).update(fields)
        machine.save(folder)

    def save_benchmarks(self, folder: str) -> None:
        """Write benchmarks.json as `asv run` does."""
        from asv.benchmarks import Benchmarks
        from asv.util import write_json

        write_json(os.path.join(folder, "benchmarks.json"), self.benchmarks, Benchmarks.api_version)

    @cached_property
    def _repo(self) -> Any:
        from asv.repo import get_repo

        try:
            return get_repo(self.conf)
        except self._failed as error:
            raise ValueError(f"asv cannot use the repository {self.conf.repo!r}: {error}") from error

    @cached_property
    def _branch_commits(self) -> set[str]:
        from asv.repo import NoSuchNameError

        found: set[str] = set()
        for branch in self.conf.branches:
            try:
                found.update(self._repo.get_branch_commits(branch))
            except (NoSuchNameError, *self._failed):
                continue
        return found

    @property
    def _failed(self) -> tuple[type[Exception], ...]:
        from asv.util import ProcessError, UserError

        return UserError, ProcessError


def _pinned(version: str | None) -> str:
    """2.13.0 of 2.13.0+cpu: which build it was, the machine says."""
    return (version or "").partition("+")[0]
