"""A latent source and its pixel model as two MODELs on one set of weights.

Two model objects of the host that share layers break as soon as one of them is unloaded. Therefore there is one object,
a pixel model that also holds the source's own weights, with two patchers, the faces. It computes in the space whose
channels it is given; nothing is exchanged when the other face samples, so that a switch moves no weights. LoRAs and
other patches belong to a face, as to any clone of a MODEL.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.patcher_extension
import torch
from torch import Tensor, nn

from ...l2p_core.config import PIXEL_CHANNELS, ModelConfig
from ...l2p_core.sources import SOURCES
from ...l2p_core.tiny.bundled import is_tiny
from .demo_source import SourceFormat
from .fp8 import quantise_backbone
from .host import L2PBaseModel, L2PModelConfig, PixelFormat, build_model
from .host_rows import HOST_ROWS
from .lora import FittingPatches
from .lora_names import PREFIX, SOURCE, L2PParts
from .network import L2PNextDiT, SizedNextDiT
from .patcher import KEY, finite_samples

STACKS = {stack.name for row in SOURCES.values() for stack in row.stacks}


def build_faces(
    pixels: dict[str, Tensor],
    source: dict[str, Tensor],
    config: ModelConfig,
    shared: set[str],
    *,
    weight_dtype: str = "default",
    head_tile: int | None = None,
    disable_dynamic: bool = False,
) -> tuple[Any, Any]:
    """The latent and the pixel MODEL of two state dicts (ComfyUI layout, no prefix). Removes the tensors from both.

    Args:
        pixels: the pixel model's weights.
        source: those of the latent source; where a whole unit is shared, the pixel model's are used.
        config: of the source.
        shared: the names of weights that are equal in both.
    """
    own = own_units(pixels, source, shared)
    state = {**pixels, **{f"{SOURCE}{name}": weight for name, weight in source.items() if unit_of(name) in own}}
    pixels.clear()
    source.clear()
    pixel_face = build_model(
        state,
        weight_dtype=weight_dtype,
        head_tile=head_tile,
        disable_dynamic=disable_dynamic,
        configured=functools.partial(DualModelConfig, config, frozenset(own)),
    )
    return latent_face(pixel_face), pixel_face


def latent_face(pixel_face: Any) -> Any:
    """A clone of the pixel MODEL through which the host sees the latent source."""
    patcher = pixel_face.clone()
    kind: Any = type(pixel_face)
    patcher.__class__ = _latent_kind(kind)
    sampling = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    patcher.remove_wrappers_with_key(sampling, KEY)
    patcher.add_wrapper_with_key(sampling, KEY, finite_samples)
    return patcher


def works_on_pixels(patcher: Any) -> bool:
    """Whether a MODEL is an L2P model: one of its own, or the pixel face of two."""
    return isinstance(patcher.model, L2PBaseModel) and not isinstance(patcher, LatentFace)


def unit_of(name: str) -> str:
    """The module that a weight is shared or owned with: a block of a stack, or a module at the top."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in STACKS else parts[0]


def own_units(pixels: Iterable[str], source: Iterable[str], shared: set[str]) -> set[str]:
    """The units of the source that the pixel model does not have with equal weights."""
    pixels = set(pixels)
    return {unit_of(name) for name in source if name not in shared or name not in pixels or "." not in name}


class DualModelConfig(L2PModelConfig):
    """The host's configuration of a pixel model that holds its source's own weights as well."""

    def __new__(cls, *_: Any, **__: Any) -> DualModelConfig:
        """Itself, unlike the row in the host's list."""
        return object.__new__(cls)

    def __init__(self, source: ModelConfig, own: frozenset[str], head_tile: int | None = None):
        super().__init__(head_tile=head_tile)
        self.unet_config |= {"source": source, "own": own}

    def get_model(self, state_dict: dict[str, Tensor], prefix: str = "", device: Any = None) -> L2PBaseModel:
        """The pixel model's; `state_dict` keeps the source's own weights."""
        own = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(SOURCE)}
        if self.asked_for_8_bits:
            stripped = {name.removeprefix(SOURCE): weight for name, weight in own.items()}
            quantise_backbone(stripped)
            own = {f"{SOURCE}{name}": weight for name, weight in stripped.items()}
        model = super().get_model(state_dict, prefix, device)
        state_dict.update(own)
        return model

    def _model(self, device: Any) -> L2PBaseModel:
        return DualBaseModel(self, device=device)


