"""Existing short prompts, to be rewritten in the published style."""

from __future__ import annotations

from collections.abc import Iterable

from .scheme import Slot

LONGEST_SHORT = 2000
"""Maximum characters of a prompt to rewrite."""
_SHOWN = 60


def slots(prompts: Iterable[str]) -> list[Slot]:
    """The prompts to rewrite, each once. A slot is named by its prompt: a list may grow, shrink and be sorted between
    two runs.

    Raises:
        ValueError: for a prompt that is too long to be one.
    """
    found = list(dict.fromkeys(" ".join(prompt.split()) for prompt in prompts if prompt.strip()))
    for prompt in found:
        if len(prompt) > LONGEST_SHORT:
            raise ValueError(
                f"The prompt that begins with {prompt[:_SHOWN]!r} has {len(prompt)} characters: one to rewrite has "
                f"at most {LONGEST_SHORT}. Write one prompt a line."
            )
    return [Slot(prompt, short=prompt) for prompt in found]
