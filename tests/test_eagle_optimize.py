"""optimize_eagle on the small model: greedy output, the law of sampled output, hits, refusals, and a restore that leaves nothing behind."""

import copy
import functools
import inspect
import pickle
from itertools import product

import pytest
import torch
from scipy.stats import chisquare

from sparse_attention.eagle import eagle_hits, host_known, optimize_eagle, optimize_steps, restore_eagle, small_model, small_model_steps
from sparse_attention.eagle.bench_sections import counted_syncs
from sparse_attention.eagle.optimize import with_globals
from sparse_attention.eagle.small_model_layers import Config
from sparse_attention.eagle.small_model_training import small_model as make
from tests.eagle_reads import Reads

OPERATIONS = {"logsoftmax_topk", "cumulative_topk", "build_tree", "verify_greedy", "commit"}
GREEDY = {"max_new_tokens": 30, "max_length": 256, "log": True}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[3, 2], ids=["EAGLE-3", "EAGLE-2"])
def trained(request):
    return make(request.param == 3, depth=7, prompts=4, steps=60, unroll=3)


@pytest.fixture
def untrained():
    torch.manual_seed(0)
    return small_model.EaModel(total_token=12, depth=3, top_k=4).eval()


def attributes(model):
    """Every attribute of the model and its parts, in order."""
    return [(path, name, value) for path, module in model.named_modules() for name, value in vars(module).items()]


def same(before, after):
    return len(before) == len(after) and all(a[:2] == b[:2] and a[2] is b[2] for a, b in zip(before, after))


def test_greedy_output_is_the_unpatched_models(trained):
    model, prompts = trained
    plain = [model.eagenerate(p, **GREEDY) for p in prompts]
    steps = sum(index + 1 for _, _, index in plain)
    accepted = sum(int(new) for _, new, _ in plain) / steps - 1
    assert 3 <= accepted <= 8
    model, original = optimize_eagle(model)
    try:
        for prompt, (tokens, new, index) in zip(prompts, plain):
            got = model.eagenerate(prompt, **GREEDY)
            assert torch.equal(got[0], tokens) and got[1:] == (new, index)
            decoded = model.naivegenerate(prompt, max_new_tokens=tokens.shape[1] - prompt.shape[1])
            assert torch.equal(decoded, tokens)
        hits = eagle_hits(model)
        assert set(hits) == OPERATIONS  # none of them "/reference"
        assert hits["verify_greedy"] == hits["commit"] == steps
        assert hits["build_tree"] == steps + len(prompts) and hits["cumulative_topk"] == 7 * hits["build_tree"]
        assert hits["logsoftmax_topk"] == 8 * hits["build_tree"]
    finally:
        restore_eagle(model, original)


def test_eagles_own_steps_run_on_our_tree(trained):
    """What a script sees that calls the steps by itself: of the patched model only topK_genrate is in its loop."""
    model, prompts = trained
    plain = model.eagenerate(prompts[0], **GREEDY)
    model, original = optimize_eagle(model)
    try:
        got = type(model).eagenerate(model, prompts[0], **GREEDY)
        assert torch.equal(got[0], plain[0]) and got[1:] == plain[1:] and set(eagle_hits(model)) == OPERATIONS - {"verify_greedy", "commit"}
    finally:
        restore_eagle(model, original)


@pytest.mark.parametrize("own_steps", [False, True], ids=["patched", "own steps"])
def test_rows_of_nothing_at_the_end_change_nothing(trained, monkeypatch, own_steps):
    """On CUDA retrieve_indices keeps its fixed shape."""
    model, prompts = trained
    plain = model.eagenerate(prompts[0], **GREEDY)
    monkeypatch.setattr(optimize_steps, "trim_retrieve_indices", lambda rows, leaf_count, width: rows)
    model, original = optimize_eagle(model)
    try:
        generate = functools.partial(type(model).eagenerate, model) if own_steps else model.eagenerate
        assert torch.equal(generate(prompts[0], **GREEDY)[0], plain[0])
        torch.manual_seed(0)
        sampled = generate(prompts[0], temperature=0.5, max_new_tokens=8, max_length=128)
        assert torch.equal(sampled[:, : prompts[0].shape[1]], prompts[0]) and sampled.shape[1] > prompts[0].shape[1] + 8
    finally:
        restore_eagle(model, original)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_step_reads_from_the_device_once(trained, monkeypatch, temperature):
    model, prompts = trained
    monkeypatch.setattr(optimize_steps, "trim_retrieve_indices", lambda rows, leaf_count, width: rows)  # as on CUDA
    model, original = optimize_eagle(model)
    found = []
    try:
        for new in (4, 24):
            model.eagenerate(prompts[0], **GREEDY)  # the cache is there, which EAGLE keeps on the host
            torch.manual_seed(1)
            with Reads(model.current_length_data) as reads:
                ids, _, last = model.eagenerate(prompts[0], temperature, max_new_tokens=new, max_length=256, log=True)
            found.append((last + 1, reads.count))
            assert type(ids) is torch.Tensor
    finally:
        restore_eagle(model, original)
    (few, reads_of_few), (many, reads_of_many) = found
    assert many >= few + 2 and reads_of_many - reads_of_few == many - few


