"""One training in a process of its own: python FILE SETTINGS prints, as JSON, its plan and the memory that it took.

SETTINGS is JSON: choices of the training, "size" in pixels, "device", and the model's "dim". Memory is, on the CPU, the
peak resident set beyond what the process held before the model was loaded, everything that torch loads on first use
included; on another device, what its allocator gave at most.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import tiny_models
import torch
from torch import Tensor

from comfyui_l2p.l2p_core.checkpoint import save
from comfyui_l2p.l2p_core.config import ModelConfig, PixelConfig
from comfyui_l2p.l2p_core.device import accelerator
from comfyui_l2p.l2p_core.device.process_memory import peak_memory
from comfyui_l2p.l2p_core.distributed.ranks import Ranks
from comfyui_l2p.l2p_core.memory import plan
from comfyui_l2p.l2p_core.memory.activations import Workload
from comfyui_l2p.l2p_core.model import key_shapes
from comfyui_l2p.l2p_core.training import loading as training_model
from comfyui_l2p.l2p_core.training.batch import Batch
from comfyui_l2p.l2p_core.training.trainer import Trainer
from comfyui_l2p.l2p_core.training_config import TrainingConfig
from comfyui_l2p.train.benchmark.process import forget_peak

TOKENS = 32


def model_of(dim: int) -> PixelConfig:
    """A model of this width."""
    return ModelConfig(
        dim=dim, head_dim=64, n_layers=10, n_refiner_layers=1, caption_dim=128, ffn_dim=3 * dim, t_freq_dim=64,
        t_hidden_dim=128, t_dim=128,
    ).with_head("1k", 0.5)  # fmt: skip


class OneBatch:
    """The same image and caption in every step."""

    def __init__(self, size: int, width: int):
        self.pixels = torch.rand(1, 3, size, size) * 2 - 1
        self.captions = [torch.randn(TOKENS, width)]

    def batch(self, number: int) -> Batch:
        return Batch(self.pixels, self.captions, [number], [None])


def weights(model: PixelConfig) -> dict[str, Tensor]:
    """Random ones of a model, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in key_shapes(model).items()
    }


def train(trainer: Trainer, size: int) -> None:
    for _ in trainer.run(OneBatch(size, trainer.model.config.caption_dim)):
        pass


def main(settings: dict[str, object]) -> None:
    size, device = int(str(settings.pop("size"))), torch.device(str(settings.pop("device", "cpu")))
    model = model_of(int(str(settings.pop("dim", 512))))
    config = TrainingConfig(steps=1, lr=1e-4, blocks=2, **settings)  # type: ignore[arg-type]
    train(Trainer(tiny_models.pixel_model(), config), 32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(weights(model), path)
        planned = plan.plan(model, config, Workload(1, size, size, TOKENS), device_type=device.type).device
        planned.pop("the GPU's driver", None)
        forget_peak()
        before = peak_memory()
        ranks = Ranks(device=device)
        train(Trainer(training_model.load(path, config, ranks), config, ranks=ranks), size)
        own = accelerator.has_own_memory(device.type)
        measured = accelerator.module(device).max_memory_allocated() if own else peak_memory() - before
    print(json.dumps({"planned": sum(planned.values()), "measured": measured, "parts": planned}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
