"""What each of two processes does in tests/test_parallel.py, which starts this file twice: python FILE FOLDER.

Everything that is asserted about numbers is asserted there, on the files left in the folder; what only a process can
see of itself is asserted here.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny_models import RandomBatches, captions, pixel_model

from comfyui_l2p.l2p_core import delta
from comfyui_l2p.l2p_core.distributed import ranks as parallel
from comfyui_l2p.l2p_core.distributed import sharding
from comfyui_l2p.l2p_core.distributed.ranks import Ranks
from comfyui_l2p.l2p_core.files.safetensors_header import CheckpointError
from comfyui_l2p.l2p_core.files.tensor_file import save
from comfyui_l2p.l2p_core.files.tensor_io import ChunkReader
from comfyui_l2p.l2p_core.run import montage
from comfyui_l2p.l2p_core.run.recipe import WatchSection
from comfyui_l2p.l2p_core.sources.next_dit import Block
from comfyui_l2p.l2p_core.training import loading as training_model
from comfyui_l2p.l2p_core.training.batch import Batch, BatchSource
from comfyui_l2p.l2p_core.training.trainer import Trainer, TrainingDiverged
from comfyui_l2p.l2p_core.training_config import TrainingConfig

STEPS = 2
CONFIG = TrainingConfig(
    steps=STEPS, lr=1e-3, blocks=1, precision="fp32", ema_decay=0.9, caption_dropout=0.3, warmup_steps=2, clip_norm=0.1
)
EMPTY = captions(1)[0]


class Unpadded:
    """Batches of two samples whose images need no padding, and whose captions need some only in every third batch."""

    def batch(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        pixels = torch.rand(2, 3, 64, 128, generator=generator) * 2 - 1
        words = captions(*([40, 32] if number % 3 == 1 else [32, 64]), seed=number)
        return Batch(pixels, words, [2 * number, 2 * number + 1], [None, None])


def scene_config(name: str) -> TrainingConfig:
    """Of a scene by its name, whose words say what is special about it."""
    words = name.split("_")
    special: dict[str, object] = {"parallel": words[0]}
    if "lora" in words:
        special |= {"policy": "lora", "lora_rank": 3}
    if "fp8" in words:
        special |= {"frozen": "fp8", "stream": True}
    if "bf16" in words:
        special |= {"precision": "bf16"}
    # One process does a step of four samples at once; two do two samples each.
    special |= {"accumulate": 1 if "part" in words else 2}
    return dataclasses.replace(CONFIG, **special)  # type: ignore[arg-type]


class Share:
    """One process's part of each of a source's micro-batches: part `index` of `count`."""

    def __init__(self, batches: BatchSource, index: int, count: int):
        self.batches, self.index, self.count = batches, index, count

    def batch(self, number: int) -> Batch:
        """The part of micro-batch `number`."""
        whole = self.batches.batch(number)
        size = len(whole.numbers) // self.count
        own = slice(self.index * size, (self.index + 1) * size)
        return Batch(whole.pixels[own], whole.captions[own], whole.numbers[own], whole.seeds[own])


def batches_of(name: str, ranks: Ranks) -> BatchSource:
    """The data of a scene: both processes together see what one process sees."""
    if "unpadded" in name or name in ("fsdp", "fsdp_read"):
        return Unpadded()
    if "part" in name:
        return Share(RandomBatches(batch_size=4), *ranks.part(1, 4))
    return RandomBatches(batch_size=2)


def trainer(config: TrainingConfig, ranks: Ranks | None = None) -> Trainer:
    return Trainer(pixel_model(), config, EMPTY, ranks)


def run(trained: Trainer, batches: BatchSource, until: int | None = None) -> list[float]:
    """Train on; what the metrics said."""
    said: list[float] = []
    for metrics in trained.run(batches):
        said += [metrics.loss, metrics.grad_norm, float(metrics.images)]
        if metrics.step == until:
            break
    return said


class Held:
    """The bytes of what has been read from files that are alive at once."""

    def __init__(self) -> None:
        self.now = self.most = self.read = 0

    def watching(self) -> Any:
        """Within it, tensors that are read are watched until they are let go of."""
        read = ChunkReader.read

        def watched(reader: ChunkReader, stored: Any) -> torch.Tensor:
            tensor = read(reader, stored)
            size = tensor.nbytes
            self.now, self.read = self.now + size, self.read + size
            self.most = max(self.most, self.now)
            weakref.finalize(tensor.untyped_storage(), self._let_go, size)
            return tensor

        return mock.patch.object(ChunkReader, "read", watched)

    def _let_go(self, size: int) -> None:
        self.now -= size


def read_by_parts(path: Path, config: TrainingConfig, ranks: Ranks) -> Trainer:
    """A trainer of a model that is read from its file; cutting it, no process holds more than a part beside its shards.

    A part is a block, or all that is in none.
    """
    held, seen = Held(), []
    with held.watching():
        model = training_model.load(path, config, ranks, lambda done, total: seen.append((done, total)))
        waits = {weight.is_meta for weight in model.parameters()}
        assert waits == {config.parallel == "fsdp"}, "shards are read when they are cut, replicas at once"
        trained = Trainer(model, config, EMPTY, ranks)
    whole = pixel_model()
    kept = dict(trained.model.named_parameters())
    # Frozen layers of their own kind take what is in the file, which is float32.
    sizes = {name: weight.numel() * kept.get(name, weight).element_size() for name, weight in whole.named_parameters()}
    blocks = [name for name, module in whole.named_modules() if isinstance(module, Block)]
    parts = [sum(size for name, size in sizes.items() if name.startswith(f"{block}.")) for block in blocks]
    parts.append(sum(sizes.values()) - sum(parts))
    assert held.read == sum(sizes.values()), "a weight was not read, or read twice"
    if config.parallel == "fsdp":
        # What is kept are the biases of frozen layers of their own kind.
        assert held.now < min(parts) / 10, "something keeps what the shards were cut from"
        assert held.most - held.now <= max(parts) < held.read / 2, (held.most, parts)
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] and model.read_part is None
    return trained


def train(folder: Path, name: str, ranks: Ranks) -> Trainer:
    """A whole run, its state in NAME.safetensors and its metrics beside it."""
    config = scene_config(name)
    by_parts = "read" in name.split("_")
    trained = read_by_parts(folder / "base.safetensors", config, ranks) if by_parts else trainer(config, ranks)
    said = run(trained, batches_of(name, ranks))
    trained.save(folder / f"{name}.safetensors")
    if ranks.first:
        save({"said": torch.tensor(said)}, folder / f"{name}_said.safetensors")
    assert all(other == said for other in ranks.gather(said))
    return trained


def resume(folder: Path, name: str, ranks: Ranks) -> None:
    """Half a run, saved; another trainer does the rest, of that save and of one that a single process left."""
    half = trainer(scene_config(name), ranks)
    run(half, batches_of(name, ranks), STEPS // 2)
    half.save(folder / f"{name}_half.safetensors")
    for start in (f"{name}_half", f"single_{name}_half"):
        rest = trainer(scene_config(name), ranks)
        rest.resume(folder / f"{start}.safetensors")
        assert rest.step == STEPS // 2
        run(rest, batches_of(name, ranks))
        rest.save(folder / f"{name}_after_{start}.safetensors")


def averages(folder: Path, name: str, ranks: Ranks, trained: Trainer) -> None:
    """The averaged model's velocity, and the delta; afterwards all is as before."""
    batch = RandomBatches().batch(0)
    before = [sharding.local(p.detach()).clone() for p in trained.parameters.values()]
    with trained.averaged() as model, torch.no_grad():
        velocity = model(batch.pixels, torch.tensor([0.3, 0.9]), batch.captions)
    if ranks.first:
        save({"velocity": velocity}, folder / f"{name}_velocity.safetensors")
    after = [sharding.local(p.detach()) for p in trained.parameters.values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    sharding.write_from_first(
        ranks,
        trained.trained(),
        lambda weights: delta.save(weights, folder / "base.safetensors", folder / f"{name}_delta.safetensors"),
    )


def montages(ranks: Ranks, trained: Trainer) -> None:
    """Three batches of prompts, shared out, are the pictures that one process makes of them."""
    words = {"": 1, "a": 3, "b": 40, "c": 5, "d": 33, "e": 7}
    watch = WatchSection(prompts=["a", "b", "c", "d", "e"], seed=3, steps=2, cfg=2.0)
    batch, level = RandomBatches().batch(0), torch.tensor([0.3, 0.9])

    def velocity() -> torch.Tensor:
        with torch.no_grad():
            return trained.model(batch.pixels, level, batch.captions)

    def pictures(ranks: Ranks, counted: list[int]) -> torch.Tensor:
        return montage.sample(
            model, lambda text: captions(words[text])[0], watch, 32, ranks, lambda done, _: counted.append(done)
        )

    before = velocity()
    with mock.patch.object(montage, "_BATCH_PIXELS", 2 * 32**2), trained.averaged() as model:
        shared: list[int] = []
        alone: list[int] = []
        ours, theirs = pictures(ranks, shared), pictures(Ranks(device=ranks.device), alone)
    assert torch.equal(ours, theirs) if ranks.first else len(ours) == 0
    assert len(alone) == 6 and len(shared) == 4, (alone, shared)
    assert torch.equal(velocity(), before), "averaged weights are still computed with"


def divergence(ranks: Ranks, name: str) -> None:
    """A number that is none in one process's data stops both before a weight changes."""

    class Broken:
        def batch(self, number: int) -> Batch:
            batch = batches_of(name, ranks).batch(number)
            if ranks.rank == 1:
                batch.pixels[0, 0, 0, 0] = float("nan")
            return batch

    trained = trainer(scene_config(name), ranks)
    before = [sharding.local(p.detach()).clone() for p in trained.parameters.values()]
    try:
        run(trained, Broken())
    except TrainingDiverged:
        after = [sharding.local(p.detach()) for p in trained.parameters.values()]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    else:
        raise AssertionError("the run went on")


def full_disk(folder: Path, ranks: Ranks, trained: Trainer, name: str) -> None:
    """A save that fails in the first process ends in both, and leaves the last one."""
    path = folder / f"{name}.safetensors"
    bytes_before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    try:
        with mock.patch.object(os, "fsync", full):
            trained.save(path)
    except CheckpointError as error:
        assert ranks.first and "disk" in str(error)
    except SystemExit:
        assert not ranks.first
    else:
        raise AssertionError("the save succeeded")
    if ranks.first:  # who goes on to write the next one
        assert path.read_bytes() == bytes_before
        assert not list(folder.glob("*.part"))
    trained.save(folder / f"{name}_again.safetensors")


def first_then_others(folder: Path, ranks: Ranks) -> None:
    """The others find what the first has made; of its mistakes they hear without repeating them."""
    made = folder / "made"

    def make() -> str:
        if not made.exists():
            assert ranks.first
            made.write_text("made", encoding="utf-8")
        return made.read_text(encoding="utf-8")

    assert ranks.first_then_others(make) == "made"

    def mistake() -> None:
        assert ranks.first
        raise ValueError("a mistake")

    try:
        ranks.first_then_others(mistake)
    except ValueError:
        assert ranks.first
    except SystemExit:
        assert not ranks.first
    else:
        raise AssertionError("it went on")


def main(folder: Path) -> None:
    names = (folder / "scenes").read_text(encoding="utf-8").split()
    # Waiting for the disk at every save would take most of the time.
    unflushed = mock.patch.object(os, "fsync", lambda _: None)
    # Elsewhere gloo notices no lost process before its time is up.
    timeout = timedelta(seconds=600 if sys.platform == "linux" else 90)
    with unflushed, parallel.process_group(timeout=timeout) as ranks:
        assert ranks.count == 2 and ranks.any(ranks.rank == 1) and not ranks.any(False)
        assert ranks.gather(ranks.rank) == [0, 1]
        first_then_others(folder, ranks)
        for name in names:
            trained = train(folder, name, ranks)
            if name in ("ddp", "fsdp"):
                averages(folder, name, ranks, trained)
                montages(ranks, trained)
                full_disk(folder, ranks, trained, name)
                resume(folder, name, ranks)
                divergence(ranks, name)
        (folder / f"done{ranks.rank}").write_text("done", encoding="utf-8")
        if ranks.rank == 1:
            os._exit(0)  # as a process ends that the system kills
        run(trainer(scene_config("ddp"), ranks), RandomBatches())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
