"""The file that a loader of the host has read, held to what L2P Loader asks of one.

The host hands us less than the file. From a file in diffusers layout it stacks q, k and v by itself, and where one of
them is missing its rows are whatever was in memory; of a file with prefixed keys Load Diffusion Model hands on those
with the prefix alone. No row of the host's list sees what it was. But each loader tells its patcher where the model can
be loaded from again, while it still loads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd

from ...l2p_core.checkpoint import check_exact, open_checkpoint
from ...l2p_core.files.safetensors_header import SUFFIXES
from ...l2p_core.model import key_shapes
from ..messages.errors import plain_errors
from ..messages.refused import DELTA


class WholeFile:
    """Mixed into the host's ModelPatcher: looks into the file's header when a loader of the host names it."""

    @property
    def cached_patcher_init(self) -> Any:
        """As the host's: (function, arguments, ...) that load the model again."""
        return vars(self).get("cached_patcher_init")

    @cached_patcher_init.setter
    def cached_patcher_init(self, value: Any) -> None:
        path = _file_of(value)
        # Clones are given what their original has: a model's file is looked into once.
        if path is not None and self.model.checked_file != path:  # type: ignore[attr-defined]
            check(path)
            self.model.checked_file = path  # type: ignore[attr-defined]
        vars(self)["cached_patcher_init"] = value


def _file_of(init: Any) -> str | None:
    """The safetensors file that a loader of the host has read; our own loader has checked its files."""
    function, arguments = (None, ()) if init is None else init[:2]
    if getattr(function, "__module__", None) != comfy.sd.__name__ or not arguments:
        return None
    path = arguments[0]
    return path if isinstance(path, str) and path.lower().endswith(SUFFIXES) else None


@plain_errors()
def check(path: str) -> None:
    """Refuse a file with a key missing or unknown, and a delta, which may have every key.

    Raises:
        ValueError: naming the key.
    """
    checkpoint = open_checkpoint(Path(path))
    if checkpoint.is_delta:
        raise ValueError(DELTA)
    check_exact(checkpoint, key_shapes(checkpoint.config()))
