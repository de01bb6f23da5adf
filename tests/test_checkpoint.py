"""Reading checkpoints in every form they come in, and writing files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_checkpoints import load_any, pixel_config, prefixed, same, weights, write, write_shards

from comfyui_l2p.l2p_core import checkpoint
from comfyui_l2p.l2p_core.checkpoint import CheckpointError, load_latent, load_model, open_checkpoint
from comfyui_l2p.l2p_core.files import tensor_io
from comfyui_l2p.l2p_core.layouts import to_diffusers
from comfyui_l2p.l2p_core.model import LatentModel

PIXELS = weights(pixel_config())


def _comfy(folder: Path) -> Path:
    return write(PIXELS, folder / "model.safetensors")


def _comfy_prefixed(folder: Path) -> Path:
    return write(prefixed(PIXELS), folder / "model.safetensors")


def _all_in_one(folder: Path) -> Path:
    return write({**prefixed(PIXELS), "vae.decoder.conv_in.weight": torch.zeros(2)}, folder / "model.safetensors")


def _diffusers(folder: Path) -> Path:
    return write(to_diffusers(PIXELS), folder / "model.safetensors")


def _shards(folder: Path) -> Path:
    return write_shards(PIXELS, folder / "transformer")


def _shards_by_index(folder: Path) -> Path:
    return write_shards(PIXELS, folder / "x", stem="model") / "model.safetensors.index.json"


def _repository(folder: Path) -> Path:
    return write_shards(PIXELS, folder / "transformer").parent


@pytest.mark.parametrize(
    "form", [_comfy, _comfy_prefixed, _all_in_one, _diffusers, _shards, _shards_by_index, _repository]
)
def test_every_form_loads_to_the_same_weights(form: Callable[[Path], Path], tmp_path: Path) -> None:
    assert same(load_model(form(tmp_path)).state_dict(), PIXELS)


def test_dtype_is_the_patch_embedders_unless_asked_for(tmp_path: Path) -> None:
    # As the published 1k file: some blocks in float32, the rest in bfloat16; q, k and v differ here too.
    mixed = to_diffusers(PIXELS)
    for name in mixed:
        if name.startswith("layers.1.") or "to_q" in name:
            mixed[name] = mixed[name].float()
    path = write(mixed, tmp_path / "mixed.safetensors")
    assert same(load_model(path).state_dict(), PIXELS)
    assert open_checkpoint(path).tensors["layers.0.attention.qkv.weight"].dtype == "F32"
    wide = load_model(path, dtype=torch.float32).state_dict()
    assert same(wide, {name: tensor.float() for name, tensor in PIXELS.items()})


def test_loaded_weights_train_and_progress_is_reported(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    model = load_model(_comfy(tmp_path), dtype=torch.float32, progress=lambda done, total: steps.append((done, total)))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert steps[-1][0] == steps[-1][1] and steps == sorted(steps)


def test_latent_and_pixel_models_are_told_apart(tmp_path: Path) -> None:
    latent = write(weights(), tmp_path / "latent.safetensors")
    pixel = _comfy(tmp_path)
    assert isinstance(load_any(latent), LatentModel) and load_model(pixel).config.variant == "1k"
    assert same(load_latent(latent).state_dict(), weights())
    with pytest.raises(CheckpointError, match="convert it to L2P first"):
        load_model(latent)
    with pytest.raises(CheckpointError, match="latent source was expected"):
        load_latent(pixel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunks_of_any_size_read_the_same(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_io, "CHUNK_BYTES", 1000)
    state = to_diffusers(weights(dtype=dtype))
    path = write(state, tmp_path / "model.safetensors")
    opened = open_checkpoint(path)
    with tensor_io.ChunkReader() as reader:
        for stored in opened.tensors.values():
            for name in ("F32", stored.dtype):
                wanted = stored.as_dtype(name)
                joined = b"".join(bytes(chunk) for chunk in reader.chunks(wanted))
                assert joined == bytes(tensor_io.as_bytes(reader.read(wanted)))


def _header(fields: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

WRONG_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "pickle": (pickle.dumps({"weight": 1}), "pickle"),
    "text": ("Bonjour à tous, ceci n'est pas un modèle. ".encode() * 9, "is a text file"),
    "web page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12309866400\n", "git-lfs pointer"),
    "gguf": (b"GGUF" + bytes(99), "is a GGUF file"),
    "noise": (bytes(range(128, 256)), "is not a safetensors file|pickle"),
    "header beyond the end": (struct.pack("<Q", 10**7) + b'{"a":', "is incomplete: it has 13 bytes"),
    "header over the limit": (struct.pack("<Q", 10**9) + b'{"a":' + bytes(99), "is not a safetensors file"),
    "nested": (struct.pack("<Q", 10**5) + b'{"a":' + b"[" * (10**5 - 5), "nested too deeply"),
    "data missing": (_header({"a": ENTRY}, b"ab"), r"is incomplete: it has [\d,]+ of [\d,]+ bytes"),
    "data too long": (_header({"a": ENTRY}, b"abcdefgh"), "4 bytes longer"),
    "overlap": (_header({"a": ENTRY, "b": ENTRY}, b"abcd"), "overlap"),
    "hole": (_header({"a": {**ENTRY, "data_offsets": [4, 8]}}, b"abcdefgh"), "hole"),
    "size": (_header({"a": {**ENTRY, "shape": [2]}}, b"abcd"), "do not match its type and shape"),
    "huge": (_header({"a": {**ENTRY, "shape": [10**18, 10**18], "data_offsets": [0, 4]}}, b"abcd"), "do not match"),
    "huge number": (_header({"a": {**ENTRY, "shape": [10**400]}}), "a number is too large"),
    "negative": (_header({"a": {**ENTRY, "shape": [-1, -1]}}, b"abcd"), "impossible shape"),
    "boolean": (_header({"a": {**ENTRY, "shape": [True]}}, b"abcd"), "impossible shape"),
    "fraction": (_header({"a": {**ENTRY, "shape": [1.0]}}, b"abcd"), "not a whole number"),
    "dtype": (_header({"a": {**ENTRY, "dtype": "F33"}}, b"abcd"), "unknown type 'F33'"),
    "metadata": (_header({"__metadata__": {"a": 1}}), "metadata is not text"),
    "list": (struct.pack("<Q", 2) + b"{]", "not valid JSON"),
    "twice": (struct.pack("<Q", 111) + b'{"a":' + json.dumps(ENTRY).encode() + b',"a":{}}'.ljust(53), "appears twice"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_each_wrong_file_has_its_sentence(name: str, tmp_path: Path) -> None:
    content, sentence = WRONG_FILES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_model(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_zip_and_a_missing_file_have_theirs(tmp_path: Path) -> None:
    _zip(tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="PyTorch pickle"):
        load_model(tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        load_model(tmp_path)


def test_a_download_cut_short_says_how_much_is_there(tmp_path: Path) -> None:
    path = _comfy(tmp_path)
    size = path.stat().st_size
    os.truncate(path, size - 100)
    with pytest.raises(CheckpointError, match=f"it has {size - 100:,} of {size:,} bytes; download it again"):
        load_model(path)


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("layers.0.feed_forward.w1.weight", torch.zeros(80, 64).to(torch.float8_e4m3fn)),
        ("layers.0.feed_forward.w1.weight", torch.zeros(80, 64, dtype=torch.int8)),
        ("layers.0.feed_forward.w1.weight_scale", torch.ones(())),
        ("layers.0.feed_forward.w1.comfy_quant", torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)),
        ("scaled_fp8", torch.zeros(2)),
    ],
)
def test_quantised_weights_are_named_not_cast(key: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    path = write({**PIXELS, key: tensor}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is quantised .* use the bf16, fp16 or fp32 file"):
        load_model(path)


def test_loads_are_strict(tmp_path: Path) -> None:
    missing = {name: tensor for name, tensor in PIXELS.items() if name != "layers.1.ffn_norm1.weight"}
    with pytest.raises(CheckpointError, match="is incomplete: 'layers.1.ffn_norm1.weight' is missing"):
        load_model(write(missing, tmp_path / "a.safetensors"))
    with pytest.raises(CheckpointError, match="'layers.0.bias' is unknown"):
        load_model(write({**PIXELS, "layers.0.bias": torch.zeros(1)}, tmp_path / "b.safetensors"))
    with pytest.raises(CheckpointError, match=r"has the shape \(3,\)"):
        load_model(write({**PIXELS, "x_embedder.bias": torch.zeros(3)}, tmp_path / "c.safetensors"))
    # Z-Image files may carry this; no network has it.
    load_model(write({**PIXELS, "norm_final.weight": torch.zeros(64)}, tmp_path / "d.safetensors"))


def test_shards_must_be_complete_and_beside_their_index(tmp_path: Path) -> None:
    folder = write_shards(PIXELS, tmp_path / "model")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    with pytest.raises(CheckpointError, match="one of 3 shards: give the folder"):
        load_model(first)
    shutil.copyfile(first, folder / "twin.safetensors")
    text = index.read_text(encoding="utf-8")
    index.write_text(text.replace('"weight_map": {', '"weight_map": {"extra": "twin.safetensors", '), encoding="utf-8")
    with pytest.raises(CheckpointError, match="two of its files contain"):
        load_model(folder)
    for escape in ("../first.safetensors", "/etc/passwd", "..", "sub/a.safetensors", "sub\\\\a.safetensors", "C:a"):
        index.write_text(text.replace(first.name, escape), encoding="utf-8")
        with pytest.raises(CheckpointError, match="is not a file beside it"):
            load_model(folder)
    index.write_text(text, encoding="utf-8")
    second.unlink()
    with pytest.raises(CheckpointError, match=f"The shard '{second.name}' is missing"):
        load_model(folder)
    for broken in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["b"]}}'):
        index.write_text(broken, encoding="utf-8")
        with pytest.raises(CheckpointError, match="not a valid index|names 1"):
            load_model(folder)


def test_saved_files_are_the_formats_own(tmp_path: Path) -> None:
    state = {
        "half": torch.randn(3, 5).half(),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 4),
        "strided": torch.randn(4, 6).t(),
        "brain": torch.randn(7).bfloat16(),
        "count": torch.arange(3),
    }
    path = tmp_path / "state.safetensors"
    checkpoint.save(state, path, {"note": "äß"})
    assert same(load_file(path), state)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "äß"}
    loaded, metadata = checkpoint.load_tensors(path)
    assert same(loaded, state) and metadata["note"] == "äß"


def test_targets_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    state = {"a": torch.zeros(4)}
    checkpoint.save(state, path)
    with pytest.raises(CheckpointError, match="already exists"):
        checkpoint.save(state, path)
    with pytest.raises(CheckpointError, match="is a folder"):
        checkpoint.save(state, tmp_path)
    with pytest.raises(CheckpointError, match="does not exist: create it"):
        checkpoint.save(state, tmp_path / "none" / "state.safetensors")
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="needs [0-9]+ bytes but its disk has only 10 bytes free"):
        checkpoint.save(state, path, overwrite=True)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file_only(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save({"a": torch.zeros(4)}, path)
    old = path.read_bytes()

    def fail(self: object, position: int, data: memoryview) -> None:
        raise error

    monkeypatch.setattr(tensor_io.TensorWriter, "write", fail)
    sentence = "is full" if isinstance(error, OSError) else None
    with pytest.raises(CheckpointError if sentence else KeyboardInterrupt, match=sentence):
        checkpoint.save({"a": torch.ones(4)}, path, overwrite=True)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
