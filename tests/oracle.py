"""What the correctness tests compare with: attention in float64, PyTorch's attention in the dtype under test, and the rule
that decides between them. Nothing here comes from the package.

The rule is row by row; a row is one query's output, its LSE, or one row of a gradient, and its error the largest of its
elements.

bfloat16 and float16: at most twice PyTorch's error in that row, or one *rounding*.
float32 and float64, and LSEs always: at most twice PyTorch's error in that row, where that is taken to be no less than
PyTorch's worst row of the call, rows compared in roundings, and no less than two roundings. Here both round as finely, so the two errors
of a row are draws from one distribution, and a row in which PyTorch is lucky says nothing. So that this hides no loss
of accuracy, the errors of all rows together (root mean square, in roundings) are held to twice PyTorch's too, or 0.4
of a rounding.

A rounding of a row is what rounding once, anywhere, may cost: half a unit in the last place of the exact answer in its dtype, plus
epsilon of the accumulator times the row's condition: how far the row moves, to first order, when each term of each sum
changes by a factor of 1 + epsilon. It is 0 where nothing is added up: such rows (a query without keys, a key without
queries) must be exact. Over tests/cases.py PyTorch's root mean square is 0.1 to 0.4 and its worst row 0.7 to 5 roundings.

PyTorch's attention is matmul, masked_fill, softmax, matmul in the same dtype; its error the larger of two runs, one of them with
all that is summed over in reverse. LSEs are float32 (float64 for float64), so theirs is PyTorch's in that dtype. The exact
answer is computed in float64 from the same rounded inputs; for float64 inputs, in numpy's long double.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

# Scores that are held at once.
_SCORES = 1 << 22


class Inputs(NamedTuple):
    """q `[batch, heads, q_len, head_dim]`, k, v `[batch, kv_heads, kv_len, head_dim]`; dout and dlse are the gradients of out and lse;
    mask is bool `[heads, q_len, kv_len]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor
    mask: torch.Tensor
    scale: float | None = None

    @property
    def factor(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale


class Results(NamedTuple):
    out: object
    lse: object
    dq: object
    dk: object
    dv: object


class Expected(NamedTuple):
    """The exact results, the errors of PyTorch's and one rounding of each row; numpy arrays."""

    exact: Results
    theirs: Results
    rounding: Results
    half: bool


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(
    mask: torch.Tensor, *, batch: int = 1, kv_heads: int | None = None, head_dim: int = 32, dtype: torch.dtype = torch.float32,
    scale: float | None = None, amplitude: float = 1.0, seed: int = 0,
) -> Inputs:  # fmt: skip
    """Normal variates; q and k times `amplitude`, which makes the softmax peaked."""
    generator = torch.Generator().manual_seed(seed)
    heads, q_len, kv_len = mask.shape
    kv_heads = heads if kv_heads is None else kv_heads

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, dout = normal(batch, heads, q_len, head_dim), normal(batch, heads, q_len, head_dim)
    k, v = normal(batch, kv_heads, kv_len, head_dim), normal(batch, kv_heads, kv_len, head_dim)
    q, k, v, dout = (x.to(dtype) for x in (q * amplitude, k * amplitude, v, dout))
    return Inputs(q, k, v, dout, normal(batch, heads, q_len).to(accumulator(dtype)), mask, scale)


def expected(x: Inputs) -> Expected:
    with one_thread():
        return _expected(x)


@contextmanager
def one_thread():
    """Small products in a row: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _expected(x: Inputs) -> Expected:
    exact, condition = _exact(x)
    errors = Results(*map(np.maximum, _pytorch_errors(x, exact, pytorch), _pytorch_errors(x, exact, _pytorch_reversed)))
    rounding = []
    for name, true, loss in zip(Results._fields, exact, condition):
        dtype = accumulator(x.q.dtype) if name == "lse" else x.q.dtype
        size = np.abs(np.where(np.isinf(true), 0, true)).astype(np.float64)
        size = size if name == "lse" else size.max(-1)
        one = torch.finfo(dtype).eps / 2 * size + torch.finfo(accumulator(dtype)).eps * loss
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps + 1000 * torch.finfo(accumulator(dtype)).tiny
        rounding.append(np.where(one > 0, one + tiny, 0.0))
    return Expected(exact, errors, Results(*rounding), x.q.dtype != accumulator(x.q.dtype))


def exact_gradients(x: Inputs) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv in float64."""
    values, _ = _exact(x)
    return tuple(torch.from_numpy(grad.astype(np.float64)) for grad in values[2:])


def check(got: Results, want: Expected, roundings: float | None = None) -> None:
    """Raise AssertionError unless `got` (tensors) obeys the rule; `roundings` replaces it by at most so many in each row."""
    for name in Results._fields:
        mine, true, theirs, rounding = (getattr(x, name) for x in (got, want.exact, want.theirs, want.rounding))
        assert tuple(mine.shape) == true.shape, f"{name} has shape {tuple(mine.shape)}, expected {true.shape}"
        error = _row_error(mine, true)
        some = rounding > 0
        if roundings:
            allowed = roundings * rounding
        elif want.half and name != "lse":
            allowed = np.maximum(2 * theirs, rounding)
        else:
            worst = (theirs[some] / rounding[some]).max(initial=2.0)
            allowed = 2 * np.maximum(theirs, worst * rounding)
            mean, their_mean = (np.sqrt(np.mean((e[some] / rounding[some]) ** 2)) if some.any() else 0.0 for e in (error, theirs))
            draws = min(some.sum(), got.lse.numel())  # the rows of all keys share the errors of the queries
            bound = max(2 * their_mean, 0.4 if draws >= 64 else 1.0)
            assert mean <= bound, f"{name}: errors of {mean:.3g} roundings (root mean square), PyTorch's {their_mean:.3g}"
        bad = ~(error <= allowed)
        if bad.any():
            place = np.unravel_index(np.argmax(np.where(bad, error / np.maximum(allowed, 1e-300), 0)), bad.shape)
            raise AssertionError(
                f"{name}: {bad.sum()} of {bad.size} rows are wrong; worst at {tuple(map(int, place))}: error {error[place]:.3g}, allowed "
                f"{allowed[place]:.3g} (PyTorch's {theirs[place]:.3g}, one rounding {rounding[place]:.3g})"
            )


def _row_error(mine: torch.Tensor, true: np.ndarray) -> np.ndarray:
    """Largest error of each row; inf where one of the two is not finite and they differ."""
    mine = mine.detach().double().numpy() if true.dtype == np.float64 else mine.detach().numpy().astype(true.dtype)
    with np.errstate(invalid="ignore"):
        error = np.where(mine == true, 0.0, np.abs(mine - true)).astype(np.float64)
    error = np.where(np.isnan(error), np.inf, error)
    return error if error.ndim == 3 else error.max(-1)


def pytorch(x: Inputs, gradients: bool = True) -> Results:
    """Masked softmax attention in the dtype of q. Rows without keys give 0, -inf and no gradient."""
    groups = x.q.shape[1] // x.k.shape[1]
    leaves = [y.detach().requires_grad_(gradients) for y in (x.q, x.k, x.v)]
    q, k, v = leaves[0], *(y.repeat_interleave(groups, 1) for y in leaves[1:])
    scores = ((q @ k.mT) * x.factor).masked_fill(~x.mask, -torch.inf)
    out = torch.softmax(scores, -1).masked_fill(~x.mask, 0.0) @ v
    lse = torch.logsumexp(scores.to(accumulator(x.q.dtype)), -1)
    grads = torch.autograd.grad([out, lse], leaves, [x.dout, x.dlse]) if gradients else [None] * 3
    return Results(out.detach(), lse.detach(), *grads)


def _pytorch_reversed(x: Inputs, gradients: bool = True) -> Results:
    """The same with queries, keys and the elements of a head in reverse."""
    back = Inputs(x.q.flip(2, 3), x.k.flip(2, 3), x.v.flip(2), x.dout.flip(2), x.dlse.flip(2), x.mask.flip(1, 2), x.scale)
    out, lse, *grads = pytorch(back, gradients)
    grads = [grads[0].flip(2, 3), grads[1].flip(2, 3), grads[2].flip(2)] if gradients else grads
    return Results(out.flip(2), lse.flip(2), *grads)


def _pytorch_errors(x: Inputs, exact: Results, run) -> Results:
    theirs, wide = run(x), accumulator(x.q.dtype)
    if x.q.dtype != wide:
        theirs = theirs._replace(lse=run(x._replace(q=x.q.to(wide), k=x.k.to(wide), v=x.v.to(wide)), gradients=False).lse)
    return Results(*(_row_error(mine, true) for mine, true in zip(theirs, exact)))


def _exact(x: Inputs) -> tuple[Results, Results]:
    """The results, and the condition of each row."""
    batch, heads, q_len, _ = x.q.shape
    rows = max(1, _SCORES // (batch * heads * x.k.shape[2]))
    values, conditions = zip(*(_exact_rows(x, slice(r, min(r + rows, q_len))) for r in range(0, q_len, rows)))
    by_query = [[np.concatenate([part[n] for part in parts], axis=2) for n in range(3)] for parts in (values, conditions)]
    by_key = [[sum(part[n] for part in parts) for n in (3, 4)] for parts in (values, conditions)]
    by_key[1] = [loss.max(-1) for loss in by_key[1]]
    return tuple(Results(*queries, *keys) for queries, keys in zip(by_query, by_key))


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype != np.float64:
        return a @ b
    # Not numpy's BLAS, whose threads would spin beside torch's.
    return (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()


def _exact_rows(x: Inputs, rows: slice) -> tuple[Results, Results]:
    wide = np.longdouble if x.q.dtype == torch.float64 else np.float64
    groups = x.q.shape[1] // x.k.shape[1]
    q, dout, dlse = (y[:, :, rows].detach().double().numpy().astype(wide) for y in (x.q, x.dout, x.dlse))
    k, v = (y.detach().double().repeat_interleave(groups, 1).numpy().astype(wide) for y in (x.k, x.v))
    mask = x.mask[:, rows].numpy()
    seen = mask.any(-1)[..., None]
    dout, dlse = np.where(seen, dout, 0), np.where(seen, dlse[..., None], 0)

    def turned(y):
        return np.swapaxes(y, -1, -2)

    def kept(y):  # sums over the query heads that share a key head
        return y.reshape(y.shape[0], -1, groups, *y.shape[2:]).sum(2)

    scores = np.where(mask, _product(q, turned(k)) * wide(x.factor), -np.inf)
    top = scores.max(-1, keepdims=True)
    top = np.where(seen, top, 0)
    p = np.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    p = p / np.where(seen, total, 1)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    out = _product(p, v)
    dp = _product(dout, turned(v))
    delta = (p * dp).sum(-1, keepdims=True) - dlse
    ds = p * (dp - delta) * wide(x.factor)
    values = out, lse, _product(ds, k), kept(_product(turned(ds), q)), kept(_product(turned(p), dout))

    q, k, v, dout, dlse, out, p, ds = (y.astype(np.float64) for y in (q, k, v, dout, dlse, out, p, ds))
    dp, delta, factor = dp.astype(np.float64), delta.astype(np.float64), abs(x.factor)
    score = np.where(mask, _product(np.abs(q), turned(np.abs(k))) * factor, 0)  # of a score
    mean = (p * score).sum(-1, keepdims=True)
    part = p * (1 + score + mean)  # of a weight
    level = _product(p, np.abs(v))
    # |v_j - out| <= (1 - 2 p_j) |v_j| + sum of p |v|: nothing where one key has all the weight.
    of_out = level + _product(part * (1 - 2 * p), np.abs(v)) + part.sum(-1, keepdims=True) * level
    of_lse = mean[..., 0] + np.abs(np.where(seen[..., 0], lse, 0)).astype(np.float64)
    dp_level = _product(np.abs(dout), turned(np.abs(v)))
    delta_level = (p * dp_level).sum(-1, keepdims=True) + np.abs(dlse)
    # A backward pass takes delta from the stored out, and its weights from the stored LSE.
    storage = torch.finfo(x.q.dtype).eps / 2 / torch.finfo(accumulator(x.q.dtype)).eps
    delta_level = delta_level + storage * (np.abs(dout) * np.abs(out)).sum(-1, keepdims=True)
    part = part + p * np.abs(np.where(seen, lse[..., None], 0)).astype(np.float64) / 2
    of_ds = (part * np.abs(dp - delta) + p * (dp_level + delta_level)) * factor
    of_dq, of_dk = _product(of_ds, np.abs(k)), _product(turned(of_ds), np.abs(q))
    of_dv = _product(turned(part), np.abs(dout))
    return Results(*values), Results(of_out.max(-1), of_lse, of_dq.max(-1), kept(of_dk), kept(of_dv))
