"""append, retrieve and commit, against slices and loops; nothing is half done."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention import eagle

IMPLS = ("native", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def numbers(*shape, dtype=torch.float32):
    """Every element differs, as far as the dtype can tell."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_append(dtype, impl):
    k, v = numbers(3, 2, 10, 8, dtype=dtype), numbers(3, 2, 10, 8, dtype=dtype) + 1
    before_k, before_v = k.clone(), v.clone()
    k_new = numbers(3, 4, 2, 8, dtype=dtype).transpose(1, 2)  # [3, 2, 4, 8], not contiguous
    v_new = k_new - 1
    lengths = torch.tensor([0, 6, 3])
    assert eagle.append(k, v, k_new, v_new, lengths, impl=impl).tolist() == [4, 10, 7]
    assert lengths.tolist() == [0, 6, 3]
    for b, start in enumerate([0, 6, 3]):
        before_k[b, :, start : start + 4], before_v[b, :, start : start + 4] = k_new[b], v_new[b]
    assert torch.equal(k, before_k) and torch.equal(v, before_v)
    assert eagle.append(k, v, k_new, v_new, 2, impl=impl).tolist() == [6, 6, 6] and torch.equal(k[:, :, 2:6], k_new)


@pytest.mark.parametrize("impl", IMPLS)
def test_append_overflow_writes_nothing(impl):
    k, v = numbers(2, 1, 5, 4), numbers(2, 1, 5, 4)
    before = k.clone()
    new = numbers(2, 1, 3, 4)
    for lengths, message in (
        (torch.tensor([1, 3]), r"lengths\[1\] is 3; expected 0 to 2: the cache has 5 rows and 3 are appended"),
        (torch.tensor([-1, 0]), r"lengths\[0\] is -1; expected 0 to 2"),
        (torch.tensor([0, 2**62]), r"lengths\[1\] is 4611686018427387904"),
        (4, "lengths is 4; expected 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            eagle.append(k, v, new, new, lengths, impl=impl)
        assert torch.equal(k, before)
    assert eagle.append(k, v, new, new, torch.tensor([1, 3]), impl=impl, check=False).tolist() == [4, 3]
    assert torch.equal(k[0, :, 1:4], new[0]) and torch.equal(k[1], before[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_retrieve(dtype, impl):
    cache = numbers(2, 2, 3, 9, 5, dtype=dtype)
    k, v = cache[0], cache[1]
    indices = torch.tensor([[8, 0, 0, -1], [3, -1, 7, 2]])
    for rows, x in zip(eagle.retrieve(k, v, indices, impl=impl), (k, v)):
        expected = torch.stack([x[b][:, indices[b].clamp(min=0)] for b in range(2)]) * (indices >= 0)[:, None, :, None]
        assert torch.equal(rows, expected) and rows.is_contiguous()
    for bad in (9, -2, 2**50):
        with pytest.raises(ValueError, match=rf"indices\[1, 0\] is {bad}; expected a row from 0 to 8, or -1"):
            eagle.retrieve(k, v, torch.tensor([[0], [bad]]), impl=impl)
        assert not eagle.retrieve(k, v, torch.tensor([[0], [bad]]), impl=impl, check=False)[0][1].any()


def committed(cache, lengths, paths):
    """[L, B, H, S, D] with the rows moved one request at a time through a copy."""
    expected = cache.clone()
    for b, (start, path) in enumerate(zip(lengths, paths)):
        expected[:, b, :, start : start + len(path)] = cache[:, b][:, :, [start + n for n in path]]
    return expected


def padded(paths, width):
    return torch.tensor([p + [-1] * (width - len(p)) for p in paths]), torch.tensor([len(p) - 1 for p in paths])


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from(IMPLS), st.sampled_from(DTYPES))
def test_commit(data, impl, dtype):
    nodes, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 7))
    batch = data.draw(st.integers(1, 3))
    lengths = [data.draw(st.integers(0, 5)) for _ in range(batch)]
    # Any order, so that rows overlap both ways; and requests that commit nothing.
    paths = [data.draw(st.permutations(range(nodes)))[: data.draw(st.integers(0, min(nodes, width)))] for _ in range(batch)]
    index, length = padded(paths, width)
    cache = numbers(4, batch, 2, 5 + max(nodes, width), 3, dtype=dtype)
    hidden = numbers(batch, nodes, 6)
    expected = committed(cache, lengths, paths)
    kinds = {
        "one": cache.clone(),
        "layers": [x.clone() for x in cache],
        "devices": [cache[:2].clone(), cache[2:].clone()],
        "strided": cache.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, given_caches in kinds.items():
        done = eagle.commit(given_caches, torch.tensor(lengths), index, length, hidden=hidden, impl=impl)
        assert done.lengths.tolist() == [start + len(path) for start, path in zip(lengths, paths)]
        after = {"layers": torch.stack, "devices": torch.cat}.get(name, lambda x: x)(given_caches)
        assert torch.equal(after, expected), name
        for b, path in enumerate(paths):
            assert torch.equal(done.hidden[b, : len(path)], hidden[b, list(path)]) and not done.hidden[b, len(path) :].any()
    assert eagle.commit(cache, torch.tensor(lengths), index, length, impl=impl).hidden is None


@settings(max_examples=20, deadline=None)
@given(st.data(), st.sampled_from(IMPLS), st.sampled_from([1, 2, 4, 16]), st.sampled_from([torch.int32, torch.int64]))
def test_commit_paged_equals_contiguous(data, impl, page, table_dtype):
    nodes, width, batch, rows = 8, 6, 2, 16
    lengths = [data.draw(st.integers(0, 8)) for _ in range(batch)]
    paths = [data.draw(st.permutations(range(nodes)))[: data.draw(st.integers(0, width))] for _ in range(batch)]
    index, length = padded(paths, width)
    cache = numbers(3, batch, 2, rows, 4)
    blocks = rows // page
    table = torch.tensor(data.draw(st.permutations(range(batch * blocks + 2)))[: batch * blocks]).view(batch, blocks)
    pages = torch.zeros(3, batch * blocks + 2, 2, page, 4)
    pages[:, table.flatten()] = cache.view(3, batch, 2, blocks, page, 4).transpose(2, 3).flatten(1, 2)
    done = eagle.commit(pages, torch.tensor(lengths), index, length, block_table=table.to(table_dtype), impl=impl)
    read = pages[:, table.flatten()].view(3, batch, blocks, 2, page, 4).transpose(2, 3).reshape(cache.shape)
    assert torch.equal(read, committed(cache, lengths, paths))
    assert done.lengths.tolist() == [start + len(path) for start, path in zip(lengths, paths)]
    assert not pages[:, [p for p in range(batch * blocks + 2) if p not in table.flatten().tolist()]].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_malformed_commit_moves_nothing(impl):
    cache = numbers(2, 2, 1, 8, 3)
    hidden = numbers(2, 6, 2)
    good = torch.tensor([[0, 2, 4], [0, 3, 5]])

    def refused(message, lengths=(0, 2), index=good, length=(2, 2), caches=cache, untouched=1, **kwargs):
        before = caches.clone()
        arguments = (torch.tensor(lengths), index, torch.tensor(length))
        with pytest.raises(ValueError, match=message):
            eagle.commit(caches, *arguments, impl=impl, **kwargs)
        assert torch.equal(caches, before)
        done = eagle.commit(caches, *arguments, impl=impl, check=False, **kwargs)
        assert int(done.lengths[untouched]) == lengths[untouched]
        other = 1 - untouched
        assert int(done.lengths[other]) == lengths[other] + length[other] + 1
        if caches is cache:
            assert torch.equal(caches[:, untouched], before[:, untouched]) and not torch.equal(caches[:, other], before[:, other])
        if done.hidden is not None:
            assert not done.hidden[untouched].any() and done.hidden[other].any()
        caches.copy_(before)

    refused(r"accept_index\[1, 2\] is 5 and lengths\[1\] is 3; expected a row of the cache, which has 8", lengths=(0, 3))
    refused(r"lengths\[1\] is 6 and 3 rows are accepted; expected room for them: the cache has 8", lengths=(0, 6))
    refused(r"lengths\[1\] is -1; expected a row", lengths=(0, -1))
    refused(r"lengths\[1\] is 4611686018427387904", lengths=(0, 2**62))
    refused(r"accept_length\[1\] is 3; expected -1 to 2", length=(2, 3))
    refused(r"accept_length\[0\] is -2; expected -1 to 2", length=(-2, 2), untouched=0)
    refused(r"accept_index\[0, 1\] is -1", index=torch.tensor([[0, -1, 4], [0, 3, 5]]), untouched=0)
    no_node = torch.tensor([[0, 2, 4], [0, 6, 5]])
    refused(r"accept_index\[1, 1\] is 6 .* which has 8, a node below 6", lengths=(0, 0), index=no_node, hidden=hidden)
    table = torch.tensor([[0, 1], [2, 7]])
    pages = numbers(2, 4, 1, 4, 3)
    refused(r"block_table\[1\] is \[2, 7\]; expected pages from 0 to 3 for rows 2 and on", caches=pages, block_table=table)
    later = torch.tensor([[0, 2, 4], [1, 2, 3]])  # request 1 reads from its second page and writes to its first
    table[1] = torch.tensor([7, 2])
    refused(r"block_table\[1\] is \[7, 2\]", lengths=(0, 3), index=later, caches=pages, block_table=table)
    refused(r"lengths\[1\] is 3; expected a row of the cache, which has 8", lengths=(0, 3), caches=pages, block_table=table.clamp(max=3))


def test_wrong_arguments_are_named():
    cache = numbers(2, 2, 1, 8, 4)
    k, v = cache
    new = numbers(2, 1, 2, 4)
    index, length = torch.tensor([[0, 1], [0, 2]]), torch.tensor([1, 1])

    def refused(message, function, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            function(*args, **kwargs)

    refused(r"k_cache has shape \(2, 2, 1, 8, 4\)", eagle.append, cache, v, new, new, 0)
    refused("v_cache is a torch.float16 tensor", eagle.append, k, v.half(), new, new, 0)
    refused("k_new has dtype torch.float64; expected torch.float32", eagle.append, k, v, new.double(), new, 0)
    refused(r"v_new has shape \(2, 1, 1, 4\); expected \(2, 1, 2, 4\)", eagle.append, k, v, new, new[:, :, :1], 0)
    refused("lengths is True; expected an integer", eagle.append, k, v, new, new, True)
    refused("lengths has dtype torch.int32; expected torch.int64", eagle.append, k, v, new, new, torch.zeros(2).int())
    refused("k_cache has strides .* expected none of 0", eagle.append, k[:1].expand(2, 1, 8, 4), v, new, new, 0)
    refused("k_cache has strides .* expected a contiguous last dimension", eagle.append, k.transpose(2, 3), v, new, new, 0)
    refused("indices has dtype torch.int32", eagle.retrieve, k, v, index.int())
    refused("caches is empty", eagle.commit, [], 0, index, length)
    refused("caches have batch 2; expected 1, that of accept_index", eagle.commit, cache, 0, index[:1], length[:1])
    refused(r"caches\[1\] is torch.float16 on cpu; expected torch.float32", eagle.commit, [k, v.half()], 0, index, length)
    shorter = r"caches\[1\] has shape \(2, 1, 6, 4\); expected the batch and rows of caches\[0\]"
    refused(shorter, eagle.commit, [k, v[:, :, :6]], 0, index, length)
    refused("caches has shape", eagle.commit, k, 0, index, length)
    wrong = {"block_table": torch.zeros(2, 1)}
    refused("block_table has dtype torch.float32; expected torch.int32 or torch.int64", eagle.commit, cache, 0, index, length, **wrong)
    refused("hidden has dtype torch.int64", eagle.commit, cache, 0, index, length, hidden=torch.zeros(2, 3, 4).long())
    refused("accept_index is on meta; expected cpu, the device of caches", eagle.commit, cache, 0, index.to("meta"), length)
