"""`l2p benchmark train`: a scaled model trained our way and the plain way (see `plain_trainer`), in one run.

All ways train the same initialisation on the same images, captions, noise levels and noise, each in its own process.
For timing, all processes exist at once and alternate step by step, so that a change in the machine's speed affects all
of them, and each step is compared with the plain one of the same turn. Memory is measured in separate runs of a few
steps, in which freed memory is returned to the system at once: the process's peak beyond what it held after training
something small, and on a GPU the allocator's peak. Without a GPU there is one memory; the tensors that would stay in
RAM throughout are then subtracted to get the device's share. The loss is the mean over the last half of the steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...l2p_core.checkpoint import load_model, load_tensors, save
from ...l2p_core.config import ModelConfig, PixelConfig
from ...l2p_core.dataset.images import to_uint8
from ...l2p_core.device import accelerator
from ...l2p_core.device.process_memory import peak_memory
from ...l2p_core.distributed.ranks import Ranks
from ...l2p_core.files.atomic import write_bytes
from ...l2p_core.files.tensor_file import save as save_tensors
from ...l2p_core.files.units import bytes_text
from ...l2p_core.model import L2PModel
from ...l2p_core.tiny.image_set import Batches, ImageSet, caption_of, rendered
from ...l2p_core.training import loading as training_model
from ...l2p_core.training.trainer import Trainer, check_possible
from ...l2p_core.training_config import TrainingConfig
from ..console import count_text, table
from .plain_trainer import SHARE, StandIn, tokens, train_plainly
from .process import FREED_AT_ONCE, Stepped, forget_peak, run_module

PLAIN = "plain"
_SMALL: dict[str, Any] = {"frozen": "fp8", "step_early": True}
_LEFT: dict[str, Any] = {"stream": True, "offload": True}
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, no checkpointing": {"gradient_checkpointing": False},
    "ours, fp8, early steps": _SMALL,
    "ours, the same, 8-bit moments": {**_SMALL, "optimiser_bits": 8},
    "ours, offloaded, streamed": _LEFT,
    "ours, the same, no checkpointing": {**_LEFT, "gradient_checkpointing": False},
}
"""Settings of the training beside those that all ways share."""

BLOCKS = 2
WARM_UP = 2  # steps that are not timed
HELD = 4  # steps of a run for memory: everything is allocated after the second
IMAGES = 64


@dataclasses.dataclass(frozen=True)
class TrainingScale:
    """The sizes of the benchmark."""

    model: PixelConfig
    side: int
    batch: int
    steps: int


_FULL = TrainingScale(
    ModelConfig(dim=384, head_dim=64, n_layers=12, ffn_dim=1024, caption_dim=384, t_hidden_dim=384).with_head(
        "1k", head_width=0.125
    ),
    side=320,
    batch=1,
    steps=32,
)
_QUICK = TrainingScale(
    ModelConfig(
        dim=64, head_dim=16, n_layers=4, n_refiner_layers=1, ffn_dim=128, caption_dim=64, t_hidden_dim=64
    ).with_head("1k", head_width=0.125),
    side=64,
    batch=2,
    steps=4,
)


def benchmark_train(
    quick: bool = False, precision: str | None = None, device: str | None = None, json_file: Path | None = None
) -> None:
    """Measure every way, print a table, and write the results to `json_file` if one is given.

    Args:
        quick: small sizes, to check that it runs.
        precision: "bf16" or "fp32"; None selects bf16 on a GPU and on processors that compute in it.
        device: to train on, such as "cpu" or "cuda"; None selects a GPU if there is one.
        json_file: see above.
    """
    device = accelerator.default_device().type if device is None else str(accelerator.named(device))
    in_bf16 = accelerator.has_own_memory(device) or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    precision = precision or ("bf16" if in_bf16 else "fp32")
    scale = _QUICK if quick else _FULL
    with tempfile.TemporaryDirectory(prefix="l2p-benchmark-") as name:
        folder = Path(name)
        count = prepare(folder, scale)
        ways = [PLAIN, *(way for way, choices in OURS.items() if _is_possible(choices, device))]
        arguments = (str(folder), precision, device, *(["--quick"] if quick else []))
        held = {way: run_module(__name__, way, *arguments, env=FREED_AT_ONCE) for way in ways}
        taken = in_turns(ways, arguments, scale.steps)
    results = {
        "quick": quick,
        "precision": precision,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": count,
        "side": scale.side,
        "batch": scale.batch,
        "steps": scale.steps,
        "ways": {way: {**held[way], **taken[way]} for way in ways},
    }
    print(report(results))
    if json_file:
        write_bytes(json_file, (json.dumps(results, indent=1) + "\n").encode())


def prepare(folder: Path, scale: TrainingScale) -> int:
    """Write the initialisation and the cached caption features; returns the model's number of parameters."""
    torch.manual_seed(0)
    model = L2PModel(scale.model)
    save(model.state_dict(), folder / "init.safetensors")
    count = sum(parameter.numel() for parameter in model.parameters())
    encoder = StandIn(scale.model.caption_dim, round(SHARE * count))
    captions = sorted({caption_of(number) for number in range(IMAGES)})
    features = {str(i): encoder(tokens(caption)) for i, caption in enumerate(captions)}
    save_tensors(features, folder / "captions.safetensors", {"captions": json.dumps(captions)})
    return count


