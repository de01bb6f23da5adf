"""The bundled tiny latent source as the host's MODEL, CLIP and VAE.

The host's own loader supports only one size of Z-Image, and not our autoencoder, so both are set up here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.sd
import comfy.supported_models
import torch
from torch import Tensor, nn

from ...l2p_core import tiny
from ...l2p_core.checkpoint import load_latent, open_checkpoint
from ...l2p_core.config import ModelConfig
from ...l2p_core.ops.finite import cause, check_finite, weights_of
from ...l2p_core.tiny.autoencoder import DOWNSCALE, LATENT_CHANNELS, Autoencoder
from .demo import load_words
from .limits import check_caption
from .network import SizedNextDiT
from .patcher import KEY, finite_samples

DECODE_FLOATS = 4000
"""Elements that decoding holds for a latent cell: 64 pixels of the widest layers, and their inputs."""


class SourceFormat(comfy.latent_formats.LatentFormat):
    """The tiny autoencoder's latent, which needs no scale; previews show its linear part."""

    latent_channels = LATENT_CHANNELS
    spacial_downscale_ratio = DOWNSCALE

    def __init__(self, autoencoder: Autoencoder | None = None):
        inverse = (autoencoder or tiny.load_autoencoder()).inverse
        assert inverse.bias is not None
        self.latent_rgb_factors = inverse.weight.detach().mean((2, 3)).tolist()
        self.latent_rgb_factors_bias = inverse.bias.detach().tolist()


class SourceNetwork(SizedNextDiT):
    """The backbone with the sizes that the host's configuration carries."""

    def __init__(self, sizes: ModelConfig, device: Any = None, dtype: Any = None, operations: Any = None, **_: Any):
        super().__init__(sizes, device, dtype, operations)


class SourceConfig(comfy.supported_models.ZImage):
    """The host's configuration object for the tiny source."""

    latent_format = SourceFormat
    supported_inference_dtypes = [torch.float32]

    def __init__(self, sizes: ModelConfig):
        super().__init__({"image_model": "lumina2", "sizes": sizes, "dim": sizes.dim, "n_layers": sizes.n_layers})

    def get_model(self, state_dict: Mapping[str, Tensor], prefix: str = "", device: Any = None) -> SourceModel:
        return SourceModel(self, device=device)


class SourceModel(comfy.model_base.Lumina2):
    """The host's Z-Image around the tiny network."""

    def __init__(self, model_config: SourceConfig, device: Any = None):
        comfy.model_base.BaseModel.__init__(
            self, model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=SourceNetwork
        )
        self.memory_usage_factor_conds = ("ref_latents",)
        self.sizes = model_config.unet_config["sizes"]

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """The host's conditioning, for captions that this model can read; a ValueError names the encoder to use for
        others."""
        check_caption(kwargs.get("cross_attn"), self.sizes)
        conds: dict[str, Any] = super().extra_conds(**kwargs)
        return conds


def load_demo_source() -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of the bundled tiny source."""
    return load_source_model(), load_words(), load_vae()


def load_source_model(disable_dynamic: bool = False) -> Any:
    """The tiny latent model as a ModelPatcher of the host, in float32."""
    config = SourceConfig(open_checkpoint(tiny.SOURCE_PATH).config())
    config.set_inference_dtype(torch.float32, None)
    state = load_latent(tiny.SOURCE_PATH, dtype=torch.float32).state_dict()
    model = config.get_model(state)
    load_device = comfy.model_management.get_torch_device()
    # A few megabytes: never worth the dynamic patcher's bookkeeping, which is for models that do not fit.
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=load_device, offload_device=comfy.model_management.unet_offload_device()
    )
    model.load_model_weights(state, "")
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, finite_samples)
    patcher.cached_patcher_init = (load_source_model, ())
    return patcher


def load_vae() -> Any:
    """The tiny autoencoder behind the host's VAE interface, in float32."""
    autoencoder = castable(tiny.load_autoencoder())
    # The host's class has no place for other networks than it knows; its simplest one sets up all the rest.
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    vae.first_stage_model = autoencoder
    vae.latent_channels, vae.downscale_ratio, vae.upscale_ratio = LATENT_CHANNELS, DOWNSCALE, DOWNSCALE
    vae.memory_used_encode = lambda shape, dtype: 8 * shape[2] * shape[3] * dtype.itemsize
    vae.memory_used_decode = lambda shape, dtype: DECODE_FLOATS * shape[2] * shape[3] * dtype.itemsize
    comfy.model_management.archive_model_dtypes(autoencoder)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        autoencoder, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    vae.process_output = functools.partial(_output, vae.process_output, autoencoder)
    vae.size = None
    vae.model_size()
    return vae


def castable(autoencoder: Autoencoder) -> Autoencoder:
    """The autoencoder with the host's convolutions, which fetch weights that are not on the device (--novram) at every
    use."""
    for module in autoencoder.modules():
        if type(module) in (nn.Conv2d, nn.ConvTranspose2d):
            module.__class__ = getattr(comfy.ops.disable_weight_init, type(module).__name__)
    return autoencoder


def _output(process: Callable[[Tensor], Tensor], autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """The host's last step of decoding, which would turn non-finite values into black."""
    check_finite(pixels, lambda: cause(weights_of(autoencoder)))
    return process(pixels)
