"""Reading, validating and writing the header of a safetensors file.

Files come from strangers and broken downloads, so no declaration in a header is trusted before it is checked against
the file itself: no size read from it is allocated, and every fault is a `CheckpointError` of one sentence. The format's
own library is not required. It does not explain a faulty file in one sentence, it maps files into memory, where their
pages count as the process's, and it writes only tensors that are entirely in memory; here models are read and written
in chunks. Tests compare the two. Format: 8 bytes of header length, a JSON header, then the tensors back to back
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
MAX_DIMENSIONS = 64
MAX_DIGITS = 19

DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

_LENGTH_BYTES = 8
_ALIGNMENT = 8
_MAGIC = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: download the file itself"),
    (b"PK\x03\x04", "a zip or PyTorch pickle file (.pt, .ckpt), which can run code: only safetensors files are read"),
    (b"\x80", "a pickle file (.pt, .ckpt, .bin), which can run code: only safetensors files are read"),
    (b"GGUF", "a GGUF file, which neither this nor ComfyUI itself reads: use the model's safetensors file"),
    (b"<", "a web page, not a model: the download went wrong, download the file itself"),
)

SUFFIXES = (".safetensors", ".sft")
"""Endings of the names of safetensors files."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or used for this purpose; the message is one sentence for its user."""


class TensorSpec(NamedTuple):
    """A tensor to write, by its key."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its bytes are [start, stop) of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A checked header: `tensors` in file order; their bytes fill the file from `data_start` to its end."""

    path: Path
    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; `dtype` is one of `DTYPE_BITS`."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: if the file is missing, is another format, is incomplete or is inconsistent.
    """
    parsed, data_start, size = _parsed_header(path)
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _damaged(path, "its metadata is not text")
    entries = sorted(
        (_checked_entry(path, name, value, data_start) for name, value in parsed.items()),
        key=lambda entry: (entry.start, entry.stop),
    )
    _check_contiguous(path, entries, data_start, size)
    return Header(path, {entry.name: entry for entry in entries}, metadata, data_start)


def tensor_names(path: Path) -> list[str]:
    """The tensors that a header names, whatever the state of their data: even a truncated download shows what it is.

    Raises:
        CheckpointError: if the header cannot be read.
    """
    return [name for name in _parsed_header(path)[0] if name != "__metadata__"]


def _parsed_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's JSON object, where the data begin, and the size of the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = _header_bytes(path, file, size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    data_start = _LENGTH_BYTES + len(raw)
    try:
        parsed = parse_json(raw.decode("utf-8"))
    except ValueError as error:
        _damaged(path, f"its header is not valid JSON ({error})")
    if not isinstance(parsed, dict):
        _damaged(path, "its header is not a JSON object")
    return parsed, data_start, size


def parse_json(text: str, fractions: bool = False) -> Any:
    """Parse untrusted JSON: no repeated keys, no huge numbers, no unlimited nesting.

    Args:
        text: without a byte order mark.
        fractions: whether numbers such as 0.5 and 123.0 are allowed; a header has none.

    Raises:
        ValueError: naming the violation.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique_pairs,
            parse_int=_bounded_int,
            parse_float=float if fractions else _refuse_number,
            parse_constant=_refuse_number,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def header_bytes(
    specs: Iterable[TensorSpec], metadata: Mapping[str, str], data_start: int | None = None, offset: int = 0
) -> bytes:
    """The length and JSON header of a file with these tensors in their order; the first one's offset is `offset`.

    `data_start` pads the header with spaces, as the format allows, so that the data begin there; None takes the
    smallest aligned header.
    """
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, dtype, shape in specs:
        start, offset = offset, offset + nbytes(dtype, shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, offset]}
    text = json.dumps(fields, separators=(",", ":")).encode("utf-8")
    smallest = -(-(_LENGTH_BYTES + len(text)) // _ALIGNMENT) * _ALIGNMENT
    length = (smallest if data_start is None else data_start) - _LENGTH_BYTES
    assert len(text) <= length <= MAX_HEADER_BYTES, "the header does not fit the space reserved for it"
    return length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length)


def header_room(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> int:
    """Where the data may begin in a file of these tensors, before it is written.

    There is room for offsets of 16 digits, as in earlier versions: the same weights give the same file.
    """
    return len(header_bytes(specs, metadata, offset=10**15))


def shown(name: object) -> str:
    """A name from a file, quoted and short enough for a message."""
    text = ascii(name)
    return text if len(text) <= 80 else text[:77] + "..."


def some_are(keys: Sequence[str]) -> str:
    """The first of some keys and how many more there are, as the subject of a sentence: "'a' and 2 more are"."""
    more = f" and {len(keys) - 1} more are" if len(keys) > 1 else " is"
    return shown(keys[0]) + more


def _header_bytes(path: Path, file: BinaryIO, size: int) -> bytes:
    if size == 0:
        raise CheckpointError(f"{path} is empty: download it again.")
    start = file.read(64)
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if len(start) <= _LENGTH_BYTES or start[_LENGTH_BYTES] != ord("{") or length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} is {_kind_of(start)}.")
    if length > size - _LENGTH_BYTES:
        raise CheckpointError(
            f"{path} is incomplete: it has {size:,} bytes but its header alone needs "
            f"{length + _LENGTH_BYTES:,}; download it again."
        )
    file.seek(_LENGTH_BYTES)
    raw = file.read(length)
    if len(raw) != length:
        raise CheckpointError(f"{path} changed while it was read; try again when nothing else writes it.")
    return raw


def _kind_of(start: bytes) -> str:
    """The kind of a file that is not safetensors, detected from its first bytes."""
    stripped = start.lstrip()
    for magic, kind in _MAGIC:
        if stripped.startswith(magic):
            return kind
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        # The cut after the first bytes may split a character of text.
        text = start[: error.start].decode("utf-8") if error.start > len(start) - 4 else "\0"
    if all(char.isprintable() or char.isspace() for char in text):
        return "a text file, not a model: give a safetensors file"
    return "not a safetensors file: it has no valid header, so it is another format or damaged"


def _checked_entry(path: Path, name: str, value: object, data_start: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        _damaged(path, f"the entry of {shown(name)} does not consist of dtype, shape and offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _damaged(path, f"{shown(name)} has the unknown type {shown(dtype)}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        _damaged(path, f"{shown(name)} has the impossible shape {shown(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        _damaged(path, f"{shown(name)} has the impossible offsets {shown(offsets)}")
    start, stop = offsets
    if stop - start != nbytes(dtype, shape) or math.prod(shape) * DTYPE_BITS[dtype] % 8:
        _damaged(path, f"{shown(name)} has offsets that do not match its type and shape")
    return Entry(path, name, dtype, tuple(shape), data_start + start, data_start + stop)


def _is_sizes(value: object) -> bool:
    # bool is an int in Python, but true is not a size in JSON.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_contiguous(path: Path, entries: list[Entry], data_start: int, size: int) -> None:
    position = data_start
    for entry in entries:
        if entry.start != position:
            _damaged(path, f"the bytes of {shown(entry.name)} overlap another tensor or leave a hole")
        position = entry.stop
    if size < position:
        raise CheckpointError(f"{path} is incomplete: it has {size:,} of {position:,} bytes; download it again.")
    if size > position:
        _damaged(path, f"it is {size - position:,} bytes longer than its header says")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        again = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{shown(again)} appears twice")
    return unique


def _bounded_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError("a number is too large")
    return int(text)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{shown(text)} is not a whole number")


def _damaged(path: Path, fault: str) -> NoReturn:
    raise CheckpointError(f"{path} is damaged: {fault}; download it again.")
