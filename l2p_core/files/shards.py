"""The files of a checkpoint: a single file, a folder with one, or shards with their index."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import Any

from .safetensors_header import CheckpointError, parse_json, shown

_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")
_INDEX_SUFFIX = ".safetensors.index.json"
_MAX_INDEX_BYTES = 100_000_000


def files_of(path: Path) -> list[Path]:
    """The safetensors files of a path, sorted by name.

    A folder may hold one file, or shards with an index (``diffusion_pytorch_model.safetensors.index.json``,
    ``model.safetensors.index.json``), or a ``transformer`` folder that does.

    Raises:
        CheckpointError: if there are none, a shard is missing, or the path is ambiguous.
    """
    if path.is_dir():
        return _files_in(path)
    if path.name.endswith(_INDEX_SUFFIX):
        return _shards(path)
    shard = _SHARD.search(path.name)
    if shard and int(shard[1]) > 1:
        raise CheckpointError(f"{path} is one of {int(shard[1])} shards: give the folder that holds them all.")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: check the name.")
    return [path]


def index_of(shard: str) -> str | None:
    """The name of the index that a shard's name belongs to; None for a file that is not a shard."""
    found = _SHARD.search(shard)
    return shard[: found.start()] + _INDEX_SUFFIX if found and int(found[1]) > 1 else None


def _files_in(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indexes) == 1:
        return _shards(indexes[0])
    if len(files) == 1:
        return files
    if (folder / "transformer").is_dir():
        return _files_in(folder / "transformer")
    if not files:
        raise CheckpointError(f"The folder {folder} holds no safetensors file: choose the one with the model.")
    raise CheckpointError(f"The folder {folder} holds {len(files)} safetensors files and no single index: choose one.")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, each a plain name beside it; each may be a link, as in a hub's snapshot."""
    names = _shard_names(index)
    for name in names:
        if not isinstance(name, str) or PureWindowsPath(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{index} names {shown(name)}, which is not a file beside it.")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"The shard {shown(name)} is missing beside {index}: download it too.")
    if not names:
        raise CheckpointError(f"{index} names no shards; download it again.")
    return [index.parent / name for name in sorted(names)]


def _shard_names(index: Path) -> set[Any]:
    try:
        content = index.read_bytes() if index.stat().st_size <= _MAX_INDEX_BYTES else None
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror or error}.") from error
    if content is None:
        raise CheckpointError(f"{index} is far too large for an index: download it again.")
    try:
        # Other fields, such as the total size, are not used; some programs write that as 123.0.
        return set(parse_json(content.decode("utf-8-sig"), fractions=True)["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a valid index of shards; download it again.") from error
