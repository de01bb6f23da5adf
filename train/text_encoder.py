"""Captions to features through the transformers library, an optional dependency, as the source's row says.

Features are hidden_states[-2] of the published encoder, the output of its second-to-last layer, without the final norm.
The last layer, the norm and the output projection are therefore not loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..l2p_core.device.accelerator import default_device
from ..l2p_core.files.quantised import FLOAT_DTYPES
from ..l2p_core.files.safetensors_header import Entry, read_header, shown
from ..l2p_core.files.sampled_hash import add_samples
from ..l2p_core.files.shards import files_of
from ..l2p_core.files.tensor_io import ChunkReader, joined
from ..l2p_core.sources.source import PublishedEncoder

SKIPPED_LAYERS = 1
DTYPE = torch.bfloat16
"""The dtype of weights and features, as published."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
"""A tokenizer's folder has one of these."""


@dataclass(frozen=True)
class EncoderFiles:
    """The files of an encoder, and how it was published.

    Attributes:
        weights: safetensors files.
        config: a config.json, if there is one.
        tokenizer: the tokenizer's folder.
        published: of the source's row.
    """

    weights: tuple[Path, ...]
    config: Path | None
    tokenizer: Path
    published: PublishedEncoder


def find(path: Path | str, tokenizer: Path | str | None, published: PublishedEncoder) -> EncoderFiles:
    """Find the files of a text encoder.

    Args:
        path: a folder as transformers saves it; a folder with `text_encoder` and `tokenizer` in it, as sources are
            published; or a single file such as the `qwen_3_4b.safetensors` of ComfyUI.
        tokenizer: the tokenizer's folder, if it is not in `path`.
        published: of the source's row.

    Raises:
        ValueError: if something is missing.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"The text encoder {path} does not exist: check the name.")
    folder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    weights = tuple(files_of(folder))
    config = folder / "config.json" if folder.is_dir() else None
    places = [Path(tokenizer)] if tokenizer else [path / "tokenizer", folder]
    for place in places:
        if any((place / name).is_file() for name in _VOCABULARIES):
            return EncoderFiles(weights, config if config and config.is_file() else None, place, published)
    raise ValueError(
        f"There is no tokenizer in {places[0]}: give the folder with the tokenizer.json of {published.title}"
        f"{published.tokenizer_elsewhere}."
    )


def caption_dim(files: EncoderFiles) -> int:
    """Width of an encoder's features, from the headers of its files.

    Raises:
        ValueError: if it is not a model of the published family.
    """
    return _Sizes.read(files, _stored_shapes(_stored(files))).hidden_size


def weight_bytes(files: EncoderFiles) -> int:
    """Bytes of an encoder's weights in bfloat16, including the layers that are not used."""
    return 2 * sum(math.prod(shape) for shape in _stored_shapes(_stored(files)).values())


def identity(files: EncoderFiles, dtype: torch.dtype = DTYPE) -> str:
    """The name of a cache of captions: a digest of the encoder's files and their use. It reads the headers and 64
    evenly spaced pieces of the weights, 64 KiB each, rather than all 8 GB.
    """
    digest, published = hashlib.sha256(), files.published
    for path in files.weights:
        add_samples(digest, path)
    small = [files.tokenizer / name for name in _TOKENIZER_FILES]
    for path in [files.config, *small] if files.config else small:
        if path.is_file():
            digest.update(f"{path.name} ".encode() + path.read_bytes())
    digest.update(published.template.encode())
    use = f"hidden_states[{-1 - SKIPPED_LAYERS}], {published.max_tokens} tokens, {str(dtype).removeprefix('torch.')}"
    return f"{published.family} {digest.hexdigest()[:32]}, {use}"


