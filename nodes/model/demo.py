"""The bundled tiny model as the host's MODEL and CLIP."""

from __future__ import annotations

from typing import Any

import comfy.sd
import comfy.supported_models_base
import torch
from torch import Tensor, nn

from ...l2p_core import tiny
from .loading import load_model

DELTA_PATH = tiny.SOURCE_PATH.with_name("delta.safetensors")

Tokens = dict[str, list[list[tuple[str, float]]]]


class WordsTokenizer:
    """The host's tokenizer interface: the words model splits and looks up texts itself, so a text is one token."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None):
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> Tokens:
        """One batch with the text as its only token, of weight 1."""
        return {"words": [[(text, 1.0)]]}

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to save."""
        return {}


class WordsEncoder(nn.Module):
    """The host's text-encoder interface around the tiny model's words."""

    dtypes = {torch.float32}

    def __init__(self, device: Any = None, dtype: Any = None, model_options: Any = None):
        super().__init__()
        self.words = tiny.load_words()
        # A parameter, so that the host's memory management can count and move it.
        self.table = nn.Parameter(self.words.table, requires_grad=False)

    def encode_token_weights(self, tokens: Tokens) -> tuple[Tensor, None]:
        """The caption's features (1, L, 64), and no pooled output.

        Raises:
            ValueError: for a word that the tiny model does not know, listing those it does.
        """
        text, _ = tokens["words"][0][0]
        return self.words.encode(text)[None], None

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """There is one layer and nothing to choose."""

    def reset_clip_options(self) -> None:
        """There is one layer and nothing to reset."""


def load_demo() -> tuple[Any, Any]:
    """MODEL and CLIP of the bundled tiny model."""
    return load_model(str(tiny.SOURCE_PATH), str(DELTA_PATH)), load_words()


def load_words() -> Any:
    """The CLIP of both bundled models."""
    return comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(WordsTokenizer, WordsEncoder))
