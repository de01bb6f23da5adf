"""The checkpoint reader against damaged and hostile files: it loads or says why not, and never more.

A few thousand seeded cases; each ends in a loaded checkpoint or a CheckpointError, soon and without memory that
the file itself does not justify.
"""

from __future__ import annotations

import json
import random
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tiny_checkpoints import load_any, pixel_config, weights, write

from comfyui_l2p.l2p_core import delta
from comfyui_l2p.l2p_core.checkpoint import CheckpointError, load_tensors, open_checkpoint
from comfyui_l2p.l2p_core.convert import convert
from comfyui_l2p.l2p_core.files.safetensors_header import DTYPE_BITS

CPU_SECONDS_PER_CASE = 2.0
MEMORY_PER_CASE = 8 << 20

SMALL = save(
    {
        "x_embedder.weight": torch.randn(8, 64),
        "layers.0.attention.to_q.weight": torch.randn(4, 4).bfloat16(),
        "layers.0.attention.to_k.weight": torch.randn(4, 4).bfloat16(),
        "layers.0.attention.to_v.weight": torch.randn(4, 4).bfloat16(),
        "x_pad_token": torch.randn(1, 8),
    },
    metadata={"format": "pt", "l2p.kind": "pixel-init"},
)
HEADER_BYTES = struct.unpack("<Q", SMALL[:8])[0]


def attempt(content: bytes, path: Path) -> bool:
    """Whether the file could be opened and read; anything but a CheckpointError goes through."""
    path.unlink(missing_ok=True)  # replacing a file's content in place makes some file systems flush it
    path.write_bytes(content)
    started = time.process_time()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        open_checkpoint(path)
        load_tensors(path)
        loaded = True
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        str(error).encode("utf-8")
        loaded = False
    assert tracemalloc.get_traced_memory()[1] - before < MEMORY_PER_CASE + 40 * len(content)
    assert time.process_time() - started < CPU_SECONDS_PER_CASE
    return loaded


@pytest.fixture(autouse=True)
def _traced(unflushed: None) -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_the_file_itself_loads(tmp_path: Path) -> None:
    assert attempt(SMALL, tmp_path / "fuzz.safetensors")


def test_flipped_bits(tmp_path: Path) -> None:
    rng = random.Random(1)
    refused = 0
    for _ in range(1000):
        content = bytearray(SMALL)
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(8 + HEADER_BYTES)] ^= 1 << rng.randrange(8)
        refused += not attempt(bytes(content), tmp_path / "fuzz.safetensors")
    assert refused > 500


def test_truncations(tmp_path: Path) -> None:
    for length in range(0, len(SMALL), 3):
        assert not attempt(SMALL[:length], tmp_path / "fuzz.safetensors")


def test_bytes_put_in_taken_out_and_doubled(tmp_path: Path) -> None:
    rng = random.Random(2)
    for _ in range(500):
        start, stop = sorted(rng.randrange(8 + HEADER_BYTES) for _ in range(2))
        content = rng.choice(
            (
                SMALL[:start] + SMALL[stop:],
                SMALL[:stop] + SMALL[start:],
                SMALL[:start] + rng.randbytes(rng.randrange(9)) + SMALL[start:],
            )
        )
        attempt(content, tmp_path / "fuzz.safetensors")


def test_noise(tmp_path: Path) -> None:
    rng = random.Random(3)
    for _ in range(300):
        content = rng.randbytes(rng.randrange(200))
        assert not attempt(content, tmp_path / "fuzz.safetensors")
        attempt(struct.pack("<Q", rng.randrange(220)) + b"{" + content, tmp_path / "fuzz.safetensors")


def _odd_value(rng: random.Random) -> Any:
    return rng.choice(
        (
            *(0, 1, -1, 2**31, 2**63, 2**64, 10**18, 10**30, True, None, 1.5, "", "F32", "\ud800", [], {}),
            [[]],
            [0, 10**18],
            [10**18, 0],
            [2**32, 2**32],
            [1] * 65,
            [True],
            {"dtype": "F32"},
        )
    )


def test_headers_of_odd_values(tmp_path: Path) -> None:
    rng = random.Random(4)
    names = ["x_embedder.weight", "layers.0.attention.to_q.weight", "x_pad_token", "", "\ud800", "__metadata__"]
    for _ in range(1000):
        fields: dict[str, Any] = {}
        for name in rng.sample(names, rng.randrange(1, 4)):
            entry: Any = {"dtype": rng.choice([*DTYPE_BITS]), "shape": [rng.randrange(4)], "data_offsets": [0, 0]}
            size = entry["shape"][0] * DTYPE_BITS[entry["dtype"]] // 8
            entry["data_offsets"] = [0, size]
            if rng.random() < 0.8:
                entry[rng.choice([*entry, "extra"])] = _odd_value(rng)
            fields[name] = entry if rng.random() < 0.9 else _odd_value(rng)
        text = json.dumps(fields).encode()
        attempt(struct.pack("<Q", len(text)) + text + bytes(rng.randrange(33)), tmp_path / "fuzz.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 100_000,
        '{"a":' + "9" * 200_000 + "}",
        '{"a":1e999999}',
        '{"a":NaN}',
        "{" + ",".join(f'"{i}":0' for i in range(50_000)) + ',"7":0}',
        '{"' + "a" * 300_000 + '":0}',
        '{"a":{"dtype":"U8","shape":[' + "0," * 50_000 + '0],"data_offsets":[0,0]}}',
    ],
    ids=["brackets", "braces", "digits", "exponent", "nan", "one key twice", "long name", "dimensions"],
)
def test_json_bombs(text: str, tmp_path: Path) -> None:
    content = text.encode()
    if not text.startswith("{"):
        content = b'{"a":' + content
    assert not attempt(struct.pack("<Q", len(content)) + content, tmp_path / "fuzz.safetensors")


def test_whole_models_with_damaged_headers_load_or_are_refused(tmp_path: Path) -> None:
    """Past the header too: sizes that contradict each other, and everything that is made of checkpoints."""
    rng = random.Random(5)
    source = write(weights(), tmp_path / "source.safetensors")
    path, target = tmp_path / "fuzz.safetensors", tmp_path / "target.safetensors"
    config = pixel_config()
    trained = {name: tensor for name, tensor in weights(config).items() if "layers.1." not in name}
    delta.save(trained, source, tmp_path / "delta.safetensors")
    for original in (source, tmp_path / "delta.safetensors"):
        content = original.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        for i in range(36):
            damaged = bytearray(content)
            damaged[8 + rng.randrange(length)] ^= 1 << rng.randrange(7)
            path.unlink(missing_ok=True)
            path.write_bytes(damaged)
            works = (
                lambda: load_any(path),
                lambda: convert(path, target, head_width=0.1, overwrite=True),
                lambda: delta.merge(path, source, target, overwrite=True),
            )
            try:
                works[i % 3]()
            except CheckpointError as error:
                assert "\n" not in str(error)
    assert sorted(file.name for file in tmp_path.iterdir() if file != target) == [
        "delta.safetensors",
        "fuzz.safetensors",
        "source.safetensors",
    ]


def test_shapes_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    rng = random.Random(6)
    state = weights()
    for name in [*state][::6]:
        shape = [rng.randrange(1, 80)] if state[name].dim() > 1 else [rng.randrange(1, 9), 2]
        path = write({**state, name: torch.zeros(shape)}, tmp_path / "odd.safetensors")
        with pytest.raises(CheckpointError):
            load_any(path)
