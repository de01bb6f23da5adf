"""L2P as a MODEL of the host: everything that ComfyUI needs to know about a diffusion model, independent of files and
nodes.

The host builds a model of a state dict by a row of its list of supported models. Ours, `L2PModelConfig`, serves both
the host's own loaders, in whose list `stock` puts it, and `build_model`, whose steps are those of
`load_diffusion_model_state_dict` in comfy/sd.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ...l2p_core.config import PixelConfig
from ...l2p_core.device.accelerator import has_own_memory
from ...l2p_core.memory.sampling_memory import choose_tile, step_bytes
from ...l2p_core.sources import sampling_of
from ..messages.errors import plain_errors
from ..options import WEIGHT_DTYPES
from . import lora_names
from .fp8 import quantise_backbone
from .host_rows import HOST_ROWS
from .limits import check_caption, check_pixels, free_memory
from .network import TILE_OPTION, L2PNextDiT
from .patcher import adopt, patchers_of
from .quantised import mark_unmarked
from .stock import L2PRow
from .weights import disk_speed, sizes, taken_out

PREVIEW_PIXELS = 512


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


class L2PModelConfig(L2PRow):
    """The host's configuration of an L2P checkpoint; a ZImage for its key prefixes, which its family shares."""

    latent_format = PixelFormat
    supported_inference_dtypes = [torch.bfloat16, torch.float32]
    quant_config: dict[str, Any] | None = None
    asked_for_8_bits = False

    def __init__(self, unet_config: Mapping[str, Any] | None = None, head_tile: int | None = None):
        # The sizes that the host detects are the latent model's: `get_model` reads L2P's from the weights.
        super().__init__({"image_model": "l2p", "head_tile": head_tile})

    def set_inference_dtype(self, dtype: torch.dtype, manual_cast_dtype: torch.dtype | None, **_: Any) -> None:
        """As the host's, except that 8 bits, which it would use for all weights, are left to `get_model`."""
        self.asked_for_8_bits = dtype.itemsize == 1
        self.unet_config["dtype"], self.manual_cast_dtype = dtype, manual_cast_dtype

    @plain_errors()
    def get_model(self, state_dict: dict[str, Tensor], prefix: str = "", device: Any = None) -> L2PBaseModel:
        """The model for these weights, without them; `state_dict` is converted to its key names, in place.

        Raises:
            ValueError: if weights are missing, as they are from a delta.
        """
        lora_names.make_known()
        weights = taken_out(state_dict, prefix)
        mark_unmarked(weights)
        if self.quant_config is None and comfy.utils.detect_layer_quantization(weights, ""):
            self._compute_quantised(weights)
        config = sizes(weights)
        if self.asked_for_8_bits and self.custom_operations is None:
            self._keep_the_head_out_of_8_bits(weights)
        state_dict.update({prefix + name: weight for name, weight in weights.items()})
        # `dim` and `n_layers` are read by the host's LoRA key map (comfy/lora.py, z_image_to_diffusers).
        self.unet_config |= {
            "l2p": config,
            "dim": config.dim,
            "n_layers": config.n_layers,
            "n_refiner_layers": config.n_refiner_layers,
        }
        # A multiplier of 1 hands the network sigma itself; ModelSamplingAuraFlow keeps it.
        self.sampling_settings = {"multiplier": 1.0, "shift": sampling_of(config).shift}
        logging.info("L2P: %s model, patch %d, %d blocks", config.variant, config.patch_size, config.n_layers)
        return self._model(device)

    def _model(self, device: Any) -> L2PBaseModel:
        return L2PBaseModel(self, device=device)

    def _keep_the_head_out_of_8_bits(self, weights: dict[str, Tensor]) -> None:
        """8 bits by the host's flag, by the node's choice, or as the file has most of its weights.

        Files that are quantised layer by layer stay as they are.
        """
        parameters = comfy.utils.calculate_parameters(weights)
        if self.quant_config is None:
            quantise_backbone(weights)
        dtype = comfy.model_management.unet_dtype(
            model_params=parameters, supported_dtypes=self.supported_inference_dtypes
        )
        # By the host's flag, again.
        self.unet_config["dtype"] = torch.bfloat16 if dtype.itemsize == 1 else dtype
        self._compute_quantised(weights)

    def _compute_quantised(self, weights: dict[str, Tensor]) -> None:
        """Tell the host that layers have their own formats: it checked before they were set."""
        self.quant_config = comfy.utils.detect_layer_quantization(weights, "")
        device = comfy.model_management.get_torch_device()
        self.manual_cast_dtype = comfy.model_management.unet_manual_cast(None, device, self.supported_inference_dtypes)

    def clip_target(self, state_dict: Mapping[str, Any] | None = None) -> Any:
        """The text encoder of the model's source, for Load Checkpoint's CLIP output."""
        row = HOST_ROWS[self.unet_config["l2p"].source]
        return row.supported.clip_target(self, {} if state_dict is None else state_dict)

    def process_vae_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The host's VAE for pixels, like Load VAE's "pixel_space", for Load Checkpoint's VAE output."""
        return {"pixel_space_vae": torch.tensor(1.0)}