def test_ids_known_to_the_host():
    ids = host_known.extended(torch.tensor([[7, 8, 9]]), torch.tensor([[1, 2]]), [1, 2])
    ids = host_known.extended(ids, torch.tensor([[3]]), [3])
    assert ids.host == [1, 2, 3] and ids.tolist() == [[7, 8, 9, 1, 2, 3]]
    ids.host[:] = [10, 20, 30]  # to see which of the two is read
    assert [ids[0, start:].tolist() for start in (3, 5, 6, -1)] == [[10, 20, 30], [30], [], [30]]
    assert ids[0, 2:].tolist() == [9, 1, 2, 3] and ids[0, 3::2].tolist() == [1, 3] and ids[:, 3:].tolist() == [[1, 2, 3]]
    assert ids[0, 4:5].tolist() == [20] and ids[0].tolist() == [7, 8, 9, 1, 2, 3] and int(ids[0, 4]) == 2
    assert type(torch.cat([ids, ids], 1)) is torch.Tensor is type(ids + 1)


@pytest.mark.parametrize("change", [
    lambda ids: ids[0, 4:].fill_(9), lambda ids: ids.add_(1), lambda ids: ids.copy_(ids.flip(1)), lambda ids: ids[:, 3:5].zero_(),
    lambda ids: ids.__setitem__((0, 4), 9), lambda ids: ids.as_subclass(torch.Tensor).mul_(2),
])  # fmt: skip
def test_the_host_forgets_ids_that_were_changed_in_place(change):
    ids = host_known.extended(torch.tensor([[7, 8, 9]]), torch.tensor([[1, 2]]), [1, 2])
    tail = ids[0, 3:]
    assert ids.current and tail.current
    change(ids)
    plain = ids.as_subclass(torch.Tensor)
    assert ids[0, 3:].tolist() == tail.tolist() == plain[0, 3:].tolist() != [1, 2]
    longer = host_known.extended(ids, torch.tensor([[3]]), [3])
    assert longer.host == [3] and longer[0, 3:].tolist() == [*plain[0, 3:].tolist(), 3] and longer[0, 5:].tolist() == [3]


def test_ids_made_under_inference_mode_are_read():
    with torch.inference_mode():
        ids = host_known.extended(torch.tensor([[7, 8, 9]]), torch.tensor([[1, 2]]), [1, 2])
        ids[0, 4] = 5
        assert ids[0, 3:].tolist() == [1, 5]


def test_copies_of_ids_are_plain():
    ids = host_known.extended(torch.tensor([[7, 8, 9]]), torch.tensor([[1, 2]]), [1, 2])
    both = copy.deepcopy([ids, ids])
    assert both[0] is both[1] and both[0] is not ids
    for other in (both[0], copy.copy(ids), pickle.loads(pickle.dumps(ids))):
        assert type(other) is torch.Tensor and torch.equal(other, ids)
    both[0][0, 4] = 5
    assert ids[0, 3:].tolist() == [1, 2] and both[0][0, 3:].tolist() == [1, 5]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_step_waits_once(trained):
    model, prompts = copy.deepcopy(trained[0]).cuda(), [p.cuda() for p in trained[1]]
    model.ea_layer.init_tree()
    vars(model).pop("past_key_values", None)  # .cuda() does not move it
    optimize_eagle(model)
    for temperature in (0.0, 0.5):
        found = []
        model.eagenerate(prompts[0], temperature, **GREEDY)
        for new in (4, 24):
            with counted_syncs(model) as counter:
                tokens, _, last = model.eagenerate(prompts[0], temperature, max_new_tokens=new, max_length=256, log=True)
            found.append((last + 1, counter["syncs"]))
        (few, waits_of_few), (many, waits_of_many) = found
        assert many >= few + 2 and waits_of_many - waits_of_few == many - few, found
        if not temperature:
            assert torch.equal(tokens.cpu(), trained[0].eagenerate(trained[1][0], max_new_tokens=24, max_length=256))
    assert {name.removesuffix("/reference") for name in eagle_hits(model)} == OPERATIONS | {"verify_sampling"}


