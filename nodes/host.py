"""L2P as a MODEL of the host: what ComfyUI needs to know of a diffusion model, and nothing of files or nodes.

The host's own detection takes L2P keys for the latent Z-Image, so nothing here goes through it; otherwise the steps
are those of `load_diffusion_model_state_dict` in comfy/sd.py.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ..l2p_core.config import VARIANTS, ModelConfig
from ..l2p_core.sampling_memory import choose_tile, step_bytes
from . import lora_names
from .limits import check_memory, check_pixels
from .lora import FittingPatches
from .network import L2PNextDiT

PREVIEW_PIXELS = 512

WEIGHT_DTYPES = {"default": None, "bf16": torch.bfloat16, "fp32": torch.float32, "fp8_e4m3fn": None}
"""What a user can choose weights to be kept in; fp8 concerns the backbone's linear layers only."""

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


class PixelFormat(comfy.latent_formats.LatentFormat):
    """The LATENT of a pixel model: RGB in [-1, 1], (B, 3, H, W), as large as the image."""

    latent_channels = 3
    spacial_downscale_ratio = 1

    def __init__(self) -> None:
        self.latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
        # An attribute, not a method: the host calls it with the latent alone.
        self.latent_rgb_factors_reshape = shrink_for_preview


def shrink_for_preview(pixels: Tensor) -> Tensor:
    """The first image of a batch, averaged down to about 512 pixels: at 10K a full preview is 300 MiB a step."""
    factor = max(1, max(pixels.shape[-2:]) // PREVIEW_PIXELS)
    return F.avg_pool2d(pixels[:1].float(), factor, ceil_mode=True)


class L2PModelConfig(comfy.supported_models.ZImage):
    """The host's configuration object for one L2P checkpoint; ZImage for its text-encoder and key prefixes."""

    latent_format = PixelFormat
    supported_inference_dtypes = [torch.bfloat16, torch.float32]

    def __init__(self, config: ModelConfig, head_tile: int | None):
        assert config.variant is not None
        super().__init__(
            {
                "image_model": "l2p",
                "l2p": config,
                "head_tile": head_tile,
                # Read by the host's LoRA key map (comfy/lora.py, z_image_to_diffusers).
                "dim": config.dim,
                "n_layers": config.n_layers,
                "n_refiner_layers": config.n_refiner_layers,
            }
        )
        # A multiplier of 1 hands the network sigma itself; ModelSamplingAuraFlow keeps it.
        self.sampling_settings = {"multiplier": 1.0, "shift": VARIANTS[config.variant].shift}

    def get_model(self, state_dict: Mapping[str, Tensor], prefix: str = "", device: Any = None) -> L2PBaseModel:
        return L2PBaseModel(self, device=device)


class L2PBaseModel(comfy.model_base.Lumina2):
    """The host's model object. A Lumina2, because the host's Z-Image LoRA key map asks for one."""

    def __init__(self, model_config: L2PModelConfig, device: Any = None):
        comfy.model_base.BaseModel.__init__(
            self, model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=L2PNextDiT
        )
        self.memory_usage_factor_conds = ()

    @property
    def l2p(self) -> ModelConfig:
        """The sizes of this model."""
        return self.diffusion_model.l2p

    def process_timestep(self, timestep: Tensor, **_: Any) -> Tensor:
        """Sigma in [0, 1], whatever scale a sampling node (ModelSamplingSD3: 1000) has put it on."""
        return timestep / self.model_sampling.multiplier

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, list[int]]:
        """The caption's shape, under the name that `memory_required` reads."""
        caption = kwargs.get("cross_attn")
        return {} if caption is None else {"c_crossattn": list(caption.shape)}

    def memory_required(
        self, input_shape: Iterable[int], cond_shapes: Mapping[str, list[list[int]]] | None = None
    ) -> float:
        """Bytes a forward pass of (B, 3, H, W) needs beside the weights, see `memory`."""
        batch, _, height, width = input_shape
        caption = max((shape[1] for shape in (cond_shapes or {}).get("c_crossattn", [])), default=0)
        itemsize = comfy.model_management.dtype_size(self.get_dtype_inference())
        tile = self.diffusion_model.head_tile
        if tile is None:
            tile = choose_tile(self.l2p, height, width, caption, itemsize, batch)
        return step_bytes(
            self.l2p, height, width, caption, itemsize, batch, tile or None, fused_attention=_fused_attention()
        )


def _fused_attention() -> bool:
    """Whether the host's attention never holds its scores."""
    return comfy.model_management.pytorch_attention_enabled() or comfy.model_management.xformers_enabled()


