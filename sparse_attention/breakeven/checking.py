"""Whether a live workload's output is right, is computed at all, and follows its inputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from .arrays import arrays, is_floating, memory, sample, size
from .case import Workload
from .suspicion import Print, same_memory


class WrongOutput(Exception):
    """The candidate's output failed its check, or computing it raised."""


class Suspicious(WrongOutput):
    """The candidate was not timed at its work."""


def check(workload: Workload) -> Print:
    """Run the candidate over freed memory full of NaN and check what it returns; without a check, against the first baseline."""
    seen, error = _seen(workload)
    if error is not None:
        raise error
    return seen


def _seen(workload: Workload, poisoned: bool = True) -> tuple[Print | None, WrongOutput | None]:
    """What the output looks like, and what is wrong with it."""
    seen = None
    try:
        if poisoned and len(workload.inputs):
            poison(workload.candidate(), workload.inputs)
        output = workload.candidate()
        seen = Print.of(output)
        if workload.check is not None:
            workload.check(output)
        elif workload.baselines:
            agree(output, next(iter(workload.baselines.values()))())
    except Exception as error:
        wrong = WrongOutput(summary(error))
        if seen is not None and poisoned and _kept(workload, output):
            wrong = Suspicious("it returned the memory of an earlier call without writing it again")
        wrong.__cause__ = error
        return seen, wrong
    return seen, None


def summary(error: Exception) -> str:
    """The error in one line; long ones, such as arrays compared, are cut."""
    kind = "" if isinstance(error, WrongOutput) else type(error).__name__
    return ": ".join(filter(None, (kind, " ".join(str(error).split())[:300])))


def check_fresh(workload: Workload, seed: int) -> None:
    """Check, change the inputs in place, check again: an output kept from an earlier call does not survive this."""
    before = check(workload)
    if workload.refresh is None and not len(workload.inputs):
        _require_computed(workload)
        return
    change([workload], seed)
    check_changed(workload, before)


def change(workloads: Iterable[Workload], seed: int) -> None:
    """Change the inputs in place, those that several workloads share only once."""
    drawn: dict[int, Any] = {}
    for workload in workloads:
        if workload.refresh is not None:
            workload.refresh(seed)
        else:
            drawn.update((id(array), array) for array in workload.inputs)
    redraw(list(drawn.values()), seed)


def check_changed(workload: Workload, before: Print, poisoned: bool = True) -> None:
    """Check after the inputs changed, `before` being the output's print until then."""
    seen, error = _seen(workload, poisoned)
    same = seen is not None and seen == before
    if error is not None and same and seen.values:
        raise Suspicious("its output stayed the same after its inputs changed") from error
    if error is not None:
        raise type(error)(f"after its inputs changed: {error}") from error
    if same and seen.telling:
        raise Suspicious("its output stayed the same after its inputs changed, and its check did not notice")


def recheck(
    workloads: Mapping[str, Workload],
    seed: int,
    progress: Callable[[str], None] = lambda name: None,
    fresh: Container[str] | None = None,
) -> dict[str, WrongOutput]:
    """What is wrong after timing, by name: on the tensors that were timed, and once their values have changed; the second only
    of those in `fresh`, if it is given.
    """
    errors: dict[str, WrongOutput] = {}
    prints = {}
    for name, workload in workloads.items():
        progress(name)
        try:
            prints[name] = check(workload)
        except WrongOutput as error:
            errors[name] = error
    wanted = {n: w for n, w in workloads.items() if n in prints and (fresh is None or n in fresh)}
    changing = {n: w for n, w in wanted.items() if w.refresh is not None or len(w.inputs)}
    change(changing.values(), seed)
    for name, workload in changing.items():
        progress(name)
        try:
            check_changed(workload, prints[name], poisoned=False)
        except WrongOutput as error:
            errors[name] = error
    return errors


def _kept(workload: Workload, output: Any) -> bool:
    """Whether an output that is still full of poison is one that the candidate keeps: it returns it again."""
    poisoned = [a for a in arrays(output) if is_floating(a) and size(a) and _all_nan(sample(a))]
    return bool(poisoned) and same_memory(poisoned, workload.candidate())


def _all_nan(some: Any) -> bool:
    return some is not None and bool((some != some).all())


def _require_computed(workload: Workload) -> None:
    """Without inputs to change, an output in the memory of one that still lives might be anybody's: refuse it."""
    first = workload.candidate()
    if same_memory(first, workload.candidate()):
        raise Suspicious("it returns the same memory on every call: give `inputs`, to be changed to see whether it computes")


def agree(output: Any, expected: Any) -> None:
    """AssertionError unless the two are equal, floating-point numbers within the usual tolerance of their type."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(expected, torch.Tensor):
        torch.testing.assert_close(output, expected)
    elif isinstance(expected, (tuple, list)):
        assert len(output) == len(expected), f"{len(output)} outputs, the baseline has {len(expected)}"
        for one, other in zip(output, expected):
            agree(one, other)
    elif hasattr(expected, "dtype") or isinstance(expected, float):
        import numpy as np

        np.testing.assert_allclose(output, expected, rtol=1e-5)
    else:
        assert output == expected, f"{output!r} is not the baseline's {expected!r}"


def poison(output: Any, inputs: Sequence[Any]) -> None:
    """Fill floating-point outputs with NaN; once freed, their memory is what the next call is likely to be given.

    Needs the inputs, so that an output that is a view of one is left alone; does nothing when there are none.
    """
    kept = {memory(array) for array in arrays(list(inputs))}
    for array in arrays(output) if kept else ():
        if not is_floating(array) or memory(array) in kept:
            continue
        try:
            array.detach().fill_(float("nan")) if hasattr(array, "detach") else array.fill(float("nan"))
        except (RuntimeError, ValueError):
            pass  # a read-only view


def redraw(inputs: Sequence[Any], seed: int) -> None:
    """New normal values of the same standard deviation, in place, in floating-point tensors and arrays."""
    import numpy as np

    generator = np.random.default_rng(seed)
    for array in inputs:
        if not is_floating(array):
            continue
        drawn = generator.standard_normal(tuple(array.shape), dtype=np.float32)
        if hasattr(array, "detach"):
            import torch

            with torch.no_grad():
                array.copy_(torch.from_numpy(drawn) * (float(array.float().std()) or 1.0))
        else:
            array[...] = drawn * (array.std() or 1.0)
