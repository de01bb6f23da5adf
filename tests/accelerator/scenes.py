"""What is shown on the simulated accelerator, in a process of its own, for it changes torch for the whole process:
python FILE prints what every scene found, as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models  # noqa: E402
from simulated import NAME, installed  # noqa: E402
from tiny_models import RandomBatches, pixel_model  # noqa: E402
from waits import Waits  # noqa: E402

installed()

from comfyui_l2p.l2p_core import delta, tiny  # noqa: E402
from comfyui_l2p.l2p_core.backbone import RMSNorm  # noqa: E402
from comfyui_l2p.l2p_core.checkpoint import open_checkpoint, save  # noqa: E402
from comfyui_l2p.l2p_core.device import accelerator  # noqa: E402
from comfyui_l2p.l2p_core.distributed.ranks import Ranks  # noqa: E402
from comfyui_l2p.l2p_core.memory import sampling_model  # noqa: E402
from comfyui_l2p.l2p_core.memory.block_stream import BlockStream  # noqa: E402
from comfyui_l2p.l2p_core.memory.placement import Form  # noqa: E402
from comfyui_l2p.l2p_core.memory.sampling_model import weight_memory  # noqa: E402
from comfyui_l2p.l2p_core.model import L2PModel  # noqa: E402
from comfyui_l2p.l2p_core.sources.next_dit import Block  # noqa: E402
from comfyui_l2p.l2p_core.tiny import bundled, shapes  # noqa: E402
from comfyui_l2p.l2p_core.training import loading as training_model  # noqa: E402
from comfyui_l2p.l2p_core.training.trainer import Trainer  # noqa: E402
from comfyui_l2p.l2p_core.training_config import TrainingConfig  # noqa: E402

DEVICE = torch.device(NAME, 0)
CPU = torch.device("cpu")
CONFIG = TrainingConfig(
    steps=3, lr=1e-3, blocks=1, ema_decay=0.5, caption_dropout=0.3, warmup_steps=2, precision="fp32",
    backbone_lr_scale=0.5,
)  # fmt: skip
UNCLIPPED: dict[str, Any] = {"clip_norm": 1e9}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"clip_norm": 0.3},
    "nothing twice": {"gradient_checkpointing": False},
    "streamed fp8, some blocks kept": {"frozen": "fp8", "stream": True, "keep_activations": 2},
    "stepped early": {"step_early": True, **UNCLIPPED},
    "offloaded and streamed": {"offload": True, "stream": True, **UNCLIPPED},
    "offloaded and streamed, two micro-batches": {"offload": True, "stream": True, "accumulate": 2, "clip_norm": 0.3},
    "all layers offloaded and streamed": {"policy": "all", "offload": True, "stream": True, **UNCLIPPED},
    "adapters": {"policy": "lora", "lora_rank": 3, "offload": True, "stream": True, **UNCLIPPED},
    "bf16": {"precision": "bf16", "offload": True, "stream": True, "frozen": "fp8", **UNCLIPPED},
}


def training() -> dict[str, Any]:
    """Of each way of training, losses on the CPU and on the accelerator, and the largest difference of weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save({name: weight.bfloat16() for name, weight in pixel_model().state_dict().items()}, path)
        found = {}
        for way, changes in WAYS.items():
            (here, ours), (there, theirs) = (trained(path, changes, device) for device in (CPU, DEVICE))
            difference = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
            found[way] = {"cpu": here, "accelerator": there, "difference": difference}
    return found


