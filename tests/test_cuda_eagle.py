"""EAGLE's tree operations on a CUDA device against their references on the CPU; graphs, no wait, the same bits each time. Skipped without one."""

from __future__ import annotations

import warnings

import pytest
import torch

from sparse_attention import eagle
from sparse_attention.eagle.mask import render
from sparse_attention.eagle.outputs import empty_mask
from tests import eagle_upstream as upstream
from tests.eagle_trees import likely_logits, random_tree
from tests.test_eagle_build import SGLANG_PARENTS, SGLANG_SELECTED
from tests.test_eagle_greedy import golden_tree

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.cuda
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WALK = ("accept_index", "accept_length", "predicts", "next_token", "best_candidate")


def cuda(x):
    """A tensor, or each of a tuple's, on the device."""
    if isinstance(x, tuple):
        made = [cuda(y) for y in x]
        return type(x)(*made) if hasattr(x, "_fields") else tuple(made)
    return x.cuda() if isinstance(x, torch.Tensor) else x


def equal(ours, theirs, fields=None):
    for name in fields or theirs._fields:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a.cpu(), b), name


def candidates(depth, top_k, seeds, dtype=torch.float32, peak=1.0):
    drawn = [upstream.draft_candidates(depth, top_k, seed, dtype=dtype, peak=peak) for seed in seeds]
    return tuple(torch.stack(x) for x in zip(*drawn))


def random_parents(batch, nodes, reach, seed):
    rng = torch.Generator().manual_seed(seed)
    parents = torch.stack([(torch.rand(nodes, generator=rng) * torch.arange(nodes).clamp(max=reach)).long() for _ in range(batch)])
    parents = (torch.arange(nodes) - 1 - parents).clamp(min=0)
    parents[:, 0] = -1
    return parents


