"""`l2p sample --prompt` of a large model: its text encoder is found, checked, used and gone before the model loads."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import test_text_encoder
import tiny_checkpoints
import torch
from PIL import Image
from test_cli import mistake
from torch import Tensor

from comfyui_l2p.l2p_core.checkpoint import save
from comfyui_l2p.l2p_core.config import ModelConfig
from comfyui_l2p.l2p_core.convert import convert
from comfyui_l2p.l2p_core.device import accelerator
from comfyui_l2p.l2p_core.sources.lumina2 import Lumina2Config
from comfyui_l2p.l2p_core.sources.z_image import Z_IMAGE
from comfyui_l2p.train import sample_captions, sampler, text_encoder
from comfyui_l2p.train.cli import main

pytestmark = pytest.mark.usefixtures("unflushed")

DIM = tiny_checkpoints.SOURCE.caption_dim


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as Z-Image is published: transformer, text_encoder and tokenizer."""
    source = tiny_checkpoints.write(tiny_checkpoints.weights(), tmp_path / "source.safetensors")
    model = tmp_path / "published" / "transformer" / "model.safetensors"
    model.parent.mkdir(parents=True)
    convert(source, model, head_width=0.125)
    write_encoder(tmp_path / "published" / "text_encoder", DIM)
    (tmp_path / "published" / "tokenizer").mkdir()
    (tmp_path / "published" / "tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")
    return model


def write_encoder(folder: Path, width: int) -> None:
    """Weights with the shapes of a Qwen3 of one layer."""
    shapes = {
        "embed_tokens.weight": (300, width),
        "layers.0.self_attn.q_norm.weight": (16,),
        "layers.0.self_attn.q_proj.weight": (32, width),
        "layers.0.self_attn.k_proj.weight": (16, width),
        "layers.0.mlp.gate_proj.weight": (48, width),
    }
    folder.mkdir(parents=True)
    tensors = {f"model.{name}": torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save(tensors, folder / "model.safetensors")


class Encoder:
    """In place of the text encoder: features are made of the caption's letters."""

    living: weakref.WeakSet[Encoder] = weakref.WeakSet()

    def __init__(self, files: text_encoder.EncoderFiles, device: torch.device):
        self.device = device
        self.living.add(self)

    def encode(self, captions: Sequence[str], negative: bool = False) -> list[Tensor]:
        return [features_of(caption) for caption in captions]


def features_of(caption: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(caption.encode()))
    return torch.randn(len(caption) + 1, DIM, generator=generator)


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def command(model: Path, target: Path, *words: str) -> list[str]:
    sizes = ["--width", "32", "--height", "32", "--steps", "2", "--device", "cpu"]
    return ["sample", str(model), *sizes, "--output", str(target), *words]


def test_a_prompt_makes_the_image_of_its_features(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = sampler._load

    def loaded(*arguments: Any) -> Any:
        assert not Encoder.living, "the text encoder is in memory while the model is loaded"
        return load(*arguments)

    monkeypatch.setattr(text_encoder, "TransformersEncoder", Encoder)
    monkeypatch.setattr(sampler, "_load", loaded)
    made = [tmp_path / f"{i}.png" for i in range(3)]
    assert main(command(published, made[0], "--prompt", "a fox", "--negative", "blurred", "--cfg", "3")) == 0
    features = tmp_path / "features.safetensors"
    save({"positive": features_of("a fox"), "negative": features_of("blurred")}, features)
    assert main(command(published, made[1], "--caption-features", str(features), "--cfg", "3")) == 0
    assert main(command(published, made[2], "--prompt", "a fox", "--cfg", "3")) == 0
    assert pixels(made[0]) == pixels(made[1]) != pixels(made[2])


def test_the_encoder_is_checked_before_anything_is_loaded(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_encoder, "TransformersEncoder", None)
    monkeypatch.setattr(sampler, "_load", None)
    target = tmp_path / "image.png"
    write_encoder(tmp_path / "other", DIM + 8)
    asked = command(published, target, "--prompt", "a fox")
    tokenizer = ["--tokenizer", str(published.parents[1] / "tokenizer")]
    assert f"width {DIM + 8}" in mistake(capsys, *asked, "--encoder", tmp_path / "other", *tokenizer)
    assert "tokenizer" in mistake(capsys, *asked, "--encoder", tmp_path / "other")
    alone = tmp_path / "alone" / "model.safetensors"
    alone.parent.mkdir()
    published.rename(alone)
    assert "--encoder" in mistake(capsys, *command(alone, target, "--prompt", "a fox"))


def test_an_encoder_that_a_gpu_has_no_room_for_runs_on_the_cpu(
    published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text_encoder, "TransformersEncoder", Encoder)
    monkeypatch.setattr(accelerator, "free_bytes", lambda device: 10**9)
    files = text_encoder.find(published.parents[1], None, Z_IMAGE.encoder)
    positive, negative = sample_captions._encoded(files, "a fox", None, torch.device("cuda"))
    assert torch.equal(positive, features_of("a fox")) and negative is None
    assert "it runs on the CPU" in capsys.readouterr().err


LUMINA2 = Lumina2Config(
    dim=96, head_dim=48, n_layers=3, n_refiner_layers=1, caption_dim=DIM, ffn_dim=80, t_freq_dim=16, t_hidden_dim=32,
    t_dim=32, n_kv_heads=1,
)  # fmt: skip


@pytest.mark.parametrize("config", [tiny_checkpoints.SOURCE, LUMINA2], ids=lambda config: config.source)
def test_with_the_real_library_it_is_one_command(config: ModelConfig, tmp_path: Path) -> None:
    """Text to image through transformers, with an encoder and a tokenizer made here."""
    library = pytest.importorskip("transformers", minversion="4.51", reason="transformers is not installed")
    model = tmp_path / "model.safetensors"
    convert(
        tiny_checkpoints.write(tiny_checkpoints.weights(config), tmp_path / "source.safetensors"),
        model,
        head_width=0.125,
    )
    made = test_text_encoder.write(library, tmp_path / "encoder", config.source, width=DIM)
    target, other, features = tmp_path / "image.png", tmp_path / "other.png", tmp_path / "features.safetensors"
    words = ["--prompt", "a red fox", "--negative", "blurred", "--encoder", str(made.folder)]
    assert main(command(model, target, "--cfg", "3", *words)) == 0
    encoder = text_encoder.TransformersEncoder(made.files(), "cpu")
    (positive,), (negative,) = encoder.encode(["a red fox"]), encoder.encode(["blurred"], negative=True)
    assert positive.shape[1] == DIM
    save({"positive": positive, "negative": negative}, features)
    assert main(command(model, other, "--cfg", "3", "--caption-features", str(features))) == 0
    assert pixels(target) == pixels(other)


@pytest.mark.parametrize("option", ["--encoder", "--tokenizer"])
@pytest.mark.parametrize(
    ("caption", "sentence"), [("--prompt", "its own text encoder"), ("--caption-features", "encoded already")]
)
def test_a_text_encoder_that_nothing_uses_is_refused(
    option: str, caption: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "image.png"
    assert main(["sample", "tiny", caption, "red", option, str(tmp_path), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and option in error and not output.exists()