def trained(path: Path, changes: dict[str, Any], device: torch.device) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the weights and states that came of them."""
    config, ranks = dataclasses.replace(CONFIG, **changes), Ranks(device=device)
    trainer = Trainer(training_model.load(path, config, ranks), config, tiny_models.captions(1)[0], ranks=ranks)
    losses = [metrics.loss for metrics in trainer.run(RandomBatches())]
    return losses, {name: tensor.float().cpu() for name, tensor in trainer._weights.state().items()}


def mistakes() -> dict[str, str]:
    """What each of some mistakes that no CPU shows ends with here; "" if nothing said so."""
    return {name: _said(mistake) for name, mistake in MISTAKES.items()}


def _said(mistake: Callable[[], object]) -> str:
    try:
        mistake()
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return ""


def _mixed() -> None:
    torch.ones(2, 2, device=DEVICE) @ torch.ones(2, 2)


def _not_waited_for() -> None:
    gpu = accelerator.module(DEVICE)
    here, home = torch.zeros(4, device=DEVICE), torch.ones(4, pin_memory=True)
    side = gpu.Stream(DEVICE)
    side.wait_stream(gpu.current_stream())
    with gpu.stream(side):
        here.copy_(home, non_blocking=True)
    here.sum()


def _overwritten_in_use() -> None:
    gpu = accelerator.module(DEVICE)
    here, home = torch.zeros(4, device=DEVICE), torch.ones(4, pin_memory=True)
    here.sum()
    with gpu.stream(gpu.Stream(DEVICE)):
        here.copy_(home, non_blocking=True)


def _read_too_early() -> None:
    home = torch.zeros(4, pin_memory=True)
    home.copy_(torch.ones(4, device=DEVICE), non_blocking=True)
    assert bool(home.eq(1).all()), "the copy had not arrived"


def _too_much() -> None:
    torch.ops.simulated_accelerator.set_limit(torch.ops.simulated_accelerator.memory_allocated() + 1000)
    try:
        torch.empty(251, device=DEVICE)
    finally:
        torch.ops.simulated_accelerator.set_limit(2**62)


MISTAKES: dict[str, Callable[[], object]] = {
    "devices mixed": _mixed,
    "a copy not waited for": _not_waited_for,
    "memory overwritten in use": _overwritten_in_use,
    "a copy read too early": _read_too_early,
    "too much memory": _too_much,
}


def streaming() -> dict[str, bool]:
    """Blocks that are changed while they come to the device, read in both directions."""
    shapes = [[(torch.float32, torch.Size([64]))] for _ in range(5)]
    blocks = BlockStream(shapes, DEVICE)
    tensors = [blocks.tensor(number, 0) for number in range(5)]
    right = True
    for turn in range(3):
        for number in [*range(5), *reversed(range(5))]:
            tensors[number].fill(torch.full((64,), float(10 * turn + number)))
            read = tensors[number].read()
            right &= bool((read == 10 * turn + number).all())
            following = number + 1 if number < 4 else 3
            tensors[following].fill(torch.full((64,), -1.0))  # what is on its way
    return {"right": right}


def precision() -> dict[str, list[str]]:
    """The dtypes that come out of each kind of part of a model under bfloat16 autocast, and of gradients between."""
    model = pixel_model().to(DEVICE)
    found: dict[str, set[str]] = {}

    def watch(kind: str, tensor: Tensor) -> Tensor:
        found.setdefault(kind, set()).add(str(tensor.dtype))
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: found.setdefault(f"{kind}, gradient", set()).add(str(gradient.dtype)))
        return tensor

    for module in model.modules():
        if isinstance(module, (Block, RMSNorm)):
            kind = type(module).__name__
            module.register_forward_hook(lambda module, given, made, kind=kind: watch(kind, made))
    for stage in model.local_decoder.stages:
        # What a decoder stage's first convolution reads is the map that grew; what it makes is bfloat16 in any case.
        first = model.get_submodule(f"local_decoder.up{stage.name}.1")
        first.register_forward_pre_hook(lambda module, given: (watch("decoder stage", given[0]),))
    with torch.autocast(NAME, torch.bfloat16):
        pixels, sigma = torch.randn(2, 3, 32, 32), torch.tensor([0.5, 0.6])
        model(pixels.to(DEVICE), sigma.to(DEVICE), tiny_models.captions(3, 40)).sum().backward()
    return {kind: sorted(dtypes) for kind, dtypes in found.items()}


def waits() -> dict[str, list[int]]:
    """Of some ways of training, how often Python waits for the accelerator in a second and a third step."""
    ways: dict[str, dict[str, Any]] = {
        "four micro-batches": {"accumulate": 4},
        "stepped early": {"step_early": True},
        "offloaded and streamed": {"offload": True, "stream": True},
    }
    found = {}
    for way, changes in ways.items():
        config, ranks = dataclasses.replace(CONFIG, **changes), Ranks(device=DEVICE)
        trainer = Trainer(pixel_model().to(DEVICE), config, tiny_models.captions(1)[0], ranks=ranks)
        steps = trainer.run(RandomBatches())
        next(steps)
        found[way] = [_waits(steps) for _ in range(2)]
    return found


def _waits(steps: Iterator[object]) -> int:
    with Waits(NAME) as waits:
        next(steps)
    return waits.count


def sampling() -> dict[str, dict[str, float]]:
    """Of each form of a model's weights: bytes on the accelerator as planned, as loaded and at the peak of loading, and
    the largest difference from the CPU's velocity."""
    forms = {
        "whole": Form(torch.float32),
        "fp8": Form(torch.float32, float8=True),
        "streamed": Form(torch.float32, streamed=True),
        "streamed fp8": Form(torch.float32, float8=True, streamed=True),
    }
    gpu, found = accelerator.module(DEVICE), {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save({name: weight.bfloat16() for name, weight in pixel_model().state_dict().items()}, path)
        checkpoint = open_checkpoint(path)
        for name, form in forms.items():
            here = _velocity(sampling_model.load(checkpoint, form, CPU), CPU)
            before = gpu.memory_allocated()
            gpu.reset_peak_memory_stats()
            model = sampling_model.load(checkpoint, form, DEVICE)
            loaded, peak = gpu.memory_allocated() - before, gpu.max_memory_allocated() - before
            difference = float((_velocity(model, DEVICE) - here).abs().max())
            planned = weight_memory(checkpoint.pixel_config(), form)
            found[name] = {
                "planned": planned.device,
                "loaded": loaded,
                "planned peak": planned.device + planned.loading,
                "peak": peak,
                "difference": difference,
            }
            del model
    return found


def _velocity(model: L2PModel, device: torch.device) -> Tensor:
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        features = [caption.to(device) for caption in tiny_models.captions(5)]
        return model(pixels, torch.tensor([0.7], device=device), features).cpu()


def tiny_images() -> dict[str, float]:
    """The largest difference between images of the bundled pixel model there and on the CPU."""
    model, words = delta.load_model(bundled.DELTA, bundled.SOURCE, dtype=torch.float32).eval(), tiny.load_words()
    captions = shapes.evaluation_captions(2)
    here = bundled.pixel_images(model, words, captions, [1, 2], steps=2)
    there = bundled.pixel_images(model.to(DEVICE), words, captions, [1, 2], steps=2)
    return {"difference": float((there - here).abs().max())}


SCENES: dict[str, Callable[[], object]] = {
    "sampling": sampling,
    "tiny images": tiny_images,
    "training": training,
    "waits": waits,
    "streaming": streaming,
    "precision": precision,
    "mistakes": mistakes,  # last: what they leave behind must not be taken for the others'
}

if __name__ == "__main__":
    print(json.dumps({name: scene() for name, scene in SCENES.items()}), flush=True)
    # Python's own end aborts now and then: it cannot end a thread of torch's that waits for the interpreter meanwhile.
    os._exit(0)
