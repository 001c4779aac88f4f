"""What a pytest session knows about performance: which tests race, what was measured, and the exit code that follows."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import pytest

from . import clock as clocks
from . import machine, table
from .case import Case, NothingToCheck, Workload
from .collected import Tables, tables_of
from .compare import Comparisons
from .forwarding import comparable
from .fresh import BlockWriter
from .progress import Progress, Silent
from .race import Race, Settings
from .replay import prepare, replay
from .result import Result, results
from .store import Run
from .terms import Terms, terms
from .thresholds import key as machine_key
from .unheard import FIXTURES, Unheard
from .verdict import ExitCode, Sequential, TwoStage, Verdict


class Gate:
    """Registered as a plugin of its own, so that its methods are hooks."""

    def __init__(self, config: pytest.Config, options: Mapping[str, Any]):
        """`options` as they were given, before plugins change them."""
        self._config = config
        option = config.option
        policy = Sequential() if option.breakeven_policy == "sequential" else TwoStage()
        device = option.breakeven_device = option.breakeven_device or "cpu"
        threads = option.breakeven_threads or machine.default_threads(device)
        self._settings = Settings(option.breakeven_budget or Settings.budget_s, threads, policy, device)
        target = option.breakeven_worker
        given = comparable(options)
        self._worker = BlockWriter(target, threads, self._settings.device, given) if target else None
        self._comparisons = Comparisons(config, self._settings, given)
        self._cases: dict[str, Case] = {}
        self._tables = Tables()
        self._terms = Terms([])
        self._run: Run | None = None
        self._raced: dict[str, Result] = {}
        self._compared: dict[str, Result] = {}
        self._racing: dict[str, str | None] = {}  # node id -> id of the case that it names
        self._answered: set[str] = set()
        self._unheard = Unheard(config)
        self._slow_nodes: set[str] = set()
        self._other_failures = 0
        self._code: ExitCode | None = None

    def race(self, request: pytest.FixtureRequest, case: Case, impl: Literal["dense", "sparse"]) -> Result:
        """Measure everything selected, once; hand this half's times to pytest-benchmark; judge in the sparse half."""
        if impl not in ("dense", "sparse"):
            raise ValueError(f"impl must be 'dense' or 'sparse', got {impl!r}")
        if self._run is None:
            self._measure({**self._cases, case.id: case})
        if case.id not in self._raced:
            raise ValueError(f"case {case.id!r} was not selected with the others: parametrize the test with a `case`")
        self._answered.add(request.node.nodeid)
        found = self._raced[case.id]
        record = self._run.records[case.id]
        if record.blocks and "benchmark" in request.fixturenames:
            samples = [s for b in record.blocks for s in (b.candidate_s if impl == "sparse" else b.baseline_s)]
            replay(request, samples, {"breakeven": found.as_dict()})
        if impl == "sparse":
            self._conclude(request, found)
        return found

    def compare(self, request: pytest.FixtureRequest, key: str, workload: Workload, floor: float) -> Result:
        """Judge two callables of a running test; in a worker, measure one block of them instead."""
        case = self._held_to(Case(key, "pytest:test", floor=floor))
        if self._worker:
            self._worker.block(key, request.node.nodeid, workload)
            return Result(key, Verdict.INCONCLUSIVE, floor)
        with self._shown() as progress:
            found = self._comparisons.judge(key, request.node.nodeid, case, progress)
        if self._terms.unjudged and found.verdict in (Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE):
            found = replace(found, verdict=Verdict.NOT_EVALUATED, reason=self._terms.unjudged)
        self._answered.add(request.node.nodeid)
        self._compared[key] = found
        self._conclude(request, found)
        return found

    @property
    def results(self) -> list[Result]:
        return [*self._raced.values(), *self._compared.values(), *self._without_result()]

    def prepare(self, items: list[pytest.Item]) -> None:
        """Before pytest-benchmark looks for its fixture: give it to the tests that race. Nothing is deselected yet."""
        raced = [(item.module, case) for item in items if (case := _case_of(item)) is not None]
        self._tables = tables_of({module for module, _ in raced}, [case for _, case in raced])
        for item in items:
            case = _case_of(item)
            if case is not None and hasattr(self._config.option, "benchmark_only"):
                prepare(item, group=case.id)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        for item in items:
            case = _case_of(item)
            if set(FIXTURES) & set(getattr(item, "fixturenames", ())):
                self._racing[item.nodeid] = case and case.id
                if hasattr(self._config, "workerinput"):
                    item.user_properties.append(_RACES)  # travels in reports to xdist's controller, which collects nothing
            if case is not None:
                self._cases[case.id] = case
            elif "breakeven" in getattr(item, "fixturenames", ()):
                self._comparisons.nodes[item.nodeid] = f"{item.path}::{item.nodeid.partition('::')[2]}"
        if self._selected and not self._worker and not self._config.option.collectonly:
            self._refuse_what_would_judge_nothing()
            self._agree(self._cases)

    def pytest_collectreport(self, report):
        self._unheard.collected(report)

    def pytest_runtest_logstart(self, nodeid):
        if self._worker:
            self._worker.start(nodeid)

    def pytest_runtest_logfinish(self, nodeid):
        if self._worker:
            self._worker.end(nodeid)

    def pytest_runtest_logreport(self, report):
        if _RACES in map(tuple, report.user_properties):
            self._racing.setdefault(report.nodeid, None)
        if report.nodeid in self._racing:
            self._unheard.ran(report)
        if report.failed and report.nodeid not in self._slow_nodes:
            self._other_failures += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        if self._worker:
            self._worker.finish()
        judging = self._selected and not self._worker and not self._config.option.collectonly
        if judging:
            self._store()
        if not judging or int(exitstatus) not in (0, 1) or self._other_failures:
            return
        option = self._config.option
        if self.results or not option.breakeven_allow_not_evaluated:
            self._code = self._terms.exit_code(self.results, option.breakeven_strict, option.breakeven_allow_not_evaluated)
            session.exitstatus = self._code

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter, exitstatus):
        if not self.results and not self._unheard.unsure:
            return
        terminalreporter.section("break-even")
        if self._run is not None:
            raced = list(self._raced.values())
            terminalreporter.write_line(table.headline(self._run, raced))
            memory = self._config.option.breakeven_memory
            terminalreporter.write_line(table.text(raced, self._terms.labels, memory))
            for remark in self._terms.remarks(self._run, raced):
                terminalreporter.write_line(remark)
        if others := [*self._compared.values(), *self._without_result()]:
            terminalreporter.write_line(table.text(others, ("baseline", "candidate")))
        for line in self._unheard.unsure:
            terminalreporter.write_line(line)
        code = self._code if self._code is not None else exitstatus
        terminalreporter.write_line(f"{table.tally(self.results)}   exit {int(code)}")

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_machine_info(self, config, machine_info):
        machine_info["breakeven"] = machine.describe()

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_json(self, config, benchmarks, output_json):
        output_json["breakeven"] = {r.id: r.as_dict() for r in self.results}

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_compare_machine_info(self, config, benchmarksession, machine_info, compared_benchmark):
        here = machine_info.get("breakeven", {}).get("class")
        there = compared_benchmark["machine_info"].get("breakeven", {}).get("class")
        if here != there:
            message = f"times of {there} are compared with times of {here}: only ratios travel"
            benchmarksession.logger.warning(message)

    @property
    def _selected(self) -> bool:
        return bool(self._racing or self._without_result())

    def _without_result(self) -> list[Result]:
        named = {node for node, case in self._racing.items() if case in self._raced}
        return self._unheard.results(self._answered | named)

    def _agree(self, cases: dict[str, Case]) -> None:
        option = self._config.option
        if option.breakeven_base and len(self._racing) == len(self._comparisons.nodes):
            raise pytest.UsageError("--breakeven-base races tables of cases: no selected test uses breakeven_race")
        try:
            chosen = self._settings.threads, self._settings.device
            self._terms = terms(option, cases.values(), *chosen, prefix="breakeven_", known=self._tables.ids)
            if not option.breakeven_base and option.breakeven_thresholds is None:
                self._tables.require_cases(machine_key(machine.machine_class(self._settings.device), *chosen))
        except NothingToCheck as error:
            pytest.exit(f"breakeven: {error}", returncode=int(ExitCode.NOTHING_CHECKED))
        except (ValueError, OSError) as error:
            raise pytest.UsageError(str(error)) from error
        self._settings = replace(self._settings, **self._terms.settings)

    def _measure(self, cases: dict[str, Case]) -> None:
        path = self._config.option.breakeven_json
        if cases.keys() != self._cases.keys():
            self._agree(cases)
        with self._shown() as progress:
            race = Race(self._terms.cases, self._settings, progress, save=lambda run: run.save(path) if path else None)
            self._run = race.run
            race.execute()
            progress.done()
        self._raced = {r.id: r for r in results(self._run, self._settings.policy)}

    def _held_to(self, case: Case) -> Case:
        """With this machine's floor, where a file of them was given; the floor in the test holds on every machine otherwise."""
        option = self._config.option
        if option.breakeven_base or not option.breakeven_thresholds:
            return case
        return terms(option, [case], self._settings.threads, self._settings.device, prefix="breakeven_").cases[0]

    def _store(self) -> None:
        """The comparisons of tests, beside the cases that were raced."""
        path = self._config.option.breakeven_json
        if path and self._compared:
            run = self._run or Run(machine.describe(self._settings.device), self._settings.as_dict(), {})
            self._comparisons.add_to(run, self._without_result())
            run.save(path)

    def _conclude(self, request: pytest.FixtureRequest, found: Result) -> None:
        request.node.user_properties.append(("breakeven", found.as_dict()))
        if found.verdict in (Verdict.WRONG, Verdict.SUSPICIOUS):
            pytest.fail(f"{found.id}: {found.verdict.value.lower()}, so it has no time: {found.reason}", pytrace=False)
        if found.verdict is Verdict.NOT_EVALUATED:
            pytest.skip(f"not evaluated: {found.reason}")
        if found.verdict is Verdict.FAIL:
            self._slow_nodes.add(request.node.nodeid)
            interval = found.interval
            pytest.fail(
                f"{found.id}: {interval.speedup:.3g}x [{interval.low:.3g}, {interval.high:.3g}] of the baseline's speed, "
                f"below {found.floor:.3g}x",
                pytrace=False,
            )

    def refuse_company(self) -> None:
        """At setup, so that a test that skips itself is refused too."""
        if hasattr(self._config, "workerinput"):  # in a worker of xdist, where a usage error would be an internal one
            pytest.fail("break-even tests time one thing at a time: run them without xdist (-n 0)", pytrace=False)

    def _refuse_what_would_judge_nothing(self) -> None:
        option = self._config.option
        for name in ("benchmark_disable", "benchmark_skip"):
            if getattr(option, name, False):
                flag = "--" + name.replace("_", "-")
                raise pytest.UsageError(f"{flag} would judge nothing: leave it out, or deselect the break-even tests")
        device, blocking = self._settings.device, os.environ.get("CUDA_LAUNCH_BLOCKING", "")
        if blocking not in ("", "0"):
            raise pytest.UsageError(f"CUDA_LAUNCH_BLOCKING={blocking} times every launch: unset it for break-even tests")
        try:
            clocks.kind(device)
            machine.machine_class(device)
        except Exception as error:  # of a clock of one's own too, whatever its module raises
            raise pytest.UsageError(f"--breakeven-device: {' '.join(str(error).split())}") from error

    @contextlib.contextmanager
    def _shown(self):
        """Progress on the real standard error, unless pytest was told to be quiet."""
        if self._config.option.verbose < 0:
            yield Silent()
            return
        capture = self._config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            sys.stderr.write("\n")
            yield Progress(sys.stderr)


_RACES = ("breakeven", "races")


def _case_of(item: pytest.Item) -> Case | None:
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    return case if isinstance(case, Case) and "breakeven_race" in item.fixturenames else None