class DualNextDiT(L2PNextDiT):
    """L2P's network, and the source's on the same shared modules.

    Args:
        source: the sizes of the latent source.
        own: the units that the source does not share, see `unit_of`.
    """

    def __init__(
        self,
        l2p: Any,
        source: ModelConfig,
        own: frozenset[str],
        head_tile: int | None = None,
        device: Any = None,
        dtype: Any = None,
        operations: Any = None,
        **_: Any,
    ):
        super().__init__(l2p, head_tile, device, dtype, operations)
        place = torch.device("cpu") if device is None else device
        # On "meta", so that shared weights are never allocated twice.
        whole = SizedNextDiT(source, torch.device("meta"), dtype, operations)
        for name, parameter in whole.named_parameters(recurse=False):
            setattr(whole, name, nn.Parameter(torch.empty_like(parameter, device=place), requires_grad=False))
        view = copy.copy(whole)
        view._modules = dict(whole._modules)
        for name, child in list(whole.named_children()):
            if isinstance(child, nn.ModuleList):
                kept = {str(i): block for i, block in enumerate(child) if f"{name}.{i}" in own}
                ours = getattr(self, name)
                view._modules[name] = nn.ModuleList(kept.get(str(i), ours[i]) for i in range(len(child)))
                whole._modules[name] = nn.ModuleDict(kept)
            elif name not in own and _has_weights(child):
                view._modules[name] = getattr(self, name)
                del whole._modules[name]
        for child in whole.children():
            child.to_empty(device=place)
        for module in whole.modules():
            if hasattr(module, "factory_kwargs"):  # quantised layers are made when they are loaded
                module.factory_kwargs["device"] = place
        self.source = whole
        # Not registered: its modules are, as the network's and as the source's own.
        self._latent_view = (view,)

    def _forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        """A step in the space that `x` has the channels of."""
        if x.shape[1] == PIXEL_CHANNELS:
            return super()._forward(x, *args, **named)
        return self._latent_view[0]._forward(x, *args, **named)


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


class DualFormat(PixelFormat):
    """Both latent formats in one, distinguished by their channels."""

    def __init__(self, latent: comfy.latent_formats.LatentFormat):
        super().__init__()
        self.latent = latent
        self.latent_rgb_factors_reshape = functools.partial(_for_preview, latent, self.latent_rgb_factors_reshape)

    def process_in(self, latent: Tensor) -> Tensor:
        return latent if latent.shape[1] == PIXEL_CHANNELS else self.latent.process_in(latent)

    def process_out(self, latent: Tensor) -> Tensor:
        return latent if latent.shape[1] == PIXEL_CHANNELS else self.latent.process_out(latent)


def _for_preview(latent: Any, of_pixels: Any, x: Tensor) -> Tensor:
    """Latents as small pixels (the host's own linear approximation), pixels averaged down."""
    if x.shape[1] == PIXEL_CHANNELS:
        return of_pixels(x)
    factors = torch.tensor(latent.latent_rgb_factors, dtype=x.dtype, device=x.device)
    bias = torch.tensor(getattr(latent, "latent_rgb_factors_bias", None) or [0.0] * 3, dtype=x.dtype, device=x.device)
    return (x.movedim(1, -1) @ factors + bias).movedim(-1, 1)


