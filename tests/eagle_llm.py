"""EAGLE-1 as PyPI has it, eagle-llm 1.2.1: fetched without its dependencies, whose pins (accelerate, gradio, protobuf 3.19) fit no
current Python, and kept in the cache folder. What it imports of them is transformers, which the test extra has."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from sparse_attention._build import cache_folder

WHEEL = "eagle_llm-1.2.1-py3-none-any.whl"
SHA256 = "e4a6d611a16d05ecee1f8afb24ce86f7d64b07a39999739309c51615313480ec"


def wheel() -> Path:
    """The wheel in the cache folder; the test skips where it cannot be fetched."""
    folder = cache_folder() / "eagle-llm"
    path = folder / WHEEL
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
            command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", fresh, "eagle-llm==1.2.1"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=90)
                trouble = done.stderr.strip().splitlines()[-1:] if done.returncode else []
            except subprocess.TimeoutExpired:
                trouble = ["no answer in 90 s"]
            if not (Path(fresh) / WHEEL).exists():
                pytest.skip(f"eagle-llm 1.2.1 cannot be downloaded: {' '.join(trouble)}")
            (Path(fresh) / WHEEL).replace(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found == SHA256, f"{path} has SHA-256 {found}, expected {SHA256}"
    return path


@contextlib.contextmanager
def imported():
    """Inside the context the package `eagle` of the wheel can be imported."""
    pytest.importorskip("transformers", reason="eagle-llm imports transformers, which the test extra has")
    if importlib.util.find_spec("eagle") is not None:
        pytest.skip("a package named eagle is installed and would be taken for eagle-llm")
    sys.path.insert(0, str(wheel()))
    try:
        importlib.import_module("eagle.model.ea_model")
        yield
    finally:
        sys.path.remove(str(wheel()))
        for name in [name for name in sys.modules if name.partition(".")[0] == "eagle"]:
            del sys.modules[name]


def checkpoint(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """(base, draft) folders of a random Llama and a random draft layer, as EaModel.from_pretrained reads them."""
    from eagle.model.cnets import Model
    from eagle.model.configs import EConfig
    from eagle.model.modeling_llama_kv import LlamaForCausalLM
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    base, draft = folder / "base", folder / "draft"
    draft.mkdir(parents=True)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_hidden_layers=4, max_position_embeddings=512, pad_token_id=0, pretraining_tp=1, initializer_range=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(base)
        (draft / "config.json").write_text(json.dumps({**config.to_dict(), "num_hidden_layers": 1, "bias": True}))
        layer = Model(EConfig.from_pretrained(draft / "config.json"), bias=True)
        torch.save(layer.state_dict(), draft / "pytorch_model.bin")
    words = models.WordLevel({f"t{i}": i for i in range(128)}, unk_token="t0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t127").save_pretrained(base)
    return base, draft


def overfit(model, tokens: torch.Tensor, steps: int = 80) -> None:
    """Trains the draft layer on these tokens [n, length] of the base: to foretell its hidden states and its next tokens, two deep."""
    layer, head = model.ea_layer, model.base_model.lm_head
    with torch.no_grad():
        hidden = model.base_model.model(tokens)[0]
        layer.embed_tokens.weight.copy_(model.base_model.model.embed_tokens.weight)
    layer.reset()
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        seen, loss = hidden[:, :-2], 0.0
        for j in range(2):
            out = layer(seen, input_ids=tokens[:, 1 : 1 + seen.shape[1]])
            loss = loss + torch.nn.functional.smooth_l1_loss(out, hidden[:, 1 : 1 + out.shape[1]])
            loss = loss + torch.nn.functional.cross_entropy(head(out).flatten(0, 1), tokens[:, 2 : 2 + out.shape[1]].flatten())
            seen = torch.cat([hidden[:, :1], out[:, :-1]], 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
