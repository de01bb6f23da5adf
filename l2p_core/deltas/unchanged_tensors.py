"""The tensors that a delta takes from its base: dtype, shape and hash of each, however the base is stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ..checkpoint import Checkpoint
from ..files import metadata
from ..files.quantised import FLOAT_DTYPES
from ..files.safetensors_header import CheckpointError, parse_json
from ..files.tensor_io import ChunkReader, Stored, equal_bytes

DIGEST_LENGTH = 32


class UnchangedTensor(NamedTuple):
    """A tensor of the base; the digest is half a SHA-256 of its bytes as `dtype`."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


def unchanged_text(unchanged: Mapping[str, UnchangedTensor]) -> str:
    """`unchanged` as metadata text; see `parse_unchanged`."""
    return json.dumps(unchanged, separators=(",", ":"))


def parse_unchanged(delta: Checkpoint) -> dict[str, UnchangedTensor]:
    """The tensors that a delta takes from its base.

    Raises:
        CheckpointError: if the delta does not list them, or the list is invalid.
    """
    unchanged = _parsed(delta.metadata.get(metadata.KEPT, ""))
    if unchanged is None or not unchanged.keys().isdisjoint(delta.tensors):
        raise CheckpointError(f"{delta.path} is damaged: its description of its base is missing or not valid.")
    return unchanged


def parse_originals(quantised: Checkpoint) -> dict[str, UnchangedTensor]:
    """The tensors that a quantised file was made from; nothing if it does not list them.

    Raises:
        CheckpointError: if the list is invalid.
    """
    originals = _parsed(quantised.metadata.get(metadata.ORIGINALS, "{}"))
    if originals is None:
        raise CheckpointError(f"{quantised.path} is damaged: its list of original tensors is not valid.")
    return originals


def _parsed(text: str) -> dict[str, UnchangedTensor] | None:
    """The list in metadata; None if it is not valid."""
    try:
        listed = parse_json(text).items()
        found = {name: UnchangedTensor(dtype, tuple(shape), digest) for name, (dtype, shape, digest) in listed}
    except (ValueError, TypeError, AttributeError):
        return None
    return found if all(map(_is_valid, found.values())) else None


def _is_valid(entry: UnchangedTensor) -> bool:
    sizes = all(type(size) is int for size in entry.shape)
    return entry.dtype in FLOAT_DTYPES and sizes and isinstance(entry.digest, str)


def short_digest(digest: Any) -> str:
    """A hashlib digest in the short form of `UnchangedTensor`."""
    return digest.hexdigest()[:DIGEST_LENGTH]


def digest_if_equal(reader: ChunkReader, stored: Stored, other: Stored | None) -> str | None:
    """The digest of a tensor if the other one, converted to its dtype, has the same bytes."""
    if other is None or other.shape != stored.shape:
        return None
    digest = hashlib.sha256()
    pairs = zip(reader.chunks(stored), reader.chunks(other.as_dtype(stored.dtype)), strict=True)
    for chunk, other_chunk in pairs:
        if not equal_bytes(chunk, other_chunk):
            return None
        reader.hash(digest, chunk)
    reader.finish_hashing()
    return short_digest(digest)


def digest_of(stored: Stored) -> str:
    """The digest of a tensor on disk; cached while its files stay unchanged, because training saves repeatedly."""
    stats = [piece.path.stat() for piece in stored.pieces]
    return _digest_of(stored, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


@lru_cache(maxsize=4096)
def _digest_of(stored: Stored, stamps: tuple[tuple[int, int], ...]) -> str:
    digest = hashlib.sha256()
    with ChunkReader() as reader:
        for chunk in reader.chunks(stored):
            reader.hash(digest, chunk)
        reader.finish_hashing()
    return short_digest(digest)
