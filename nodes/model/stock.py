"""The host's own loaders, Load Diffusion Model and Load Checkpoint, with L2P files.

They ask the rows of `comfy.supported_models.models` in turn and would treat L2P as the latent Z-Image: a wrong image of
129 GB. A row of ours at the head of that list accepts files with a Detailer Head and no others. If a host supports L2P
itself, its own row is used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import comfy.supported_models

HEAD = "local_decoder."
"""What the keys of a Detailer Head begin with: one is enough, so that a damaged file is L2P's to refuse."""

_OTHER_PIXEL_MODEL = "dec_net."
"""In files of another pixel model on the same backbone, which the host knows."""

BACKBONE = "lumina2"
"""The host's name of the backbone that L2P shares with latent models."""


class L2PRow(comfy.supported_models.ZImage):
    """The row of L2P files in the host's list. The model's own configuration, which answers for it, is imported when
    the first such file is loaded."""

    # What the host detects in an L2P file, which it takes for the latent model of the same backbone.
    unet_config: dict[str, Any] = {"image_model": BACKBONE}
    required_keys: dict[str, Any] = {}

    def __new__(cls, *_: Any, **__: Any) -> L2PRow:
        """The configuration of a model, whichever class is called."""
        from .host import L2PModelConfig

        return super().__new__(L2PModelConfig)

    @classmethod
    def matches(
        cls,
        unet_config: Mapping[str, Any],
        state_dict: Mapping[str, Any] | None = None,
        unet_key_prefix: str | None = None,
    ) -> bool:
        """Whether a file is an L2P model that the host does not know itself. Older hosts give no prefix of its keys."""
        prefix = _prefix(state_dict or ()) if unet_key_prefix is None else unet_key_prefix
        handed_on = () if unet_key_prefix is None else (unet_key_prefix,)
        return is_l2p(state_dict, prefix) and not is_native(unet_config, state_dict, prefix, *handed_on)


def register() -> None:
    """Insert our row at the head of the host's list, once."""
    if L2PRow not in comfy.supported_models.models:
        comfy.supported_models.models.insert(0, L2PRow)


def is_l2p(state: Mapping[str, Any] | None, prefix: str) -> bool:
    """Whether the keys of a state dict are those of an L2P model, or of a part of one."""
    keys = state or ()
    return _any(keys, prefix + HEAD) and not _any(keys, prefix + _OTHER_PIXEL_MODEL)


def _any(keys: Iterable[str], beginning: str) -> bool:
    return any(key.startswith(beginning) for key in keys)


def _prefix(keys: Iterable[str]) -> str:
    """What stands before the head's keys."""
    return next((key[: key.index(HEAD)] for key in keys if HEAD in key), "")


def is_native(unet_config: Mapping[str, Any], state: Mapping[str, Any] | None, prefix: str, *handed_on: str) -> bool:
    """Whether this host knows an L2P file itself, by a row of its own beside ours; said in the log.

    It does if it detects another kind of model than that of the latent backbone, or if the row that answers would not
    without the head.
    """
    without_head = dict.fromkeys(key for key in state or () if not key.startswith(prefix + HEAD))
    others = (row for row in comfy.supported_models.models if not issubclass(row, L2PRow))
    # The host takes the first row that matches: one behind it, such as another pack's, is never used.
    answers = next((row for row in others if row.matches(unet_config, state, *handed_on)), None)
    known = unet_config.get("image_model") != BACKBONE or (
        answers is not None and not answers.matches(unet_config, without_head, *handed_on)
    )
    if known:
        logging.info("L2P: this ComfyUI supports L2P and loads the file with its own code; L2P Loader uses this pack's")
    return known
