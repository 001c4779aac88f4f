"""The registered op: PyTorch's own checks, compilers, export, checkpointing, and gradients of every engine."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sparse_attention as sa
from sparse_attention.handle import handle, pattern_of
from sparse_attention.ops import attention_op, backward_op
from tests.cases import block_mask

ENGINES = ["tile", "gather", "dense", "reference"]
WINDOW = (sa.SlidingWindow(5) | sa.Sinks(2)) & sa.Causal()


def inputs(q_len=20, kv_len=20, heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, batch=2, grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [
        torch.randn(batch, h, n, head_dim, dtype=dtype, generator=generator).requires_grad_(grad) for h, n in shapes
    ]


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("pattern", [WINDOW, sa.Causal()], ids=["window", "causal"])
def test_opcheck(impl, pattern):
    torch.library.opcheck(attention_op, (*inputs(), handle(pattern), None, impl))


@pytest.mark.parametrize("impl", ENGINES)
def test_opcheck_backward(impl):
    q, k, v = inputs(grad=False)
    out, lse = attention_op(q, k, v, handle(WINDOW), 0.3, impl)
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(backward_op, (torch.randn_like(out), dlse, q, k, v, out, lse, handle(WINDOW), 0.3, impl))


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("op", [False, True], ids=["eager", "op"])
def test_gradcheck(impl, op):
    """With a query that sees nothing: row 0 of 5 queries over 4 keys."""

    def run(q, k, v):
        if op:
            out, lse = attention_op(q, k, v, handle(WINDOW), None, impl)
        else:
            out, lse = sa.attention(q, k, v, WINDOW, impl=impl, return_lse=True)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(run, inputs(5, 4, 2, 1, 8, torch.float64, batch=1))


@pytest.mark.parametrize("impl", ENGINES)
def test_gradient_of_lse_alone(impl):
    q, k, v = inputs(dtype=torch.float64)
    pattern = sa.SlidingWindow(4)
    _, lse = sa.attention(q, k, v, pattern, impl=impl, return_lse=True)
    _, expected = sa.attention(q, k, v, pattern, impl="reference", return_lse=True)
    got = torch.autograd.grad(lse.square().sum(), (q, k), retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(expected.square().sum(), (q, k))):
        torch.testing.assert_close(a, b)


def test_a_second_gradient_is_refused_or_right():
    q, k, v = inputs(5, 5, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda q: sa.attention(q, k, v, WINDOW, impl="reference"), q, fast_mode=True)
    out = sa.attention(q, k, v, WINDOW, impl="gather")
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(dq.sum(), q)


@pytest.mark.parametrize("backend, impl", [("inductor", "auto"), ("inductor", "dense"), ("aot_eager", "gather")])
def test_compile_with_dynamic_lengths(backend, impl):
    """One graph serves all lengths, forward and backward; the pattern is made inside the compiled function."""
    torch._dynamo.reset()

    def model(q, k, v, window):
        out, lse = sa.attention(q * 2, k, v, sa.SlidingWindow(window) & sa.Causal(), impl=impl, return_lse=True)
        return out.square().sum() + lse.sum()

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for n in (50, 64, 150):
        tensors = inputs(n, n)
        loss, expected = compiled(*tensors, 7), model(*tensors, 7)
        torch.testing.assert_close(loss, expected)
        for a, b in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


class Block(torch.nn.Module):
    def __init__(self, pattern):
        super().__init__()
        self.project = torch.nn.Linear(32, 96)
        self.pattern = pattern

    def forward(self, x):
        batch, n, _ = x.shape
        q, k, v = self.project(x).view(batch, n, 3, 2, 16).permute(2, 0, 3, 1, 4)
        return sa.attention(q, k, v, self.pattern).transpose(1, 2).reshape(batch, n, 32)


MADE_OUTSIDE = {
    "tree": sa.Tree((-1, 0, 0, 2)),
    "documents": sa.Documents((10, 54)) & sa.Causal(),
    "blocks": sa.BlockSparse(block_mask(4, 4).fill_diagonal_(True), 16),
    "blocks & causal": sa.BlockSparse(block_mask(4, 4).fill_diagonal_(True), 16) & sa.Causal(),
    "per head": sa.Dilated(4, (1, 3)),
    "predicate": sa.Predicate(lambda i, j: (i + j) % 3 != 1),
}


@pytest.mark.parametrize("name", MADE_OUTSIDE)
def test_compile_with_any_pattern_of_a_module(name):
    torch._dynamo.reset()
    block, x = Block(MADE_OUTSIDE[name]), torch.randn(2, 64, 32)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_compile_sees_that_the_pattern_changed():
    torch._dynamo.reset()
    block, x = Block(sa.SlidingWindow(3)), torch.randn(2, 64, 32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    compiled(x)
    for pattern in (sa.SlidingWindow(9), sa.Tree((-1, 0)), sa.Tree((-1, -1))):
        block.pattern = pattern
        torch.testing.assert_close(compiled(x), block(x))


def test_compile_longnet():
    torch._dynamo.reset()
    q = torch.randn(1, 2, 40, 16)
    compiled = torch.compile(lambda q: sa.longnet(q, q, q, (8, 16), (1, 2)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), sa.longnet(q, q, q, (8, 16), (1, 2)))


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_dynamic_length_saves_and_loads(strict, tmp_path):
    block = Block(sa.SlidingWindow(16) | sa.Sinks(2))
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(block, (torch.randn(1, 64, 32),), dynamic_shapes=({1: length},), strict=strict)
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    for n in (2, 64, 101):
        x = torch.randn(1, n, 32)
        torch.testing.assert_close(loaded(x), block(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    block = Block(sa.SlidingWindow(16))
    x = torch.randn(2, 50, 32, requires_grad=True)
    block(x).square().sum().backward()
    expected = [x.grad, *(p.grad for p in block.parameters())]
    x.grad = None
    block.zero_grad()
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    for got, want in zip([x.grad, *(p.grad for p in block.parameters())], expected):
        assert torch.equal(got, want)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_sdpa_does(compiled):
    torch._dynamo.reset()
    q, k, v = inputs()
    call = torch.compile(sa.attention, fullgraph=True, backend="aot_eager") if compiled else sa.attention
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = call(q, k.bfloat16(), v, WINDOW, return_lse=True)
        wide = call(*inputs(dtype=torch.float64), WINDOW)
    assert (out.dtype, lse.dtype, wide.dtype) == (torch.bfloat16, torch.float32, torch.float64)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert dq.dtype == torch.float32


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_then_with(impl, mode):
    """What a call under inference mode leaves in the caches serves a later call with a gradient."""
    q, k, v = inputs(33, 33)
    pattern = sa.SlidingWindow(6) & sa.Sinks(40)
    with mode():
        out = sa.attention(q, k, v, pattern, impl=impl)
        assert not out.requires_grad
    again = sa.attention(q, k, v, pattern, impl=impl)
    torch.testing.assert_close(out, again.detach(), rtol=0, atol=0)
    again.sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("pattern", [*MADE_OUTSIDE.values(), WINDOW, sa.BigBird()], ids=str)
def test_handle_names_its_pattern(pattern):
    assert pattern_of(handle(pattern)) == pattern


def test_handle_of_equal_content_is_equal():
    mask = block_mask(4, 4)
    assert handle(sa.BlockSparse(mask, 16)) == handle(sa.BlockSparse(mask.clone(), 16))
    assert handle(sa.BlockSparse(mask, 16)) != handle(sa.BlockSparse(~mask, 16))


def test_unknown_handle_says_what_to_do():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="unknown to this process; make an equal pattern here and call"):
        attention_op(q, k, v, "(registered['BlockSparse 00'] & Causal())", None, "auto")


def test_fake_tensors_go_through_the_op():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        q = torch.randn(1, 2, 1 << 20, 64)
        out, lse = sa.attention(q, q, q, WINDOW, return_lse=True)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])


def test_functional_transform_vmap_goes_through_the_op():
    q = torch.randn(3, 1, 2, 20, 16)
    out = torch.vmap(lambda q: sa.attention(q, q, q, WINDOW, impl="gather"))(q)
    torch.testing.assert_close(out, torch.stack([sa.attention(x, x, x, WINDOW, impl="gather") for x in q]))


@pytest.mark.parametrize("impl", ["tile", "gather"])
def test_strides_that_the_compiler_chose(impl):
    """The op takes any strides: a compiler may hand it others than the caller wrote."""
    q, k, v = (x.detach().mT.contiguous().mT for x in inputs())
    out, _ = attention_op(q, k, v, handle(WINDOW), None, impl)
    torch.testing.assert_close(out, sa.attention(*(x.contiguous() for x in (q, k, v)), WINDOW, impl=impl))
