"""The host's counterparts of each source."""

from __future__ import annotations

from typing import Any, NamedTuple

import comfy.supported_models


class HostRow(NamedTuple):
    """A source in the host.

    Attributes:
        supported: its row of supported models, which knows the text encoder.
        clip: the node that loads its text encoder, worded to follow "the CLIP of".
        has_template: whether its CLIP puts captions into the published template, which nodes have to do otherwise.
    """

    supported: Any
    clip: str
    has_template: bool


HOST_ROWS = {
    "z-image": HostRow(
        comfy.supported_models.ZImage,
        "Load CLIP with qwen_3_4b.safetensors and the type lumina2",
        has_template=True,
    ),
    "lumina2": HostRow(
        comfy.supported_models.Lumina2,
        "Load CLIP with Gemma-2-2B and the type lumina2",
        has_template=False,
    ),
}
"""The rows by the names of `sources.SOURCES`."""
