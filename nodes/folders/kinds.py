"""Selects the files in the models folders that suit an input: its choices and its default. Only headers are read, each
once while its file stays unchanged; whether it did is looked up once for all inputs of a request.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from ...l2p_core.files.safetensors_header import read_header
from ...l2p_core.files.shards import files_of
from . import files

DELTA, INITIAL, PIXEL, LATENT, OTHER = "delta", "pixel-init", "pixel", "latent", "other"

_FRESH = 1.0
"""Seconds for which a file is not looked at again: the host asks some forty inputs for their choices in a request."""
_recent: dict[tuple[str, tuple[Path, ...]], tuple[float, str]] = {}
"""Until when each file's kind holds, and the kind, by its name and folders."""
_KIND_KEY = "l2p.kind"
_PIXEL_KEY = "local_decoder.out_conv.weight"


def deltas() -> list[str]:
    """Names of the deltas in models/diffusion_models, recognised by their metadata."""
    return [name for name, kind in _kinds() if kind == DELTA]


def whole_files(*folders: str) -> list[str]:
    """Names of the files in the folders (diffusion_models) that may be models on their own: all except deltas."""
    return [name for name, kind in _kinds(*folders) if kind != DELTA]


def models(*folders: str) -> list[str]:
    """`whole_files`, followed by the bundled latent model."""
    return [*whole_files(*folders), files.TINY]


def first(*kinds: str, folders: tuple[str, ...] = ()) -> str | None:
    """The name of the first file of the first kind that exists in the folders (diffusion_models)."""
    found: dict[str, str] = {}
    for name, kind in _kinds(*folders):
        if kind == kinds[0]:
            return name
        found.setdefault(kind, name)
    return next((found[kind] for kind in kinds if kind in found), None)


def _kinds(*folders: str) -> Iterator[tuple[str, str]]:
    """The name and kind of each file."""
    now, roots = time.monotonic(), tuple(files.roots(*folders))
    for name in files.choices(*folders):
        until, kind = _recent.get((name, roots), (0.0, OTHER))
        if now >= until:
            kind = _kind(name, folders, *files.fingerprint(name))
            _recent[name, roots] = now + _FRESH, kind
        yield name, kind


@lru_cache(maxsize=4096)
def _kind(name: str, folders: tuple[str, ...], *_state: str) -> str:
    try:
        headers = [read_header(file) for file in files_of(Path(files.existing(name, *folders)))]
    except ValueError:
        return OTHER
    stated = headers[0].metadata.get(_KIND_KEY)
    if stated in (DELTA, INITIAL):
        return stated
    keys = [key for header in headers for key in header.tensors]
    if any(key.endswith(_PIXEL_KEY) for key in keys):
        return PIXEL
    # The rows of the sources hold networks, which take a while to import: only where there is such a file.
    from ...l2p_core.config import COMFY_PREFIX
    from ...l2p_core.sources.recognition import recognised

    return LATENT if recognised(key.removeprefix(COMFY_PREFIX) for key in keys) else OTHER
