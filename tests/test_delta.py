"""Deltas: merged equals trained bit for bit on every base, and another base is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import HEAD_WIDTH, SOURCE, pixel_config, prefixed, same, weights, write, write_shards
from torch import Tensor

from comfyui_l2p.l2p_core import delta
from comfyui_l2p.l2p_core.checkpoint import CheckpointError, load_model, load_tensors, open_checkpoint
from comfyui_l2p.l2p_core.convert import convert
from comfyui_l2p.l2p_core.files import atomic, tensor_io
from comfyui_l2p.l2p_core.layouts import to_comfy, to_diffusers
from comfyui_l2p.l2p_core.quantise import BF16, FORMATS, quantise
from comfyui_l2p.train.cli import main

TRAINED_PARTS = (
    "x_embedder.",
    "local_decoder.",
    "t_embedder.",
    "noise_refiner.",
    "layers.0.",
    "layers.2.",
    "x_pad_token",
)


class Files:
    """A source in several forms, its pixel initialisation, and a model trained from that."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.source = write(weights(), folder / "source.safetensors")
        self.init = folder / "init.safetensors"
        convert(self.source, self.init, head_width=HEAD_WIDTH)
        self.initial, _ = load_tensors(self.init)
        # Training writes float32 for what it trains.
        self.state = {
            name: tensor.float() + 0.01 if name.startswith(TRAINED_PARTS) else tensor
            for name, tensor in self.initial.items()
        }
        self.trained = write(self.state, folder / "trained.safetensors")
        self.delta = folder / "delta.safetensors"

    def bases(self) -> Iterator[Path]:
        yield self.source
        yield self.init
        yield write(prefixed(weights()), self.folder / "prefixed.safetensors")
        yield write(to_diffusers(weights()), self.folder / "diffusers.safetensors")
        yield write_shards(weights(), self.folder / "shards")
        yield write_shards(self.initial, self.folder / "init shards", stem="model", count=2)

    def merged(self, base: Path, delta_file: Path | None = None, layout: str = "comfy") -> dict[str, Tensor]:
        target = self.folder / "merged.safetensors"
        delta.merge(delta_file or self.delta, base, target, layout=layout, overwrite=True)
        return load_tensors(target)[0]


@pytest.fixture
def files(tmp_path: Path, unflushed: None) -> Files:
    return Files(tmp_path)


def test_merged_equals_trained_on_every_base(files: Files) -> None:
    for made_on in (files.source, files.init, write_shards(weights(), files.folder / "shards")):
        delta.extract(files.trained, made_on, files.delta, overwrite=True)
        for base in files.bases():
            assert same(files.merged(base), files.state)


def test_only_what_training_changed_is_kept(files: Files) -> None:
    report = delta.extract(files.trained, files.init, files.delta)
    stored, metadata = load_tensors(files.delta)
    changed = {name for name in files.state if name.startswith(TRAINED_PARTS)}
    assert stored.keys() == changed == set(report.trained)
    assert set(report.unchanged) == files.state.keys() - changed
    assert files.delta.stat().st_size < files.trained.stat().st_size
    assert metadata["l2p.kind"] == "delta" and metadata["l2p.variant"] == "1k"
    assert metadata["l2p.source_sha256"] == load_tensors(files.init)[1]["l2p.source_sha256"]
    assert set(json.loads(metadata["l2p.kept"])) == set(report.unchanged)
    assert "1 of x_pad_token" in report.summary()


def test_one_changed_bit_is_found_and_kept(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_io, "CHUNK_BYTES", 4096)  # so that it is not in the first chunk
    state = {name: tensor.clone() for name, tensor in files.initial.items()}
    state["layers.1.feed_forward.w2.weight"].view(torch.int16)[-1, -1] ^= 1
    trained = write(state, files.folder / "bit.safetensors")
    report = delta.extract(trained, files.init, files.delta)
    assert report.trained == ("layers.1.feed_forward.w2.weight",)
    assert same(files.merged(files.init), state)
    with pytest.raises(CheckpointError, match=r"made for another base .*it has no 'local_decoder\.|its 'x_embedder"):
        files.merged(files.source)