@functools.cache
def _patcher_class(base: type) -> type:
    """The host's patcher (which one is decided when the host starts) that leaves out what does not fit."""
    return type("L2PModelPatcher", (FittingPatches, base), {})


def build_model(
    state: dict[str, Tensor],
    metadata: dict[str, str] | None,
    config: ModelConfig,
    *,
    weight_dtype: str = "default",
    head_tile: int | None = None,
    disable_dynamic: bool = False,
) -> Any:
    """Put an L2P state dict (ComfyUI layout, no prefix) into a ModelPatcher. Takes the tensors out of `state`."""
    lora_names.make_known()
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    model_config = L2PModelConfig(config, head_tile)
    if weight_dtype == "fp8_e4m3fn" or (weight_dtype == "default" and _host_takes_fp8(state, model_config)):
        quantise_backbone(state)
    state, metadata = comfy.utils.convert_old_quants(state, "", metadata=metadata)
    model_config.quant_config = comfy.utils.detect_layer_quantization(state, "") or None
    supported = model_config.supported_inference_dtypes
    quantised = model_config.quant_config is not None
    dtype = WEIGHT_DTYPES[weight_dtype] or comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=supported,
        weight_dtype=None if quantised else comfy.utils.weight_dtype(state),
    )
    if dtype.itemsize == 1:
        # By the host's flag; the linear layers are quantised already, and nothing else may be.
        dtype = torch.bfloat16
    cast = comfy.model_management.unet_manual_cast(None if quantised else dtype, load_device, supported)
    model_config.set_inference_dtype(dtype, cast)

    model = model_config.get_model(state)
    on_cpu = comfy.model_management.is_device_cpu(load_device)
    # Given a CPU, the host's dynamic patcher turns itself into a plain one, which a subclass could not follow.
    plain = disable_dynamic or on_cpu
    base = comfy.model_patcher.ModelPatcher if plain else comfy.model_patcher.CoreModelPatcher
    patcher = _patcher_class(base)(model, load_device=load_device, offload_device=offload_device)
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "l2p", _before_sampling)
    logging.info("L2P: %s model, patch %d, %d blocks", config.variant, config.patch_size, config.n_layers)
    return patcher


def _host_takes_fp8(state: dict[str, Tensor], model_config: L2PModelConfig) -> bool:
    """Whether the host would keep all weights in 8 bits, the head's too: by its flag, or as the file has most of them.

    Not for files that are quantised layer by layer, which stay as they are.
    """
    if comfy.utils.detect_layer_quantization(state, "") or "scaled_fp8" in state:
        return False
    dtype: torch.dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=model_config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(state),
    )
    return dtype.itemsize == 1


def _before_sampling(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wraps the host's sampling: refuses what cannot be sampled, and brings areas of conditioning to pixels.

    Areas come in eighths of a pixel's size, whatever the model.
    """
    guider = executor.class_obj
    check_pixels(noise.shape)
    check_memory(guider.model_patcher, noise.shape[0], *noise.shape[2:])
    for conds in guider.conds.values():
        for cond in conds:
            area = cond.get("area")
            if area is not None and area[0] != "percentage":
                cond["area"] = tuple(8 * value for value in area)
    return executor(noise, *args, **kwargs)


def quantise_backbone(state: dict[str, Tensor]) -> None:
    """Turn the linear layers of all blocks into the host's scaled fp8 format, in place.

    The head, embedders, norms and modulation keep their precision: 8-bit convolutions show as bands in the image,
    and the rest is small. Weights are dequantised for the product (`full_precision_matrix_mult`).
    """
    layer_format = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()
    for key in [key for key in state if is_backbone_linear(key)]:
        layer = key.removesuffix(".weight")
        if f"{layer}.comfy_quant" in state or not state[key].dtype.is_floating_point:
            continue
        weight = state[key]
        scale = torch.ones(())
        if weight.dtype != torch.float8_e4m3fn:
            scale = (weight.float().abs().amax() / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
            state[key] = (weight.float() / scale).to(torch.float8_e4m3fn)
        state[f"{layer}.weight_scale"] = scale
        state[f"{layer}.comfy_quant"] = torch.tensor(list(layer_format), dtype=torch.uint8)


def is_backbone_linear(key: str) -> bool:
    """Whether a key is the weight of a linear layer in a block's attention or feed-forward."""
    block = key.startswith(("layers.", "noise_refiner.", "context_refiner."))
    return block and key.endswith((".qkv.weight", ".out.weight", ".w1.weight", ".w2.weight", ".w3.weight"))
