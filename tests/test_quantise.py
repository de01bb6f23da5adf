"""Quantised files: their sizes, what stays in bfloat16, what the rounding costs, and deltas on them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import golden_vectors as golden
import pytest
import quantised_files
import torch
from safetensors.torch import load_file
from tiny_checkpoints import SOURCE, bits, pixel_config, same, weights, write, write_shards
from torch import Tensor

from comfyui_l2p.l2p_core import delta, files
from comfyui_l2p.l2p_core.checkpoint import CheckpointError, load_model, open_checkpoint
from comfyui_l2p.l2p_core.config import VARIANTS, ModelConfig
from comfyui_l2p.l2p_core.deltas.delta_on_base import open_merged
from comfyui_l2p.l2p_core.deltas.low_rank import ALPHA, DOWN, UP
from comfyui_l2p.l2p_core.files.about import stated
from comfyui_l2p.l2p_core.layouts import to_comfy, to_diffusers
from comfyui_l2p.l2p_core.quantise import FORMATS, planned_bytes, quantise
from comfyui_l2p.l2p_core.sources import source_of
from comfyui_l2p.l2p_core.sources.lumina2 import Lumina2Config
from comfyui_l2p.l2p_core.tiny import bundled
from comfyui_l2p.train.benchmark import formats
from comfyui_l2p.train.cli import main

GB = 1e9
EIGHT_BITS = [name for name in FORMATS if name != "bf16"]
PIXELS = weights(pixel_config())
SMALL = {
    "z-image": SOURCE,
    "lumina2": Lumina2Config(
        dim=48,
        head_dim=48,
        n_layers=1,
        n_refiner_layers=1,
        caption_dim=24,
        ffn_dim=64,
        t_freq_dim=16,
        t_hidden_dim=32,
        t_dim=32,
        n_kv_heads=1,
    ),
}


def model(folder: Path, name: str = "model", state: dict[str, Tensor] = PIXELS) -> Path:
    return write(state, folder / f"{name}.safetensors")


@pytest.mark.parametrize("format", EIGHT_BITS)
def test_the_published_models_become_small(format: str) -> None:
    """The published 1k file has 19.57 GB; 8 bits are half of bf16's, so that is what the host then holds."""
    sizes = {name: planned_bytes(ModelConfig().with_head(name), format) for name in VARIANTS}
    assert sizes["1k"] <= 6.4 * GB and sizes["10k"] <= 7.0 * GB
    assert sizes["1k"] / (19.57 * GB) < 0.33
    assert 0.5 < sizes["1k"] / planned_bytes(ModelConfig().with_head("1k"), "bf16") < 0.52


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("source", SMALL)
def test_the_file_is_what_was_planned(source: str, format: str, tmp_path: Path) -> None:
    config = SMALL[source].with_head("1k", 0.125)
    report = quantise(model(tmp_path, state=weights(config, torch.float32)), tmp_path / "small.safetensors", format)
    opened = open_checkpoint(report.target)
    assert opened.nbytes == planned_bytes(config, format) and opened.config() == config
    in_eight_bits = {name for name, stored in opened.tensors.items() if stored.stored_dtype in ("F8_E4M3", "I8")}
    assert in_eight_bits == {name for name, fate in report.fates.items() if fate != "bf16"}
    assert bool(in_eight_bits) == (format != "bf16")
    for name in in_eight_bits:
        assert source_of(config).is_block_linear(name)
    for name in set(report.fates) - in_eight_bits:
        assert opened.tensors[name].dtype == "BF16", name
    assert all(f"{part}." in str(sorted(set(report.fates) - in_eight_bits)) for part in ("local_decoder", "x_embedder"))
    assert not any("adaLN" in name for name in in_eight_bits)


@pytest.mark.parametrize(("format", "error"), [("float8_e4m3fn", 0.04), ("int8_tensorwise", 0.012), ("bf16", 0.006)])
def test_rounded_weights_stand_for_those_they_were_made_from(format: str, error: float, tmp_path: Path) -> None:
    state = to_comfy(golden.diffusers_weights())
    target = tmp_path / "small.safetensors"
    quantise(model(tmp_path, state=state), target, format)
    small = load_model(target, torch.float32)
    for name, weight in small.state_dict().items():
        assert golden.relative_error(weight, state[name]) < error, name
    x, cap = golden.array("x", (1, 3, 32, 32), 0), golden.array("cap", (5, small.config.caption_dim), 0)
    with torch.no_grad():
        velocities = [each(x, torch.tensor([0.7]), [cap]) for each in (small, golden.model())]
    assert 0 < golden.relative_error(*velocities) < error


