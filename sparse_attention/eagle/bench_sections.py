"""Where a generation's time goes, and how often it waits for the device: the same wrappers around EAGLE's steps and around ours."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn

from sparse_attention.eagle.optimize import with_globals
from sparse_attention.eagle.optimize_model import unwrapped

SECTIONS = {
    "initialize_tree": "prefill",
    "topK_genrate": "draft",
    "tree_decoding": "target",
    "evaluate_posterior": "verify",
    "update_inference_inputs": "commit",
}
_REST = "rest"


class Sections:
    """Seconds that model.eagenerate spends in each section while the object is entered, and its steps.

    prefill: the base on the prompt; draft: topK_genrate; target: the base on the tree; verify; commit: cache, hidden states, next token;
    rest: EAGLE's loop. A section's time is without the sections called in it. The device is finished at every border, so the sum is
    more than the time of a generation that is left alone.
    """

    def __init__(self, model: nn.Module):
        self.model, self.steps = model, 0
        self.seconds = dict.fromkeys([*SECTIONS.values(), _REST], 0.0)
        self._open: list[str] = []
        self._since = 0.0

    def __enter__(self) -> Sections:
        model, layer = self.model, self.model.ea_layer
        self._before = [(owner, name, vars(owner).get(name)) for owner, name in ((model, "eagenerate"), (layer, "topK_genrate"))]
        known = unwrapped(model.eagenerate).__globals__
        replaced = {name: self._timed(section, known[name]) for name, section in SECTIONS.items() if name in known}
        vars(model)["eagenerate"] = self._timed(_REST, with_globals(model.eagenerate, replaced))
        vars(layer)["topK_genrate"] = self._timed(SECTIONS["topK_genrate"], layer.topK_genrate)
        return self

    def __exit__(self, *error) -> None:
        for owner, name, before in self._before:
            if before is None:
                del vars(owner)[name]
            else:
                vars(owner)[name] = before

    def _timed(self, section: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            self._mark()
            self._open.append(section)
            try:
                return function(*args, **kwargs)
            finally:
                self._mark()
                self._open.pop()
                self.steps += section == SECTIONS["tree_decoding"]

        return call

    def _mark(self) -> None:
        """Charges the time since the last border to the innermost section."""
        wait(self.model)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def wait(model: nn.Module) -> None:
    """Until the model's device has finished."""
    device = model.base_model.lm_head.weight.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def counted_syncs(model: nn.Module):
    """A Counter whose "syncs" is how often the host waited for a CUDA device in the body; it stays empty on the CPU.

    They are torch's own count (torch.cuda.set_sync_debug_mode), which warns at every copy to the host and every wait that torch knows of.
    """
    counter: Counter[str] = Counter()
    if model.base_model.lm_head.weight.device.type != "cuda":
        yield counter
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counter
        finally:
            torch.cuda.set_sync_debug_mode(before)
            counter["syncs"] = sum("called a synchronizing" in str(w.message) for w in caught)
