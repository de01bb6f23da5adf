"""Weights that come and go: the same image however little of an L2P MODEL the device may hold."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.sd
import golden_vectors as golden
import kit
import pytest
import torch

X = golden.array("x", (1, 3, 48, 64), 0)


def output(model: Any) -> torch.Tensor:
    return kit.velocity(model, X, 0.7, kit.caption()[0][0])


def with_lora(model: Any) -> Any:
    """Patched weights take another way than plain ones where they are not on the device."""
    dim = model.model.l2p.dim
    name = "diffusion_model.layers.0.attention.out"
    file = {f"{name}.lora_up.weight": golden.array("u", (dim, 2), 0, 0.1)}
    file[f"{name}.lora_down.weight"] = golden.array("d", (2, dim), 0, 0.1)
    return comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)[0]


@pytest.mark.parametrize("state", ["LOW_VRAM", "NO_VRAM"])
@pytest.mark.parametrize(("weight_dtype", "tolerance"), [("fp32", 1e-6), ("bf16", 1e-3), ("fp8_e4m3fn", 1e-3)])
@torch.inference_mode()
def check_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, weight_dtype: str, tolerance: float
) -> None:
    """--lowvram with half the model's size free, and --novram: the host takes the same steps as on a GPU."""
    model = with_lora(kit.model(tmp_path, weight_dtype=weight_dtype))
    expected = kit.ksample(model)
    management.unload_all_models()
    free = management.minimum_inference_memory() + model.model_size() // 2

    def free_memory(device: Any = None, torch_free_too: bool = False) -> Any:
        return (free, free) if torch_free_too else free

    monkeypatch.setattr(management, "vram_state", management.VRAMState[state])
    monkeypatch.setattr(management, "lowvram_available", True)
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "get_free_memory", free_memory)
    result = kit.ksample(model)
    assert model.model.model_lowvram
    assert model.model.model_loaded_weight_memory <= (model.model_size() / 2 if state == "LOW_VRAM" else 0)
    assert golden.relative_error(result, expected) < tolerance
    management.unload_all_models()


def check_partly_loaded_weights_are_cast_at_use(tmp_path: Path) -> None:
    """Only some weights are on the device, the others are brought for every use."""
    model = kit.model(tmp_path, weight_dtype="bf16")
    expected = output(model)
    management.unload_all_models()
    model.partially_unload(torch.device("cpu"), 1e12)
    model.load(torch.device("cpu"), lowvram_model_memory=10_000)
    with torch.inference_mode():
        features = kit.caption()[0][0]
        result = model.model.diffusion_model(
            X, torch.tensor([0.7]), context=features, num_tokens=features.shape[1], transformer_options={}
        )
    assert model.model.model_lowvram and model.model.model_loaded_weight_memory < model.model_size() / 2
    assert golden.relative_error(result, expected) < 1e-5


def check_unloading_and_loading_again(tmp_path: Path) -> None:
    model = kit.model(tmp_path)
    expected = output(model)
    management.unload_all_models()
    assert torch.equal(output(model), expected)


def check_a_dropped_model_frees_its_memory(tmp_path: Path) -> None:
    model = kit.model(tmp_path)
    kit.ksample(model, steps=1)
    network = weakref.ref(model.model.diffusion_model)
    management.unload_all_models()
    del model
    gc.collect()
    assert network() is None