def test_rows_and_tensors_of_zeros_and_single_large_values(tmp_path: Path) -> None:
    name = "layers.1.feed_forward.w2.weight"
    state = {**PIXELS, name: torch.zeros_like(PIXELS[name])}
    state[name][3, 5] = -300.0
    for format in EIGHT_BITS:
        quantise(model(tmp_path, state=state), tmp_path / "small.safetensors", format, overwrite=True)
        weight = load_model(tmp_path / "small.safetensors", torch.float32).state_dict()[name]
        assert torch.allclose(weight, state[name].float(), rtol=1 / 16)


def test_every_layout_gives_the_same_file(tmp_path: Path) -> None:
    targets = [tmp_path / f"small-{number}.safetensors" for number in range(3)]
    forms = (
        model(tmp_path),
        model(tmp_path, "diffusers", to_diffusers(PIXELS)),
        write_shards(PIXELS, tmp_path / "shards"),
    )
    for form, target in zip(forms, targets, strict=True):
        quantise(form, target, "int8_tensorwise")
    assert all(same(load_file(target), load_file(targets[0])) for target in targets)
    assert len({said(target)["l2p.originals"] for target in targets}) == 1


class Trained(SimpleNamespace):
    """A source, a model trained on it, and the delta between them."""

    base: Path
    model: Path
    delta: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    kept = [name for name in PIXELS if name.startswith("layers.1.")]
    base = {**weights(SOURCE, seed=1), **{name: PIXELS[name] for name in kept}}
    found = Trained(base=model(folder, "base", base), model=model(folder), delta=folder / "delta.safetensors")
    delta.extract(found.model, found.base, found.delta)
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_a_delta_on_its_base_is_rounded_as_the_merged_model(trained: Trained, format: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    quantise(trained.delta, one, format, base=trained.base)
    delta.merge(trained.delta, trained.base, tmp_path / "merged.safetensors")
    quantise(tmp_path / "merged.safetensors", two, format)
    assert same(load_file(one), load_file(two))
    assert said(one)["l2p.originals"] == said(two)["l2p.originals"]


@pytest.mark.parametrize("format", EIGHT_BITS)
def test_a_quantised_base_takes_the_delta_of_its_original(trained: Trained, format: str, tmp_path: Path) -> None:
    base, merged = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    quantise(trained.base, base, format)
    report = delta.merge(trained.delta, base, merged)
    small, of_base, of_delta = load_file(merged), load_file(base), load_file(trained.delta)
    for name, tensor in small.items():
        expected = of_delta[name] if name in of_delta else of_base[name]
        assert torch.equal(bits(tensor), bits(expected)), name
    assert {name for name in report.unchanged} == {name for name in PIXELS if name.startswith("layers.1.")}
    assert set(report.trained) == PIXELS.keys() - set(report.unchanged)
    direct = delta.load_model(trained.delta, base, torch.float32).state_dict()
    assert same(direct, load_model(merged, torch.float32).state_dict())
    for name, weight in load_model(trained.model, torch.float32).state_dict().items():
        assert golden.relative_error(direct[name], weight) < 0.04
    # A single small file of the two.
    quantise(trained.delta, tmp_path / "small.safetensors", format, base=base)
    quantise(trained.model, tmp_path / "expected.safetensors", format)
    assert same(load_file(tmp_path / "small.safetensors"), load_file(tmp_path / "expected.safetensors"))


def test_a_quantised_file_of_other_weights_is_not_its_base(trained: Trained, tmp_path: Path) -> None:
    other = load_file(trained.base)
    other["layers.1.attention.qkv.weight"][0, 0] += 1
    quantise(model(tmp_path, state=other), tmp_path / "base.safetensors", "int8_tensorwise")
    for unchecked in (False, True):
        with pytest.raises(
            CheckpointError, match="made for another base .*'layers.1.attention.qkv.weight' was made from"
        ):
            open_merged(trained.delta, tmp_path / "base.safetensors", unchecked)


def test_what_does_not_say_what_it_was_made_from_is_taken_only_if_allowed(trained: Trained, tmp_path: Path) -> None:
    kinds = {name: getattr(quantised_files, name) for name in ("scaled_fp8", "fp8", "int8", "nvfp4")}
    for name, make in kinds.items():
        base = model(tmp_path, name, make(load_file(trained.base)))
        merged = tmp_path / f"merged {name}.safetensors"
        with pytest.raises(CheckpointError, match="does not state what it was made from.* or allow an unchecked base"):
            delta.merge(trained.delta, base, merged)
        report = delta.merge(trained.delta, base, merged, unchecked_base=True)
        opened = open_checkpoint(merged)
        assert {layer for layer in opened.layer_settings} == {
            layer for layer in quantised_files.linears(PIXELS) if layer.startswith("layers.1.")
        }
        assert f"{next(iter(opened.layer_settings))}.comfy_quant" in opened.tensors and len(report.unchanged) == 13
        assert load_file(merged).keys().isdisjoint({"scaled_fp8", "layers.1.attention.out.scale_weight"})


def test_a_base_quantised_from_another_dtype_is_named_so(trained: Trained, tmp_path: Path) -> None:
    wide = {name: tensor.float() for name, tensor in load_file(trained.base).items()}
    quantise(model(tmp_path, state=wide), tmp_path / "base.safetensors", "float8_e4m3fn")
    with pytest.raises(CheckpointError, match="was quantised from F32 weights, not BF16"):
        open_merged(trained.delta, tmp_path / "base.safetensors")


@pytest.mark.parametrize("format", EIGHT_BITS)
def test_low_rank_adapters_are_added_to_quantised_layers(format: str, tmp_path: Path) -> None:
    init, layer = model(tmp_path), "layers.1.feed_forward.w1"
    rows, columns = PIXELS[f"{layer}.weight"].shape
    up, down = torch.ones(rows, 2) / 4, torch.ones(2, columns)
    adapter = {f"{layer}{UP}": up, f"{layer}{DOWN}": down, f"{layer}{ALPHA}": torch.tensor(2.0)}
    changed = {name: PIXELS[name] + 1 for name in PIXELS if name.startswith("local_decoder.")}
    delta.save({**changed, **adapter}, init, tmp_path / "delta.safetensors")
    quantise(init, tmp_path / "base.safetensors", format)
    delta.merge(tmp_path / "delta.safetensors", tmp_path / "base.safetensors", tmp_path / "merged.safetensors")
    expected = PIXELS[f"{layer}.weight"].float() + 0.5
    for found in (
        load_model(tmp_path / "merged.safetensors", torch.float32),
        delta.load_model(tmp_path / "delta.safetensors", tmp_path / "base.safetensors", torch.float32),
    ):
        assert golden.relative_error(found.state_dict()[f"{layer}.weight"], expected) < 0.05
    with pytest.raises(CheckpointError, match="A low-rank adapter cannot be added"):
        foreign = model(tmp_path, "foreign", quantised_files.nvfp4(PIXELS))
        delta.merge(tmp_path / "delta.safetensors", foreign, tmp_path / "x.safetensors", unchecked_base=True)


def test_deltas_in_bf16(trained: Trained, tmp_path: Path) -> None:
    state = {name: weight.float() + 2**-12 for name, weight in PIXELS.items()}
    wide, names = model(tmp_path, "wide", state), ("full", "asked", "cast")
    full, asked, cast = (tmp_path / f"{name}.safetensors" for name in names)
    delta.extract(wide, trained.base, full)
    delta.extract(wide, trained.base, asked, dtype=torch.bfloat16)
    report = quantise(full, cast, "bf16")
    assert open_checkpoint(cast).is_delta and set(report.fates) == set(load_file(full))
    assert asked.stat().st_size < 0.6 * full.stat().st_size and cast.stat().st_size < 0.6 * full.stat().st_size
    for file in (asked, cast):
        merged = delta.load_model(file, trained.base, torch.float32).state_dict()
        for name, weight in state.items():
            assert torch.equal(merged[name], weight.bfloat16().float()), name


def said(path: Path) -> dict[str, str]:
    return open_checkpoint(path).metadata


def test_licence_base_and_trigger_words_travel(tmp_path: Path) -> None:
    about = {"modelspec.license": "Apache-2.0", "modelspec.base_model": "Z-Image-Turbo", "trained_words": "zx"}
    alone = {"modelspec.title": "the source", "modelspec.hash_sha256": "0x12"}
    source = write(weights(), tmp_path / "source.safetensors", about | alone)
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("init", "delta", "merged", "small", "cast", "saved")}
    assert main(["convert", str(source), str(paths["init"]), "--head-width", "0.125", "--author", "someone"]) == 0
    state = {
        name: tensor + 1 if name.startswith("layers.0.") else tensor
        for name, tensor in load_file(paths["init"]).items()
    }
    moved = write(state, tmp_path / "trained.safetensors")
    words = ["--title", "Mine", "--trigger-words", "zx, yw"]
    assert main(["delta", str(moved), str(paths["init"]), str(paths["delta"]), *words]) == 0
    assert main(["merge", str(paths["delta"]), str(paths["init"]), str(paths["merged"])]) == 0
    assert main(["quantise", str(paths["merged"]), str(paths["small"])]) == 0
    assert main(["quantise", str(paths["delta"]), str(paths["cast"]), "--format", "bf16"]) == 0
    delta.save({"layers.0.ffn_norm1.weight": state["layers.0.ffn_norm1.weight"]}, paths["init"], paths["saved"])
    for name, path in paths.items():
        known = said(path)
        assert known["modelspec.license"] == "Apache-2.0" and known["modelspec.author"] == "someone", name
        assert known["modelspec.base_model"] == "Z-Image-Turbo", name
        assert "modelspec.hash_sha256" not in known, name
        architecture = f"z-image-width-{SOURCE.dim}-l2p-1k" + ("/delta" if "l2p.kept" in known else "")
        assert known.get("modelspec.architecture") == (None if name == "init" else architecture)
        titled = name in ("delta", "merged", "small", "cast")
        assert known.get("modelspec.title") == ("Mine" if titled else None), name
        assert known["trained_words"] == ("zx, yw" if titled else "zx"), name
    assert said(paths["small"])["modelspec.trigger_phrase"] == "zx, yw"
    assert stated(license="  ", title=None) == {}


