"""Checkpoints: a safetensors file or a folder of shards, opened as one set of tensors in ComfyUI layout.

Opening reads headers only. Both key layouts, the prefix ``model.diffusion_model.`` and mixed dtypes are understood;
quantised weights are recognised, and refused where exact weights are needed. No key is ignored: each is a weight of the
model, a scale of a weight (`quantised`), or listed among the keys that a file may have beside them (`recognise`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from .config import COMFY_PREFIX, ModelConfig, PixelConfig
from .files.eight_bit_formats import check_readable, read_weight
from .files.metadata import DELTA, KIND, stored_config
from .files.quantised import LayerSettings, check_layers, layer_settings, summary, unpacked
from .files.recognise import is_beside, is_unused, other_kind, unknown_prefix
from .files.safetensors_header import CheckpointError, Entry, Header, read_header, shown, some_are
from .files.shards import files_of
from .files.tensor_file import load_tensors, save
from .files.tensor_io import DTYPE_NAMES, ByteCounter, ChunkReader, ProgressCallback, Stored, joined
from .layouts import comfy_sources
from .model import L2PModel, LatentModel, key_shapes
from .sources import source_of
from .sources.recognition import known_models, nearest_source

__all__ = ["Checkpoint", "CheckpointError", "load_latent", "load_model", "load_tensors", "save"]

_Model = TypeVar("_Model", L2PModel, LatentModel)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: the file or folder it was opened from.
        files: the headers of its files, in the order of the file names.
        tensors: {ComfyUI key: where its elements are stored}.
        outside: keys of an all-in-one file that lie outside the diffusion model.
        metadata: of its only file; empty for shards.
    """

    path: Path
    files: tuple[Header, ...]
    tensors: dict[str, Stored]
    outside: tuple[str, ...]
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.tensors.values())

    @property
    def paths(self) -> list[Path]:
        return [header.path for header in self.files]

    @property
    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    @property
    def is_delta(self) -> bool:
        """Whether this is a trained part, to be merged onto its base (see `delta`)."""
        return self.metadata.get(KIND) == DELTA

    @cached_property
    def layer_settings(self) -> LayerSettings:
        """The quantised layers and how each is stored; reads their markers.

        Raises:
            CheckpointError: if one is not valid.
        """
        return layer_settings(self.path, self.tensors, self.metadata)

    @property
    def quantisation(self) -> str | None:
        """The format of quantised weights in a few words, such as "nvfp4"; None for plain floating-point weights."""
        return summary(self.tensors, self.layer_settings)

    def config(self) -> ModelConfig:
        """The model's sizes: as stated in the metadata if the shapes agree with that, otherwise read off the shapes.

        Raises:
            CheckpointError: if this is a delta, another kind of model, or its shapes contradict each other.
        """
        self._refuse_other_models()
        shapes = unpacked(self.shapes, self.layer_settings)
        try:
            found = ModelConfig.from_shapes(shapes)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        stated = stored_config(self.metadata)
        # They may differ where weights are filled up.
        if stated and stated != found and _kind(stated) == _kind(found):
            with suppress(CheckpointError):
                check_exact(self, key_shapes(stated))
                return stated
        return found

    @property
    def input_dtype(self) -> str:  # of the patch embedder
        return self.tensors[nearest_source(self.tensors).embedder_weight].dtype

    def plain_config(self) -> ModelConfig:
        """The model's sizes, if its weights are plain floating-point numbers.

        Raises:
            CheckpointError: as `config`, and if the checkpoint is quantised.
        """
        self._refuse_other_models()
        if self.quantisation:
            raise CheckpointError(
                f"{self.path} is quantised ({self.quantisation}), which suffices for sampling only: use the bf16, fp16 "
                "or fp32 file of the same model."
            )
        return self.config()

    def pixel_config(self, plain: bool = True) -> PixelConfig:
        """`plain_config` of what must be an L2P pixel model; `config` where its weights need not be `plain`.

        Raises:
            CheckpointError: as those, and for a latent model.
        """
        config = self.plain_config() if plain else self.config()
        if not isinstance(config, PixelConfig):
            raise CheckpointError(
                f"{self.path} is a latent model, not an L2P pixel model: convert it to L2P first, or give another."
            )
        return config

    def _refuse_other_models(self) -> None:
        if self.is_delta:
            raise CheckpointError(
                f"{self.path} is an L2P delta, which holds only what was trained: merge it onto its base first, or "
                "give that base here and this file as the delta."
            )
        kind = other_kind(self.tensors, self.outside, self.metadata.get("model_class", ""))
        if kind:
            raise CheckpointError(f"{self.path} is {kind}, but a {known_models()} model was expected.")
        prefix = unknown_prefix(self.tensors)
        if prefix:
            raise CheckpointError(
                f"{self.path} has keys with the unknown prefix {shown(prefix)}: save it again with the prefix "
                f"'{COMFY_PREFIX}' or none, as {known_models()} models have."
            )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a safetensors file, a folder with one or with shards and their index, or an index file.

    Raises:
        CheckpointError: if it is missing, something else, incomplete or contradicts itself.
    """
    path = Path(path)
    headers = tuple(read_header(file) for file in files_of(path))
    entries: dict[str, Entry] = {}
    for header in headers:
        for name, entry in header.tensors.items():
            if name in entries:
                raise CheckpointError(f"{path} is damaged: two of its files contain {shown(name)}; download it again.")
            entries[name] = entry
    prefixed = [key for key in entries if key.startswith(COMFY_PREFIX)]
    outside = tuple(key for key in entries if prefixed and not key.startswith(COMFY_PREFIX))
    try:
        sources = comfy_sources(prefixed or entries)
        tensors = {name: joined(name, [entries[key] for key in keys]) for name, keys in sources.items()}
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Checkpoint(path, headers, tensors, outside, headers[0].metadata if len(headers) == 1 else {})


def load_model(
    path: str | Path | Checkpoint,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: ProgressCallback | None = None,
) -> L2PModel:
    """Load an L2P pixel model of any variant.

    Args:
        path: a file, folder or opened checkpoint, in either key layout.
        dtype: of all weights; None takes that of the patch embedder.
        device: where the weights go, tensor by tensor.
        progress: called with (bytes read, bytes in all).

    Raises:
        CheckpointError: if it is not a complete L2P model, or is quantised in a format that is not read here.
    """
    checkpoint = _opened(path)
    return _filled(empty_model(checkpoint), checkpoint, dtype, device, progress)


def load_latent(
    path: str | Path | Checkpoint,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: ProgressCallback | None = None,
) -> LatentModel:
    """Load a latent source model; arguments and errors as for `load_model`."""
    checkpoint = _opened(path)
    config = checkpoint.config()
    if isinstance(config, PixelConfig):
        raise CheckpointError(f"{checkpoint.path} is an L2P pixel model, but its latent source was expected.")
    return _filled(_empty(LatentModel, checkpoint, config), checkpoint, dtype, device, progress)


def empty_model(checkpoint: Checkpoint) -> L2PModel:
    """The pixel model of a checkpoint, without its weights (on the device "meta").

    Raises:
        CheckpointError: if it is not one complete L2P model, or is quantised in a format that is not read here.
    """
    return _empty(L2PModel, checkpoint, checkpoint.pixel_config(plain=False))


def _empty(kind: type[_Model], checkpoint: Checkpoint, config: ModelConfig) -> _Model:
    check_readable(checkpoint.path, checkpoint.quantisation, checkpoint.layer_settings)
    check_exact(checkpoint, key_shapes(config))
    with torch.device("meta"):
        return kind(config)


def _filled(
    model: _Model,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    device: torch.device | str,
    progress: ProgressCallback | None,
) -> _Model:
    """A model with the weights of its checkpoint."""
    name = checkpoint.input_dtype if dtype is None else DTYPE_NAMES[dtype]
    weights = read_weights(checkpoint, dict.fromkeys(model.state_dict(), name), progress)
    model.load_state_dict({key: weight.to(device) for key, weight in weights}, assign=True)
    return model


def read_weights(
    checkpoint: Checkpoint, dtypes: Mapping[str, str], progress: ProgressCallback | ByteCounter | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights one by one, on the CPU; those of quantised layers are dequantised.

    Args:
        checkpoint: to read.
        dtypes: which weights, in this order, and the name that safetensors gives the dtype of each.
        progress: called with (bytes read, total bytes); or a counter shared by several calls.
    """
    total = sum(checkpoint.tensors[key].nbytes for key in dtypes)
    counter = progress if isinstance(progress, ByteCounter) else ByteCounter(total, progress)
    with ChunkReader() as reader:
        for key, dtype in dtypes.items():
            stored = checkpoint.tensors[key]
            yield key, read_weight(reader, checkpoint.tensors, key, dtype)
            counter.advance(stored.nbytes)


