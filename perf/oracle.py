"""Whether an output is right, on the tensors that are timed: some rows (and columns) of it, computed in float64."""

from __future__ import annotations

import os

import numpy as np
import torch

from sparse_attention.patterns import Lengths, Pattern

ROWS = 16


class Oracle:
    """Checks outputs of attention over these tensors as they are now. Rows are drawn anew for every check and process.

    A row is right when its error is at most twice PyTorch's own in the same dtype (the largest of the drawn rows').
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern):
        self.q, self.k, self.v, self.pattern = q, k, v, pattern
        self.lengths = Lengths(q.shape[2], k.shape[2])
        self.scale = q.shape[3] ** -0.5
        self._random = np.random.default_rng(os.getpid())

    def check(self, out: torch.Tensor) -> None:
        """AssertionError unless `out` is the attention of the pattern."""
        assert out.shape == (*self.q.shape[:3], self.v.shape[3]), f"the output has shape {tuple(out.shape)}"
        assert torch.isfinite(out).all(), "the output is not finite everywhere"
        rows = self._draw(self.lengths.q_len)
        exact = self.probabilities(rows, torch.float64) @ self._grouped(self.v, torch.float64)
        plain = self.probabilities(rows, self.q.dtype) @ self._grouped(self.v, self.q.dtype)
        _compare("row", rows, out[:, :, rows], exact, plain)

    def check_gradients(self, gradients: tuple[torch.Tensor, ...], dout: torch.Tensor) -> None:
        """AssertionError unless (dq, dk, dv) are the gradients for `dout`; dk and dv in two neighbouring columns."""
        for name, gradient in zip(("dq", "dk", "dv"), gradients):
            assert torch.isfinite(gradient).all(), f"{name} is not finite everywhere"
        rows = self._draw(self.lengths.q_len)
        exact, plain = (self._dq(rows, dout, dtype) for dtype in (torch.float64, self.q.dtype))
        _compare("dq row", rows, gradients[0][:, :, rows], exact, plain)
        column = int(self._random.integers(self.lengths.kv_len - 1))
        columns = torch.tensor([column, column + 1])
        exact, plain = (self._dk_dv(columns, dout, dtype) for dtype in (torch.float64, self.q.dtype))
        for name, got, right, usual in zip(("dk", "dv"), gradients[1:], exact, plain):
            _compare(f"{name} row", columns, got[:, :, columns], right, usual)

    def probabilities(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Softmax rows, [batch, heads, rows, kv_len]; a row that sees nothing is 0."""
        scores = self.q[:, :, rows].detach().to(dtype) @ self._grouped(self.k, dtype).transpose(-1, -2) * self.scale
        seen = self._seen(rows)
        return torch.softmax(scores.masked_fill(~seen, float("-inf")), -1).masked_fill(~seen, 0.0)

    def _dq(self, rows, dout, dtype):
        p, dp = self._p_dp(rows, dout, dtype)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * self.scale
        return ds @ self._grouped(self.k, dtype)

    def _dk_dv(self, columns, dout, dtype):
        i = torch.arange(self.lengths.q_len) + self.lengths.offset
        seeing = torch.stack([self.pattern.for_head(h).allows(i[:, None], columns, self.lengths) for h in self._heads])
        rows = seeing.any(-1).any(0).nonzero().squeeze(1)
        p, dp = self._p_dp(rows, dout, dtype)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * self.scale
        dk = ds[..., columns].transpose(-1, -2) @ self.q[:, :, rows].detach().to(dtype)
        dv = p[..., columns].transpose(-1, -2) @ dout[:, :, rows].to(dtype)
        return dk, dv

    def _p_dp(self, rows, dout, dtype):
        p = self.probabilities(rows, dtype)
        return p, dout[:, :, rows].to(dtype) @ self._grouped(self.v, dtype).transpose(-1, -2)

    def _grouped(self, x, dtype):
        x = x.detach().to(dtype)
        group = self.q.shape[1] // x.shape[1]
        return x if group == 1 else x.repeat_interleave(group, 1)

    def _seen(self, rows):
        i, j = rows[:, None] + self.lengths.offset, torch.arange(self.lengths.kv_len)[None]
        variants = {}
        for head in self._heads:
            one = self.pattern.for_head(head)
            if one not in variants:
                variants[one] = one.allows(i, j, self.lengths).expand(len(rows), self.lengths.kv_len)
        return torch.stack([variants[self.pattern.for_head(h)] for h in self._heads])

    @property
    def _heads(self):
        return range(self.q.shape[1])

    def _draw(self, count):
        drawn = self._random.integers(count, size=min(ROWS, count))
        return torch.from_numpy(np.unique(np.concatenate([[0, count - 1], drawn])))


def _compare(what, positions, got, exact, plain):
    error = (got.double() - exact).abs().amax((0, 1, 3))
    usual = (plain.double() - exact).abs().max()
    allowed = 2 * usual + torch.finfo(got.dtype).eps * exact.abs().max()
    worst = int(error.argmax())
    assert error[worst] <= allowed, (
        f"{what} {int(positions[worst])} is off by {float(error[worst]):.2e}; PyTorch's own error is {float(usual):.2e}"
    )