class TransformersEncoder:
    """A source's text encoder, a `TextEncoder` of `l2p_core.dataset.caption_cache`.

    Args:
        files: see `find`.
        device: where it runs; None is the GPU if there is one. Qwen3-4B takes 8 GB.
        dtype: of its weights and features.

    Raises:
        ValueError: if transformers is missing or too old, or the files are not those of such an encoder.
    """

    def __init__(self, files: EncoderFiles, device: torch.device | str | None = None, dtype: torch.dtype = DTYPE):
        transformers = _transformers()
        self.identity = identity(files, dtype)
        self.device = torch.device(device) if device else default_device()
        self._published = files.published
        self._tokenizer = _load_tokenizer(transformers, files)
        with _quiet(transformers):
            self._model = _load_model(transformers, files, dtype).to(self.device)

    @torch.no_grad()
    def encode(self, captions: Sequence[str], negative: bool = False) -> list[Tensor]:
        """Features of each caption, (L_i, caption_dim), on the CPU; cut at the published number of tokens.

        Args:
            captions: any texts; the empty one is a negative caption.
            negative: whether all of them are negative captions, from which guidance leads away.
        """
        cut = {"truncation": True, "max_length": self._published.max_tokens}
        tokens = [self._tokens(caption, negative, **cut) for caption in captions]
        lengths = [len(ids) for ids in tokens]
        # Attention is causal, so tokens after a caption do not change its features; any will do.
        ids = torch.tensor([row + [0] * (max(lengths) - len(row)) for row in tokens], device=self.device)
        mask = torch.arange(max(lengths), device=self.device) < torch.tensor(lengths, device=self.device)[:, None]
        hidden = self._model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return [row[:length].cpu() for row, length in zip(hidden, lengths, strict=True)]

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption in its template, before it is cut."""
        return [len(self._tokens(caption)) for caption in captions]

    def _tokens(self, caption: str, negative: bool = False, **cut: Any) -> list[int]:
        return list(self._tokenizer(self._published.text(caption, negative), **cut)["input_ids"])


def _transformers() -> Any:
    try:
        import transformers
        from transformers import Qwen3Model  # noqa: F401 (older versions lack it)
    except ImportError as error:
        raise ValueError(
            "Encoding captions needs the transformers library: install it with 'pip install \"transformers>=4.51\"'."
        ) from error
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep the library from warning of the weights that are not needed."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _load_tokenizer(transformers: Any, files: EncoderFiles) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(str(files.tokenizer), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{files.tokenizer} has no readable tokenizer: use the one of {files.published.title}."
        ) from error


def _load_model(transformers: Any, files: EncoderFiles, dtype: torch.dtype) -> Any:
    """The required layers, as transformers loads a folder, or the tensors of a single file."""
    stored = _stored(files)
    config = _config(transformers, files, _stored_shapes(stored))
    with torch.device("meta"):
        empty = transformers.AutoModel.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items() if name != "norm.weight"}
    for name, shape in wanted.items():
        _check(files, name, stored.get(name), shape)
    how: dict[str, Any] = {"config": config, "torch_dtype": dtype, "local_files_only": True}
    if files.config:
        model = type(empty).from_pretrained(str(files.config.parent), use_safetensors=True, **how)
    else:
        with ChunkReader() as reader:
            state = {name: reader.read(joined(name, [stored[name]])) for name in wanted}
        model = type(empty).from_pretrained(None, state_dict=state, **how)
    model.norm = nn.Identity()
    return model.eval().requires_grad_(False)


def _stored(files: EncoderFiles) -> dict[str, Entry]:
    headers = [read_header(path) for path in files.weights]
    return {entry.name.removeprefix("model."): entry for header in headers for entry in header.tensors.values()}


def _stored_shapes(stored: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in stored.items()}


def _check(files: EncoderFiles, name: str, found: Entry | None, shape: tuple[int, ...]) -> None:
    """Refuse files from which transformers would initialise a weight itself, or misread one."""
    if found is None:
        raise ValueError(
            f"{files.weights[0]} is not a complete {files.published.family} model: it has no {shown(name)}."
        )
    if found.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{found.path} is quantised ({shown(found.name)} is {found.dtype}): use the text encoder in bf16."
        )
    if found.shape != shape:
        raise ValueError(f"{found.path} is inconsistent: {shown(found.name)} is {found.shape}, not {shape}.")


def _config(transformers: Any, files: EncoderFiles, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The configuration without the unused layers; derived from the shapes if there is no config.json."""
    sizes, published = _Sizes.read(files, shapes), files.published
    if files.config:
        config = transformers.AutoConfig.from_pretrained(str(files.config.parent), local_files_only=True)
        if config.model_type != published.model_type:
            raise ValueError(
                f"{files.config} is of a {config.model_type} model: this model takes captions from {published.title}."
            )
    else:
        values = dict(published.unseen) | dataclasses.asdict(sizes)
        config = transformers.AutoConfig.for_model(published.model_type, **values)
    for name, value in published.settings:
        setattr(config, name, value)
    config.num_hidden_layers -= SKIPPED_LAYERS
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


@dataclass(frozen=True)
class _Sizes:
    """An encoder's sizes by transformers' names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @classmethod
    def read(cls, files: EncoderFiles, shapes: Mapping[str, tuple[int, ...]]) -> _Sizes:
        published = files.published
        try:
            vocabulary, width = shapes["embed_tokens.weight"]
            norm = shapes.get("layers.0.self_attn.q_norm.weight")
            head = norm[0] if norm else int(dict(published.unseen)["head_dim"])
            return cls(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=shapes["layers.0.mlp.gate_proj.weight"][0],
                num_hidden_layers=1
                + max(int(m[1]) for name in shapes if (m := re.match(r"layers\.(\d{1,4})\.", name))),
                num_attention_heads=shapes["layers.0.self_attn.q_proj.weight"][0] // head,
                num_key_value_heads=shapes["layers.0.self_attn.k_proj.weight"][0] // head,
                head_dim=head,
            )
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise ValueError(
                f"{files.weights[0]} is not a {published.family} text encoder: use {published.title}."
            ) from error
