"""The interface to the language model that writes, whatever program runs it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_TOKENS = 200
"""Maximum tokens of an answer. A prompt of 350 characters has about 80; a text that is not finished at 200 is not a
prompt."""
TEMPERATURE = 0.9
TOP_K, TOP_P = 50, 0.95
"""Sampling, a little freer than Qwen3's own advice (0.7, 20, 0.8): here variety counts."""

CHATML_MARK = "<|im_start|>"
CHATML_TURN = "<|im_start|>{role}\n{text}<|im_end|>\n"
CHATML_ANSWER = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""How Qwen3 is asked to answer without thinking: its own chat template writes this with enable_thinking=False."""


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation; the role is system, user or assistant."""

    role: str
    text: str


@dataclass(frozen=True)
class Request:
    """A conversation that the model continues by one turn.

    Attributes:
        turns: the last one is the user's.
        seed: of the sampling, 0 to 2**31 - 1, which every program takes.
    """

    turns: tuple[Turn, ...]
    seed: int


class Writer(Protocol):
    """A language model.

    Attributes:
        name: identifies it, with what else its texts depend on; it goes into the journal and the report.
        at_once: how many requests it works on together.
    """

    name: str
    at_once: int

    def write(self, requests: Sequence[Request]) -> list[str]:
        """The model's answers, in order, as it gives them.

        Raises:
            ValueError: if the model cannot answer, in a sentence for the user.
        """
        ...


def chatml(turns: Sequence[Turn]) -> str:
    """A conversation in the format of Qwen models, up to the start of the answer. Marks of the format within a text,
    which would end its turn, are removed."""
    marked = (CHATML_TURN.format(role=turn.role, text=re.sub(r"<\|im_(start|end)\|>", "", turn.text)) for turn in turns)
    return "".join(marked) + CHATML_ANSWER
