"""The host's CLIP as the encoder of a run's captions, so that a model trains on the same features as in sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..l2p_core.config import ModelConfig
from ..l2p_core.dataset.caption_cache import CaptionCache
from ..l2p_core.run.caption_source import CaptionSource
from ..l2p_core.sources import source_of
from .model.content import content_digest
from .model.host_rows import HOST_ROWS

PROBE = "A fox (asleep:1.2), seen from above."
"""A caption whose tokens reveal the tokenizer, its template, and whether it parses weights in a text."""


def host_captions(clip: Any, folder: Path, config: ModelConfig) -> CaptionSource:
    """The caption cache in `folder` for this CLIP and the captions of a model.

    The text encoder leaves the GPU first: its weights there may carry patches of other models.

    Raises:
        ValueError: as for `identity_of`.
    """
    unload(clip)
    published = source_of(config).encoder
    text = _as_typed if HOST_ROWS[config.source].has_template else published.text
    identity = identity_of(clip, text)
    make = partial(ClipEncoder, clip, identity, text)
    return HostCaptions(folder, identity, make, clip, max_tokens=published.max_tokens)


def _as_typed(caption: str) -> str:
    return caption


def identity_of(clip: Any, text: Callable[[str], str] = _as_typed) -> str:
    """The identity of a caption cache: weights, their patches, tokenizer, template and layer.

    It is the same after every start. Only samples of each weight are read, so that 8 GB take little time.

    Args:
        clip: the host's.
        text: what is encoded of a caption.

    Raises:
        ValueError: if the CLIP has hooks, which change it during sampling.
    """
    if clip.patcher.forced_hooks is not None:
        raise ValueError(
            "This CLIP has hooks, which may change it during sampling, but training needs one text encoder "
            "throughout: connect the CLIP without them."
        )
    use = [clip.tokenize(text(PROBE)), clip.layer_idx, clip.tokenizer_options]
    digest = content_digest([use, clip.patcher.model_state_dict(), clip.patcher.patches])
    return f"ComfyUI {type(clip.cond_stage_model).__name__.rstrip('_')} {digest[:32]}"


class ClipEncoder:
    """A CLIP as a `TextEncoder` of `l2p_core.dataset.caption_cache`.

    Args:
        clip: the host's.
        identity: see `identity_of`.
        text: the text to encode for a caption.
    """

    def __init__(self, clip: Any, identity: str, text: Callable[[str], str]):
        self.identity = identity
        self._clip, self._text = clip, text

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features of each caption, (L_i, caption_dim), on the CPU, whole.

        Raises:
            ValueError: if the CLIP does not encode a caption as one sequence of vectors.
        """
        with torch.inference_mode():
            features = [self._features(caption) for caption in captions]
        # Copies made outside inference mode are ordinary tensors, which can be used in training.
        return [matrix.clone() for matrix in features]

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption in its template; 1 where the CLIP's encoder splits the text itself."""
        tokens = [self._tokens(caption) for caption in captions]
        return [max(sum(map(len, parts)) for parts in of_caption.values()) for of_caption in tokens]

    def _tokens(self, caption: str) -> Any:
        return self._clip.tokenize(self._text(caption))

    def _features(self, caption: str) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        conditioning = self._clip.encode_from_tokens_scheduled(self._tokens(caption), show_pbar=False)
        (features, extra), *more = conditioning
        if more or features.ndim != 3 or features.shape[0] != 1:
            raise ValueError(
                f"This CLIP encodes a caption as {len(conditioning)} x {tuple(features.shape)}, but L2P takes one "
                "(1, tokens, width): connect the text encoder that the model was trained with."
            )
        mask = extra.get("attention_mask")
        return (features[0] if mask is None else features[0, mask.reshape(-1).bool()]).cpu()


@dataclass(frozen=True)
class HostCaptions(CaptionSource):
    """CaptionSource whose encoder is the host's `clip`, which outlives them: it is moved off the GPU after use."""

    clip: Any

    def fill(self, captions: Iterable[str], progress: Callable[[int, int], None] | None = None) -> CaptionCache:
        try:
            return super().fill(captions, progress)
        finally:
            unload(self.clip)


def unload(clip: Any) -> None:
    """Move a text encoder, and its clones, off the device it computes on."""
    kept = [
        loaded
        for loaded in comfy.model_management.current_loaded_models
        if loaded.model is None or not loaded.model.is_clone(clip.patcher)
    ]
    if len(kept) < len(comfy.model_management.current_loaded_models):
        comfy.model_management.free_memory(1e30, clip.patcher.load_device, kept)
