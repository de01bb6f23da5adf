"""Captions to features as L2P was trained: Qwen3-4B through the transformers library, an optional dependency.

The published encoder formats the caption as a user turn followed by the generation prompt, and takes hidden_states[-2]
of at most 512 tokens: the output of the second-to-last layer, without the final norm. The last layer, the norm and the
output projection are therefore not loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..l2p_core.dataset.caption_cache import MAX_TOKENS
from ..l2p_core.device.accelerator import default_device
from ..l2p_core.files.safetensors_header import Entry, Header, read_header, shown
from ..l2p_core.files.sampled_hash import add_samples
from ..l2p_core.files.shards import files_of
from ..l2p_core.files.tensor_io import TORCH_DTYPES, ChunkReader, Piece, Stored

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""Qwen3's chat template for one user turn with the generation prompt, thinking allowed."""
SKIPPED_LAYERS = 1
DTYPE = torch.bfloat16
"""Of weights and features, as published."""
PAD_TOKEN = 151643  # the features of padding are dropped, so that any token serves where a vocabulary is smaller
# What Qwen3 checkpoints do not show by their shapes; https://huggingface.co/Qwen/Qwen3-4B/blob/main/config.json
ROPE_THETA = 1_000_000.0
NORM_EPS = 1e-6

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class QwenFiles:
    """The files of an encoder: safetensors files, a config.json if there is one, and the tokenizer's folder."""

    weights: tuple[Path, ...]
    config: Path | None
    tokenizer: Path


def find(path: Path | str, tokenizer: Path | str | None = None) -> QwenFiles:
    """Find the files of a text encoder.

    Args:
        path: a folder as transformers saves it; a folder with `text_encoder` and `tokenizer` in it, as Z-Image and
            L2P are published; or a single file such as the `qwen_3_4b.safetensors` of ComfyUI.
        tokenizer: the tokenizer's folder, if it is not in `path`; ComfyUI has one in
            `comfy/text_encoders/qwen25_tokenizer`.

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
        if any((place / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            return QwenFiles(weights, config if config and config.is_file() else None, place)
    raise ValueError(
        f"There is no tokenizer in {places[0]}: give the folder with Qwen3's tokenizer.json or vocab.json; ComfyUI has "
        "one in comfy/text_encoders/qwen25_tokenizer."
    )


def caption_dim(files: QwenFiles) -> int:
    """Width of an encoder's features, from the headers of its files.

    Raises:
        ValueError: if it is not a Qwen3 model.
    """
    return _Sizes.read(files.weights[0], _stored_shapes(_stored(files))).hidden_size


def weight_bytes(files: QwenFiles) -> int:
    """Bytes of an encoder's weights in bfloat16, including the layers that are not used."""
    return 2 * sum(math.prod(shape) for shape in _stored_shapes(_stored(files)).values())


def identity(files: QwenFiles, dtype: torch.dtype = DTYPE) -> str:
    """What a cache of captions is named by: the encoder's files and how they are used.

    Of the weights, the headers and 64 evenly spaced pieces of 64 KiB are read rather than all 8 GB.
    """
    digest = hashlib.sha256()
    for path in files.weights:
        add_samples(digest, path)
    small = [files.tokenizer / name for name in _TOKENIZER_FILES]
    for path in [files.config, *small] if files.config else small:
        if path.is_file():
            digest.update(f"{path.name} ".encode() + path.read_bytes())
    digest.update(TEMPLATE.encode())
    use = f"hidden_states[{-1 - SKIPPED_LAYERS}], {MAX_TOKENS} tokens, {str(dtype).removeprefix('torch.')}"
    return f"Qwen3 {digest.hexdigest()[:32]}, {use}"


