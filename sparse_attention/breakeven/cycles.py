"""The clock that a GPU's multiprocessors really ran at: their cycle counters and the device's timer, read in a stream before and
after a call.

NVML cannot tell it: on an H100 its reading changes about every 100 ms and is of the past (docs/benchmarking.md).
"""

from __future__ import annotations

from typing import Any

from .driver_kernel import DriverKernel, driver

_SLOTS = 1024  # multiprocessors that may be told apart; %smid need not be below their number
_PTX = f"""
.version 7.0
.target sm_80
.address_size 64
.visible .entry mark(.param .u64 row)
{{
    .reg .pred %far;
    .reg .b32 %sm;
    .reg .b64 %at, %offset, %cycles, %ns;
    mov.u32 %sm, %smid;
    setp.ge.u32 %far, %sm, {_SLOTS};
    @%far bra DONE;
    ld.param.u64 %at, [row];
    cvta.to.global.u64 %at, %at;
    mul.wide.u32 %offset, %sm, 16;
    add.s64 %at, %at, %offset;
    mov.u64 %cycles, %clock64;
    mov.u64 %ns, %globaltimer;
    st.global.v2.u64 [%at], {{%cycles, %ns}};
DONE:
    ret;
}}
"""


class Cycles:
    """Of torch's current device, with `blocks` multiprocessors. `library` and `memory` stand in for the driver and for
    [2, 1024, 2] int64 of the device. Raises Absent.
    """

    def __init__(self, blocks: int, library: Any = None, memory: Any = None):
        self._blocks, library = blocks, library or driver()
        self._memory = _memory() if memory is None else memory  # made first: it makes the context too
        self._kernel = DriverKernel(_PTX, "mark", library)

    def mark(self, row: int, stream: int) -> None:
        """Queue the reading of every multiprocessor's counter: row 0 before a call, 1 after it."""
        self._kernel.launch(stream, self._blocks, 1, self._memory[row].data_ptr())

    def megahertz(self) -> float | None:
        """Mean between the two marks, the median over multiprocessors; None without them. Waits for the device."""
        before, after = self._memory.cpu()
        seen = (before[:, 1] > 0) & (after[:, 1] > before[:, 1])
        cycles, ns = (after - before)[seen].double().unbind(1)
        self._memory.zero_()  # a multiprocessor that one of the next marks does not meet is not seen
        return float((1e3 * cycles / ns).median()) if len(ns) else None


def _memory() -> Any:
    import torch

    return torch.zeros(2, _SLOTS, 2, dtype=torch.int64, device="cuda")
