"""Whether an output is right, on the tensors that are timed: some rows (and columns) of it, computed in float64."""

from __future__ import annotations

import os

import numpy as np
import torch

from sparse_attention.patterns import Causal, Lengths, Pattern

ROWS = 12


class Oracle:
    """Checks outputs of attention over these tensors as they are now. Rows are drawn anew for every check and process, and
    computed on the CPU, wherever the tensors are.

    A row is right when its error is at most twice PyTorch's own in the same dtype (the largest of the drawn rows').
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern):
        self.q, self.k, self.v, self.pattern = q, k, v, pattern
        self.lengths = Lengths(q.shape[2], k.shape[2])
        self.heads = range(q.shape[1])
        self._random = np.random.default_rng(os.getpid())

    def check(self, out: torch.Tensor) -> None:
        """AssertionError unless `out` is the attention of the pattern."""
        assert out.shape == (*self.q.shape[:3], self.v.shape[3]), f"the output has shape {tuple(out.shape)}"
        assert torch.isfinite(out).all(), "the output is not finite everywhere"
        rows = self._rows()
        seen = self.seen(rows)
        exact, plain = (_Rows(self, rows, seen, dtype).out for dtype in (torch.float64, self.q.dtype))
        _compare("row", rows, out[:, :, rows.to(out.device)], exact, plain)

    def check_gradients(self, gradients: tuple[torch.Tensor, ...], dout: torch.Tensor) -> None:
        """AssertionError unless (dq, dk, dv) are the gradients for `dout`; dk and dv for two neighbouring keys.

        For as many heads in k and v as in q.
        """
        for name, gradient in zip(("dq", "dk", "dv"), gradients):
            assert torch.isfinite(gradient).all(), f"{name} is not finite everywhere"
        rows = self._rows()
        seen = self.seen(rows)
        exact, plain = (_Rows(self, rows, seen, dtype).dq(dout) for dtype in (torch.float64, self.q.dtype))
        _compare("dq row", rows, gradients[0][:, :, rows.to(gradients[0].device)], exact, plain)
        key = int(self._random.integers(self.lengths.kv_len - 1))
        keys = torch.tensor([key, key + 1])
        i = torch.arange(self.lengths.q_len)[:, None] + self.lengths.offset
        seeing = [self.pattern.for_head(h).allows(i, keys[None], self.lengths).any(1) for h in self.heads]
        rows = torch.stack(seeing).any(0).nonzero().squeeze(1)
        seen = self.seen(rows)
        exact, plain = (_Rows(self, rows, seen, dtype).dk_dv(dout, keys) for dtype in (torch.float64, self.q.dtype))
        for name, got, right, usual in zip(("dk", "dv"), gradients[1:], exact, plain):
            _compare(f"{name} row", keys, got[:, :, keys.to(got.device)], right, usual)

    def seen(self, rows: torch.Tensor) -> torch.Tensor:
        """How often each row sees each key, [heads, rows, kv_len]."""
        i, j = rows[:, None] + self.lengths.offset, torch.arange(self.lengths.kv_len)[None]
        variants = {}
        for head in self.heads:
            one = self.pattern.for_head(head)
            if one not in variants:
                variants[one] = one.allows(i, j, self.lengths).expand(len(rows), self.lengths.kv_len)
        return torch.stack([variants[self.pattern.for_head(h)] for h in self.heads])

    def _rows(self):
        count = self.lengths.q_len
        drawn = self._random.integers(count, size=min(ROWS, count))
        return torch.from_numpy(np.unique(np.concatenate([[0, count - 1], drawn])))


class LongNetOracle(Oracle):
    """For LongNet's levels: a key that a query sees at two levels counts twice."""

    def __init__(self, q, k, v, segments: list[int], dilations: list[int]):
        super().__init__(q, k, v, Causal())
        self.levels = list(zip(segments, dilations))

    def seen(self, rows):
        i, j, head = rows[:, None], torch.arange(self.lengths.kv_len)[None], torch.tensor(self.heads)[:, None, None]
        counts = 0
        for segment, dilation in self.levels:
            reached = (i % dilation == head % dilation) & (j % dilation == head % dilation)
            counts = counts + (reached & (i // segment == j // segment) & (j <= i)).int()
        return counts


class _Rows:
    """Some rows of attention in one dtype, over the keys that any of them sees: [batch, heads, rows, keys]."""

    def __init__(self, oracle: Oracle, rows: torch.Tensor, seen: torch.Tensor, dtype: torch.dtype):
        self.rows, self.dtype, self.scale = rows, dtype, oracle.q.shape[3] ** -0.5
        self.keys = (seen != 0).any(0).any(0).nonzero().squeeze(1)
        group = oracle.q.shape[1] // oracle.k.shape[1]
        self.q = self._cast(oracle.q, rows)
        self.k, self.v = (self._cast(x, self.keys).repeat_interleave(group, 1) for x in (oracle.k, oracle.v))
        scores = self.q @ self.k.transpose(-1, -2) * self.scale
        self.p = torch.softmax(scores + seen[..., self.keys].to(dtype).log(), -1).nan_to_num(0.0)
        self.out = self.p @ self.v

    def dq(self, dout):
        return self._ds(dout) @ self.k

    def dk_dv(self, dout, keys):
        at = torch.searchsorted(self.keys, keys)
        dk = self._ds(dout)[..., at].transpose(-1, -2) @ self.q
        return dk, self.p[..., at].transpose(-1, -2) @ self._cast(dout, self.rows)

    def _ds(self, dout):
        """The gradient of the scores as SDPA's own backward forms it: from the output's product with dout."""
        dout = self._cast(dout, self.rows)
        return self.p * (dout @ self.v.transpose(-1, -2) - (dout * self.out).sum(-1, keepdim=True)) * self.scale

    def _cast(self, x, positions):
        return x.detach()[:, :, positions.to(x.device)].cpu().to(self.dtype)


def _compare(what, positions, got, exact, plain):
    error = (got.cpu().double() - exact).abs().amax((0, 1, 3))
    usual = (plain.double() - exact).abs().max()
    allowed = 2 * usual + torch.finfo(got.dtype).eps * exact.abs().max()
    worst = int(error.argmax())
    assert error[worst] <= allowed, (
        f"{what} {int(positions[worst])} is off by {float(error[worst]):.2e}; PyTorch's own error is {float(usual):.2e}"
    )