def test_without_any_the_base_is_named_by_its_sizes(tmp_path: Path) -> None:
    quantise(model(tmp_path), tmp_path / "small.safetensors", "float8_e4m3fn")
    assert "Z-Image's architecture" in said(tmp_path / "small.safetensors")["modelspec.base_model"]
    assert "modelspec.license" not in said(tmp_path / "small.safetensors")


def test_the_benchmark_of_formats_prints_both_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One variant of golden vectors and two steps of sampling, which take long and are tested elsewhere."""
    monkeypatch.setattr(formats, "VARIANTS", {"1k": VARIANTS["1k"]})
    monkeypatch.setattr(bundled, "pixel_images", partial(bundled.pixel_images, steps=2))
    assert main(["benchmark", "formats", "--images", "1"]) == 0
    printed = capsys.readouterr().out
    assert "| golden vectors |" in printed and all(f"| {name} " in printed for name in ("1k", *FORMATS))


def test_the_public_name() -> None:
    assert files.quantise is quantise


def test_mistakes_end_in_a_sentence_and_leave_no_file(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, target = tmp_path / "small.safetensors", tmp_path / "target.safetensors"
    quantise(trained.model, small, "float8_e4m3fn")
    broken = {
        **PIXELS,
        "layers.0.attention.qkv.weight": torch.full_like(PIXELS["layers.0.attention.qkv.weight"], torch.nan),
    }
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    mistakes: dict[str, list[object]] = {
        "quantised already": [small, target],
        "is a GGUF file": [gguf, target],
        "There is no format 'int4'; choose one of": [trained.model, target, "--format", "int4"],
        "give the base too": [trained.delta, target],
        "is not a delta, so it has no base": [trained.model, target, "--base", trained.base],
        "a source of the new file": [trained.model, trained.model, "--overwrite"],
        "already exists": [trained.model, small],
        "end the name in .safetensors": [trained.model, tmp_path / "target.gguf"],
        "not finite numbers": [model(tmp_path, "broken", broken), target],
        "does not exist": [tmp_path / "none.safetensors", target],
        "made for another base": [trained.delta, target, "--base", model(tmp_path, "other", weights(SOURCE, seed=2))],
    }
    for sentence, arguments in mistakes.items():
        assert main(["quantise", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert sentence in error and "Traceback" not in error, sentence
        assert not target.exists() and not list(tmp_path.glob("*.part"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="its disk has only 1 KB free"):
        quantise(trained.model, target, "bf16", progress=lambda done, total: pytest.fail("read before the check"))


def test_progress_runs_to_the_end_and_can_stop_the_work(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    quantise(model(tmp_path), tmp_path / "small.safetensors", "bf16", progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1] == sum(tensor.nbytes for tensor in PIXELS.values())

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise(model(tmp_path), tmp_path / "stopped.safetensors", "int8_tensorwise", progress=stop)
    assert not list(tmp_path.glob("stopped*"))
