"""`l2p benchmark checkpoint`: conversion, delta, merge and rounding of a synthetic model, against copying its file.

Every run is a separate process and ends when its file is on disk, as does copying; runs and copies alternate, so that
both see the same state of the machine. Memory is the peak resident set beyond what the process held before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ...l2p_core import convert, delta, quantise
from ...l2p_core.checkpoint import open_checkpoint
from ...l2p_core.config import ModelConfig
from ...l2p_core.device.process_memory import peak_memory
from ...l2p_core.files.model_file import model_file
from ...l2p_core.files.safetensors_header import TensorSpec, nbytes
from ...l2p_core.files.tensor_io import ChunkReader, as_bytes
from ...l2p_core.files.units import bytes_text
from ...l2p_core.freeze import trainable_names
from ...l2p_core.model import key_shapes
from ..console import table
from .process import forget_peak, run_module

ROUNDS = 3
ROUNDINGS = {"float8": "float8_e4m3fn", "int8": "int8_tensorwise"}
"""The tasks that quantise, and to what."""
DTYPE = "BF16"
_NARROW = ModelConfig(dim=512, ffn_dim=1365)  # for files too small for a block of the 6B model
_PATTERN_BYTES = 8 << 20


def benchmark_checkpoint(gigabytes: float = 1.0, folder: Path | None = None, rounds: int = ROUNDS) -> None:
    """Measure on a source of about this size, in a new folder inside `folder` that is removed afterwards, and print.

    The disk needs space for four such files.
    """
    with tempfile.TemporaryDirectory(prefix="l2p-benchmark-", dir=folder) as name:
        work = Path(name)
        source, init, trained = (work / f"{part}.safetensors" for part in ("source", "init", "trained"))
        config = config_of_size(gigabytes * 1e9)
        write_source(config, source)
        convert.convert(source, init)
        write_trained(init, trained)
        init.unlink()
        delta_file, result = work / "delta.safetensors", work / "result.safetensors"
        delta.extract(trained, source, delta_file)
        tasks = {
            "convert": (source, [source, result]),
            "delta": (trained, [trained, source, result]),
            "merge": (trained, [delta_file, source, result]),
            **{task: (trained, [trained, result]) for task in ROUNDINGS},
        }
        rows = [_row(task, whole, paths, result, rounds) for task, (whole, paths) in tasks.items()]
        largest = max(stored.nbytes for stored in open_checkpoint(trained).tensors.values())
        print(f"{bytes_text(source.stat().st_size)} source, largest tensor {bytes_text(largest)}, median of {rounds}")
    print(table(["task", "file", "seconds", "copying it", "speed of copying", "peak memory added"], rows))


def config_of_size(size: float) -> ModelConfig:
    """A latent source of about `size` bytes: as many blocks as fit, those of the 6B model if several do."""
    for config in (ModelConfig(), _NARROW):
        one, two = (_bytes(replace(config, n_layers=layers)) for layers in (1, 2))
        layers = 1 + round((size - one) / (two - one))
        if layers >= 3:
            break
    return ModelConfig(dim=config.dim, ffn_dim=config.ffn_dim, n_layers=max(3, layers))


def _bytes(config: ModelConfig) -> int:
    return sum(nbytes(DTYPE, shape) for shape in key_shapes(config).values())


def write_source(config: ModelConfig, target: Path) -> None:
    """Write a latent model with arbitrary weights."""
    # Finite: a delta of broken weights is refused.
    generator = torch.Generator().manual_seed(0)
    pattern = as_bytes(torch.randn(_PATTERN_BYTES // 2, generator=generator).bfloat16())
    specs = [TensorSpec(name, DTYPE, shape) for name, shape in key_shapes(config).items()]
    with model_file(target, specs, config, {}) as (writer, places):
        for spec in specs:
            size = nbytes(spec.dtype, spec.shape)
            for start in range(0, size, len(pattern)):
                writer.write(places[spec.name] + start, pattern[: size - start])
        writer.finish({})


def write_trained(init: Path, target: Path) -> None:
    """Write the pixel initialisation with other values in everything that shallow training trains."""
    opened = open_checkpoint(init)
    config = opened.config()
    trained = trainable_names(config, blocks=max(1, config.n_layers // 6))
    specs = [TensorSpec(stored.name, stored.dtype, stored.shape) for stored in opened.tensors.values()]
    with model_file(target, specs, config, {}) as (writer, places), ChunkReader() as reader:
        for name, stored in opened.tensors.items():
            position = places[name]
            for chunk in reader.chunks(stored):
                data = np.bitwise_xor(np.frombuffer(chunk, np.uint8), 1).data if name in trained else chunk
                writer.write(position, data)
                position += len(chunk)
        writer.finish({})


def _row(task: str, whole: Path, paths: list[Path], result: Path, rounds: int) -> list[str]:
    """Measure one task, alternating with copying `whole`, the large file that it reads or writes."""
    copies: list[float] = []
    runs: list[float] = []
    memory = 0
    for _ in range(rounds):
        for name, arguments in (("copy", [whole, result]), (task, paths)):
            measured = run_module(__name__, name, *map(str, arguments))
            (copies if name == "copy" else runs).append(measured["seconds"])
            memory = max(memory, 0 if name == "copy" else measured["memory"])
            result.unlink()
    copying, seconds = statistics.median(copies), statistics.median(runs)
    size = bytes_text(whole.stat().st_size)
    return [task, size, f"{seconds:.2f}", f"{copying:.2f}", f"{copying / seconds:.0%}", bytes_text(memory)]


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


TASKS: dict[str, Callable[..., object]] = {
    "copy": _copy,
    "convert": convert.convert,
    "delta": delta.extract,
    "merge": delta.merge,
    **{task: partial(quantise.quantise, format=format) for task, format in ROUNDINGS.items()},
}


def _measure(task: str, paths: list[Path]) -> Iterator[tuple[str, float]]:
    forget_peak()
    before, started = peak_memory(), time.perf_counter()
    TASKS[task](*paths)
    yield "seconds", time.perf_counter() - started
    yield "memory", peak_memory() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("paths", nargs="+", type=Path)
    arguments = parser.parse_args()
    print(json.dumps(dict(_measure(arguments.task, arguments.paths))))
