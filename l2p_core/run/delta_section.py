"""The recipe section about the delta that a run saves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..files.about import STATED, stated
from ..ranges import check_choices

DELTA_DTYPES = {"trained": None, "bf16": torch.bfloat16}
"""The dtypes in which a run's delta may be saved."""


@dataclass(frozen=True)
class DeltaSection:
    """`[delta]`: the delta that a run saves, for sharing.

    Attributes:
        dtype: of its weights: "trained", the float32 of training; or "bf16", half the size. This does not affect
            resuming, which uses the run's state.
        title, author, license, trigger_words, description: stated in its metadata, which ComfyUI and model sites show,
            and in every file made from it.
    """

    dtype: str = "trained"
    title: str = ""
    author: str = ""
    license: str = ""
    trigger_words: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        check_choices(self, {"dtype": DELTA_DTYPES})

    @property
    def about(self) -> dict[str, str]:
        """The metadata that it states."""
        return stated(**{name: getattr(self, name) for name in STATED})
