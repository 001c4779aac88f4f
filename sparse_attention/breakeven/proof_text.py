"""The proof as markdown, and its place in a page: a block for each machine class between two comments."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .proof import BELOW, MARGIN, REGRESSION, TWIN, Proof
from .regression import floor_of
from .resampling import POLICIES, blocks_needed, mean_rate

CASES_IN_A_SUITE = 50
_RULES = {
    "two-stage": "two-stage: 5 blocks at 5 %, suspects 10 fresh ones at 1 %",
    "two-stage, 0.01 %": "two-stage: 5 blocks at 5 %, suspects 10 fresh ones at 0.01 %",
    "sequential": "sequential: 5, 10 and 20 blocks, 1 % in all",
    "10 blocks": "10 blocks at 1 %",
    REGRESSION: "regression: the kernel against itself, 10 blocks at 1 %, floor {floor:g}",
}


def markdown(proof: Proof) -> str:
    """What was measured, false alarms, detection, and the negative controls."""
    machine = proof.machine
    commit = (machine["commit"] or "no commit")[:10] + (" with uncommitted changes" if machine["dirty"] else "")
    torch = machine["versions"].get("torch")
    threads = f"{proof.threads} thread{'s' * (proof.threads > 1)}"
    parts = [f"{machine['time'][:10]}, {machine['class']} ({machine['cpu']}), {threads}, torch {torch}, commit {commit}."]
    if proof.sessions:
        parts += [_sessions(proof), "**False alarms**, with every floor at the true speedup", _alarms(proof), _suites(proof)]
        parts += ["**Detection**: shares of gates that say FAIL when the kernel repeats part of its tiles", _power(proof)]
        parts += [f"**The same with floors {100 * MARGIN:g} % below the true speedups**; at 0 % the twin is judged", _margin(proof)]
        parts += [_method(proof)]
    if proof.controls:
        parts += ["**Negative controls**", _controls(proof.controls)]
    return "\n\n".join(parts)


def put(page: Path, machine_class: str, body: str) -> None:
    """Replace this class's block of the page, or append one; the page is made if it is not there."""
    start, end = f"<!-- proof of {machine_class}: written by the command proof -->", f"<!-- end of proof of {machine_class} -->"
    block = f"{start}\n## {machine_class}\n\n{body}\n{end}"
    text = page.read_text() if page.exists() else "# The proof\n"
    marked = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    found = marked.findall(text)
    if len(found) > 1:
        raise ValueError(f"{page} holds {len(found)} blocks for {machine_class}, expected one")
    page.write_text(marked.sub(lambda _: block, text) if found else f"{text.rstrip()}\n\n{block}\n")


def summary(proof: Proof) -> str:
    """One line a gate, for a terminal."""
    lines = []
    for gate, orders in proof.alarms.items():
        alarms = mean_rate(list(orders["shuffled"].values())) if orders["shuffled"] else None
        cases = proof.power.get(gate, {}).values()
        x = min((x for rates in cases for x in rates if x >= 0.05), default=0.05)
        found = [rates[x] for rates in cases if x in rates]
        twin = mean_rate(list(orders[TWIN].values())) if orders.get(TWIN) else "not measured"
        lines.append(f"{gate}: false alarms {alarms}, of the twin {twin}; {100 * x:.3g} % slowdowns found: {mean_rate(found) if found else 'not measured'}")
    for gate, orders in proof.suites.items():
        rates = [f"{rates[0.0]} {order}" for order, rates in orders.items()]
        what = f"suites of {CASES_IN_A_SUITE} cases that fail with every floor at its true speedup"
        lines.append(f"{gate}: {what}: {', '.join(rates)}")
    for control in proof.controls:
        state = {True: "held", False: "DID NOT HOLD", None: "not tried"}[control["held"]]
        lines.append(f"control: {control['name']}: {state} (exit {control['exit']}, expected {_codes(control['expected'])})")
    return "\n".join(lines)


def _sessions(proof: Proof) -> str:
    rows = []
    for s in proof.sessions:
        real = [f"{100 * x:.3g} % is {100 * s.slowdown(x)[0]:.1f} %" for x in s.against_plain]
        rows.append([f"`{s.case}`", str(s.blocks), f"{100 * s.sd:.2f} %", ", ".join(real) or "-"])
    return _table(["case", "blocks", "block sd", "repeating a share of the tiles costs"], rows)


