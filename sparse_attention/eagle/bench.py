"""End to end, EAGLE as it is against EAGLE on the tree operations: one model, interleaved runs, equal output."""

from __future__ import annotations

import statistics
import time
from collections import Counter

import torch
from torch import Tensor, nn

from sparse_attention.eagle.bench_model import Loaded
from sparse_attention.eagle.bench_sections import Sections, counted_syncs, wait
from sparse_attention.eagle.optimize import eagle_hits, optimize_eagle, restore_eagle

VARIANTS = ("baseline", "patched")


def run(loaded: Loaded, *, iterations: int, warmup: int, max_tokens: int, temperature: float) -> dict:
    """What `table` prints: for each variant the latencies (s) of `iterations` interleaved passes over all prompts, tokens, steps of a pass,
    seconds of each section in a step, from passes of their own, and host syncs of a step (None on the CPU); the speedup of each pair; hits
    of a pass; and where greedy output differs."""
    measured = {name: {"latency_s": []} for name in VARIANTS}
    outputs: dict[str, list[Tensor]] = {}
    options = {"max_new_tokens": max_tokens, "temperature": temperature}
    tree = getattr(loaded.model.ea_layer, "total_tokens", 0)  # EAGLE's loop keeps room for it
    options["max_length"] = max(p.shape[1] for p in loaded.prompts) + 2 * max_tokens + tree + 64
    hits = {}
    for iteration in range(warmup + iterations):
        for name in VARIANTS if iteration % 2 == 0 else VARIANTS[::-1]:
            with _Variant(loaded.model, name):
                seconds, outputs[name] = _pass(loaded, options)
            if iteration >= warmup:
                measured[name]["latency_s"].append(seconds)
                measured[name].setdefault("tokens", []).append(sum(o.shape[1] - p.shape[1] for o, p in zip(outputs[name], loaded.prompts)))
    profiled = {name: Counter() for name in VARIANTS}
    for iteration in range(max(1, iterations // 2)):
        for name in VARIANTS if iteration % 2 == 0 else VARIANTS[::-1]:
            with _Variant(loaded.model, name) as variant, Sections(loaded.model) as sections:
                _pass(loaded, options)
                hits = variant.hits() or hits
            profiled[name].update(sections.seconds, steps=sections.steps)
    on_cuda = loaded.prompts[0].device.type == "cuda"
    for name, found in profiled.items():
        steps = found.pop("steps")
        measured[name].update(steps=sections.steps, section_s={section: seconds / steps for section, seconds in found.items()})
        with _Variant(loaded.model, name), counted_syncs(loaded.model) as counter:
            _pass(loaded, options)
        measured[name]["syncs_per_step"] = counter["syncs"] / sections.steps if on_cuda else None
    pairs = [b / p for b, p in zip(measured["baseline"]["latency_s"], measured["patched"]["latency_s"])]
    return {
        "model": loaded.name,
        "prompts": [p.shape[1] for p in loaded.prompts],
        "settings": {"iterations": iterations, "warmup": warmup, **options},
        "variants": measured,
        "speedup": {"median": statistics.median(pairs), "pairs": pairs},
        "hits": hits,
        "divergence": None if temperature > 1e-5 else _divergence(loaded.model, *(outputs[name] for name in VARIANTS)),
    }


def table(result: dict) -> str:
    """The result as text."""
    rows = [("", *VARIANTS)]
    variants = [result["variants"][name] for name in VARIANTS]
    rows.append(("latency, median", *(f"{1e3 * statistics.median(v['latency_s']):.1f} ms" for v in variants)))
    rows.append(("tokens/s", *(f"{sum(v['tokens']) / sum(v['latency_s']):.1f}" for v in variants)))
    rows.append(("steps", *(str(v["steps"]) for v in variants)))
    rows.append(("tokens a step", *(f"{v['tokens'][-1] / v['steps']:.2f}" for v in variants)))
    for section in variants[0]["section_s"]:
        rows.append((f"{section}, a step", *(f"{1e3 * v['section_s'][section]:.3f} ms" for v in variants)))
    if variants[0]["syncs_per_step"] is not None:
        rows.append(("host syncs a step", *(f"{v['syncs_per_step']:.1f}" for v in variants)))
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {a:>14}  {b:>14}" for name, a, b in rows]
    pairs = result["speedup"]["pairs"]
    lines.append(f"speedup {result['speedup']['median']:.3f}x, {min(pairs):.3f} to {max(pairs):.3f} over {len(pairs)} interleaved pairs")
    lines.append("hits    " + ", ".join(f"{name} {count}" for name, count in result["hits"].items()))
    found = result["divergence"]
    if found is not None and not found:
        lines.append("output  equal")
    for at in found or []:
        gap = f"where the two logits are {at['logit_gap']:.3g} apart"
        lines.append(f"output  of prompt {at['prompt']} differs from token {at['token']} on, {gap}")
    return "\n".join(lines)


class _Variant:
    """The model as it is, or patched inside the context."""

    def __init__(self, model: nn.Module, name: str):
        self.model, self.patched = model, name == "patched"

    def __enter__(self):
        if self.patched:
            _, self.original_methods = optimize_eagle(self.model)
        return self

    def __exit__(self, *error) -> None:
        if self.patched:
            restore_eagle(self.model, self.original_methods)

    def hits(self) -> dict[str, int]:
        return eagle_hits(self.model) if self.patched else {}


def _pass(loaded: Loaded, options: dict) -> tuple[float, list[Tensor]]:
    """Seconds of one generation for each prompt, and what they gave."""
    wait(loaded.model)
    start = time.perf_counter()
    outputs = [loaded.model.eagenerate(prompt, **options) for prompt in loaded.prompts]
    wait(loaded.model)
    return time.perf_counter() - start, outputs


@torch.no_grad()
def _divergence(model: nn.Module, baseline: list[Tensor], patched: list[Tensor]) -> list[dict]:
    """For each prompt whose outputs differ: where, and how far the base's logits of the two tokens are apart there."""
    found = []
    for number, (a, b) in enumerate(zip(baseline, patched)):
        shorter = min(a.shape[1], b.shape[1])
        apart = (a[0, :shorter] != b[0, :shorter]).nonzero().flatten().tolist()
        if apart:
            model.base_model.model.tree_mask = None
            logits = model.base_model(a[:, : apart[0]])
            logits = getattr(logits, "logits", logits)[0, -1].float()
            gap = float(logits[a[0, apart[0]]] - logits[b[0, apart[0]]])
            found.append({"prompt": number, "token": apart[0], "logit_gap": abs(gap)})
        elif a.shape[1] != b.shape[1]:
            found.append({"prompt": number, "token": shorter, "logit_gap": float("nan")})
    return found
