"""Reading and writing tensors as bytes in chunks, so that memory does not grow with the model.

A few reused buffers are better than mapping the file, whose pages would count as the process's memory. Hashing runs in
a thread in parallel with reading and writing; all of them release the interpreter lock.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.finite import is_finite
from .atomic import write_all
from .safetensors_header import DTYPE_BITS, CheckpointError, Entry, TensorSpec, header_bytes, nbytes, shown

# Small enough to stay in the processor's cache for hashing and writing: chunks of 8 MiB take twice the time.
CHUNK_BYTES = 1 << 20

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
STORED_DTYPES = {**TORCH_DTYPES, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""These, and the dtypes that have a meaning only with the scales of a quantised layer."""

ProgressCallback = Callable[[int, int], None]
"""Called with what is done and the total, in bytes unless stated otherwise; an exception from it stops the work and
leaves no file."""


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: the concatenated elements of its pieces, tensors of files, read as `dtype`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Entry, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)

    @property
    def stored_dtype(self) -> str:
        """The dtype of the elements in the file, if all pieces share one, whatever they are read as."""
        found = {piece.dtype for piece in self.pieces}
        return found.pop() if len(found) == 1 else self.dtype

    @property
    def place(self) -> tuple[Path, int]:
        """The file and byte where it begins; in this order tensors are read sequentially."""
        return self.pieces[0].path, self.pieces[0].start

    def as_dtype(self, dtype: str) -> Stored:
        """The same tensor, converted to `dtype` while it is read."""
        return replace(self, dtype=dtype)

    def runs(self, first: int, count: int) -> Iterator[tuple[Entry, int, int]]:
        """The elements [first, first + count) as (piece, first element in it, count)."""
        for piece in self.pieces:
            held = (piece.stop - piece.start) // itemsize(piece.dtype)
            here = min(held - first, count)
            if here > 0:
                yield piece, first, here
                count -= here
                first += here
            first -= held


def joined(name: str, parts: list[Entry]) -> Stored:
    """The tensors of a file as one, stacked along the first dimension; the widest dtype holds them all.

    Raises:
        ValueError: if they do not fit together.
    """
    first, *others = parts
    if not others:
        return Stored(name, first.dtype, first.shape, (first,))
    if any(other.shape[1:] != first.shape[1:] or not other.shape for other in others):
        raise ValueError(f"The q, k and v of {shown(name)} have different shapes: the model is damaged.")
    rows = sum(part.shape[0] for part in parts)
    return Stored(name, _widest(name, {part.dtype for part in parts}), (rows, *first.shape[1:]), tuple(parts))


