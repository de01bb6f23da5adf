"""Prompts of a language model on disk, on a tiny Qwen3 made here: its chat template, its sampling, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_text_encoder import write_tokenizer

from comfyui_l2p.l2p_core.prompts.writer import TOP_K, TOP_P, Request, Turn, chatml
from comfyui_l2p.train import prompt_model
from comfyui_l2p.train.cli import main
from comfyui_l2p.train.prompt_model import ModelWriter, SeededSampling

TURNS = (Turn("system", "Be brief."), Turn("user", "A fox."))
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if not enable_thinking %}[quiet]{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("transformers", minversion="4.51", reason="transformers is not installed")


@pytest.fixture(scope="module")
def folder(library: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as Z-Image is published, with random weights."""
    torch.manual_seed(0)
    config = library.Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, eos_token_id=257, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    root = tmp_path_factory.mktemp("published")
    library.Qwen3ForCausalLM(config).save_pretrained(root / "text_encoder")
    write_tokenizer(library, root / "tokenizer")
    return root


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_model, "MAX_TOKENS", 12)


def requests(*seeds: int) -> list[Request]:
    return [Request((*TURNS[:1], Turn("user", "A fox. " * (1 + seed % 3))), seed) for seed in seeds]


def test_texts_follow_from_their_seeds_alone(folder: Path) -> None:
    """Alone, in a batch with others of other lengths, and in another writer."""
    one = ModelWriter(str(folder), device="cpu")
    alone = [one.write([request])[0] for request in requests(1, 2, 3, 4)]
    assert len(set(alone)) == 4 and all(alone)
    assert ModelWriter(str(folder), device="cpu", at_once=4).write(requests(1, 2, 3, 4)) == alone
    assert one.name == ModelWriter(str(folder)).name and one.name.startswith("text_encoder ")


def test_an_answer_is_new_text_of_limited_length(folder: Path, library: Any) -> None:
    writer = ModelWriter(str(folder), device="cpu")
    (text,) = writer.write(requests(5))
    assert writer._loaded is not None
    assert len(writer._loaded[1](text)["input_ids"]) <= 3 * 12 and "Be brief" not in text


def test_the_chat_template_is_the_models_own(library: Any, folder: Path) -> None:
    tokenizer = library.AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert prompt_model._conversation(tokenizer, TURNS) == chatml(TURNS)
    tokenizer.chat_template = TEMPLATE
    assert prompt_model._conversation(tokenizer, TURNS) == "[system]Be brief.[user]A fox.[quiet]"
    tokenizer.chat_template = NO_SYSTEM
    assert prompt_model._conversation(tokenizer, TURNS) == "[user]Be brief.\n\nA fox.[quiet]"


def test_sampling_has_the_models_probabilities() -> None:
    scores = torch.log(torch.tensor([0.05, 0.5, 0.03, 0.3, 0.12]))
    rows = 4000
    chosen = SeededSampling(range(rows), temperature=1.0)(torch.zeros(rows, 1), scores.expand(rows, -1))
    assert (chosen == 0).sum(-1).eq(1).all() and (chosen.isinf() | (chosen == 0)).all()
    shares = (chosen == 0).float().mean(0)
    # The rarest token lies beyond TOP_P, the others share its probability.
    assert shares[2] == 0 and TOP_P > 0.92 and TOP_K >= 5
    assert torch.allclose(shares[[0, 1, 3, 4]], torch.tensor([0.05, 0.5, 0.3, 0.12]) / 0.97, atol=0.03)
    cold = SeededSampling(range(100), temperature=0.01)(torch.zeros(100, 1), scores.expand(100, -1))
    assert (cold[:, 1] == 0).all()


def test_a_model_that_writes_noise_is_refused_by_the_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prompts", "write", str(tmp_path), "--count", "9", "--model", str(folder), "--device", "cpu"]
    assert main([*command, "--at-once", "30"]) == 2
    error = capsys.readouterr().err
    assert "None of the model's last 60 texts is a prompt" in error and "l2p: " in error
    assert json.loads((tmp_path / "journal.jsonl").read_text(encoding="utf-8").splitlines()[0])["model"].startswith(
        "text_"
    )


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda root: (root / "text_encoder" / "config.json").unlink(), "has no config.json"),
        (lambda root: [file.unlink() for file in (root / "tokenizer").iterdir()], "There is no tokenizer in"),
        (lambda root: (root / "text_encoder" / "model.safetensors").unlink(), "holds no"),
    ],
)
def test_what_is_missing_is_named(folder: Path, tmp_path: Path, spoil: Any, sentence: str) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(ValueError, match=sentence):
        ModelWriter(str(tmp_path / "model"))


def test_nothing_is_downloaded_unless_asked(library: Any) -> None:
    with pytest.raises(ValueError, match="There is no folder Qwen/Qwen3-4B: .* add --download"):
        ModelWriter("Qwen/Qwen3-4B")


def test_without_the_library_a_sentence_names_the_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ValueError, match="needs the transformers library: install it with .* or give .* --server"):
        ModelWriter("anything")
