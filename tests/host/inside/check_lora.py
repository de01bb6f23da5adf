"""LoRA files under every name they come with, and deltas with adapters, on an L2P MODEL."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.lora
import comfy.sd
import comfy.weight_adapter
import golden_vectors as golden
import kit
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from comfyui_l2p.l2p_core import delta
from comfyui_l2p.l2p_core.checkpoint import load_model
from comfyui_l2p.l2p_core.deltas import low_rank as lora
from comfyui_l2p.l2p_core.layouts import to_comfy
from comfyui_l2p.l2p_core.sources.next_dit import LAYERS
from comfyui_l2p.l2p_core.training.batch import Batch
from comfyui_l2p.l2p_core.training.trainer import Trainer
from comfyui_l2p.l2p_core.training_config import TrainingConfig
from comfyui_l2p.nodes.model.lora_names import L2PNames

X = golden.array("x", (1, 3, 48, 64), 0)


def output(model: Any) -> Tensor:
    return kit.velocity(model, X, 0.7, kit.caption()[0][0])


def with_weights(folder: Path, weights: dict[str, Tensor]) -> Any:
    path = folder / "changed.safetensors"
    kit.save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return kit.load_model(str(path), weight_dtype="fp32")


def low_rank(name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    up = golden.array(f"{name}.up", (shape[0], 2, *(1 for _ in shape[2:])), 0, 0.1)
    return up, golden.array(f"{name}.down", (2, *shape[1:]), 0, 0.1)


def patched(model: Any, file: dict[str, Tensor], caplog: pytest.LogCaptureFixture) -> tuple[Any, list[str]]:
    """The model with a LoRA file on it, and all that was logged meanwhile."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        result, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)
    return result, [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("prefix", ["transformer.", "lycoris_", "diffusion_model.", ""])
@pytest.mark.parametrize("name", ["dit_16", "dit_64"])
def check_diffusers_names_apply_in_full(
    tmp_path: Path, prefix: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    weights = to_comfy(golden.diffusers_weights(name))
    patch = {"dit_16": 16, "dit_64": 64}[name]
    parts = {
        f"all_x_embedder.{patch}-1": "x_embedder",
        "local_decoder.enc2.0": "local_decoder.enc2.0",
        "local_decoder.up1.1": "local_decoder.up1.1",
        "local_decoder.out_conv": "local_decoder.out_conv",
        "layers.1.feed_forward.w2": "layers.1.feed_forward.w2",
    }
    file: dict[str, Tensor] = {}
    for written, own in parts.items():
        up, down = low_rank(own, tuple(weights[f"{own}.weight"].shape))
        key = prefix + (written.replace(".", "_") if prefix == "lycoris_" else written)
        ends = ("lora_up", "lora_down") if prefix == "lycoris_" else ("lora_B", "lora_A")
        file |= {f"{key}.{ends[0]}.weight": up, f"{key}.{ends[1]}.weight": down, f"{key}.alpha": torch.tensor(1.0)}
        change = (up.flatten(1) @ down.flatten(1)).reshape(weights[f"{own}.weight"].shape)
        weights[f"{own}.weight"] += 0.5 * change
    model, logged = patched(kit.model(tmp_path, name), file, caplog)
    assert golden.relative_error(output(model), output(with_weights(tmp_path, weights))) < 1e-5
    assert not logged


PREFIXES = ("diffusion_model.", "transformer.", "lora_unet_", "lycoris_", "")
ENDS = {"kohya": ("lora_up", "lora_down"), "peft": ("lora_B", "lora_A")}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize(
    ("embedder", "final"),
    [
        ("x_embedder", "final_layer.linear"),
        ("x_embedder", "final_layer.adaLN_modulation.1"),
        ("all_x_embedder.2-1", "all_final_layer.2-1.linear"),
    ],
)
def check_the_latent_ends_are_left_out_in_one_line(
    tmp_path: Path, embedder: str, final: str, ends: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A Z-Image LoRA under every name it comes with: what fits applies, and the host reports nothing of its own."""
    model = kit.model(tmp_path)
    dim = model.model.l2p.dim
    weights = to_comfy(golden.diffusers_weights())
    up, down = low_rank("out", (dim, dim))
    weights["layers.0.attention.out.weight"] += up @ down
    expected = output(with_weights(tmp_path, weights))
    high, low = ENDS[ends]
    for prefix in PREFIXES:
        file = {
            "diffusion_model.layers.0.attention.out.lora_up.weight": up,
            "diffusion_model.layers.0.attention.out.lora_down.weight": down,
        }
        for name, (rows, columns) in {embedder: (dim, 64), final: (64, dim)}.items():
            key = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
            file |= {f"{key}.{high}.weight": torch.ones(rows, 2), f"{key}.{low}.weight": torch.ones(2, columns)}
            file[f"{key}.alpha"] = torch.tensor(2.0)
        on_it, logged = patched(model, file, caplog)
        assert logged == ["L2P: 1 weights patched; skipped, not being made for this model: final_layer, x_embedder"]
        assert torch.equal(output(on_it), expected)


def check_a_lora_of_another_variant_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = kit.model(tmp_path)
    before = output(model)
    up, down = low_rank("x", (model.model.l2p.dim, 64 * 64 * 3))
    file = {"all_x_embedder.64-1.lora_B.weight": up, "all_x_embedder.64-1.lora_A.weight": down}
    model, logged = patched(model, file, caplog)
    assert logged == ["L2P: 0 weights patched; skipped, not being made for this model: x_embedder"]
    assert torch.equal(output(model), before)


def check_bypassing_leaves_out_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """LoRAs beside the layers, whose weights stay as they are: of a latent source's file, with its embedder."""
    weights = to_comfy(golden.diffusers_weights())
    model = kit.model(tmp_path)
    shapes: dict[str, tuple[int, ...]] = {"x_embedder": (weights["x_embedder.weight"].shape[0], 64)}
    shapes |= {
        name: tuple(weights[f"{name}.weight"].shape) for name in ("layers.1.attention.out", "layers.1.feed_forward.w2")
    }
    file: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        up, down = low_rank(name, shape)
        file |= {f"diffusion_model.{name}.lora_B.weight": up, f"diffusion_model.{name}.lora_A.weight": down}
    bypassed, _ = comfy.sd.load_bypass_lora_for_models(model, None, file, 1.0, 0.0)
    with caplog.at_level(logging.INFO):
        found = output(bypassed)
    assert "L2P: 2 weights patched; skipped, not being made for this model: x_embedder" in caplog.messages
    expected = output(patched(model, file, caplog)[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, output(model))


def check_hooks_leave_out_the_same(tmp_path: Path) -> None:
    model = kit.model(tmp_path).clone()
    dim = model.model.l2p.dim
    up, down = low_rank("x", (dim, 64))
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    file = {"diffusion_model.x_embedder.lora_up.weight": up, "diffusion_model.x_embedder.lora_down.weight": down}
    hook = comfy.hooks.WeightHook()
    assert model.add_hook_patches(hook, comfy.lora.load_lora(file, names)) == ["diffusion_model.x_embedder.weight"]
    assert not model.hook_patches[hook.hook_ref]


def check_the_format_is_added_once_and_answers_to_l2p_names_only(tmp_path: Path) -> None:
    for _ in range(2):
        kit.model(tmp_path)
    assert comfy.weight_adapter.adapters.count(L2PNames) == 1
    file = {"transformer.layers.0.lora_B.weight": torch.ones(2, 2), "final_layer.lora_A.weight": torch.ones(2, 2)}
    for name in ("diffusion_model.layers.0", "layers.0", "diffusion_model.x_embedder", "lora_unet_x_embedder"):
        assert L2PNames.load(name, file, None, None, set()) is None


class OneBatch:
    """Four times the same image."""

    def batch(self, number: int) -> Batch:
        pixels = golden.array("train", (1, 3, 64, 64), 0).tanh()
        return Batch(pixels, [golden.array("words", (5, kit.CAPTION_DIM), 0)], [number], [None])


def trained(folder: Path, dtype: torch.dtype) -> tuple[Trainer, str, Path]:
    """A short run of the policy "lora", its base and its delta."""
    base = folder / "base.safetensors"
    weights = to_comfy(golden.diffusers_weights())
    kit.save_file({key: value.to(dtype).contiguous() for key, value in weights.items()}, base)
    config = TrainingConfig(
        steps=4, lr=2e-3, policy="lora", blocks=0, lora_rank=4, lora_alpha=8.0, precision="fp32",
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = Trainer(load_model(base, dtype=torch.float32), config)
    for _ in trainer.run(OneBatch()):
        pass
    delta.save(trainer.trained(), base, folder / "delta.safetensors")
    return trainer, str(base), folder / "delta.safetensors"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def check_the_loader_reads_full_tensors_and_adapters(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    """On a bfloat16 base adapted weights are rounded to bfloat16, as merging them does."""
    trainer, base, file = trained(tmp_path, dtype)
    model = kit.load_model(base, str(file), weight_dtype="fp32")
    state = model.model.diffusion_model.state_dict()
    for name, value in trainer.trained().items():
        if not lora.is_adapter(name):
            assert torch.equal(state[name], value), name
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(X, torch.tensor([0.7]), [kit.caption()[0][0][0]])
    before = output(kit.load_model(base, weight_dtype="fp32"))
    assert golden.relative_error(before, expected) > 0.05
    assert golden.relative_error(output(model), expected) < tolerance
    delta.merge(file, base, tmp_path / "merged.safetensors")
    merged = kit.load_model(str(tmp_path / "merged.safetensors"), weight_dtype="fp32")
    assert torch.equal(output(model), output(merged))


def check_the_hosts_lora_loader_reads_the_adapters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On the model whose other tensors are the trained ones already, they complete it."""
    trainer, base, file = trained(tmp_path, torch.float32)
    full = {name: value for name, value in trainer.trained().items() if not lora.is_adapter(name)}
    partly = with_weights(tmp_path, load_file(base) | full)
    count = len(lora.adapted_layers(trainer.model.config, full))
    assert count == len(LAYERS.linears) * trainer.model.config.n_layers
    model, logged = patched(partly, load_file(file), caplog)
    assert logged == [
        f"L2P: {count} weights patched; skipped, {len(full)} whole tensors of a delta, which belongs in L2P "
        "Loader's delta input"
    ]
    complete = output(kit.load_model(base, str(file), weight_dtype="fp32"))
    assert golden.relative_error(output(partly), complete) > 1e-3
    assert golden.relative_error(output(model), complete) < 1e-5