class QwenEncoder:
    """The text encoder of Z-Image and L2P, a `TextEncoder` of `l2p_core.dataset.caption_cache`.

    Args:
        files: see `find`.
        device: where it runs; None is the GPU if there is one. The 4B model takes 8 GB.
        dtype: of its weights and features.

    Raises:
        ValueError: if transformers is missing or too old, or the files are not those of a Qwen3 model.
    """

    def __init__(self, files: QwenFiles, device: torch.device | str | None = None, dtype: torch.dtype = DTYPE):
        transformers = _transformers()
        self.identity = identity(files, dtype)
        self.device = torch.device(device) if device else default_device()
        self._tokenizer = _load_tokenizer(transformers, files.tokenizer)
        self._model = _load_model(transformers, files, self.device, dtype)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features of each caption, (L_i, caption_dim), on the CPU; cut at 512 tokens."""
        tokens = [self._tokens(caption) for caption in captions]
        lengths = [len(ids) for ids in tokens]
        # Attention is causal, so tokens after a caption do not change its features.
        padding = min(PAD_TOKEN, self._model.config.vocab_size - 1)
        ids = torch.tensor([row + [padding] * (max(lengths) - len(row)) for row in tokens], device=self.device)
        mask = torch.arange(max(lengths), device=self.device) < torch.tensor(lengths, device=self.device)[:, None]
        hidden = self._model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return [row[:length].cpu() for row, length in zip(hidden, lengths, strict=True)]

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption in its template, before it is cut."""
        return [len(self._tokenizer(TEMPLATE.format(caption))["input_ids"]) for caption in captions]

    def _tokens(self, caption: str) -> list[int]:
        ids = self._tokenizer(TEMPLATE.format(caption), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return list(ids)


def _transformers() -> Any:
    try:
        import transformers
        from transformers import Qwen3Model  # noqa: F401 (older versions lack it)
    except ImportError as error:
        raise ValueError(
            "Encoding captions with Qwen3 needs the transformers library: install it with "
            "'pip install \"transformers>=4.51\"'."
        ) from error
    return transformers


def _load_tokenizer(transformers: Any, folder: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds no tokenizer that can be read: use the one of Qwen3.") from error


def _load_model(transformers: Any, files: QwenFiles, device: torch.device, dtype: torch.dtype) -> Any:
    """The required layers, read tensor by tensor directly to the device."""
    stored = _stored(files)
    config = _config(transformers, files, _stored_shapes(stored))
    with torch.device("meta"):
        model = transformers.Qwen3Model(config)
        model.norm = nn.Identity()
    # Its frequencies are computed, not stored.
    model.rotary_emb = type(model.rotary_emb)(config=config).to(device)
    weights = {}
    with ChunkReader() as reader:
        for name, wanted in model.state_dict().items():
            if name not in stored:
                raise ValueError(f"{files.weights[0]} is not a complete Qwen3 model: it has no {shown(name)}.")
            weights[name] = _read(reader, *stored[name], tuple(wanted.shape)).to(device, dtype)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _stored(files: QwenFiles) -> dict[str, tuple[Header, Entry]]:
    headers = [read_header(path) for path in files.weights]
    return {
        entry.name.removeprefix("model."): (header, entry) for header in headers for entry in header.tensors.values()
    }


def _stored_shapes(stored: Mapping[str, tuple[Header, Entry]]) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, (_, entry) in stored.items()}


def _read(reader: ChunkReader, header: Header, entry: Entry, shape: tuple[int, ...]) -> Tensor:
    if entry.dtype not in TORCH_DTYPES or not TORCH_DTYPES[entry.dtype].is_floating_point:
        raise ValueError(
            f"{header.path} is quantised ({shown(entry.name)} is {entry.dtype}): use the text encoder in bf16."
        )
    if entry.shape != shape:
        raise ValueError(f"{header.path} is inconsistent: {shown(entry.name)} is {entry.shape}, not {shape}.")
    piece = Piece(header.path, entry.start, entry.stop, entry.dtype)
    return reader.read(Stored(entry.name, entry.dtype, entry.shape, (piece,)))


def _config(transformers: Any, files: QwenFiles, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The configuration without the unused layers; derived from the shapes if there is no config.json."""
    sizes = _Sizes.read(files.weights[0], shapes)
    if files.config:
        config = transformers.AutoConfig.from_pretrained(str(files.config.parent), local_files_only=True)
        if config.model_type != "qwen3":
            raise ValueError(f"{files.config} is of a {config.model_type} model: L2P takes captions from Qwen3.")
        kept = config.num_hidden_layers - SKIPPED_LAYERS
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:kept]
        config.num_hidden_layers = kept
        return config
    values = dataclasses.asdict(sizes) | {"num_hidden_layers": sizes.num_hidden_layers - SKIPPED_LAYERS}
    return transformers.Qwen3Config(**values, rope_theta=ROPE_THETA, rms_norm_eps=NORM_EPS)


@dataclass(frozen=True)
class _Sizes:
    """A Qwen3 model's sizes by transformers' names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @classmethod
    def read(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> _Sizes:
        try:
            vocabulary, width = shapes["embed_tokens.weight"]
            (head,) = shapes["layers.0.self_attn.q_norm.weight"]
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
            raise ValueError(f"{path} is not a Qwen3 text encoder: use the one of Z-Image, Qwen3-4B.") from error
