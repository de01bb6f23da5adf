"""The text encoder of the command line, on a tiny Qwen3 made here: template, layer, length, and what is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from comfyui_l2p.l2p_core.dataset.caption_cache import CaptionCache
from comfyui_l2p.l2p_core.files.tensor_file import load_tensors, save
from comfyui_l2p.train import qwen

LAYERS = 3


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("transformers", minversion="4.51", reason="transformers is not installed")


@pytest.fixture(scope="module")
def reference(library: Any) -> Any:
    """A whole Qwen3 with random weights, as transformers runs it."""
    torch.manual_seed(0)
    config = library.Qwen3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=qwen.NORM_EPS,
        rope_theta=qwen.ROPE_THETA,
    )
    model = library.Qwen3ForCausalLM(config).eval()
    # Away from their initial ones, so that a norm too many or too few shows.
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 2)
        else:
            parameter.data.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def folder(library: Any, reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as published: a folder with text_encoder and tokenizer."""
    root = tmp_path_factory.mktemp("published")
    reference.save_pretrained(root / "text_encoder")
    write_tokenizer(library, root / "tokenizer")
    return root


def write_tokenizer(library: Any, folder: Path) -> None:
    """A tokenizer of bytes with Qwen3's special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = library.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.save_pretrained(folder)


def encoder(folder: Path) -> qwen.QwenEncoder:
    return qwen.QwenEncoder(qwen.find(folder), device="cpu", dtype=torch.float32)


@torch.no_grad()
def published(library: Any, reference: Any, folder: Path, caption: str) -> torch.Tensor:
    """What the published pipeline computes: all layers, then the last hidden states but one."""
    tokenizer = library.AutoTokenizer.from_pretrained(folder / "tokenizer")
    text = f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)["input_ids"]
    output = reference.model(input_ids=ids, output_hidden_states=True)
    assert len(output.hidden_states) == LAYERS + 1
    return output.hidden_states[-2][0]


def test_features_are_the_published_ones_whatever_shares_the_batch(library: Any, reference: Any, folder: Path) -> None:
    captions = ["", "a red fox in snow", "Ünïcode 狐", "a long caption " * 20]
    features = encoder(folder).encode(captions)
    for caption, found in zip(captions, features, strict=True):
        expected = published(library, reference, folder, caption)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4), caption


def test_no_more_than_512_tokens_count(library: Any, reference: Any, folder: Path) -> None:
    long, longer = encoder(folder).encode(["x" * 600, "x" * 600 + " and more"])
    assert long.shape == (512, 32)
    assert torch.equal(long, longer)
    assert torch.allclose(long, published(library, reference, folder, "x" * 600), atol=1e-4, rtol=1e-4)
    template, more = encoder(folder).lengths(["", "x" * 600])
    assert more == template + 600


def test_special_tokens_of_the_template_are_single_tokens(folder: Path) -> None:
    text = qwen.TEMPLATE.format("")
    plain = len(text.encode()) - len("<|im_start|>" * 2 + "<|im_end|>")
    assert len(encoder(folder)._tokens("")) == plain + 3


def test_a_single_file_with_a_tokenizer_given_is_the_same(folder: Path, tmp_path: Path) -> None:
    [weights] = qwen.find(folder).weights
    single = tmp_path / "qwen_3_4b.safetensors"
    save(load_tensors(weights)[0], single)
    files = qwen.find(single, folder / "tokenizer")
    assert files.config is None
    found = qwen.QwenEncoder(files, device="cpu", dtype=torch.float32).encode(["a red fox"])[0]
    assert torch.equal(found, encoder(folder).encode(["a red fox"])[0])


def test_what_is_not_needed_is_not_read(folder: Path, tmp_path: Path) -> None:
    """Neither the last layer, nor the final norm, nor the output projection."""
    [weights] = qwen.find(folder).weights
    tensors = load_tensors(weights)[0]
    needless = [f"layers.{LAYERS - 1}.", "model.norm.", "lm_head."]
    assert all(any(part in name for name in tensors) for part in needless)
    for name, tensor in tensors.items():
        if any(part in name for part in needless):
            tensor.fill_(float("nan"))
    single = tmp_path / "poisoned.safetensors"
    save(tensors, single)
    files = qwen.find(single, folder / "tokenizer")
    found = qwen.QwenEncoder(files, device="cpu", dtype=torch.float32).encode(["a red fox"])[0]
    assert torch.equal(found, encoder(folder).encode(["a red fox"])[0])


def test_the_cache_is_filled_with_it(folder: Path, tmp_path: Path, unflushed: None) -> None:
    files = qwen.find(folder)
    cache = CaptionCache(tmp_path, qwen.identity(files, torch.float32))
    assert cache.fill(["a fox", "a hare"], lambda: encoder(folder)) == 3
    assert torch.equal(cache.read("a fox"), encoder(folder).encode(["a fox"])[0])


def test_identity_tells_weights_tokenizers_and_precisions_apart(folder: Path, tmp_path: Path) -> None:
    files = qwen.find(folder)
    tensors = load_tensors(files.weights[0])[0]
    identities = {qwen.identity(files), qwen.identity(files, torch.float32)}
    for number in range(2):
        tensors["model.embed_tokens.weight"][0, 0] = float(number)
        save(tensors, tmp_path / f"{number}.safetensors")
        identities.add(qwen.identity(qwen.find(tmp_path / f"{number}.safetensors", folder / "tokenizer")))
    assert len(identities) == 4
    assert qwen.identity(qwen.find(folder)) == qwen.identity(files)


def test_wrong_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        qwen.find(tmp_path / "none")
    [weights] = qwen.find(folder).weights
    with pytest.raises(ValueError, match="no tokenizer in .*nowhere"):
        qwen.find(weights, tmp_path / "nowhere")
    tensors = load_tensors(weights)[0]

    def load(changed: dict[str, torch.Tensor]) -> None:
        save(changed, tmp_path / "changed.safetensors", overwrite=True)
        qwen.QwenEncoder(qwen.find(tmp_path / "changed.safetensors", folder / "tokenizer"), device="cpu")

    with pytest.raises(ValueError, match="not a Qwen3 text encoder"):
        load({"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="has no .*layers.1.mlp.up_proj"):
        load({name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name})
    with pytest.raises(ValueError, match="is quantised"):
        load(tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32, dtype=torch.int8)})


def test_another_family_of_models_is_refused(folder: Path, library: Any, tmp_path: Path) -> None:
    [weights] = qwen.find(folder).weights
    save(load_tensors(weights)[0], tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(ValueError, match="is of a llama model"):
        qwen.QwenEncoder(qwen.find(tmp_path, folder / "tokenizer"), device="cpu")


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ValueError, match="needs the transformers library: install it"):
        qwen._transformers()
