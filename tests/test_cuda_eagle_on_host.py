"""The tree operations' CUDA kernels and their bindings, compiled for the host: blocks in random order, threads as fibers.

Then `impl="native"` is these kernels, and the tests of the C++ engines are run on them. Slow, so few examples; it needs no GPU.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from sparse_attention import _build, eagle
from sparse_attention._build import compiler, source_folder
from tests import test_eagle_build, test_eagle_cache, test_eagle_draft, test_eagle_greedy, test_eagle_mask, test_eagle_sampling

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fibers are ucontext's, on Linux")
HERE = Path(__file__).parent / "cuda_on_host"


def compile_module(folder: Path):
    from torch.utils.cpp_extension import include_paths, library_paths

    cuda = source_folder() / "cuda"
    shutil.copytree(cuda / "eagle", folder / "eagle")
    for source in [cuda / "bindings.h", *cuda.glob("eagle_*"), HERE / "eagle" / "library.cpp"]:
        text = source.read_text().replace("is_cuda()", "is_cpu()")
        (folder / source.name).write_text(text)
    shutil.copy(HERE / "eagle" / "device.cuh", folder / "eagle")
    shutil.copy(HERE / "threads.h", folder / "eagle")
    target = folder / f"eagle_on_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    paths = [folder, HERE / "eagle", *include_paths(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++20", "-O1", "-w", "-fPIC", "-fvisibility=hidden", *(f"-I{path}" for path in paths)]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    sources = [folder / "library.cpp", *(folder / "eagle").glob("*.cu")]
    link = [*(f"-L{path}" for path in library_paths()), "-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10"]
    objects = [str(source) + ".o" for source in sources]
    jobs = [
        subprocess.Popen([*compiler(), *flags, "-c", "-x", "c++", str(source), "-o", made], stderr=subprocess.PIPE, text=True)
        for source, made in zip(sources, objects)
    ]
    said = [job.communicate()[1] for job in jobs]
    assert not any(job.returncode for job in jobs), "".join(said)[-4000:]
    done = subprocess.run([*compiler(), "-shared", *objects, "-o", str(target), *link], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    spec = importlib.util.spec_from_file_location("eagle_on_host", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Kernels:
    """What `_build.kernels()` gives, with the CUDA kernels in place of the C++ engines.

    A kernel finds nothing malformed; here it says it did, so that Python looks, as it does on CUDA before the call.
    """

    def __init__(self, module, engines):
        self.module, self.engines = module, engines

    def __getattr__(self, name):
        kernel, engine = getattr(self.module, name, None), getattr(self.engines, name)
        if kernel is None:
            return engine

        def run(*arguments):
            strict = name not in ("eagle_append", "eagle_commit") or arguments[-1]
            if strict and name in ("eagle_append", "eagle_commit"):
                copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
                if name == "eagle_commit":
                    copies[0] = [x.clone() for x in arguments[0]]
                if engine(*copies):
                    return True
            assert kernel(*arguments) is False
            return strict

        return run


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    return compile_module(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def kernels(module, monkeypatch):
    made = Kernels(module, _build.kernels())
    monkeypatch.setattr(_build, "kernels", lambda: made)
    return made


@pytest.mark.parametrize("row_order", ["leaf", "sorted"])
@pytest.mark.parametrize("size", [(5, 10, 59), (3, 4, 20), (4, 1, 5), (2, 2, 1), (0, 6, 6)], ids=str)
def test_build(kernels, size, row_order):
    test_eagle_build.test_equals_upstream(*size, row_order, "native")


@pytest.mark.parametrize(
    "test",
    [
        test_eagle_build.test_selection_of_special_scores,
        test_eagle_build.test_sglang_golden_trees,
        test_eagle_build.test_one_node_and_all_nodes,
        test_eagle_build.test_out_is_filled_and_returned,
        test_eagle_build.test_an_orphan_is_refused_or_left_out,
        test_eagle_build.test_malformed_selections,
        test_eagle_build.test_max_depth_bounds_the_rows,
        test_eagle_mask.test_a_parent_that_is_no_lower_node,
        test_eagle_mask.test_out,
        test_eagle_greedy.test_a_batch_is_its_requests,
        test_eagle_greedy.test_everything_and_nothing_accepted,
        test_eagle_greedy.test_sglang_golden_vectors,
        test_eagle_cache.test_append_overflow_writes_nothing,
        test_eagle_cache.test_a_malformed_commit_moves_nothing,
        test_eagle_draft.test_draft_tokens_become_target_tokens,
        test_eagle_draft.test_a_draft_is_upstreams,
        test_eagle_draft.test_sums_that_are_no_numbers,
        test_eagle_sampling.test_coins_at_the_edges,
        lambda impl: test_eagle_sampling.test_tokens_and_links_that_are_none("upstream", impl),
        lambda impl: test_eagle_sampling.test_tokens_and_links_that_are_none("target_only", impl),
        test_eagle_sampling.test_probabilities_that_are_none,
    ],
    ids=lambda test: test.__name__,
)
def test_as_the_engines(kernels, test):
    test("native")


@pytest.mark.parametrize(
    "test",
    [
        test_eagle_build.test_any_tree_against_lists_and_sets,
        test_eagle_mask.test_equals_the_sets_of_ancestors,
        test_eagle_greedy.test_equals_upstream,
        test_eagle_cache.test_commit,
        test_eagle_cache.test_commit_paged_equals_contiguous,
        test_eagle_draft.test_cumulative_topk,
        test_eagle_sampling.test_equals_upstream_with_given_coins,
        test_eagle_sampling.test_native_equals_the_reference,
    ],
    ids=lambda test: test.__name__,
)
def test_drawn_cases(kernels, test):
    test()


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_dtypes(kernels, dtype):
    test_eagle_build.test_selection_orders_ties_by_index_and_keeps_ancestors(dtype, "native")
    for vocab in (1, 7, 1025, 5000):
        test_eagle_greedy.test_best_token(vocab, dtype, "native")
    test_eagle_cache.test_append(dtype, "native")
    test_eagle_cache.test_retrieve(dtype, "native")
    for vocab, k in ((1, 1), (100, 100), (3000, 10), (1100, 1100)):
        logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
        for x in (logits, logits.round(), torch.zeros_like(logits)):
            ours, theirs = (eagle.logsoftmax_topk(x, k, impl=impl) for impl in ("native", "reference"))
            assert torch.equal(ours.tokens, theirs.tokens)
            test_eagle_draft.close(ours.values, theirs.values)


@pytest.mark.parametrize("row_order", ["leaf", "sorted"])
def test_a_tree_that_several_blocks_write(kernels, row_order):
    rng = torch.Generator().manual_seed(3)
    parents = torch.tensor([[-1] + [int(torch.randint(max(-1, n - 40), n, (), generator=rng)) for n in range(1, 300)] for _ in range(2)])
    parents[:, 1:] = parents[:, 1:].clamp(min=0)
    parents[1, 7] = 200  # an orphan, and all below it
    tokens = torch.arange(600).view(2, 300)
    for mask in ("bits", "full"):
        options = {"mask": mask, "row_order": row_order, "check": False, "prefix_lens": [5, 0] if mask == "full" else None}
        ours, theirs = (eagle.assemble_tree(tokens, parents, impl=impl, **options) for impl in ("native", "reference"))
        assert test_eagle_build.equal_trees(ours, theirs)
