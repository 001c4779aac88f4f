"""Where tensors are made: on what the clock of a run times."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from perf import workloads
from sparse_attention.breakeven import Unavailable, Workload, device, nvml, worker
from tests import breakeven_toys as toys

SHAPE = {"batch": 1, "heads": 2, "kv_heads": 1, "q_len": 8, "kv_len": 8, "head_dim": 16, "dtype": "float32"}


@pytest.mark.parametrize("clock, where", [("cpu", "cpu"), ("cuda", "cuda"), ("cuda-graph", "cuda"), (toys.DEVICE, "cpu")])
def test_a_worker_tells_builders_where_to_make_tensors(clock, where):
    source = f"""
from sparse_attention.breakeven import device, worker
worker._KINDS["probe"] = lambda job, emit: device.current_device()
worker.main({{"kind": "probe", "cores": [], "device": {clock!r}}})
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout == f'{{"result": "{where}"}}\n'


def test_tensors_are_made_there_in_the_dtype_of_a_gpu(monkeypatch):
    here = workloads.tensors(**SHAPE, gpu_dtype="float16")
    assert {(x.device.type, x.dtype) for x in here} == {("cpu", torch.float32)}
    monkeypatch.setattr(device, "_current", "meta")
    there = workloads.tensors(**SHAPE, gpu_dtype="float16")
    assert {(x.device.type, x.dtype) for x in there} == {("meta", torch.float16)}
    assert workloads.tensors(**SHAPE)[0].dtype == torch.bfloat16
    assert workloads.tensors(**{**SHAPE, "dtype": "float64"})[0].dtype == torch.float64


class OnGpu:
    """An array that says that it lies on a GPU."""

    device, shape, dtype = "cuda:0", (8,), "float32"


def test_a_cuda_clock_refuses_work_that_is_not_on_the_gpu(monkeypatch):
    for clock in ("cuda", "cuda-graph"):
        with pytest.raises(Unavailable, match=f"on the GPU, which is all that the {clock} clock times"):
            device.require_on_device(toys.doubling(), clock)
        device.require_on_device(Workload(lambda: np.zeros(8), inputs=[OnGpu()]), clock)
        device.require_on_device(Workload(OnGpu), clock)
    device.require_on_device(toys.doubling(), "cpu")
    monkeypatch.setattr(worker, "make", lambda clock: toys.ToldClock())
    job = {"device": "cuda", "seed": 0, "cases": [toys.case("quick").as_dict()]}
    found = worker.scout(job, lambda **message: None)
    assert found["quick"]["status"] == "unavailable" and "on the GPU" in found["quick"]["reason"]


def test_the_driver_says_its_version_or_nothing():
    class Library:
        code = 0

        def nvmlInit_v2(self):
            return 0

        def nvmlSystemGetDriverVersion(self, text, length):
            text.value = b"580.159.04"
            return self.code

    library = Library()
    assert nvml.driver(library) == "580.159.04"
    library.code = 3
    assert nvml.driver(library) is None
    assert nvml.driver(object()) is None
