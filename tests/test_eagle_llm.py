"""optimize_eagle on a third party's EAGLE: eagle-llm 1.2.1 from PyPI, a static tree of 26 nodes."""

import itertools
import json

import pytest
import torch

from sparse_attention.eagle import EAGLE1_MC_SIM_7B_63, eagle_hits, generate_tree_buffers, optimize_eagle, restore_eagle
from sparse_attention.eagle.__main__ import main
from tests import eagle_llm
from tests.eagle_reads import Reads


@pytest.fixture(scope="module")
def checkpoint_folders(tmp_path_factory):
    with eagle_llm.imported():  # until the last test of this file
        yield eagle_llm.checkpoint(tmp_path_factory.mktemp("eagle-llm"))


@pytest.fixture(scope="module")
def model_and_prompts(checkpoint_folders):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    from eagle.model.ea_model import EaModel

    base, draft = map(str, checkpoint_folders)
    model = EaModel.from_pretrained(base_model_path=base, ea_model_path=draft).eval()
    prompts = torch.randint(127, (3, 10), generator=torch.Generator().manual_seed(1))
    tokens = prompts
    with torch.no_grad():
        for _ in range(40):
            tokens = torch.cat([tokens, model.base_model.lm_head(model.base_model.model(tokens)[0][:, -1:]).argmax(-1)], 1)
    eagle_llm.overfit(model, tokens)
    yield model, [p[None] for p in prompts]
    torch.set_num_threads(threads)


MASK = "base_model.model._prepare_decoder_attention_mask"


def generated(model, prompt, **options):
    return model.eagenerate(prompt, max_new_tokens=30, max_length=200, **options)


def test_greedy_output_is_the_unpatched_models(model_and_prompts):
    model, prompts = model_and_prompts
    plain = [generated(model, p) for p in prompts]
    before = [list(vars(m).items()) for m in model.modules()]
    model, original = optimize_eagle(model)
    assert set(original) == {"eagenerate", "ea_generate", "ea_layer.topK_genrate", MASK}
    patched = [generated(model, p) for p in prompts]
    streamed = [list(itertools.islice(model.ea_generate(p), 4)) for p in prompts]
    hits = eagle_hits(model)
    restore_eagle(model, original)
    for a, b, stream in zip(plain, patched, streamed):
        assert torch.equal(a, b)
        assert all(torch.equal(part, a[:, : part.shape[1]]) for part in stream)
    assert set(hits) == {"logsoftmax_topk", "verify_greedy", "commit"}
    assert hits["verify_greedy"] == hits["commit"] and hits["logsoftmax_topk"] == 5 * (hits["commit"] + 2 * len(prompts))
    new = sum(p.shape[1] for p in patched) - sum(p.shape[1] for p in prompts) + sum(s[-1].shape[1] - 10 for s in streamed)
    assert new / hits["commit"] > 1.5  # tokens a step: the draft is good enough for the tree to matter
    after = [list(vars(m).items()) for m in model.modules()]
    assert [[k for k, _ in d] for d in after] == [[k for k, _ in d] for d in before]
    assert "eagenerate" not in vars(model) and "topK_genrate" not in vars(model.ea_layer)


def test_a_step_reads_from_the_device_once(model_and_prompts):
    model, prompts = model_and_prompts
    per_step = []
    for patched in (False, True):
        if patched:
            model, original = optimize_eagle(model)
        generated(model, prompts[0])  # now the cache and the buffers are there, which EAGLE keeps
        found = []
        for steps in (2, 6):
            stream = model.ea_generate(prompts[0])
            with Reads(model.current_length_data) as reads:
                assert all(type(ids) is torch.Tensor for ids in itertools.islice(stream, steps))
            found.append(reads.count)
        per_step.append((found[1] - found[0]) / 4)
    restore_eagle(model, original)
    assert per_step[0] > 3 and per_step[1] == 1


def test_the_mask_is_eagles(model_and_prompts):
    model, _ = model_and_prompts
    decoder = model.base_model.model
    decoder.tree_mask = generate_tree_buffers(EAGLE1_MC_SIM_7B_63).tree_attn_mask
    inputs = torch.ones(1, 40, dtype=torch.bool), (1, 26), torch.zeros(1, 26, 8), 14
    plain, before = decoder._prepare_decoder_attention_mask(*inputs), dict(vars(decoder))
    model, original = optimize_eagle(model)
    assert torch.equal(decoder._prepare_decoder_attention_mask(*inputs), plain)
    assert decoder.tree_mask is before["tree_mask"] and original[MASK].__func__ is type(decoder)._prepare_decoder_attention_mask
    restore_eagle(model, original)
    assert vars(decoder) == before
    decoder.tree_mask = None


def test_sampling_keeps_eagles_own_rule(model_and_prompts):
    model, prompts = model_and_prompts
    model, original = optimize_eagle(model)
    torch.manual_seed(0)
    out = generated(model, prompts[0], temperature=1.0)
    hits = eagle_hits(model)
    restore_eagle(model, original)
    assert out.shape[1] > 30 and set(hits) == {"commit"}


def test_static_buffers_are_eagles(model_and_prompts):
    from eagle.model.utils import generate_tree_buffers as upstream

    theirs, ours = upstream(EAGLE1_MC_SIM_7B_63, device="cpu"), generate_tree_buffers(EAGLE1_MC_SIM_7B_63)
    for name in ("tree_attn_mask", "tree_indices", "tree_position_ids", "retrieve_indices"):
        assert torch.equal(theirs[name], getattr(ours, name)), name


def test_command_line_with_a_checkpoint(model_and_prompts, checkpoint_folders, tmp_path, capsys):
    models = ["--base-model", str(checkpoint_folders[0]), "--draft-model", str(checkpoint_folders[1]), "--prompt", "t5 t17 t40 t99"]
    options = ["--iterations", "1", "--warmup", "0", "--max-tokens", "8", "--threads", "1", "--json", str(tmp_path / "run.json")]
    assert main(["bench", *models, *options]) == 0
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["prompts"] == [4] and run["divergence"] == [] and run["hits"]["commit"] == run["variants"]["patched"]["steps"]
    assert main(["doctor", *models]) == 0
    assert "EAGLE-1" in capsys.readouterr().out
    assert main(["bench", *models, "--depth", "3"]) == 2
    assert "--depth is 3; expected none: this EAGLE's tree is fixed" in capsys.readouterr().err