def test_the_disk_is_asked_for_what_is_written_and_no_more(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole model most is the base's."""
    asked: list[int] = []
    monkeypatch.setattr(atomic, "_check_room", lambda target, size: asked.append(size))
    delta.extract(files.trained, files.init, files.delta)
    saved = files.folder / "saved.safetensors"
    delta.save({n: t for n, t in files.state.items() if n.startswith(TRAINED_PARTS)}, files.init, saved)
    for size, path in zip(asked, (files.delta, saved), strict=True):
        assert path.stat().st_size == size < files.trained.stat().st_size
    asked.clear()
    merged = files.folder / "merged.safetensors"
    delta.merge(files.delta, files.init, merged)
    init = files.folder / "other.safetensors"
    convert(files.source, init, head_width=HEAD_WIDTH)
    assert asked == pytest.approx([merged.stat().st_size, init.stat().st_size], rel=1e-3)


def test_nan_and_infinity_of_the_base_survive(files: Files) -> None:
    state = {name: tensor.clone() for name, tensor in files.initial.items()}
    state["layers.0.ffn_norm1.weight"][0] = -0.0
    state["layers.1.ffn_norm1.weight"][:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    source = write({**weights(), "layers.1.ffn_norm1.weight": state["layers.1.ffn_norm1.weight"]}, files.source)
    delta.extract(write(state, files.trained), source, files.delta)
    assert "layers.1.ffn_norm1.weight" not in load_tensors(files.delta)[0]
    assert same(files.merged(source), state)


def test_frozen_weights_that_were_only_widened_stay_out(files: Files) -> None:
    """As in the published 1k file, whose frozen blocks are float32 copies of a bfloat16 source's."""
    state = {name: tensor.float() if name.startswith("layers.1.") else tensor for name, tensor in files.state.items()}
    delta.extract(write(state, files.trained), files.source, files.delta)
    assert not any(name.startswith("layers.1.") for name in load_tensors(files.delta)[0])
    for base in files.bases():
        assert same(files.merged(base), state)


def test_a_diffusers_file_can_be_trained_merged_and_written(files: Files) -> None:
    published = write(to_diffusers(files.state), files.folder / "published.safetensors")
    delta.extract(published, files.source, files.delta)
    assert same(to_comfy(files.merged(files.source, layout="diffusers")), files.state)
    assert "all_x_embedder.16-1.weight" in files.merged(files.source, layout="diffusers")


def test_training_saves_the_same_delta_from_memory(files: Files) -> None:
    trained = {name: tensor for name, tensor in files.state.items() if name.startswith(TRAINED_PARTS)}
    delta.extract(files.trained, files.init, files.delta)
    saved = files.folder / "saved.safetensors"
    delta.save(trained, files.init, saved, {"l2p.steps": "7"})
    (stored, said), (expected, text) = load_tensors(saved), load_tensors(files.delta)
    assert same(stored, expected) and said == {**text, "l2p.steps": "7", "l2p.kept": said["l2p.kept"]}
    assert json.loads(said["l2p.kept"]) == json.loads(text["l2p.kept"])
    for base in files.bases():
        assert same(files.merged(base, saved), files.state)
    with pytest.raises(CheckpointError, match="already exists"):
        delta.save(trained, files.init, saved)


def test_saving_again_does_not_read_the_base_again(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = {name: tensor for name, tensor in files.state.items() if name.startswith(TRAINED_PARTS)}
    delta.save(trained, files.init, files.delta)
    first = files.delta.read_bytes()
    monkeypatch.setattr(
        "comfyui_l2p.l2p_core.deltas.unchanged_tensors.ChunkReader.chunks", lambda *_: pytest.fail("read the base")
    )
    delta.save(trained, files.init, files.delta, overwrite=True)
    assert files.delta.read_bytes() == first


def test_loading_without_a_merged_file(files: Files) -> None:
    delta.extract(files.trained, files.init, files.delta)
    model = delta.load_model(files.delta, files.source, dtype=torch.float32)
    assert same(model.state_dict(), load_model(files.trained, dtype=torch.float32).state_dict())
    other = write(weights(seed=1), files.folder / "other.safetensors")
    with pytest.raises(CheckpointError, match="made for another base than .*other.safetensors"):
        delta.load_model(files.delta, other)


def test_another_base_is_refused_with_the_reason(files: Files) -> None:
    delta.extract(files.trained, files.init, files.delta)
    last = weights()
    last["layers.1.ffn_norm2.weight"] = last["layers.1.ffn_norm2.weight"].clone()
    last["layers.1.ffn_norm2.weight"].view(torch.int16)[-1] ^= 1
    wider = dataclasses.replace(SOURCE, caption_dim=32)
    shallower = dataclasses.replace(SOURCE, n_layers=1)
    bases = [
        (weights(seed=1), r"its '[\w.]+' has other values"),
        (last, r"its 'layers.1.ffn_norm2.weight' has other values"),
        (weights(wider), r"its 'cap_embedder.0.weight' has the shape \(32,\), not \(24,\)"),
        (weights(shallower), r"it has no 'layers.1.[\w.]+'"),
    ]
    for i, (state, reason) in enumerate(bases):
        base = write(state, files.folder / f"base{i}.safetensors")
        with pytest.raises(CheckpointError, match=f"made for another base than .*base{i}.safetensors: {reason}"):
            files.merged(base)
    assert not (files.folder / "merged.safetensors").exists()


def test_wrong_files_have_their_sentence(files: Files) -> None:
    delta.extract(files.trained, files.init, files.delta)
    target = files.folder / "target.safetensors"
    wide = write(weights(pixel_config("4k")), files.folder / "wide.safetensors")
    for arguments, sentence in (
        ((files.init, files.init, target), "there is nothing to store"),
        ((files.source, files.init, target), "is a latent model, not an L2P pixel model: convert it"),
        ((files.delta, files.init, target), "is an L2P delta"),
        ((files.trained, files.delta, target), "is an L2P delta"),
        ((files.trained, files.init, files.trained), "is a source of the new file"),
        ((files.trained, files.init, files.delta), "already exists"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            delta.extract(*arguments, overwrite=arguments[2] == files.trained)
    with pytest.raises(CheckpointError, match="is not an L2P delta"):
        delta.merge(files.trained, files.source, target)
    with pytest.raises(CheckpointError, match="is an L2P delta, .*: merge it onto its base first, or give that base"):
        load_model(files.delta)
    with pytest.raises(CheckpointError, match="is an L2P delta"):
        convert(files.delta, target)
    assert not target.exists()
    delta.extract(wide, files.init, target)  # another variant only stores more
    assert same(files.merged(files.init, target), load_tensors(wide)[0])


@pytest.mark.parametrize(
    "text", ["", "[]", '{"a":1}', '{"a":["F32",[1]]}', '{"a":["F32",["1"],"0"]}', '{"a":["X",[1],"0"]}', "[" * 99999]
)
def test_a_delta_with_a_senseless_account_of_its_base_is_refused(text: str, files: Files) -> None:
    state, metadata = (delta.extract(files.trained, files.init, files.delta), load_tensors(files.delta)[1])[0:2]
    assert state.unchanged
    write(load_tensors(files.delta)[0], files.delta, {**metadata, "l2p.kept": text})
    with pytest.raises(CheckpointError, match="is damaged"):
        files.merged(files.init)


def test_an_interrupt_leaves_nothing(files: Files) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    before = sorted(files.folder.iterdir())
    with pytest.raises(KeyboardInterrupt):
        delta.extract(files.trained, files.init, files.delta, progress=interrupt)
    assert sorted(files.folder.iterdir()) == before
    delta.extract(files.trained, files.init, files.delta)
    with pytest.raises(KeyboardInterrupt):
        delta.merge(files.delta, files.init, files.folder / "merged.safetensors", progress=interrupt)
    assert sorted(files.folder.iterdir()) == sorted([*before, files.delta])


def test_merged_files_say_what_they_are(files: Files) -> None:
    delta.extract(files.trained, files.init, files.delta)
    files.merged(files.source)
    opened = open_checkpoint(files.folder / "merged.safetensors")
    assert opened.metadata["l2p.kind"] == "merged" and "l2p.kept" not in opened.metadata
    assert json.loads(opened.metadata["l2p.copied"]) == {
        "cap_embedder": 3,
        "cap_pad_token": 1,
        "context_refiner": 11,
        "layers": 13,
    }
    assert json.loads(opened.metadata["l2p.trained"])["x_embedder"] == 2
    steps: list[tuple[int, int]] = []
    delta.merge(
        files.delta,
        files.source,
        files.folder / "again.safetensors",
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps[-1][0] == steps[-1][1] == opened.nbytes


def test_values_that_are_not_finite_numbers(
    tmp_path: Path, unflushed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """No delta is made of them; merging and converting say which tensor has them."""
    files = Files(tmp_path)
    state = {key: tensor.clone() for key, tensor in files.state.items()}
    state["layers.0.attention.qkv.weight"][-1, -1] = float("nan")
    broken = write(state, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match="'layers.0.attention.qkv.weight' has values that are not finite numbers"):
        delta.extract(broken, files.init, files.delta)
    assert not files.delta.exists()

    source = weights()
    source["layers.1.attention.out.weight"][0, 0] = float("inf")
    base = write(source, tmp_path / "base.safetensors")
    report = convert(base, tmp_path / "broken init.safetensors", head_width=HEAD_WIDTH)
    assert report.broken == "layers.1.attention.out.weight" and report.broken in report.summary()
    trained = load_tensors(tmp_path / "broken init.safetensors")[0]
    trained = {key: tensor + 0.01 if key.startswith("x_embedder.") else tensor for key, tensor in trained.items()}
    delta.extract(write(trained, tmp_path / "new.safetensors"), base, files.delta)
    merged = tmp_path / "merged.safetensors"
    assert main(["merge", str(files.delta), str(base), str(merged)]) == 0
    assert "Warning: 'layers.1.attention.out.weight' has values that are not finite numbers" in capsys.readouterr().out

    report = convert(files.source, tmp_path / "sound.safetensors", head_width=HEAD_WIDTH)
    assert report.broken is None and "Warning" not in report.summary()


@pytest.mark.parametrize("format", FORMATS)
def test_no_quantised_file_has_values_that_are_not_finite_numbers(format: str, tmp_path: Path, unflushed: None) -> None:
    """Nor in tensors that the format leaves in bf16, nor if it stays a delta."""
    files, target, key = Files(tmp_path), tmp_path / "target.safetensors", "local_decoder.out_conv.weight"
    ruined = {**files.state, key: torch.full_like(files.state[key], torch.inf)}
    with pytest.raises(CheckpointError, match=f"model.safetensors is broken: '{key}' has values that are not finite"):
        quantise(write(ruined, tmp_path / "model.safetensors"), target, format)
    delta.extract(files.trained, files.init, files.delta)
    changed, about = load_tensors(files.delta)
    broken = write({**changed, key: ruined[key]}, tmp_path / "broken.safetensors", about)
    with pytest.raises(CheckpointError, match=f"broken.safetensors is broken: '{key}' has values that are not finite"):
        quantise(broken, target, format, base=None if format == BF16 else files.source)
    assert not target.exists() and not list(tmp_path.glob("*.part"))


def test_a_dtype_too_narrow_for_a_weight_is_named(tmp_path: Path, unflushed: None) -> None:
    source = {key: tensor.float() for key, tensor in weights().items()}
    source["layers.1.attention.out.weight"][0, 0] = 1e6
    file = write(source, tmp_path / "source.safetensors")
    report = convert(file, tmp_path / "half.safetensors", head_width=HEAD_WIDTH, dtype=torch.float16)
    assert report.broken == "layers.1.attention.out.weight"
