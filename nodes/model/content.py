"""A stable digest of the host's in-memory models: weights, their patches, and descriptions of their use."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

_PIECES, _PIECE = 8, 1024  # per tensor, and elements per piece


def content_digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of weights, patches and tokens; the same after every start.

    Only pieces of each tensor are read, so that large models take little time.
    """
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        _add_tensor(digest, value)
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            _add(digest, key)
            _add(digest, value[key])
    elif isinstance(value, list | tuple | set):
        digest.update(f"{len(value)} ".encode())
        for item in sorted(value, key=repr) if isinstance(value, set) else value:
            _add(digest, item)
    elif value is None or isinstance(value, str | bytes | int | float):
        digest.update(f"{value!r} ".encode())
    elif callable(value):
        digest.update(f"{getattr(value, '__qualname__', type(value).__qualname__)} ".encode())
    else:
        # Weight adapters of the host: LoRA and its kin, with their tensors in attributes.
        digest.update(f"{type(value).__qualname__} ".encode())
        _add(digest, vars(value))


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
    numbers = tensor.detach().reshape(-1)
    for piece in range(_PIECES):
        start = len(numbers) * piece // _PIECES
        stop = min(start + _PIECE, len(numbers) * (piece + 1) // _PIECES)
        digest.update(numbers[start:stop].cpu().contiguous().view(torch.uint8).numpy().tobytes())
