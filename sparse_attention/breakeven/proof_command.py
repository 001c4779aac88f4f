"""The command `proof`: measure or reread a session, draw gates from it, try the controls, write what came out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .case import Case, load_list, select
from .controls import Control, Outcome, run_controls
from .machine import default_threads, describe
from .progress import Progress, Silent, duration
from .proof import LEAST_BLOCKS, Injected, Proof, Session, analyse, load_sessions, policy_of_session, save, sessions_of
from .proof_text import markdown, put, summary
from .race import Race, Settings
from .store import Run
from .verdict import ExitCode

BLOCKS = 60


def add_command(command: Callable[..., Any], seconds: Callable[[str], float], positive: Callable[[str], int]) -> None:
    proof = command("proof", _proof, [], "false alarms, detection and refusals of the gate on real kernels: about 15 minutes")
    proof.add_argument("--table", metavar="MODULE", help="holds INJECTED and CONTROLS: perf.proof, or perf.proof_cuda with a CUDA clock")
    proof.add_argument("--blocks", type=positive, default=BLOCKS, help="fresh processes a case; 22 at least, 25 for bounds")
    proof.add_argument("--budget", type=seconds, default=14 * 60.0, metavar="TIME", help="for the blocks, such as 14m")
    proof.add_argument("--threads", type=positive, help="1 unless given; all cores beside a GPU")
    proof.add_argument("--device", default="cpu", help="cpu, cuda, cuda-graph or the module:Class of a clock")
    proof.add_argument("--runs", type=positive, default=1000, help="gates drawn for each rate")
    proof.add_argument("--seed", type=int, default=0)
    proof.add_argument("--cases", action="append", default=[], metavar="PATTERN", help="shell pattern on ids, tags and names of controls")
    proof.add_argument("--json", metavar="FILE", help="write the blocks here, after every block")
    proof.add_argument("--resume", metavar="FILE", help="go on from the blocks of a proof that was cut short")
    proof.add_argument("--stored", metavar="FILE", help="take the blocks of a stored proof instead of measuring")
    proof.add_argument("--only", choices=("rates", "controls"), help="leave out the other half")
    proof.add_argument("--results", default="perf/proofs", metavar="DIR", help="write the proof below here, by machine class")
    proof.add_argument("--page", default="docs/proof.md", metavar="FILE", help="put the summary into this page; 'none' for nowhere")
    proof.add_argument("--dry-run", action="store_true", help="say what would be measured")
    proof.add_argument("--quiet", action="store_true", help="no progress")


def _proof(options) -> int:
    table = options.table or ("perf.proof_cuda" if options.device.startswith("cuda") else "perf.proof")
    injected: Sequence[Injected] = load_list(table, "INJECTED")
    controls: Sequence[Control] = load_list(table, "CONTROLS")
    injected, controls = _chosen(injected, controls, options.cases)
    options.threads = options.threads or default_threads(options.device)
    if options.dry_run:
        return _say(options, injected, controls)
    progress = Silent() if options.quiet else Progress()
    machine, threads, sessions, kept = describe(options.device), options.threads, [], ()
    if options.stored:
        sessions, machine, threads, kept = load_sessions(options.stored)
    elif options.only != "controls" and injected:
        run = _measured(options, injected, progress)
        machine, found = run.machine, sessions_of(run, injected)
        sessions = [s for s in found if s.blocks >= LEAST_BLOCKS]
        for line in _left_out(run, injected, found):
            print(line)
    proof = Proof(machine, threads, (), {}, {}, {}, {})
    if options.only != "controls" and (injected or options.stored):
        proof = analyse(sessions, machine, threads, options.runs, options.seed, progress.line)
    if options.only != "rates" and not options.stored:
        kept = tuple(_tried(controls, threads, progress))
    proof = dataclasses.replace(proof, controls=tuple(kept))
    for path in save(proof, Path(options.results) / machine["class"].replace("/", "-")):
        print(f"wrote {path}")
    if options.page != "none":
        put(Path(options.page), machine["class"], markdown(proof))
        print(f"wrote {options.page}")
    print(summary(proof))
    fallen = [c["name"] for c in proof.controls if c["held"] is False]
    print(f"{len(fallen)} of {len(proof.controls)} controls did not hold" if fallen else "every control that was tried held")
    return ExitCode.WRONG if fallen else ExitCode.OK


def _chosen(
    injected: Sequence[Injected], controls: Sequence[Control], patterns: Sequence[str]
) -> tuple[Sequence[Injected], Sequence[Control]]:
    """Those that a pattern matches (all, without patterns); NothingToCheck for a pattern that matches neither."""
    named = {case.id: case for case in (*(item.plain for item in injected), *(Case(c.name, "a:control") for c in controls))}
    ids = {case.id for case in select(named.values(), patterns, "full")}
    return [item for item in injected if item.plain.id in ids], [control for control in controls if control.name in ids]


def _measured(options, injected: Sequence[Injected], progress: Progress) -> Run:
    cases = [case for item in injected for case in item.cases]
    policy = policy_of_session(options.blocks)
    settings = Settings(options.budget, options.threads, policy, options.device, options.seed, first_look_share=1.0)
    path = options.json or options.resume
    resume = Run.load(options.resume) if options.resume else None
    race = Race(cases, settings, progress, save=lambda run: run.save(path) if path else None, resume=resume)
    race.scout()
    race.first_look()
    progress.done()
    return race.run


def _left_out(run: Run, injected: Sequence[Injected], sessions: Sequence[Session]) -> list[str]:
    """A line for each case of too few blocks, with the reason if one is on record."""
    blocks = {s.case: s.blocks for s in sessions}
    lines = []
    for item in injected:
        count = blocks.get(item.plain.id, 0)
        if count < LEAST_BLOCKS:
            records = [run.records[case.id] for case in item.cases]
            reasons = [r.error or r.scout.get("reason", "") for r in records if not r.ready]
            why = f": {reasons[0]}" if reasons else ""
            lines.append(f"{item.plain.id}: left out, {count} of {LEAST_BLOCKS} blocks undisturbed{why}")
    return lines


def _tried(controls: Sequence[Control], threads: int, progress: Progress) -> list[dict[str, Any]]:
    outcomes: list[Outcome] = []
    for outcome in run_controls(controls, threads):
        outcomes.append(outcome)
        progress.line(f"control {len(outcomes)} of {len(controls)}: {outcome.name}: exit {outcome.exit}")
    return [outcome.as_dict() for outcome in outcomes]


def _say(options, injected: Sequence[Injected], controls: Sequence[Control]) -> int:
    print(f"{options.blocks} blocks of these, {options.threads} threads, {duration(options.budget)} at most:")
    for item in injected:
        slowed = ", ".join(f"+{100 * x:.3g} %" for x in item.slowed)
        print(f"  {item.plain.id}" + (f", and with work repeated: {slowed}" if slowed else ""))
    print("then these controls:")
    for control in controls:
        print(f"  {control.name}: python -m {' '.join(control.arguments)}")
    return ExitCode.OK
