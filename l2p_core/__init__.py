"""What L2P adds to a transformer, in one place and without ComfyUI: geometry, Detailer Head, conversion, training.

The names in `__all__` are public; docs/python.md shows them at work. Each is imported from its module on first use, so
that importing this package is fast and does not load torch. `convert`, `delta`, `hybrid`, `quantise` and `tiny` are
modules: `l2p.convert.convert`, `l2p.delta.extract`, `l2p.hybrid.sample`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import convert, delta, hybrid, quantise, tiny
    from .checkpoint import load_latent, load_model, open_checkpoint
    from .config import VARIANTS, ModelConfig
    from .dataset.caption_cache import CaptionCache
    from .detailer import DetailerHead
    from .flow import sample, sigmas, to_image, velocity_loss
    from .freeze import trainable_names
    from .layouts import to_comfy, to_diffusers
    from .model import L2PModel, LatentModel
    from .run.loop import train
    from .run.recipe import Recipe
    from .run.recipe import load as load_recipe
    from .run.recipe import parse as parse_recipe
    from .version import __version__

__all__ = [
    "VARIANTS",
    "CaptionCache",
    "DetailerHead",
    "L2PModel",
    "LatentModel",
    "ModelConfig",
    "Recipe",
    "__version__",
    "convert",
    "delta",
    "hybrid",
    "load_latent",
    "load_model",
    "load_recipe",
    "open_checkpoint",
    "parse_recipe",
    "quantise",
    "sample",
    "sigmas",
    "tiny",
    "to_comfy",
    "to_diffusers",
    "to_image",
    "train",
    "trainable_names",
    "velocity_loss",
]

_MODULES = {
    "checkpoint": ("load_latent", "load_model", "open_checkpoint"),
    "config": ("VARIANTS", "ModelConfig"),
    "dataset.caption_cache": ("CaptionCache",),
    "detailer": ("DetailerHead",),
    "flow": ("sample", "sigmas", "to_image", "velocity_loss"),
    "freeze": ("trainable_names",),
    "layouts": ("to_comfy", "to_diffusers"),
    "model": ("L2PModel", "LatentModel"),
    "run.loop": ("train",),
    "run.recipe": ("Recipe",),
    "version": ("__version__",),
}
_WHERE = {name: (module, name) for module, names in _MODULES.items() for name in names}
_WHERE |= {"load_recipe": ("run.recipe", "load"), "parse_recipe": ("run.recipe", "parse")}


def __getattr__(name: str) -> Any:
    """A public name, imported from its module."""
    if name in _WHERE:
        module, attribute = _WHERE[name]
        return getattr(import_module(f".{module}", __name__), attribute)
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