def check_complete(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a checkpoint has all keys and shapes of a model; it may have more.

    Raises:
        CheckpointError: naming the first key, or part of a quantised layer, that is missing or of another shape.
    """
    check_tensors(checkpoint.path, checkpoint.tensors, checkpoint.layer_settings, expected, may_have_more=True)


def check_exact(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a checkpoint has exactly the keys and shapes of a model.

    Raises:
        CheckpointError: naming the first key that is missing, unknown or of another shape.
    """
    check_tensors(checkpoint.path, checkpoint.tensors, checkpoint.layer_settings, expected)
    beside = [key for key in checkpoint.outside if not is_beside(key)]
    if beside:
        raise CheckpointError(
            f"{checkpoint.path} has tensors outside its diffusion model that belong to no known part: "
            f"{some_are(beside)} unknown."
        )


def check_tensors(
    path: Path | str,
    tensors: Mapping[str, Stored],
    settings: LayerSettings,
    expected: Mapping[str, tuple[int, ...]],
    may_have_more: bool = False,
) -> None:
    """`check_exact` of a diffusion model's tensors, or `check_complete` if it `may_have_more`; `path` is the file's
    name in error messages.

    Raises:
        CheckpointError: as these.
    """
    missing = [key for key in expected if key not in tensors]
    if missing:
        raise CheckpointError(f"{path} is incomplete: {some_are(missing)} missing.")
    quantised = check_layers(path, tensors, settings, expected)
    for key, shape in expected.items():
        if key not in quantised and tensors[key].shape != shape:
            raise CheckpointError(f"{path}: {shown(key)} has the shape {tensors[key].shape}, but {shape} was expected.")
    unknown = [key for key in tensors if key not in expected and key not in quantised and not is_unused(key)]
    if unknown and not may_have_more:
        raise CheckpointError(f"{path} has tensors that such a model does not have: {some_are(unknown)} unknown.")


def _kind(config: ModelConfig) -> tuple[object, ...]:
    """The facts in which a stated configuration and the tensors must agree."""
    return type(config), config.variant if isinstance(config, PixelConfig) else None, source_of(config).blocks(config)


def _opened(path: str | Path | Checkpoint) -> Checkpoint:
    return path if isinstance(path, Checkpoint) else open_checkpoint(path)
