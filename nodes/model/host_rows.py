"""What the host has for each source: its row of supported models, which knows the text encoder, and a CLIP."""

from __future__ import annotations

from typing import Any

import comfy.supported_models

HOST_ROWS: dict[str, Any] = {
    "z-image": comfy.supported_models.ZImage,
    "lumina2": comfy.supported_models.Lumina2,
}
"""By the names of `sources.SOURCES`."""

CLIP = {
    "z-image": "Load CLIP with qwen_3_4b.safetensors and the type lumina2",
    "lumina2": "Load CLIP with Gemma-2-2B and the type lumina2",
}
"""Where a source's captions come from in the host, in words that follow "the CLIP of"."""
