"""A cache of caption features on disk, so that training never holds the text encoder.

Each caption has one file, named by the caption's content, in a folder named by the encoder. Runs and data sets can
therefore share them, several processes can fill a cache at once, and an interrupted fill resumes. Features of the 6B
model take about 5 kB per token; they are read together with their image, not kept in memory.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..device import accelerator
from ..files.metadata import KIND as KIND_KEY
from ..files.safetensors_header import CheckpointError, read_header
from ..files.tensor_file import load_tensors, save

KIND = "caption"
ENCODER_KEY, CAPTION_KEY = "l2p.encoder", "l2p.caption"
TOKENS_KEY = "l2p.tokens"
FEATURES = "features"
EMPTY = ""
"""The caption for guidance and caption dropout; every cache holds it."""


_TEXT_BYTES = 3
"""UTF-8 bytes of text per token, about: English has four or five, digits and rare scripts one."""
_TEMPLATE_TOKENS = 32
_FILE_BYTES = 4096
"""Bytes of a caption's file beside its features: the header, and the unused rest of the disk's last block."""


def bytes_of_features(captions: Iterable[str], max_tokens: int, width: int, itemsize: int) -> int:
    """Estimate the bytes on disk of the features of captions.

    Args:
        captions: not encoded yet.
        max_tokens: the length at which they are cut.
        width: of the features.
        itemsize: bytes of an element.
    """
    tokens = (min(max_tokens, len(caption.encode()) // _TEXT_BYTES + _TEMPLATE_TOKENS) for caption in captions)
    return sum(count * width * itemsize + _FILE_BYTES for count in tokens)


class TextEncoder(Protocol):
    """Turns captions into the features that the model was trained with."""

    @property
    def identity(self) -> str:
        """Everything that the features depend on besides the caption: weights, template, layer, precision."""
        ...

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features of each caption, (L_i, caption_dim), cut or not, of any float type on any device."""
        ...

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before it is cut; fewer than its features only if the tokenizer does not know."""
        ...


class CaptionCache:
    """Caption features on disk, of one encoder.

    Args:
        folder: shared by encoders and data sets; created if missing.
        identity: the encoder's, see `TextEncoder`.
        max_tokens: at which captions are cut, their template included. In a causal text encoder the cut does not
            change the features of the first tokens.
    """

    def __init__(self, folder: Path | str, identity: str, max_tokens: int):
        self.identity, self.max_tokens = identity, max_tokens
        self.folder = Path(folder) / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._lengths: dict[str, int] = {}

    def path(self, caption: str) -> Path:
        """The file of a caption's features."""
        digest = hashlib.sha256(caption.encode()).hexdigest()[:40]
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def missing(self, captions: Iterable[str]) -> list[str]:
        """The captions, including the empty one, that have no complete file yet; each once."""
        return [caption for caption in dict.fromkeys([EMPTY, *captions]) if not self._is_there(caption)]

    def cut(self, captions: Iterable[str]) -> dict[str, int]:
        """The captions that are cut, with their numbers of tokens; known once `fill` has seen them."""
        lengths = {caption: self._lengths.get(caption, 0) for caption in captions}
        return {caption: length for caption, length in lengths.items() if length > self.max_tokens}

    def fill(
        self,
        captions: Iterable[str],
        make_encoder: Callable[[], TextEncoder],
        *,
        batch_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Encode the missing captions and the empty one, and return how many were missing.

        Each caption is written as soon as it is encoded, so an interruption loses at most one batch.

        Args:
            captions: of the data; processes that share the work each pass a part.
            make_encoder: called only if something is missing. The encoder is released before this returns.
            batch_size: captions encoded at once, of about equal length.
            progress: called with (captions encoded, captions to encode); an exception from it stops the work.

        Raises:
            ValueError: if the encoder is not the cache's, returns features that are not a finite matrix, or a file
                cannot be written.
        """
        missing = sorted(self.missing(captions), key=lambda caption: (-len(caption), caption))
        if not missing:
            return 0
        encoder = make_encoder()
        try:
            if encoder.identity != self.identity:
                raise ValueError(f"This cache is for captions of {self.identity}, not of {encoder.identity}.")
            # The longest first: if they do not fit into memory, this shows at once.
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                with torch.no_grad():
                    features = encoder.encode(batch)
                for caption, matrix, length in zip(batch, features, encoder.lengths(batch), strict=True):
                    self._write(caption, matrix, max(length, len(matrix)))
                if progress:
                    progress(start + len(batch), len(missing))
        finally:
            del encoder
            # Release the encoder's memory now: training needs as much next.
            gc.collect()
            accelerator.empty_cache(accelerator.default_device())
        return len(missing)

    def read(self, caption: str) -> Tensor:
        """Features of a caption, (L, caption_dim), L at most `max_tokens`, float32.

        Raises:
            ValueError: if they are not in the cache or their file is damaged.
        """
        path = self.path(caption)
        if not path.exists():
            raise ValueError(
                f"The caption {_short(caption)} has no features in {self.folder}: encode the captions first."
            )
        tensors, metadata = load_tensors(path)
        said = metadata.get(KIND_KEY), metadata.get(ENCODER_KEY), metadata.get(CAPTION_KEY)
        if said != (KIND, self.identity, caption) or FEATURES not in tensors:
            raise ValueError(
                f"{path} is not the file of the caption {_short(caption)}: delete it; it will be created again."
            )
        return tensors[FEATURES][: self.max_tokens].float()  # version 0.1 stored all tokens that ComfyUI encodes

    def _is_there(self, caption: str) -> bool:
        """Whether the file is complete: copies of a cache may be truncated."""
        try:
            header = read_header(self.path(caption))
        except CheckpointError:
            return False
        if FEATURES not in header.tensors:
            return False
        rows = header.tensors[FEATURES].shape[0]
        # Files of version 0.1 do not state the caption's length: those at the limit count as cut.
        said = header.metadata.get(TOKENS_KEY, "")
        self._lengths[caption] = int(said) if said.isdecimal() else rows + (rows == self.max_tokens)
        return True

    def _write(self, caption: str, features: Tensor, length: int) -> None:
        if features.ndim != 2 or not features.is_floating_point() or not bool(features.isfinite().all()):
            raise ValueError(
                f"The features of the caption {_short(caption)} are not a matrix of finite numbers (shape "
                f"{tuple(features.shape)}, {features.dtype}): the text encoder's file may be damaged."
            )
        path = self.path(caption)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {KIND_KEY: KIND, ENCODER_KEY: self.identity, CAPTION_KEY: caption, TOKENS_KEY: str(length)}
        self._lengths[caption] = length
        try:
            save({FEATURES: features[: self.max_tokens]}, path, metadata, overwrite=True)
        except CheckpointError:
            # On Windows a file that another process has open cannot be replaced; it then has the same content.
            if not self._is_there(caption):
                raise


def _short(caption: str) -> str:
    return repr(caption if len(caption) <= 60 else caption[:57] + "...")
