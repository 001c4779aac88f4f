"""A draft step: log-softmax with top-k, and the top-k of the sums; a whole draft equals EAGLE's loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention import eagle
from tests import eagle_upstream as upstream

IMPLS = ("native", "reference")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: (1e-6, 1e-6), torch.float64: (1e-13, 1e-13), torch.bfloat16: (8e-3, 1e-3), torch.float16: (1e-3, 1e-3)}


def close(a, b):
    rtol, atol = TOLERANCE[a.dtype]
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(IMPLS), st.sampled_from(DTYPES))
def test_logsoftmax_topk(data, impl, dtype):
    vocab = data.draw(st.sampled_from([1, 2, 10, 63, 64, 100, 1023, 1024, 1025, 3000]))
    k = min(vocab, data.draw(st.sampled_from([1, 2, 10, 64, 65, 100])))
    shape = data.draw(st.sampled_from([(), (3,), (2, 3)]))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = (torch.randn(*shape, vocab, generator=rng) * data.draw(st.sampled_from([0.1, 3, 30]))).to(dtype)
    if data.draw(st.booleans()):
        logits = logits.round()  # ties
    values, tokens = eagle.logsoftmax_topk(logits, k, impl=impl)
    # PyTorch's own on the CPU rounds more than once in half precision.
    expected = logits.double().log_softmax(-1)
    close(values, expected.topk(k).values.to(dtype))
    close(values, expected.gather(-1, tokens).to(dtype))
    for row, chosen in zip(logits.view(-1, vocab).tolist(), tokens.view(-1, k).tolist()):
        assert chosen == sorted(range(vocab), key=lambda t: (-row[t], t))[:k]


@pytest.mark.parametrize("impl", IMPLS)
def test_draft_tokens_become_target_tokens(impl):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    d2t = torch.arange(50) * 3
    plain = eagle.logsoftmax_topk(logits, 5, impl=impl)
    mapped = eagle.logsoftmax_topk(logits, 5, d2t=d2t, impl=impl)
    assert torch.equal(mapped.tokens, plain.tokens + d2t[plain.tokens]) and torch.equal(mapped.values, plain.values)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [3, 70])
def test_logits_that_are_no_numbers(k, impl):
    logits = torch.zeros(2, 80)
    logits[0, 2], logits[0, 4], logits[0, 6] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(ValueError, match=r"logits\[0, 2\] is nan; expected a finite number or minus infinity"):
        eagle.logsoftmax_topk(logits, k, impl=impl)
    values, tokens = eagle.logsoftmax_topk(logits, k, impl=impl, check=False)
    assert tokens[0].tolist() == [t for t in range(80) if t not in (2, 4, 6)][:k]
    close(values[0], torch.full((k,), -float(torch.tensor(77.0).log())))
    empty = eagle.logsoftmax_topk(torch.full((1, 80), -torch.inf), k, impl=impl)
    assert empty.tokens.tolist() == [list(range(k))] and bool((empty.values == -torch.inf).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11), st.data(), st.sampled_from(IMPLS), st.sampled_from(DTYPES))
def test_cumulative_topk(batch, rows, width, data, impl, dtype):
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    log_probs, scores = (-torch.randint(0, 6, s, generator=rng).to(dtype) / 4 for s in ((batch, rows, width), (batch, rows)))
    tokens = torch.randint(0, 99, (batch, rows, width), generator=rng)
    k = data.draw(st.integers(1, rows * width))
    front = eagle.cumulative_topk(log_probs, scores, k, tokens=tokens, level=2, impl=impl)
    assert torch.equal(front.cumulative, log_probs + scores[:, :, None])
    for b in range(batch):
        flat = front.cumulative[b].flatten().tolist()
        assert front.index[b].tolist() == sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:k]
        assert front.scores[b].tolist() == [flat[i] for i in front.index[b].tolist()]
    assert torch.equal(front.rows, front.index // width) and torch.equal(front.tokens, tokens.flatten(1).gather(1, front.index))
    assert torch.equal(front.parents, front.index + 1 + width + 2 * width * width)
    plain = eagle.cumulative_topk(log_probs, scores, k, impl=impl)
    assert plain.tokens is None and plain.parents is None and torch.equal(plain.index, front.index)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_draft_is_upstreams(impl):
    depth, top_k, vocab, seed = 5, 6, 200, 9
    scores, tokens, parents = upstream.draft_candidates(depth, top_k, seed, vocab)
    rng = torch.Generator().manual_seed(seed)
    best = eagle.logsoftmax_topk(torch.randn(1, vocab, generator=rng) * 3, top_k, impl=impl)
    score = best.values
    all_scores, all_tokens, rows = [best.values], [best.tokens], [torch.zeros(1, 1).long(), torch.arange(1, top_k + 1)[None]]
    for level in range(depth):
        best = eagle.logsoftmax_topk(torch.randn(1, top_k, vocab, generator=rng) * 3, top_k, impl=impl)
        front = eagle.cumulative_topk(best.values, score, top_k, tokens=best.tokens, level=level, impl=impl)
        score = front.scores
        all_scores.append(front.cumulative.flatten(1))
        all_tokens.append(best.tokens.flatten(1))
        rows.append(front.parents)
    close(torch.cat(all_scores, 1)[0], scores)
    assert torch.equal(torch.cat(all_tokens, 1)[0], tokens) and torch.equal(torch.cat(rows[:-1], 1)[0], parents)


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_that_are_no_numbers(impl):
    log_probs, scores = torch.zeros(1, 2, 2), torch.tensor([[0.0, -1.0]])
    log_probs[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"log_probs\[0, 0, 0\] is nan; expected a number"):
        eagle.cumulative_topk(log_probs, scores, 2, impl=impl)
    front = eagle.cumulative_topk(log_probs, scores, 4, impl=impl, check=False)
    assert front.index.tolist() == [[1, 2, 3, 0]] and front.scores[0, 3] == -torch.inf
    with pytest.raises(ValueError, match=r"scores\[0, 1\] is nan"):
        eagle.cumulative_topk(torch.zeros(1, 2, 2), torch.tensor([[0.0, torch.nan]]), 2, impl=impl)


def test_wrong_arguments_are_named():
    def refused(message, function, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            function(*args, **kwargs)

    logits = torch.zeros(2, 9)
    refused("k is 10; expected an integer from 1 to 9", eagle.logsoftmax_topk, logits, 10)
    refused("k is 0; expected an integer from 1", eagle.logsoftmax_topk, logits, 0)
    refused("logits has dtype torch.int64", eagle.logsoftmax_topk, logits.long(), 1)
    refused(r"logits has shape \(0, 9\)", eagle.logsoftmax_topk, logits[:0], 1)
    refused("logits is 3; expected a tensor", eagle.logsoftmax_topk, 3, 1)
    refused(r"d2t has shape \(8,\); expected \[9\]", eagle.logsoftmax_topk, logits, 1, d2t=torch.zeros(8).long())
    log_probs, scores = torch.zeros(1, 2, 3), torch.zeros(1, 2)
    refused(r"scores has shape \(1, 3\); expected \[1, 2\]", eagle.cumulative_topk, log_probs, torch.zeros(1, 3), 2)
    refused("scores has dtype torch.float64; expected torch.float32", eagle.cumulative_topk, log_probs, scores.double(), 2)
    refused("k is 7; expected an integer from 1 to 6", eagle.cumulative_topk, log_probs, scores, 7)
    refused("level is -1; expected an integer of at least 0", eagle.cumulative_topk, log_probs, scores, 2, level=-1)
    refused("tokens has dtype torch.int32", eagle.cumulative_topk, log_probs, scores, 2, tokens=torch.zeros(1, 2, 3).int())
