"""The metadata that we write into the headers of files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ..config import VARIANTS, HeadConfig, HeadStage, ModelConfig, PixelConfig
from ..sources import SOURCES, source_of
from ..version import __version__
from .about import ARCHITECTURE, BASE_MODEL
from .safetensors_header import parse_json

KIND = "l2p.kind"
VARIANT = "l2p.variant"
CONFIG = "l2p.config"
SOURCE_SHA256 = "l2p.source_sha256"
SEED = "l2p.seed"
VERSION = "l2p.version"
COPIED = "l2p.copied"
INIT = "l2p.init"
TRAINED = "l2p.trained"
KEPT = "l2p.kept"
"""The tensors that a delta takes from its base: {key: [dtype, shape, digest]} as JSON."""
FORMAT = "l2p.format"
"""The format of a quantised file's weights."""
ORIGINALS = "l2p.originals"
"""The tensors that a quantised file was made from, as in `KEPT`, by which a delta recognises its base in 8 bits."""

PIXEL_INIT = "pixel-init"
DELTA = "delta"
MERGED = "merged"
QUANTISED = "quantised"
"""The kind of a quantised file whose source states no kind."""

# The largest size that a stored configuration may state.
_MAX_SIZE = 1 << 20
_MAX_BLOCKS = 1 << 10
_MAX_STAGES = 16


def describe(kind: str, config: ModelConfig, **fields: str) -> dict[str, str]:
    """The metadata of a file of this kind; `fields` are further entries without their prefix ``l2p.``."""
    return {
        "format": "pt",
        # Runs of earlier versions know the initialisation that they convert by its bytes.
        **({} if kind == PIXEL_INIT else modelspec(config, is_delta=kind == DELTA)),
        KIND: kind,
        VARIANT: config.variant if isinstance(config, PixelConfig) else "latent",
        CONFIG: config.to_json(),
        VERSION: __version__,
        **{f"l2p.{name}": value for name, value in fields.items()},
    }


def modelspec(config: ModelConfig, is_delta: bool = False) -> dict[str, str]:
    """What ComfyUI's model library shows for each of our files: the architecture, and the name of the base."""
    source = source_of(config)
    # What fits models of one size, such as a LoRA, does not fit those of another.
    name = source.name if source.is_published(config) else f"{source.name}-width-{config.dim}"
    architecture = f"{name}-l2p-{config.variant}" if isinstance(config, PixelConfig) else name
    return {
        "modelspec.sai_model_spec": "1.0.1",
        ARCHITECTURE: f"{architecture}/delta" if is_delta else architecture,
        BASE_MODEL: source.base_title(config),
    }


def grouped(names: Iterable[str]) -> dict[str, int]:
    """The number of tensors of each part of the model among `names`: {"layers": 390, "x_embedder": 2}."""
    return dict(sorted(Counter(name.partition(".")[0] for name in names).items()))


def grouped_text(names: Iterable[str]) -> str:
    """`grouped` as words: "390 of layers, 2 of x_embedder"."""
    return ", ".join(f"{count} of {part}" for part, count in grouped(names).items())


def grouped_json(names: Iterable[str]) -> str:
    """`grouped` as metadata text."""
    return json.dumps(grouped(names), separators=(",", ":"))


def stored_config(metadata: Mapping[str, str]) -> ModelConfig | None:
    """The configuration that a file states, None if it states none or an invalid one; see `Checkpoint.config`."""
    try:
        stated = parse_json(metadata.get(CONFIG, ""))
        head, variant = stated.pop("head"), stated.pop("variant")
        source = SOURCES[stated.get("source", ModelConfig.source)]
        config = source.config(**stated)
        if head or variant:
            config = config.of_pixels(VARIANTS[variant], _stored_head(head))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    sizes = [getattr(config, field.name) for field in fields(config) if field.name not in ("variant", "head", "source")]
    if not all(map(_is_size, sizes)) or config.dim % config.head_dim:
        return None
    return config if max(getattr(config, stack.count) for stack in source.stacks) <= _MAX_BLOCKS else None


def _stored_head(stated: dict[str, Any]) -> HeadConfig:
    stages = tuple(HeadStage(**stage) for stage in stated["stages"])
    sizes = [size for stage in stages for size in (stage.enc, stage.up, stage.dec)]
    if not 0 < len(stages) <= _MAX_STAGES or not all(map(_is_size, [*sizes, stated["bottleneck"]])):
        raise ValueError("not the sizes of a head")
    return HeadConfig(stages, stated["bottleneck"])


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= _MAX_SIZE


def broken_text(key: str) -> str:
    """A line of a report on a file with NaN or infinity in it."""
    return f"Warning: '{key}' has values that are not finite numbers: images of this model will be black."