class L2PBaseModel(comfy.model_base.Lumina2):
    """The host's model object. A Lumina2, because the host's Z-Image LoRA key map asks for one."""

    network: Any = L2PNextDiT

    def __init__(self, model_config: L2PModelConfig, device: Any = None):
        comfy.model_base.BaseModel.__init__(
            self, model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=self.network
        )
        self.memory_usage_factor_conds = ()

    untrained: bool | None = None
    """Whether the weights are a pixel initialisation, which makes noise; None if one of the host's loaders has loaded
    it and the file has not been checked yet."""
    checked_file: str | None = None
    """The file whose header `WholeFile` has checked."""

    @property
    def l2p(self) -> PixelConfig:
        """The sizes of this model."""
        return self.diffusion_model.l2p

    def load_model_weights(self, sd: dict[str, Tensor], unet_prefix: str = "", assign: bool = False) -> L2PBaseModel:
        """As the host's, which has created its patcher by then."""
        super().load_model_weights(sd, unet_prefix, assign)
        for patcher in patchers_of(self):
            adopt(patcher)
        return self

    def process_timestep(self, timestep: Tensor, **_: Any) -> Tensor:
        """Sigma in [0, 1], whatever scale a sampling node (ModelSamplingSD3: 1000) has given it. Nodes without a scale
        (ModelSamplingFlux) pass sigma on.
        """
        return timestep / getattr(self.model_sampling, "multiplier", 1.0)

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """A step of the host's; the head's tile is chosen by free memory."""
        options = dict(transformer_options or {})
        if self.diffusion_model.head_tile is None:
            caption = 0 if c_crossattn is None else c_crossattn.shape[1]
            free, spare = _memory_for_a_step(x.device, self.current_patcher)
            options[TILE_OPTION] = self._auto_tile(x.shape, caption, free, spare)
        return super()._apply_model(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _auto_tile(
        self, shape: Iterable[int], caption: int, free: float | None = None, spare: float | None = None
    ) -> int | None:
        batch, _, height, width = shape
        itemsize = comfy.model_management.dtype_size(self.get_dtype_inference())
        return choose_tile(self.l2p, height, width, caption, itemsize, batch, free, spare)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """As the host's, after checking that this model can read the captions.

        Raises:
            ValueError: for those of another text encoder, naming the one to use.
        """
        check_caption(kwargs.get("cross_attn"), self.l2p)
        conds: dict[str, Any] = super().extra_conds(**kwargs)
        return conds

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, list[int]]:
        """The caption's shape, under the name that `memory_required` reads."""
        caption = kwargs.get("cross_attn")
        return {} if caption is None else {"c_crossattn": list(caption.shape)}

    def memory_required(
        self, input_shape: Iterable[int], cond_shapes: Mapping[str, list[list[int]]] | None = None, **_: Any
    ) -> float:
        """Bytes that a forward pass of (B, 3, H, W) needs beside the weights, see `sampling_memory`."""
        shape = list(input_shape)
        check_pixels(shape)
        batch, _channels, height, width = shape
        caption = max((shape[1] for shape in (cond_shapes or {}).get("c_crossattn", [])), default=0)
        itemsize = comfy.model_management.dtype_size(self.get_dtype_inference())
        tile = self.diffusion_model.head_tile
        if tile is None:
            tile = self._auto_tile(shape, caption)
        return step_bytes(
            self.l2p, height, width, caption, itemsize, batch, tile or None, fused_attention=_fused_attention()
        )


def _memory_for_a_step(device: torch.device, patcher: Any) -> tuple[float, float]:
    """Bytes of a device that a step can use, and those of them that nothing else needs.

    Under dynamic VRAM weights fill what is free, and give way to a step; but those of the model itself come back in
    every step. Memory that all programs share counts as free only as far as it is reserved for a step.
    """
    free = float(free_memory(patcher, device))
    if not has_own_memory(device.type):
        return free, 0.0
    if patcher is None or not patcher.is_dynamic():
        return free, free
    empty, loaded = comfy.model_management.get_free_memory(device), patcher.loaded_size()
    # Older hosts do not count memory of offloadable weights as free.
    return max(free, empty + loaded), max(0.0, empty - max(0, patcher.model_size() - loaded))


def _fused_attention() -> bool:
    """Whether the host's attention never materialises its scores."""
    return comfy.model_management.pytorch_attention_enabled() or comfy.model_management.xformers_enabled()


def build_model(
    state: dict[str, Tensor],
    *,
    weight_dtype: str = "default",
    head_tile: int | None = None,
    disable_dynamic: bool = False,
    configured: Callable[..., L2PModelConfig] = L2PModelConfig,
) -> Any:
    """Put an L2P state dict (no prefix) into a ModelPatcher. Removes the tensors from `state`.

    Quantised layers have their markers, see `quantised.mark_layers`.
    """
    model_config = configured(head_tile=head_tile)
    model_config.quant_config = comfy.utils.detect_layer_quantization(state, "") or None
    supported = model_config.supported_inference_dtypes
    quantised = model_config.quant_config is not None
    dtype = WEIGHT_DTYPES[weight_dtype] or comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=supported,
        weight_dtype=None if quantised else comfy.utils.weight_dtype(state),
    )
    load_device = comfy.model_management.get_torch_device()
    cast = comfy.model_management.unet_manual_cast(None if quantised else dtype, load_device, supported)
    model_config.set_inference_dtype(dtype, cast)
    model = model_config.get_model(state)
    plain = comfy.model_patcher.ModelPatcher
    kind = plain if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    offload_device = comfy.model_management.unet_offload_device()
    patcher = kind(model, load_device=load_device, offload_device=offload_device, **disk_speed(kind, state))
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    return patcher