@pytest.mark.parametrize("depth, top_k, total", [(7, 10, 59), (3, 4, 20), (4, 1, 5), (2, 2, 1), (0, 6, 6), (7, 10, 500), (5, 20, 1023)])
@pytest.mark.parametrize("row_order", ["leaf", "sorted"])
def test_build_tree(depth, top_k, total, row_order):
    inputs = candidates(depth, top_k, range(3))
    roots = torch.tensor([5, 6, 7])
    for mask in ("float", "bits"):
        ours = eagle.build_tree(*cuda(inputs), total, roots.cuda(), mask=mask, row_order=row_order, impl="native")
        theirs = eagle.build_tree(*inputs, total, roots, mask=mask, row_order=row_order, impl="reference")
        equal(ours, theirs)
    chosen = eagle.select_tree(inputs[0].cuda(), total, impl="native")
    assert torch.equal(chosen.cpu(), eagle.select_tree(inputs[0], total, impl="reference"))
    equal(eagle.build(chosen, *cuda(inputs[1:]), roots.cuda(), mask="bits", row_order=row_order, impl="native"), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_selection_with_ties(dtype):
    for seed in range(3):
        scores, tokens, parents = candidates(6, 8, (seed, seed + 10), dtype, peak=8.0)
        for total in (1, 40, scores.shape[1]):
            ours = eagle.select_tree(scores.cuda(), total, impl="native")
            assert torch.equal(ours.cpu(), eagle.select_tree(scores, total, impl="reference"))
    special = torch.tensor([[0.0, -0.0, -torch.inf, torch.nan, 1e-45, -1e-45, 0.0, torch.inf, -torch.nan]], dtype=dtype)
    special = torch.cat([special, torch.zeros(1, 3000, dtype=dtype)], 1)  # more than a block has threads
    for total in range(1, 12):
        ours = eagle.select_tree(special.cuda(), total, impl="native")
        assert torch.equal(ours.cpu(), eagle.select_tree(special, total, impl="reference", check=False))


@pytest.mark.parametrize("nodes, reach", [(1, 1), (2, 1), (31, 2), (33, 8), (64, 1), (65, 60), (200, 200), (1024, 30)])
def test_assembled_trees_and_masks(nodes, reach):
    parents = random_parents(3, nodes, reach, nodes)
    broken = parents.clone()
    broken[1, nodes // 2] = nodes + 5  # an orphan, and what hangs from it
    broken[2, nodes - 1] = -(2**40)
    tokens = torch.arange(3 * nodes).view(3, nodes)
    for given in (parents, broken):
        for row_order in ("leaf", "sorted"):
            options = {"row_order": row_order, "max_depth": min(nodes - 1, 40), "check": False}
            equal(
                eagle.assemble_tree(tokens.cuda(), given.cuda(), mask="bool", impl="native", **options),
                eagle.assemble_tree(tokens, given, mask="bool", impl="reference", **options),
            )
        visible = eagle.tree_mask(given, impl="reference", check=False)
        forms = [("bool", None), ("float", None), ("bits", None), ("bits32", None), *(("additive", dtype) for dtype in DTYPES)]
        for form, dtype in forms:
            theirs = empty_mask(3, nodes, form, dtype or torch.float32, 0, "cpu")
            render(visible, form, None, theirs)
            ours = eagle.tree_mask(given.cuda(), form, dtype=dtype or torch.float32, impl="native")
            assert ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs), form


def test_full_masks():
    parents = random_parents(70, 30, 5, 1)
    lengths = torch.arange(70) * 3 % 50
    for batch in (3, 70):  # prefix lengths in the launch's arguments, and copied
        theirs = eagle.tree_mask(parents[:batch], "full", prefix_lens=lengths[:batch], impl="reference")
        ours = eagle.tree_mask(parents[:batch].cuda(), "full", prefix_lens=lengths[:batch], impl="native")
        assert torch.equal(ours.cpu(), theirs)
        for size in (theirs.numel() + 100, theirs.numel() - 100):  # what does not fit is not written
            out = torch.zeros(size + 64, dtype=torch.bool, device="cuda")
            eagle.tree_mask(parents[:batch].cuda(), "full", prefix_lens=lengths[:batch].cuda(), impl="native", out=out[:size])
            fits = min(size, theirs.numel())
            assert torch.equal(out[:fits].cpu(), theirs[:fits]) and not out[fits:].any()
    out = torch.zeros(5000, dtype=torch.bool, device="cuda")
    huge = torch.tensor([2**62, -7], device="cuda")
    eagle.tree_mask(parents[:2].cuda(), "full", prefix_lens=huge, impl="native", out=out[:4000])
    assert out[:4000].all() and not out[4000:].any()


def test_golden_trees_and_orphans():
    tree = eagle.build(
        torch.tensor(SGLANG_SELECTED).cuda(), torch.arange(104).view(2, 52).cuda(), (torch.tensor(SGLANG_PARENTS) + 1).cuda(),
        torch.tensor([29974, 13]).cuda(), impl="native",
    )  # fmt: skip
    assert tree.first_child.tolist() == [[1, 3, 4, 5, 6, 7, -1, -1], [1, 2, -1, 6, -1, -1, 7, -1]]
    assert tree.next_sibling.tolist() == [[-1, 2, -1, -1, -1, -1, -1, -1], [-1, -1, 3, 4, 5, -1, -1, -1]]
    scores, tokens, parents = candidates(3, 4, (3,))
    bad = parents.clone()
    bad[0, 1:4] = torch.tensor([9, -3, 2**62])
    for given in (parents, bad):
        for selected in ([0, 4, 5, 36], [0, 1, 5, 99], [-5, 0, 4, 8], [2, 2, 4, 8], [0, 4, 8, 12]):
            chosen, root = torch.tensor([selected]), torch.tensor([0])
            ours = eagle.build(chosen.cuda(), *cuda((tokens, given)), root.cuda(), impl="native")
            equal(ours, eagle.build(chosen, tokens, given, root, impl="reference", check=False))
    with pytest.raises(ValueError, match="expected that candidate to be selected too"):
        eagle.build(torch.tensor([[0, 4, 5, 36]]).cuda(), *cuda((tokens, parents, torch.tensor([0]))), impl="native", check=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [7, 64, 1023, 5000, 128256])
def test_verify_greedy(vocab, dtype):
    batch, nodes = (1, 12) if vocab > 100000 else (4, 60)
    tree = random_tree(nodes, vocab, vocab=min(vocab, 40), batch=batch, reach=1 if vocab == 7 else 6)
    logits = likely_logits(tree, vocab, 5).to(dtype)
    for case in ("plain", "ties", "nan"):
        if case == "ties":
            logits = logits.round()
        if case == "nan":
            logits[:, ::3, : vocab // 2] = torch.nan
            logits[0, 0] = -torch.inf
        theirs = eagle.verify_greedy(tree, logits, return_sample_p=True, impl="reference", check=False)
        ours = eagle.verify_greedy(cuda(tree), logits.cuda(), return_sample_p=True, impl="native")
        equal(ours, theirs, WALK)
        assert torch.equal(ours.sample_p.nan_to_num().cpu(), theirs.sample_p.nan_to_num())
        equal(eagle.verify_greedy(cuda(tree), logits.cuda(), width=3, impl="native"),
              eagle.verify_greedy(tree, logits, width=3, impl="reference", check=False))  # fmt: skip
    shifted = torch.zeros(logits.numel() + 1, dtype=dtype, device="cuda")[1:].view(logits.shape).copy_(logits)  # not aligned
    equal(eagle.verify_greedy(cuda(tree), shifted, impl="native"), eagle.verify_greedy(tree, logits, impl="reference", check=False))


def test_verify_given_tokens():
    targets = torch.full((2, 6), 18)
    targets[0, 0], targets[0, 3], targets[0, 4], targets[1, 0], targets[1, 4] = 3, 4, 5, 11, 12
    verified = eagle.verify_greedy(cuda(golden_tree()), target_tokens=targets.cuda(), width=4, impl="native")
    predicts, accept_index, count = eagle.engines_view(verified)
    assert predicts.tolist() == [3, -1, -1, 4, 5, 18, 11, -1, -1, -1, 12, 18]
    assert accept_index.tolist() == [[0, 3, 4, 5], [6, 10, 11, -1]] and count.tolist() == [3, 2]
    rng = torch.Generator().manual_seed(0)
    for seed in range(20):  # links that are no tree
        first, following = (torch.randint(-3, 12, (50, 9), generator=rng) for _ in range(2))
        tree = eagle.DraftTree(torch.randint(0, 2, (50, 9), generator=rng), first_child=first, next_sibling=following)
        targets = torch.randint(0, 2, (50, 9), generator=rng)
        theirs = eagle.verify_greedy(tree, target_tokens=targets, impl="reference", check=False)
        equal(eagle.verify_greedy(cuda(tree), target_tokens=targets.cuda(), impl="native"), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["upstream", "target_only"])
def test_verify_sampling(rule, dtype):
    for seed, (nodes, vocab) in enumerate([(1, 7), (12, 40), (30, 1100), (20, 7), (9, 33000)]):
        tree = random_tree(nodes, seed, reach=4, batch=6, vocab=max(vocab, 40))
        tree = tree._replace(draft_tokens=tree.draft_tokens % vocab)
        probs = likely_logits(tree, vocab, seed, 3.0).softmax(2).to(dtype)
        probs = torch.where(probs < 0.1 * probs.amax(2, keepdim=True), 0, probs)
        rng = torch.Generator().manual_seed(seed)
        given = {"coins": torch.rand(6, nodes, generator=rng), "final_coins": torch.rand(6, generator=rng)}
        for source in (given, {"seed": seed, "offset": 2**33 + 5}):
            options = {"rule": rule, "threshold_single": 0.9, "threshold_acc": 0.8, "width": min(nodes, 7), "return_sample_p": True}
            theirs = eagle.verify_sampling(tree, probs, **source, **options, impl="reference")
            ours = eagle.verify_sampling(cuda(tree), probs.cuda(), **{k: cuda(v) for k, v in source.items()}, **options, impl="native")
            equal(ours, theirs, WALK)
            torch.testing.assert_close(ours.sample_p.cpu(), theirs.sample_p)
    nothing = eagle.verify_sampling(cuda(tree), torch.zeros(6, nodes, 64, device="cuda"), seed=1, rule=rule, impl="native")
    assert not nothing.next_token.any() and not nothing.accept_length.any()
    bad = torch.full((6, nodes, 64), torch.nan, device="cuda")
    assert not eagle.verify_sampling(cuda(tree), bad, seed=1, rule=rule, impl="native").next_token.any()


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dim", [1, 5, 8, 12, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_and_retrieve(dim, dtype):
    cache = numbers(2, 4, 3, 40, dim, dtype=dtype)
    new = numbers(2, 4, 7, 3, dim, dtype=dtype).transpose(2, 3)
    lengths = torch.tensor([0, 33, 34, 2**62])  # two that do not fit
    ours, theirs = cache.cuda(), cache.clone()
    a = eagle.append(*ours, *new.cuda(), lengths.cuda(), impl="native")
    b = eagle.append(*theirs, *new, lengths, impl="reference", check=False)
    assert torch.equal(a.cpu(), b) and torch.equal(ours.cpu(), theirs)
    strided = cache.transpose(2, 3).contiguous().transpose(2, 3).cuda()
    eagle.append(*strided, *new.cuda(), lengths.cuda(), impl="native")
    assert torch.equal(strided.cpu(), theirs)
    indices = torch.tensor([[39, 0, -1, 7, 7], [40, -2, 2**50, 1, 2], [3, 4, 5, 6, 7], [0, 0, 0, 0, 0]])
    for x, y in zip(eagle.retrieve(*strided, indices.cuda(), impl="native"), eagle.retrieve(*theirs, indices, impl="reference", check=False)):
        assert torch.equal(x.cpu(), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("dim", [3, 8, 64])
@pytest.mark.parametrize("nodes, width", [(12, 7), (60, 9), (60, 40), (1, 1)])
def test_commit(nodes, width, dim, dtype):
    rng = torch.Generator().manual_seed(nodes + dim)
    batch = 4
    order = torch.stack([torch.randperm(nodes, generator=rng) for _ in range(batch)])
    index = torch.nn.functional.pad(order, (0, max(0, width - nodes)), value=-1)[:, :width].contiguous()
    length = torch.tensor([min(nodes, width) - 1, -1, (min(nodes, width) - 1) // 2, width])  # the last is too many
    start = torch.tensor([0, 3, 5, 1])
    cache, hidden = numbers(6, batch, 2, 80, dim, dtype=dtype), numbers(batch, nodes, dim + 5, dtype=dtype)
    expected = cache.clone()
    theirs = eagle.commit(expected, start, index, length, hidden=hidden, impl="reference", check=False)
    arguments = cuda((start, index, length))
    kinds = {
        "one": cache.cuda(),
        "list": [x.cuda() for x in cache],
        "uneven": [cache[:1].cuda(), cache[1:2].cuda(), cache[2:].cuda()],
        "strided": cache.transpose(2, 3).contiguous().cuda().transpose(2, 3),
    }
    for name, given in kinds.items():
        ours = eagle.commit(given, *arguments, hidden=hidden.cuda(), impl="native")
        after = {"list": torch.stack, "uneven": torch.cat}.get(name, lambda x: x)(given)
        assert torch.equal(after.cpu(), expected), name
        equal(ours, theirs)
    for page in (1, 16, 80):
        blocks = 80 // page
        table = torch.randperm(batch * blocks + 2, generator=rng)[: batch * blocks].view(batch, blocks)
        pages = torch.zeros(6, batch * blocks + 2, 2, page, dim, dtype=dtype)
        pages[:, table.flatten()] = cache.view(6, batch, 2, blocks, page, dim).transpose(2, 3).flatten(1, 2)
        table[2, 0] = 10**6  # no page: request 2 is left as it is where it reads or writes there
        copy = pages.cuda()
        theirs_paged = eagle.commit(pages, start, index, length, block_table=table, impl="reference", check=False)
        ours = eagle.commit(copy, *arguments, block_table=table.int().cuda(), impl="native")
        assert torch.equal(copy.cpu(), pages) and torch.equal(ours.lengths.cpu(), theirs_paged.lengths)
    with pytest.raises(ValueError, match=rf"accept_length\[3\] is {width}; expected -1 to {width - 1}"):
        eagle.commit(kinds["one"], *arguments, impl="native", check=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab, k", [(1, 1), (10, 10), (100, 65), (1023, 10), (3000, 100), (2000, 2000), (32000, 10), (128256, 64)])
def test_logsoftmax_topk(vocab, k, dtype):
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    logits = (numbers(3, vocab) * 4).to(dtype)
    bad = logits.clone()
    bad[0, ::2], bad[1], bad[2, ::3] = torch.nan, -torch.inf, torch.inf
    d2t = torch.arange(vocab) * 3
    for case in (logits, logits.round(), torch.zeros_like(logits), bad):
        theirs = eagle.logsoftmax_topk(case.double(), k, d2t=d2t, impl="reference", check=False)  # PyTorch's float32 sum is off by 1e-5 here
        ours = eagle.logsoftmax_topk(case.cuda(), k, d2t=d2t.cuda(), impl="native")
        assert torch.equal(ours.tokens.cpu(), theirs.tokens)
        torch.testing.assert_close(ours.values.cpu().double(), theirs.values, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width, k", [(1, 1, 1), (10, 10, 10), (7, 11, 77), (64, 64, 64), (40, 60, 2000)])
def test_cumulative_topk(rows, width, k, dtype):
    rng = torch.Generator().manual_seed(rows)
    log_probs, scores = (-torch.randint(0, 60, s, generator=rng).to(dtype) / 4 for s in ((3, rows, width), (3, rows)))
    log_probs[0, 0, 0] = torch.nan
    tokens = torch.randint(0, 99, (3, rows, width), generator=rng)
    ours = eagle.cumulative_topk(*cuda((log_probs, scores)), k, tokens=tokens.cuda(), level=2, impl="native")
    equal(ours, eagle.cumulative_topk(log_probs, scores, k, tokens=tokens, level=2, impl="reference", check=False))


class Step:
    """A speculative step after the draft on a device: build, verify, commit. Its inputs stay where they are."""

    def __init__(self, vocab=4000, batch=2):
        self.inputs = [torch.empty_like(x, device="cuda") for x in (*candidates(5, 8, range(batch)), torch.zeros(batch).long())]
        self.batch, self.vocab = batch, vocab
        self.logits = torch.empty(batch, 41, vocab, dtype=torch.bfloat16, device="cuda")
        self.cache = torch.empty(8, batch, 2, 128, 64, dtype=torch.bfloat16, device="cuda")
        self.lengths = torch.empty(batch, dtype=torch.int64, device="cuda")
        self.offset = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.hidden = torch.empty(batch, 41, 96, dtype=torch.bfloat16, device="cuda")

    def draw(self, seed):
        """Other inputs, and copies of them on the CPU."""
        scores, tokens, parents = candidates(5, 8, range(seed, seed + self.batch))
        roots = torch.arange(self.batch) + seed
        tree = eagle.build_tree(scores, tokens, parents, 40, roots, impl="reference")
        logits = likely_logits(tree, self.vocab, seed).bfloat16()
        cache = numbers(8, self.batch, 2, 128, 64, dtype=torch.bfloat16)
        hidden = numbers(self.batch, 41, 96, dtype=torch.bfloat16)
        host = scores, tokens, parents, roots, logits, cache, torch.tensor([50, 7])[: self.batch] + seed, hidden, torch.tensor([seed])
        there = *self.inputs, self.logits, self.cache, self.lengths, self.hidden, self.offset
        for x, y in zip(there, host):
            x.copy_(y)
        return host

    @staticmethod
    def run(scores, tokens, parents, roots, logits, cache, lengths, hidden, offset, impl, seed):
        tree = eagle.build_tree(scores, tokens, parents, 40, roots, mask="bits", impl=impl)
        verified = eagle.verify_greedy(tree, logits, impl=impl)
        sampled = eagle.verify_sampling(tree, logits.float().softmax(2), seed=seed, offset=offset, impl=impl)
        done = eagle.commit(cache, lengths, verified.accept_index, verified.accept_length, hidden=hidden, impl=impl)
        best = eagle.logsoftmax_topk(logits, 8, impl=impl)
        some = logits[:, :, :8].contiguous(), logits[:, :, 8].contiguous()
        front = eagle.cumulative_topk(*some, 8, tokens=best.tokens, level=1, impl=impl)
        return [x for part in (tree, verified, sampled, done, (best.tokens,), front) for x in part if x is not None]

    def on_device(self):
        there = *self.inputs, self.logits, self.cache, self.lengths, self.hidden, self.offset
        return self.run(*there, "native", torch.full((1,), 5, dtype=torch.int64, device="cuda"))


def test_a_graph_replays_with_other_inputs():
    step = Step()
    step.draw(0)
    step.on_device()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step.on_device()
    lengths = set()
    for seed in (3, 4, 5):
        host = step.draw(seed)
        graph.replay()
        expected = step.run(*(x.clone() for x in host[:5]), cache := host[5].clone(), *host[6:], "reference", torch.tensor([5]))
        assert all(torch.equal(x.cpu(), y) for x, y in zip(results, expected))
        assert torch.equal(step.cache.cpu(), cache)
        lengths.update(results[11].tolist())
    assert len(lengths) > 1


def test_no_wait_for_the_device():
    step = Step()
    step.draw(1)
    step.on_device()
    new = torch.zeros(2, 2, 3, 64, dtype=torch.bfloat16, device="cuda")
    parents = random_parents(2, 50, 5, 0).cuda()
    prefix = torch.tensor([3, 4])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step.on_device()
            eagle.append(step.cache[0], step.cache[1], new, new, step.lengths)
            eagle.retrieve(step.cache[0], step.cache[1], parents[:, :5])
            eagle.tree_mask(parents, "full", prefix_lens=prefix)
            eagle.select_tree(step.inputs[0], 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_waits_once_for_the_accepted_tokens():
    step = Step()
    step.draw(1)

    def run():
        tree = eagle.build_tree(*step.inputs[:3], 40, step.inputs[3], mask="bits")
        verified = eagle.verify_greedy(tree, step.logits)
        eagle.commit(step.cache, step.lengths, verified.accept_index, verified.accept_length, hidden=step.hidden)
        return tree, verified, eagle.accepted_tokens(tree, verified)

    run()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            tree, verified, tokens = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("called a synchronizing" in str(w.message) for w in caught) == 1
    assert tokens == eagle.accepted_tokens(*(type(x)(*(y if y is None else y.cpu() for y in x)) for x in (tree, verified)))


def test_the_same_bits_each_time():
    step = Step(vocab=32000)
    host = step.draw(2)
    first = [x.clone() for x in step.on_device()]
    moved = step.cache.clone()
    start = host[5].cuda()
    same = torch.ones((), dtype=torch.bool, device="cuda")
    for _ in range(300):
        step.cache.copy_(start)
        for x, y in zip(step.on_device(), first):
            same &= (x == y).all()
        same &= (step.cache == moved).all()
    assert bool(same)


def test_launches_on_several_streams():
    tree = random_tree(60, 1, vocab=40, batch=3)
    logits = [likely_logits(tree, 20000, seed).half() for seed in range(4)]
    expected = [eagle.verify_greedy(tree, x, impl="reference") for x in logits]
    there, inputs = cuda(tree), [x.cuda() for x in logits]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    made = []
    for _ in range(40):
        for stream, x in zip(streams, inputs):
            with torch.cuda.stream(stream):
                made.append(eagle.verify_greedy(there, x, impl="native"))
    torch.cuda.synchronize()
    for n, ours in enumerate(made):
        equal(ours, expected[n % 4])
