"""What the files we write say about themselves, in the header's metadata."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

from .. import __version__
from .config import ModelConfig

KIND = "l2p.kind"
VARIANT = "l2p.variant"
CONFIG = "l2p.config"
SOURCE_SHA256 = "l2p.source_sha256"
SEED = "l2p.seed"
VERSION = "l2p.version"
COPIED = "l2p.copied"
INITIALISED = "l2p.initialised"
INIT = "l2p.init"
TRAINED = "l2p.trained"
KEPT = "l2p.kept"
"""What a delta takes from its base: {key: [dtype, shape, digest]} as JSON."""

PIXEL_INIT = "pixel-init"
DELTA = "delta"
MERGED = "merged"


def describe(kind: str, config: ModelConfig, **fields: str) -> dict[str, str]:
    """The metadata of a file of this kind; `fields` are further entries without their ``l2p.``."""
    return {
        "format": "pt",
        KIND: kind,
        VARIANT: config.variant or "latent",
        CONFIG: config.to_json(),
        VERSION: __version__,
        **{f"l2p.{name}": value for name, value in fields.items()},
    }


def grouped(names: Iterable[str]) -> dict[str, int]:
    """How many tensors each part of the model has among `names`: {"layers": 390, "x_embedder": 2}."""
    return dict(sorted(Counter(name.partition(".")[0] for name in names).items()))


def grouped_json(names: Iterable[str]) -> str:
    """`grouped` as metadata text."""
    return json.dumps(grouped(names), separators=(",", ":"))