class DualBaseModel(L2PBaseModel):
    """The host's model object of both faces."""

    network = DualNextDiT
    share = 0.0
    """The share of the source's parameters in blocks that both faces use."""
    saves_source = False
    """Whether what is being saved is the latent source."""

    def __init__(self, model_config: DualModelConfig, device: Any = None):
        super().__init__(model_config, device)
        source = model_config.unet_config["source"]
        of_source = SourceFormat if is_tiny(source) else HOST_ROWS[source.source].supported.latent_format
        self.latent_format = DualFormat(of_source())

    def _apply_model(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        if x.shape[1] == PIXEL_CHANNELS:
            return super()._apply_model(x, *args, **named)
        return comfy.model_base.Lumina2._apply_model(self, x, *args, **named)

    def memory_required(
        self, input_shape: Iterable[int], cond_shapes: Mapping[str, list[list[int]]] | None = None, **more: Any
    ) -> float:
        """The memory of the face that has the shape's channels."""
        shape = list(input_shape)
        if len(shape) == 4 and shape[1] == PIXEL_CHANNELS:
            return super().memory_required(shape, cond_shapes, **more)
        required: float = comfy.model_base.BaseModel.memory_required(self, shape, cond_shapes or {}, **more)
        return required

    def state_dict_for_saving(self, unet_state_dict: dict[str, Any], *others: Any, **named: Any) -> dict[str, Any]:
        """One face's state dict: a file of the pixel model or of the source, as each would be saved alone."""
        if self.saves_source:
            names = self.diffusion_model._latent_view[0].state_dict()
            kept = {name: unet_state_dict.get(f"{SOURCE}{name}", unet_state_dict.get(name)) for name in names}
        else:
            kept = {name: weight for name, weight in unet_state_dict.items() if not name.startswith(SOURCE)}
        saved: dict[str, Any] = super().state_dict_for_saving(kept, *others, **named)
        return saved


class LatentFace:
    """A mixin for the host's ModelPatcher: the model as its latent source."""

    def state_dict_for_saving(self, *others: Any, **named: Any) -> dict[str, Any]:
        """The state dict of the source alone."""
        model: DualBaseModel = self.model  # type: ignore[attr-defined]
        model.saves_source = True
        try:
            saved: dict[str, Any] = super().state_dict_for_saving(*others, **named)  # type: ignore[misc]
        finally:
            model.saves_source = False
        return saved

    def get_model_object(self, name: str) -> Any:
        """As the host's; the format of empty latents is the source's."""
        found = super().get_model_object(name)  # type: ignore[misc]
        return found.latent if name == "latent_format" and isinstance(found, DualFormat) else found

    def _fitting(self, patches: dict[Any, Any]) -> tuple[dict[Any, Any], list[Any]]:
        """Patches go to the source's own weights where there are any."""
        weights = self.model.state_dict()  # type: ignore[attr-defined]
        moved = {
            _of_source(key, weights): _parts_of_source(patch, weights) if isinstance(patch, L2PParts) else patch
            for key, patch in patches.items()
        }
        found: tuple[dict[Any, Any], list[Any]] = super()._fitting(moved)  # type: ignore[misc]
        return found

    def add_patches(self, patches: dict[Any, Any], *strengths: float, **named: float) -> list[Any]:
        """As the host's, which compares what was patched with the names that it gave."""
        patched = super().add_patches(patches, *strengths, **named)  # type: ignore[misc]
        return self._as_given(patched, patches)

    def add_hook_patches(self, hook: Any, patches: dict[Any, Any], *strengths: float, **named: float) -> list[Any]:
        """As `add_patches`."""
        patched = super().add_hook_patches(hook, patches, *strengths, **named)  # type: ignore[misc]
        return self._as_given(patched, patches)

    def _as_given(self, patched: Iterable[Any], patches: Iterable[Any]) -> list[Any]:
        weights = self.model.state_dict()  # type: ignore[attr-defined]
        given = {_of_source(key, weights): key for key in patches}
        return [given.get(key, key) for key in patched]


def _parts_of_source(parts: L2PParts, weights: Mapping[str, Tensor]) -> L2PParts:
    found = parts.of_source()
    return replace(found, patches={_of_source(key, weights): patch for key, patch in found.patches.items()})


def _of_source(key: Any, weights: Mapping[str, Tensor]) -> Any:
    name = key if isinstance(key, str) else key[0]
    own = f"{PREFIX}{SOURCE}{name.removeprefix(PREFIX)}"
    if own not in weights:
        return key
    return own if isinstance(key, str) else (own, *key[1:])


@functools.cache
def _latent_kind(base: type) -> type:
    """A subclass of the pixel face's class; clones have it too."""
    assert issubclass(base, FittingPatches)
    return type("L2PLatentFace", (LatentFace, base), {})