@pytest.mark.parametrize("processor", [None, small_model_steps.prepare_logits_processor(1.0)], ids=["greedy", "sampling"])
def test_drafts_the_same_tree(trained, processor):
    model, prompts = trained
    model.base_model.model.tree_mask = None
    with torch.no_grad():
        outputs, logits, hidden = model(prompts[0], output_orig=True)
    if model.use_eagle3:
        hidden = torch.cat(outputs["hidden_states"], -1)
    ids = torch.cat([prompts[0], logits[:, -1:].argmax(-1)], 1)

    def draft():
        model.ea_layer.reset_kv()
        return model.ea_layer.topK_genrate(hidden, ids, model.base_model.lm_head, processor)

    plain = draft()
    model, original = optimize_eagle(model)
    try:
        for a, b in zip(plain, draft()):
            assert a.dtype == b.dtype and torch.equal(a, b)
    finally:
        restore_eagle(model, original)


def law(model, prompt, temperature, tokens, least):
    """{continuation: probability} of those more likely than `least`, by the base alone."""
    likely = {(): 1.0}
    for _ in range(tokens):
        starts = torch.cat([torch.cat([prompt, torch.tensor([c], dtype=torch.int64)], 1) for c in likely])
        with torch.no_grad():
            p = (model.base_model(starts)[:, -1] / temperature).softmax(-1)
        grown = {(*c, t): q * float(p[i, t]) for (i, (c, q)), t in product(enumerate(likely.items()), range(p.shape[1]))}
        likely = {c: q for c, q in grown.items() if q > least}
    return likely


def test_sampled_output_has_the_targets_law(trained):
    model, prompts = trained
    kept = model.ea_layer.total_tokens, model.ea_layer.depth
    draws, temperature = 250, 0.4
    model.base_model.model.tree_mask = None
    expected = law(model, prompts[0], temperature, 3, 6 / draws)
    assert len(expected) >= 4 and sum(expected.values()) > 0.3  # enough classes to tell laws apart
    model, original = optimize_eagle(model)
    model.ea_layer.total_tokens, model.ea_layer.depth = 20, 2
    try:
        torch.manual_seed(7)
        counts = dict.fromkeys(expected, 0)
        for _ in range(draws):
            out = model.eagenerate(prompts[0], temperature=temperature, max_new_tokens=2, max_length=64)
            continuation = tuple(out[0, prompts[0].shape[1] :].tolist()[:3])
            if continuation in counts:
                counts[continuation] += 1
        hits = eagle_hits(model)
    finally:
        model.ea_layer.total_tokens, model.ea_layer.depth = kept
        restore_eagle(model, original)
    assert hits["verify_sampling"] == hits["commit"] < 2.7 * draws  # three steps a draw if nothing is accepted
    rest = draws - sum(counts.values()), draws * (1 - sum(expected.values()))
    p = chisquare([*counts.values(), rest[0]], [*(draws * q for q in expected.values()), rest[1]]).pvalue
    assert p > 1e-3


def test_restore_leaves_the_model_as_it_was(untrained):
    prompt = torch.arange(9)[None]
    untrained.eagenerate(prompt, max_new_tokens=5, max_length=64)
    own = untrained.eagenerate
    untrained.eagenerate = own  # now it is in the instance as well
    other = small_model.EaModel()
    globals_before = dict(inspect.unwrap(small_model.EaModel.eagenerate).__globals__)
    before = attributes(untrained)
    model, original = optimize_eagle(untrained)
    assert model is untrained and set(original) == {"eagenerate", "ea_layer.topK_genrate"} and original["eagenerate"] is own
    assert original["ea_layer.topK_genrate"].__func__ is type(model.ea_layer).topK_genrate
    assert model.eagenerate is not own and "eagenerate" not in vars(other) and "topK_genrate" not in vars(other.ea_layer)
    assert inspect.unwrap(small_model.EaModel.eagenerate).__globals__ == globals_before
    assert restore_eagle(model, original) is model
    assert same(before, attributes(model)) and model.eagenerate is own
    del model.eagenerate
    with pytest.raises(ValueError, match="not patched"):
        eagle_hits(model)


