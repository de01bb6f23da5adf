"""Conversion to pixel initialisations: every key's fate, the same file for the same seed, and wrong inputs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import HEAD_WIDTH, SOURCE, pixel_config, prefixed, same, weights, write, write_shards

from comfyui_l2p.l2p_core.checkpoint import CheckpointError, load_model, load_tensors
from comfyui_l2p.l2p_core.config import VARIANTS
from comfyui_l2p.l2p_core.convert import ConversionReport, convert
from comfyui_l2p.l2p_core.initialise import random_values
from comfyui_l2p.l2p_core.layouts import to_comfy, to_diffusers
from comfyui_l2p.l2p_core.model import key_shapes


def run(source: Path, target: Path, **options: object) -> ConversionReport:
    return convert(source, target, head_width=HEAD_WIDTH, **options)  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path, unflushed: None) -> Path:
    return write(weights(), tmp_path / "source.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_latent_source_becomes_every_variant(variant: str, source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "pixel.safetensors", variant=variant)
    model = load_model(tmp_path / "pixel.safetensors")
    assert model.config == pixel_config(variant)
    state, old = model.state_dict(), weights()
    backbone = {name for name in state if not name.startswith(("x_embedder.", "local_decoder."))}
    assert set(report.keys("copied")) == backbone
    assert same({name: state[name] for name in backbone}, {name: old[name] for name in backbone})
    assert set(report.keys("initialised")) == state.keys() - backbone
    assert set(report.keys("dropped")) == {name for name in old if name.startswith("final_layer.")}
    keys = [entry.key for entry in report.fates]
    assert len(keys) == len(set(keys)) and set(keys) == state.keys() | old.keys()


def test_every_form_of_the_source_gives_the_same_weights(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "expected.safetensors")
    expected, _ = load_tensors(tmp_path / "expected.safetensors")
    forms = [
        write(prefixed(weights()), tmp_path / "prefixed.safetensors"),
        write(to_diffusers(weights()), tmp_path / "diffusers.safetensors"),
        write_shards(weights(), tmp_path / "shards"),
    ]
    for i, form in enumerate(forms):
        run(form, tmp_path / f"{i}.safetensors")
        assert same(load_tensors(tmp_path / f"{i}.safetensors")[0], expected)
        run(form, tmp_path / f"{i}d.safetensors", layout="diffusers")
        written, _ = load_tensors(tmp_path / f"{i}d.safetensors")
        assert same(to_comfy(written), expected) and "all_x_embedder.16-1.weight" in written


def test_the_same_seed_gives_the_same_file_and_another_seed_another(source: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(source, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_new_weights_are_as_torch_makes_them_and_depend_on_their_name_alone() -> None:
    shapes = {"a.weight": (1200, 1000), "a.bias": (1200,), "b.weight": (16, 3, 5, 5)}
    values = torch.cat(list(random_values("a.weight", shapes, seed=5)))
    torch.manual_seed(0)
    expected = torch.nn.Linear(1000, 1200).weight.detach()
    assert values.shape == (1200 * 1000,) and values.abs().max() <= 1 / math.sqrt(1000)
    assert math.isclose(values.std().item(), expected.std().item(), rel_tol=0.01)
    assert abs(values.mean().item()) < 1e-4
    bias = torch.cat(list(random_values("a.bias", shapes, seed=5)))
    assert 0.9 / math.sqrt(1000) < bias.abs().max() <= 1 / math.sqrt(1000)
    convolution = torch.cat(list(random_values("b.weight", shapes, seed=5)))
    assert 0.9 / math.sqrt(75) < convolution.abs().max() <= 1 / math.sqrt(75)
    again = torch.cat(list(random_values("a.weight", {"a.weight": (1200, 1000)}, seed=5)))
    assert torch.equal(values, again)


@pytest.mark.parametrize(("old", "new"), [("4k", "8k"), ("4k", "10k"), ("8k", "10k"), ("1k", "4k")])
def test_a_variant_warm_starts_from_another(old: str, new: str, tmp_path: Path) -> None:
    held = weights(pixel_config(old))
    path = write(to_diffusers(held), tmp_path / "old.safetensors")
    report = run(path, tmp_path / "new.safetensors", variant=new)
    state = load_model(tmp_path / "new.safetensors").state_dict()
    equal = {name for name in state if name in held and held[name].shape == state[name].shape}
    equal -= {"x_embedder.bias"}  # has the patch size in its published name
    assert set(report.keys("copied")) == equal
    assert same({name: state[name] for name in equal}, {name: held[name] for name in equal})
    assert any(name.startswith("local_decoder.") for name in equal)


def test_scaled_values_hand_on_variance_through_convolution_and_silu() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "local_decoder.enc2.0.weight": (64, 64, 3, 3),
        "local_decoder.up2.1.weight": (64, 64, 3, 3),
    }
    shapes |= {name.replace("weight", "bias"): (64,) for name in shapes}
    made = {name: torch.cat(list(random_values(name, shapes, 5, "scaled"))).view(shapes[name]) for name in shapes}
    x = torch.randn(1, 64, 32, 32, generator=torch.Generator().manual_seed(0))
    for part, activation in (("enc2.0", torch.nn.functional.silu), ("up2.1", torch.nn.Identity())):
        weight, bias = made[f"local_decoder.{part}.weight"], made[f"local_decoder.{part}.bias"]
        assert bias.abs().max() == 0
        assert float(activation(torch.nn.functional.conv2d(x, weight)).square().mean()) == pytest.approx(1, abs=0.1)
    embedder = {"x_embedder.weight": (8, 32)}
    scaled, random = (torch.cat(list(random_values("x_embedder.weight", embedder, 5, i))) for i in ("scaled", "random"))
    assert torch.equal(scaled, random)


def test_dtypes_are_kept_or_converted(tmp_path: Path) -> None:
    mixed = {name: tensor.float() if name.startswith("layers.1.") else tensor for name, tensor in weights().items()}
    path = write(mixed, tmp_path / "mixed.safetensors")
    run(path, tmp_path / "kept.safetensors")
    kept, _ = load_tensors(tmp_path / "kept.safetensors")
    assert all(kept[name].dtype == mixed[name].dtype for name in kept if name in mixed)
    assert kept["local_decoder.out_conv.weight"].dtype == torch.bfloat16
    run(path, tmp_path / "half.safetensors", dtype=torch.float16)
    half, _ = load_tensors(tmp_path / "half.safetensors")
    assert same(half, {name: half[name].half() for name in half})
    assert same({"a": half["layers.1.ffn_norm1.weight"]}, {"a": mixed["layers.1.ffn_norm1.weight"].half()})


def test_the_file_says_where_it_comes_from(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "pixel.safetensors", seed=3)
    _, metadata = load_tensors(tmp_path / "pixel.safetensors")
    assert metadata["format"] == "pt" and metadata["l2p.kind"] == "pixel-init" and metadata["l2p.variant"] == "1k"
    assert metadata["l2p.source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest() == report.source_sha256
    assert metadata["l2p.seed"] == "3" and metadata["l2p.version"] and metadata["l2p.init"] == "random"
    assert json.loads(metadata["l2p.config"])["dim"] == SOURCE.dim
    assert json.loads(metadata["l2p.copied"])["layers"] == 13 * SOURCE.n_layers
    assert json.loads(metadata["l2p.initialised"])["x_embedder"] == 2
    summary = report.summary()
    assert all(word in summary for word in ("copied 72", "initialised", "dropped 4", report.source_sha256, "seed 3"))


def test_shards_have_one_hash_together(tmp_path: Path) -> None:
    folder = write_shards(weights(), tmp_path / "shards")
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))]
    report = run(folder, tmp_path / "pixel.safetensors")
    assert report.source_sha256 == hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def test_wrong_sources_have_their_sentence(source: Path, tmp_path: Path) -> None:
    sdxl = {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(3),
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(3),
        "first_stage_model.decoder.conv_in.weight": torch.zeros(3),
    }
    run(source, tmp_path / "done.safetensors")
    partial = {name: tensor for name, tensor in weights().items() if "layers.2.feed_forward.w3" not in name}
    quantised = {**weights(), "layers.0.attention.out.weight": torch.zeros(64, 64).to(torch.float8_e4m3fn)}
    cases = [
        (write(sdxl, tmp_path / "sdxl.safetensors"), "is an SDXL checkpoint, but a Z-Image, Lumina-2 or L2P model"),
        (tmp_path / "done.safetensors", "is a 1k pixel model already: there is nothing to convert"),
        (write(partial, tmp_path / "partial.safetensors"), "is incomplete: 'layers.2.feed_forward.w3.weight'"),
        (write(quantised, tmp_path / "fp8.safetensors"), "is quantised"),
        (
            write({"vision.weight": torch.zeros(2)}, tmp_path / "other.safetensors"),
            "not a Z-Image, Lumina-2 or L2P model",
        ),
        (write({"lora_unet_a": torch.zeros(2)}, tmp_path / "lora.safetensors"), "is a LoRA"),
    ]
    for path, sentence in cases:
        with pytest.raises(CheckpointError, match=sentence):
            run(path, tmp_path / "target.safetensors")
    assert not (tmp_path / "target.safetensors").exists()


def test_wrong_options_have_their_sentence(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.safetensors"
    for options, sentence in (
        ({"variant": "2k"}, "choose one of 1k, 4k, 8k, 10k"),
        ({"init": "zeros"}, "choose one of random"),
        ({"layout": "kohya"}, "choose one of comfy, diffusers"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(source, target, **options)
    with pytest.raises(CheckpointError, match="is a source of the new file"):
        run(source, source, overwrite=True)
    target.write_bytes(b"old")
    with pytest.raises(CheckpointError, match="already exists"):
        run(source, target)
    assert target.read_bytes() == b"old"
    run(source, target, overwrite=True)
    load_model(target)


def test_an_interrupt_leaves_the_old_file_only(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.safetensors"
    target.write_bytes(b"old")

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, target, overwrite=True, progress=interrupt)
    assert target.read_bytes() == b"old" and sorted(tmp_path.iterdir()) == sorted([source, target])


def test_a_kill_leaves_the_old_file(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.safetensors"
    target.write_bytes(b"old")
    script = (
        "import os; from comfyui_l2p.l2p_core.convert import convert;"
        f"convert({str(source)!r}, {str(target)!r}, head_width={HEAD_WIDTH}, overwrite=True,"
        " progress=lambda done, total: os._exit(9) if done > total / 2 else None)"
    )
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 9 and target.read_bytes() == b"old"


def test_progress_reaches_its_end(source: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    run(source, tmp_path / "target.safetensors", progress=lambda done, total: steps.append((done, total)))
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]
    new = sum(
        2 * math.prod(shape)
        for name, shape in key_shapes(pixel_config()).items()
        if name.startswith(("x_embedder", "local_decoder"))
    )
    assert steps[-1][1] == source.stat().st_size + new
