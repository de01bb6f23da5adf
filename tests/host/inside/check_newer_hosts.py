"""What hosts newer than the tested one ask and bring, by stand-ins for their classes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import comfy
import comfy.model_management
import comfy.model_patcher
import kit
import pytest
import torch

from comfyui_l2p.nodes.model import limits
from comfyui_l2p.nodes.model.lora import FittingPatches
from comfyui_l2p.nodes.model.weights import disk_speed

LAYER = "diffusion_model.layers.0.attention.qkv"
CPU = torch.device("cpu")


def check_memory_required_takes_further_keywords(tmp_path: Path) -> None:
    model = kit.model(tmp_path).model
    shape = [2, 3, 64, 64]
    assert model.memory_required(shape, cond_shapes={}, of_a_newer_host=1) == model.memory_required(shape)


class Patcher:
    """A host's patcher that keeps whatever patches it is given."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(state_dict=lambda: {f"{LAYER}.weight": torch.zeros(6, 2)})
        self.taken: dict[Any, Any] = {}

    def add_patches(self, patches: dict[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        self.taken |= patches
        return list(patches)

    def add_hook_patches(
        self, hook: Any, patches: dict[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> Any:
        return self.add_patches(patches)


class Fitting(FittingPatches, Patcher):
    pass


def check_patches_that_set_how_a_layer_computes_pass() -> None:
    """Unlike those of weights that the model does not have, or has in another shape."""
    config = {LAYER: ("config", {"precision": "fp8"}), "diffusion_model.gone": ("config", {})}
    weights = {
        f"{LAYER}.weight": ("diff", (torch.zeros(6, 3),)),
        "diffusion_model.gone.weight": ("diff", (torch.zeros(6, 2),)),
    }
    plain, hooked = Fitting(), Fitting()
    plain.add_patches(config | weights)
    hooked.add_hook_patches(object(), config | weights)
    assert plain.taken == hooked.taken == config


def check_free_memory_is_asked_of_the_patcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows what gives way to a step; patchers of older hosts cannot be asked."""
    needs = SimpleNamespace(memory_required=lambda shape: 1000.0)

    def patcher(free: float) -> Any:
        return SimpleNamespace(load_device=CPU, model=needs, get_free_memory=lambda device: free)

    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 0.0)
    limits.check_memory(patcher(free=2**30), 1, 8, 8)
    with pytest.raises(ValueError, match="choose a smaller size or batch"):
        limits.check_memory(SimpleNamespace(load_device=CPU, model=needs), 1, 8, 8)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: float(2**30))
    with pytest.raises(ValueError, match="choose a smaller size or batch"):
        limits.check_memory(patcher(free=0.0), 1, 8, 8)


def check_patchers_are_told_of_a_fast_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Newer(comfy.model_patcher.CoreModelPatcher):
        def __init__(self, *args: Any, fast_disk: Any = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            told.append(fast_disk)

    storage: Any = ModuleType("comfy.storage")
    storage.state_dict_fast_disk = lambda state: "layers.0.attention.qkv.weight" in state
    monkeypatch.setitem(sys.modules, "comfy.storage", storage)
    monkeypatch.setattr(comfy, "storage", storage, raising=False)
    assert disk_speed(comfy.model_patcher.ModelPatcher, {}) == {}
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Newer)
    kit.model(tmp_path)
    assert told == [True]