def images_of(scale: TrainingScale) -> ImageSet:
    """Clean renderings, enlarged."""
    captions = [caption_of(number) for number in range(IMAGES)]
    pixels = F.interpolate(rendered(captions, range(IMAGES)), (scale.side, scale.side), mode="bilinear")
    return ImageSet(to_uint8(pixels), captions, list(range(IMAGES)))


def in_turns(ways: list[str], arguments: tuple[str, ...], steps: int) -> dict[str, dict[str, list[float]]]:
    """The `seconds` of each way's steps, without warm-up, and the `losses` of all steps."""
    with ExitStack() as running:
        trained = {way: running.enter_context(Stepped(__name__, way, *arguments, "--in-turns")) for way in ways}
        turns = [{way: trained[way].step() for way in ways} for _ in range(steps)]
    return {
        way: {
            "seconds": [turn[way]["seconds"] for turn in turns[WARM_UP:]],
            "losses": [turn[way]["loss"] for turn in turns],
        }
        for way in ways
    }


def take_turns(way: str, folder: Path, precision: str, device: torch.device, scale: TrainingScale) -> None:
    """Train one way in this process, one step per line of standard input; see `process.Stepped`."""
    steps = _steps(way, folder, precision, device, scale)
    for _ in sys.stdin:
        started = time.perf_counter()
        loss, _left = next(steps)
        if accelerator.has_own_memory(device.type):
            accelerator.module(device).synchronize()  # the next turn belongs to another way
        print(json.dumps({"seconds": time.perf_counter() - started, "loss": loss}), flush=True)


def measure(way: str, folder: Path, precision: str, device: torch.device, scale: TrainingScale) -> dict[str, int]:
    """Train one way in this process for a few steps: the `memory` of the process and that of the `device`, or its share
    on a GPU, in bytes."""
    with tempfile.TemporaryDirectory(dir=folder) as small:  # which goes even if this process is killed
        # torch imports hundreds of megabytes on first use in any training: not counted.
        prepare(Path(small), _QUICK)
        list(_steps(way, Path(small), precision, device, _QUICK))
    gpu = accelerator.module(device) if accelerator.has_own_memory(device.type) else None
    forget_peak()
    if gpu:
        gpu.reset_peak_memory_stats(device)
    before = peak_memory()
    steps = list(_steps(way, folder, precision, device, dataclasses.replace(scale, steps=HELD)))
    memory = peak_memory() - before
    return {"memory": memory, "device": gpu.max_memory_allocated(device) if gpu else memory - steps[-1][1]}


