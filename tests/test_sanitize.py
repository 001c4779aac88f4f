"""What tests/sanitize.py makes of compute-sanitizer's words, and that its cases hold on a CPU's engines too."""

from __future__ import annotations

import pytest
import torch

from sparse_attention._build import BuildError
from tests import sanitize, sanitize_cases

KERNEL = "void sparse_attention::sm90::forward<sparse_attention::sm90::Shape<(int)64, (int)64, (int)4>, __half>(sparse_attention::sm90::Maps)"
READ = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void sparse_attention::gather::<unnamed>::rows<float>(sparse_attention::gather::Forward, int, int)+0x1b0
=========     by thread (64,0,0) in block (1,0,0)
=========     Access to 0x7f1934803a00 is out of bounds
=========     and is 16,907,253,761 bytes after the nearest allocation at 0x7f1544c00000 of size 512 bytes
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4>(int)+0x50
=========     by thread (1,0,0) in block (0,0,0)
=========
Traceback (most recent call last):
========= Target application returned an error
========= ERROR SUMMARY: 2 errors
"""
HOST = """========= COMPUTE-SANITIZER
========= Host API memory access error at host access to 0x7fbe6284dc00 of size 153,600 bytes
=========     Uninitialized access to 0x7fbe6284dc00 on access by cudaMemcpy source
=========
========= ERROR SUMMARY: 1 error
"""


def race(write: int) -> str:
    return (
        f"========= COMPUTE-SANITIZER\n========= Error: Race reported between Read access at {KERNEL}+0x460 in forward.cuh:115\n"
        f"=========     and Write access at {KERNEL}+0x6e00 in forward.cuh:{write} [16 hazards]\n========= \n"
        "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    )


def line_of(words: str) -> int:
    text = (sanitize.ROOT / "csrc/cuda/sm90/forward.cuh").read_text().splitlines()
    return next(number for number, line in enumerate(text, 1) if words in line)


def test_reports_of_other_kernels_are_left_out():
    (only,) = sanitize.reports(READ)
    assert only.startswith("Invalid __global__ read") and "gather" in only
    assert len(sanitize.reports(HOST)) == 1, "a copy of what no kernel wrote belongs to nobody else"
    assert sanitize.reports("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n") == []


def test_a_race_is_in_order_only_by_the_line_that_writes():
    for write, ordered in ((line_of("shared.item ="), True), (line_of("tensor_load("), False)):
        (found,) = sanitize.reports(race(write))
        assert sanitize.in_order(found) == ordered
    assert not sanitize.in_order(race(1).replace(" in forward.cuh:1", "")), "without lines nothing is known"


def test_a_planted_fault_must_be_found():
    def checked(tool, engine, reports, failed=""):
        return sanitize.Checked(tool, engine, reports, 0, failed, 1.0)

    assert checked("memcheck", "outside", ["a read"], "exit 1").good and not checked("memcheck", "outside", []).good
    assert checked("memcheck", "sm90", []).good
    assert not checked("memcheck", "sm90", ["a read"]).good and not checked("memcheck", "sm90", [], "exit 1").good
    table = sanitize.table([checked("memcheck", "sm90", []), checked("racecheck", "sm90", ["a"]), checked("memcheck", "outside", ["b"])])
    assert [line.split() for line in table.splitlines()] == [["sm90", "outside"], ["memcheck", "0", "found"], ["racecheck", "1"]]


def test_every_tool_has_a_planted_fault():
    assert [tool for tool, _ in sanitize.PLANTED] == list(sanitize.TOOLS)
    assert set(sanitize_cases.ENGINES) == {*sanitize.ENGINES, *(case for _, case in sanitize.PLANTED)}


def test_the_planted_kernels_compile(tmp_path):
    try:
        library = sanitize_cases.faults((9, 0), tmp_path / "faults.so")
    except BuildError as error:
        pytest.skip(str(error))
    if not torch.cuda.is_available():
        assert library.race(None) and library.divergent(None), "without a device both say an error"


def test_the_kernels_of_decode_are_found_by_name():
    assert sanitize_cases.decode_kernels()[0] == "kNarrow" and "kWarpgroups" in sanitize_cases.decode_kernels()


@pytest.mark.parametrize("engine", ["sm90", "gather", "blocks", "decode", "decoders", "eagle"])
def test_the_cases_hold(engine):
    sanitize_cases.ENGINES[engine]()