def test_after_generating_only_what_eagle_itself_keeps_has_changed(untrained):
    prompt = torch.arange(9)[None]
    twin = copy.deepcopy(untrained)
    twin.eagenerate(prompt, max_new_tokens=5, max_length=64)
    model, original = optimize_eagle(untrained)
    model.eagenerate(prompt, max_new_tokens=5, max_length=64)
    restore_eagle(model, original)
    assert [a[:2] for a in attributes(model)] == [a[:2] for a in attributes(twin)]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))


@pytest.mark.parametrize(
    "path",
    [
        *("ea_layer.total_tokens", "ea_layer.depth", "ea_layer.top_k", "ea_layer.tree_mask_init", "ea_layer.position_ids"),
        *("ea_layer.midlayer", "ea_layer.norm", "ea_layer.lm_head", "ea_layer.d2t", "ea_layer.embed_tokens"),
        *("ea_layer", "base_model", "base_model.lm_head", "base_model.model.layers"),
    ],
)
def test_names_the_attribute_that_is_missing(untrained, path):
    owner, _, name = path.rpartition(".")
    delattr(untrained.get_submodule(owner), name)
    with pytest.raises(ValueError, match=rf"model\.{path} is missing"):
        optimize_eagle(untrained)
    assert not any("patch" in name or "sparse" in name for name in vars(untrained))


@pytest.mark.parametrize("step", ["tree_decoding", "evaluate_posterior", "update_inference_inputs"])
def test_names_the_step_that_is_other_than_expected(untrained, step):
    untrained.eagenerate = with_globals(untrained.eagenerate, {step: lambda logits, threshold: None})
    with pytest.raises(ValueError, match=rf"{step} takes \(logits, threshold\); expected"):
        optimize_eagle(untrained)
    untrained.eagenerate = with_globals(untrained.eagenerate, {step: None})
    with pytest.raises(ValueError, match=rf"{step} is missing"):
        optimize_eagle(untrained)


def test_refuses_what_it_does_not_understand(untrained):
    with pytest.raises(ValueError, match="model is int"):
        optimize_eagle(3)
    with pytest.raises(ValueError, match=r"ea_layer is missing"):
        optimize_eagle(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="impl is 'fast'"):
        optimize_eagle(untrained, impl="fast")
    model, original = optimize_eagle(untrained)
    with pytest.raises(ValueError, match="already patched"):
        optimize_eagle(model)
    with pytest.raises(ValueError, match="original_methods are not those"):
        restore_eagle(model, dict(original))
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="expected one model and one loop"):
        twin.eagenerate(torch.arange(9)[None], max_new_tokens=5, max_length=64)
    restore_eagle(model, original)
    with pytest.raises(ValueError, match="not patched"):
        restore_eagle(model, original)
    wrapped = untrained.eagenerate
    untrained.eagenerate = functools.wraps(wrapped)(lambda *args, **kwargs: wrapped(*args, **kwargs))
    with pytest.raises(ValueError, match="model.eagenerate is wrapped by"):
        optimize_eagle(untrained)
    del untrained.eagenerate
    untrained.base_model.model.norm.to("meta")
    with pytest.raises(ValueError, match=r"model.base_model.model.norm.weight is on meta; expected cpu"):
        optimize_eagle(untrained)


def test_impl_says_what_runs_and_is_counted(untrained):
    prompt = torch.arange(9)[None]
    outputs = []
    for impl, ending in (("native", ""), ("reference", "/reference")):
        model, original = optimize_eagle(untrained, impl=impl)
        outputs.append(model.eagenerate(prompt, max_new_tokens=8, max_length=64))
        assert set(eagle_hits(model)) == {name + ending for name in OPERATIONS}
        restore_eagle(model, original)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("options", [{"top_k": 1, "total_token": 3, "depth": 4}, {"top_k": 4, "total_token": 2, "depth": 0}], ids=str)
def test_small_trees_and_one_vocabulary(options):
    torch.manual_seed(1)
    model = small_model.EaModel(Config(vocab_size=40, draft_vocab_size=40), **options).eval()
    prompt = torch.arange(6)[None]
    plain = model.eagenerate(prompt, max_new_tokens=6, max_length=64)
    model, _ = optimize_eagle(model)
    assert torch.equal(model.eagenerate(prompt, max_new_tokens=6, max_length=64), plain)


def test_bfloat16_and_top_p_run(untrained):
    model, _ = optimize_eagle(untrained.to(torch.bfloat16))
    prompt = torch.arange(9)[None]
    for options in ({}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20}):
        out = model.eagenerate(prompt, max_new_tokens=6, max_length=64, **options)
        assert torch.equal(out[:, :9], prompt) and int(out.max()) < 96
    assert eagle_hits(model)["verify_sampling"] > 0