def _steps(
    way: str, folder: Path, precision: str, device: torch.device, scale: TrainingScale
) -> Iterator[tuple[float, int]]:
    """The loss of each step, and the bytes that a GPU would leave in RAM."""
    config = TrainingConfig(
        steps=scale.steps, lr=2e-4, blocks=BLOCKS, precision=precision, noise="fresh", clip_norm=1e9
    )
    run = _plain if way == PLAIN else _ours
    yield from run(way, folder, config, device, scale, images_of(scale))


def _plain(
    way: str, folder: Path, config: TrainingConfig, device: torch.device, scale: TrainingScale, images: ImageSet
) -> Iterator[tuple[float, int]]:
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = load_model(folder / "init.safetensors", dtype).to(device)
    encoder = StandIn(scale.model.caption_dim, round(SHARE * sum(p.numel() for p in model.parameters())))
    encoder.to(device, dtype)
    for loss in train_plainly(model, encoder, Batches(images, tokens, scale.batch, seed=0), config):
        yield loss, 0


def _ours(
    way: str, folder: Path, config: TrainingConfig, device: torch.device, scale: TrainingScale, images: ImageSet
) -> Iterator[tuple[float, int]]:
    config = dataclasses.replace(config, **OURS[way])
    ranks = Ranks(device=device)
    features, metadata = load_tensors(folder / "captions.safetensors")
    by_caption = {caption: features[str(i)] for i, caption in enumerate(json.loads(metadata["captions"]))}
    model = training_model.load(folder / "init.safetensors", config, ranks)
    batches = Batches(images, by_caption.__getitem__, scale.batch, seed=0)
    trainer = Trainer(model, config, ranks=ranks)
    for step in trainer.run(batches):
        yield step.loss, trainer.bytes_in_ram


def _is_possible(choices: dict[str, Any], device: str) -> bool:
    with suppress(ValueError):
        check_possible(TrainingConfig(**choices), Ranks(device=torch.device(device)))
        return True
    return False


def report(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    ways, plain = results["ways"], results["ways"][PLAIN]
    rows = []
    for way, found in ways.items():
        ratios = [ours / theirs for ours, theirs in zip(found["seconds"], plain["seconds"], strict=True)]
        rows.append(
            [
                way,
                f"{statistics.median(found['seconds']):.2f} s",
                f"{statistics.median(ratios):.2f}",
                "{:.2f} to {:.2f}".format(*_middle_half(ratios)),
                bytes_text(found["memory"]),
                bytes_text(found["device"]),
                f"{found['device'] / plain['device']:.2f}",
                f"{statistics.mean(found['losses'][len(found['losses']) // 2 :]):.4f}",
            ]
        )
    first = (
        f"{count_text(results['parameters'])} parameters, {results['side']} px, {results['batch']} images per step, "
        f"{results['steps']} steps, {results['precision']}, {results['device']}, {results['threads']} threads, torch "
        f"{results['torch']}" + (" (quick check, small sizes)" if results["quick"] else "")
    )
    header = [
        "way of training",
        "a step",
        "ratio",
        "half of its steps",
        "peak memory of the process",
        "of the device",
        "ratio",
        "loss, last half",
    ]
    return f"{first}\n\n{table(header, rows)}"


def _middle_half(values: list[float]) -> tuple[float, float]:
    """The quartiles that the middle half of some values lies between."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def main() -> None:
    """Train one way in this process: prints its memory as JSON, or the time of each step on request."""
    parser = argparse.ArgumentParser(description="One way of training, for its time and peak memory.")
    parser.add_argument("way", choices=[PLAIN, *OURS])
    parser.add_argument("folder", type=Path, help="written by `prepare`")
    parser.add_argument("precision", choices=["bf16", "fp32"])
    parser.add_argument("device", type=torch.device)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--in-turns", action="store_true", help="one step per line of standard input")
    args = parser.parse_args()
    scale = _QUICK if args.quick else _FULL
    if args.in_turns:
        take_turns(args.way, args.folder, args.precision, args.device, scale)
    else:
        print(json.dumps(measure(args.way, args.folder, args.precision, args.device, scale)))


if __name__ == "__main__":
    main()