def _alarms(proof: Proof) -> str:
    cases = [s.case for s in proof.sessions]
    rows = []
    for gate, orders in proof.alarms.items():
        for order, rates in orders.items():
            if rates:
                each = [str(rates[c].caught) + f" of {rates[c].runs}" if c in rates else "-" for c in cases]
                rows.append([_rule(gate, proof), order, *each, str(mean_rate(list(rates.values())))])
    return _table(["gate", "blocks taken", *(f"`{c}`" for c in cases), "all [95 % bounds]"], rows)


def _suites(proof: Proof) -> str:
    rows = []
    for gate, orders in proof.suites.items():
        rows += [[_rule(gate, proof), order, *(str(rates[b]) for b in BELOW)] for order, rates in orders.items()]
    distances = ("floors at the true speedups" if not b else f"{100 * b:g} % below" for b in BELOW)
    head = [f"suites of {CASES_IN_A_SUITE} cases that fail", "blocks taken", *distances]
    return _table(head, rows)


def _power(proof: Proof) -> str:
    rows = []
    slowdowns = sorted({x for cases in proof.power.values() for rates in cases.values() for x in rates if x})
    for gate, cases in proof.power.items():
        for case, rates in cases.items():
            rows.append([_rule(gate, proof), f"`{case}`", *(str(rates[x]) if x in rates else "-" for x in slowdowns)])
        shared = proof.disjoint.get(gate, {})
        if shared and cases:
            cells = [f"{shared[x].caught} of {shared[x].runs}" if x in shared else "-" for x in slowdowns]
            rows.append([_rule(gate, proof), "gates that share no block", *cells])
    return _table(["gate", "case", *(f"{100 * x:.3g} %" for x in slowdowns)], rows)


def _margin(proof: Proof) -> str:
    slowdowns = sorted({x for cases in proof.margin.values() for rates in cases.values() for x in rates})
    rows = [
        [_rule(gate, proof), f"`{case}`", *(str(rates[x]) if x in rates else "-" for x in slowdowns)]
        for gate, cases in proof.margin.items()
        for case, rates in cases.items()
    ]
    return _table(["gate", "case", *(f"{100 * x:.3g} %" for x in slowdowns)], rows)


def _method(proof: Proof) -> str:
    runs = max((r.runs for orders in proof.alarms.values() for rates in orders.values() for r in rates.values()), default=0)
    needed = {gate: blocks_needed(policy) for gate, policy in POLICIES.items()}
    fewest = min(s.blocks for s in proof.sessions)
    judges = ", ".join(f"{gate} judges {n} and leaves {fewest - n} or more" for gate, n in needed.items())
    unbounded = [gate for gate, n in needed.items() if fewest - math.ceil(fewest / 10) < n + 2]
    bounds = f" Of {', '.join(unbounded)} too few blocks are left for that: bounds are 0 and 100 %." if unbounded else ""
    return (
        f"Every block is a fresh process. Each rate is of {runs} gates drawn from the blocks above: *shuffled* over the session, "
        "or *in order*, as a real gate's; the floor is the mean speedup of the blocks that the gate does not judge "
        f"({judges}), and is uncertain itself, which adds alarms. *Repeated* gates draw with replacement and have the mean of all "
        "blocks for their floor. *Of the twin*: the same call of another pattern object is judged, with the kernel's own speedup for its "
        "floor, which shows what its place among the others and in memory does. Bounds are the wider of Clopper and Pearson's for that many gates and two standard errors by "
        f"leaving out a tenth of the session at a time.{bounds} Suites take the cases above in turn."
    )


def _controls(controls: Sequence[Mapping]) -> str:
    rows = []
    for c in controls:
        held = {True: "yes", False: "**no**", None: "not tried"}[c["held"]]
        said = (c["said"] or "").splitlines()
        rows.append([c["name"], str(c["exit"]) if c["exit"] is not None else "-", _codes(c["expected"]), held, _cell(said)])
    return _table(["control", "exit", "expected", "held", "it said"], rows, "lrrll")


def _cell(lines: Sequence[str]) -> str:
    text = " / ".join(lines).replace("|", "\\|").replace("`", "'")
    return f"`{text[:160]}`" if text else ""


def _codes(codes: Sequence[int]) -> str:
    return " or ".join(map(str, codes))


def _rule(gate: str, proof: Proof) -> str:
    return _RULES[gate].format(floor=floor_of(proof.machine["class"]))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], sides: str = "") -> str:
    rule = [":--" if side == "l" else "--:" for side in sides or "l" + "r" * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))

