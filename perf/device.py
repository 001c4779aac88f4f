"""Where `pytest perf` measures unless it is told: on a GPU that the kernels run on, where there is one."""

from __future__ import annotations

GPU_BUDGET_S = 420.0  # for all of perf/cuda_cases.py; compiling FlexAttention takes much of it


class Unfit(Exception):
    """A GPU is there, and no kernel for it."""


def chosen() -> tuple[str, str]:
    """"cuda" or "cpu", and why, in words; Unfit where a GPU would be raced with other kernels than its own."""
    import torch

    from sparse_attention import _build_cuda

    if not torch.cuda.is_available():
        return "cpu", f"torch {torch.__version__} finds no CUDA device"
    name = torch.cuda.get_device_name()
    if obstacle := _build_cuda.obstacle(torch.cuda.get_device_capability()):
        raise Unfit(f"{name} is here, but {obstacle}")
    return "cuda", name