def _widest(name: str, dtypes: set[str]) -> str:
    """The floating-point type that holds the values of all these types."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    if not all(dtype in TORCH_DTYPES and TORCH_DTYPES[dtype].is_floating_point for dtype in dtypes):
        raise ValueError(f"The q, k and v of {shown(name)} cannot be joined: they are {', '.join(sorted(dtypes))}.")
    return DTYPE_NAMES[functools.reduce(torch.promote_types, (TORCH_DTYPES[dtype] for dtype in dtypes))]


class ByteCounter:
    """Counts bytes for a callback."""

    def __init__(self, total: int, callback: ProgressCallback | None):
        self.done, self.total, self.callback = 0, total, callback

    def advance(self, count: int) -> None:
        self.done += count
        if self.callback:
            self.callback(self.done, self.total)


class ChunkReader(AbstractContextManager["ChunkReader"]):
    """Reads stored tensors chunk by chunk, and hashes chunks in a thread."""

    def __init__(self) -> None:
        self._files: dict[Path, FileIO] = {}
        # Four: two streams compared side by side, and the two chunks before them that may still be hashed.
        self._buffers = deque(torch.empty(CHUNK_BYTES, dtype=torch.uint8) for _ in range(4))
        self._scratch = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._hashing: deque[Future[None]] = deque()

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown()
        for file in self._files.values():
            file.close()

    def chunks(self, stored: Stored) -> Iterator[memoryview]:
        """The tensor's bytes, as `stored.dtype`; a chunk stays valid until the second one after it is requested.

        Tensors of one shape and dtype have the same chunk borders, whatever their pieces are.
        """
        per_chunk = CHUNK_BYTES // itemsize(stored.dtype)
        for first in range(0, stored.numel, per_chunk):
            count = min(per_chunk, stored.numel - first)
            self.finish_hashing(pending=1)
            self._buffers.rotate(-1)
            buffer = self._buffers[0][: count * itemsize(stored.dtype)]
            self._fill(buffer, stored, first, count)
            yield as_bytes(buffer)

    def read(self, stored: Stored) -> Tensor:
        """The whole tensor as `stored.dtype`, read directly into its memory."""
        tensor = torch.empty(stored.shape, dtype=STORED_DTYPES[stored.dtype])
        self._fill(tensor.view(-1).view(torch.uint8), stored, 0, stored.numel)
        return tensor

    def hash(self, digest: Any, chunk: memoryview) -> None:
        """Add the chunk last read to a hashlib digest, in the background; see `finish_hashing`."""
        self._hashing.append(self._worker.submit(digest.update, chunk))

    def finish_hashing(self, pending: int = 0) -> None:
        """Wait until at most `pending` chunks remain to be hashed."""
        while len(self._hashing) > pending:
            self._hashing.popleft().result()

    def _fill(self, out: Tensor, stored: Stored, first: int, count: int) -> None:
        """Read the elements [first, first + count) into the bytes `out`."""
        filled = 0
        for piece, offset, length in stored.runs(first, count):
            size = length * itemsize(stored.dtype)
            if piece.dtype == stored.dtype:
                start = piece.start + offset * itemsize(piece.dtype)
                self._read_exactly(piece.path, start, out[filled : filled + size])
            else:
                self._convert(piece, offset, out[filled : filled + size].view(TORCH_DTYPES[stored.dtype]))
            filled += size

    def _convert(self, piece: Entry, first: int, out: Tensor) -> None:
        """Read the elements of a piece from `first` on into `out`, in its dtype."""
        width = itemsize(piece.dtype)
        for part in out.split(CHUNK_BYTES // width):
            raw = self._scratch[: len(part) * width]
            self._read_exactly(piece.path, piece.start + first * width, raw)
            part.copy_(raw.view(TORCH_DTYPES[piece.dtype]))
            first += len(part)

    def _read_exactly(self, path: Path, start: int, out: Tensor) -> None:
        if path not in self._files:
            self._files[path] = open(path, "rb", buffering=0)  # noqa: SIM115 (closed on exit)
        file = self._files[path]
        if file.tell() != start:
            file.seek(start)
        view = as_bytes(out)
        while view:
            count = file.readinto(view)
            if not count:
                raise CheckpointError(f"{path} changed while it was read; try again when nothing else writes it.")
            view = view[count:]


class TensorWriter:
    """Writes a safetensors file: tensors in any order, then the header in the space reserved for it.

    Attributes:
        places: the position of each tensor's first byte, in the order of the file.
        broken: the first tensor with NaN or infinity in it, found while writing.
    """

    def __init__(self, file: FileIO, specs: Sequence[TensorSpec], data_start: int):
        self._file, self._specs, self._data_start = file, specs, data_start
        *self._starts, self._stop = accumulate((nbytes(dtype, shape) for _, dtype, shape in specs), initial=0)
        self.places = {spec.name: start for spec, start in zip(specs, self._starts, strict=True)}
        self.broken: str | None = None

    def write(self, position: int, data: memoryview) -> None:
        """Write bytes, whole elements of one tensor or of several of a dtype, within the `places`."""
        if data and self.broken is None:
            spec = self._specs[bisect_right(self._starts, position) - 1]
            dtype = STORED_DTYPES.get(spec.dtype)
            if dtype and dtype.is_floating_point and not is_finite(torch.frombuffer(data, dtype=dtype)):
                self.broken = spec.name
        _write_at(self._file, self._data_start + position, data)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header."""
        self._file.truncate(self._data_start + self._stop)
        _write_at(self._file, 0, memoryview(header_bytes(self._specs, metadata, self._data_start)))


def copy_tensor(reader: ChunkReader, stored: Stored, writer: TensorWriter, position: int, digest: Any = None) -> None:
    """Copy a tensor chunk by chunk to its place in the file, and hash it on the way."""
    for chunk in reader.chunks(stored):
        if digest:
            reader.hash(digest, chunk)
        writer.write(position, chunk)
        position += len(chunk)
    reader.finish_hashing()


def itemsize(dtype: str) -> int:
    """Bytes of one element of a dtype that has whole bytes."""
    return DTYPE_BITS[dtype] // 8


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def equal_bytes(left: memoryview, right: memoryview) -> bool:
    """Whether two byte ranges are equal; numpy compares long words, many times faster than Python or torch."""
    number = np.uint64 if len(left) % 8 == 0 else np.uint8
    return np.array_equal(np.frombuffer(left, number), np.frombuffer(right, number))


def converted(chunk: memoryview, dtype: str, new_dtype: str) -> memoryview:
    """Bytes of `dtype` elements converted to `new_dtype`; the same memory if the dtypes are equal."""
    if dtype == new_dtype:
        return chunk
    return as_bytes(torch.frombuffer(chunk, dtype=TORCH_DTYPES[dtype]).to(TORCH_DTYPES[new_dtype]))


def _write_at(file: FileIO, position: int, data: memoryview) -> None:
    if file.tell() != position:
        file.seek(position)
    write_all(file, data)
