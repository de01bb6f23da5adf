"""The memory that L2P asks the host for is what it uses, within 30%, for every variant, size and tile."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import kit
import pytest
import torch
from peak import Peak

from comfyui_l2p.l2p_core.config import ModelConfig
from comfyui_l2p.l2p_core.memory import sampling_memory as memory
from comfyui_l2p.l2p_core.model import key_shapes
from comfyui_l2p.nodes.model import host
from comfyui_l2p.nodes.model.host import build_model

WIDE = ModelConfig(dim=768, head_dim=64, n_layers=1, n_refiner_layers=1, caption_dim=64, ffn_dim=2048, t_dim=256)
CAPTION = 32


def model(variant: str, **settings: Any) -> Any:
    """One block of a wide backbone with the published head."""
    config = WIDE.with_head(variant)
    weights = {key: torch.zeros(shape) for key, shape in key_shapes(config).items()}
    return build_model(weights, **{"weight_dtype": "fp32", **settings})


def used_by(patcher: Any, batch: int, height: int, width: int, caption: int = CAPTION) -> int:
    """Bytes that a forward pass takes."""
    comfy.model_management.load_models_gpu([patcher])
    pixels, features = torch.zeros(batch, 3, height, width), torch.zeros(batch, caption, WIDE.caption_dim)
    with torch.inference_mode(), Peak() as used:
        patcher.model.apply_model(
            pixels, torch.full((batch,), 0.5), c_crossattn=features, num_tokens=caption, transformer_options={}
        )
    return used.peak


def measure(
    variant: str, height: int, width: int, tile: int | None, batch: int, caption: int = CAPTION, dtype: str = "fp32"
) -> tuple[float, int]:
    """Bytes that the host is asked for, and that a forward pass took."""
    patcher = model(variant, head_tile=tile, weight_dtype=dtype)
    conds = {"c_crossattn": [[batch, caption, WIDE.caption_dim]]}
    estimate = patcher.model.memory_required([batch, 3, height, width], conds)
    return estimate, used_by(patcher, batch, height, width, caption)


def agree(estimate: float, used: int) -> None:
    assert 0.7 < estimate / used < 1.3, f"{estimate / 2**20:.0f} MiB asked for, {used / 2**20:.0f} MiB used"


@pytest.mark.parametrize(
    ("variant", "height", "width", "tile", "batch"),
    [
        ("1k", 256, 256, 0, 1),
        ("1k", 192, 320, 0, 2),
        ("1k", 512, 512, 128, 1),
        ("1k", 512, 512, None, 1),
        ("1k", 200, 333, 128, 3),
        ("4k", 512, 768, 0, 1),
        ("4k", 1024, 1024, 256, 1),
        ("4k", 700, 500, None, 2),
        ("8k", 512, 1024, 0, 1),
        ("8k", 1024, 1024, 256, 1),
        ("10k", 640, 960, 0, 1),
        ("10k", 640, 640, 320, 2),
        ("10k", 1280, 1280, 320, 1),
    ],
)
def check_estimates(variant: str, height: int, width: int, tile: int | None, batch: int) -> None:
    agree(*measure(variant, height, width, tile, batch))


def check_estimates_for_long_captions_and_other_precision() -> None:
    agree(*measure("1k", 256, 256, 0, 2, caption=500))
    # Small: a processor without bfloat16 takes minutes for more.
    agree(*measure("1k", 192, 192, 0, 1, dtype="bf16"))


@pytest.mark.parametrize(("variant", "side"), [("1k", 512), ("4k", 1024)])
def check_auto_takes_the_tile_that_little_memory_allows(
    variant: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little free, a step in auto tiles takes less than the whole would, and the head no more than is free."""
    whole = measure(variant, side, side, 0, 1)[1]
    free = 120 * 2**20

    def free_memory(device: Any = None, torch_free_too: bool = False) -> Any:
        return (free, free) if torch_free_too else free

    monkeypatch.setattr(comfy.model_management, "get_free_memory", free_memory)
    config = WIDE.with_head(variant)
    tile = memory.choose_tile(config, side, side, CAPTION, 4, free=free)
    assert tile is not None and memory.head_bytes(config, side, side, tile, 4) < free
    assert used_by(model(variant), 1, side, side) < 0.7 * whole


def check_auto_keeps_the_head_within_its_budget() -> None:
    config = ModelConfig().with_head("10k")
    for side in (10240, 5120):
        tile = memory.choose_tile(config, side, side, 512, 2)
        assert tile is not None
        budget = max(memory.MIN_HEAD_BUDGET, memory.backbone_bytes(config, side, side, 512, 2))
        assert memory.head_bytes(config, side, side, tile, 2) <= budget
    assert memory.choose_tile(ModelConfig().with_head("1k"), 1024, 1024, 512, 2) is None
    assert memory.choose_tile(ModelConfig().with_head("1k"), 1024, 1024, 512, 2, free=100 * 2**20) == 256


def check_auto_takes_the_memory_that_is_free() -> None:
    config, side = ModelConfig().with_head("10k"), 10240
    asked_for = memory.choose_tile(config, side, side, 512, 2)
    assert asked_for is not None
    # The whole image would pass what a GPU's convolutions count.
    assert memory.choose_tile(config, side, side, 512, 2, free=60 * 2**30) == 5120
    # Weights that come and go give way to what the host was asked for, and to no more.
    assert memory.choose_tile(config, side, side, 512, 2, free=60 * 2**30, spare=0) == asked_for


def check_a_step_counts_what_dynamic_vram_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU filled with 9 of a model's 12 GB, 1 GB is free: a step may drive out all, and has nothing to spare."""
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 1.0)
    patcher = SimpleNamespace(is_dynamic=lambda: True, loaded_size=lambda: 9, model_size=lambda: 12)
    assert host._memory_for_a_step(torch.device("cuda"), patcher) == (10, 0)
    patcher.model_size = lambda: 9
    assert host._memory_for_a_step(torch.device("cuda"), patcher) == (10, 1)
    patcher.is_dynamic = lambda: False
    assert host._memory_for_a_step(torch.device("cuda"), patcher) == (1, 1)
    assert host._memory_for_a_step(torch.device("cpu"), patcher) == (1, 0)


def check_numbers_for_the_published_models_are_sane() -> None:
    """In bfloat16, with auto tiles: what a user reads in the host's log."""
    for variant, side, at_most in (("1k", 1024, 2), ("4k", 4096, 4), ("8k", 8192, 6), ("10k", 10240, 8)):
        config = ModelConfig().with_head(variant)
        tile = memory.choose_tile(config, side, side, 512, 2)
        assert memory.step_bytes(config, side, side, 512, 2, tile=tile) < at_most * 2**30


def check_published_size_does_not_evict_other_models(tmp_path: Path) -> None:
    small = kit.model(tmp_path)
    assert small.model.memory_required([2, 3, 1024, 1024]) < 4 * 2**30
