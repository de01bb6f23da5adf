"""Checks an existing list of prompts against the published style."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from . import checks
from .near_duplicates import Seen


@dataclass(frozen=True)
class Checked:
    """A prompt with all its problems, keys of `reasons`, and the earlier prompt that it repeats."""

    text: str
    reasons: tuple[str, ...]
    like: str = ""


def check(prompts: Iterable[str]) -> list[Checked]:
    """Every prompt with its problems, in order; the first of several similar ones does not count as a duplicate.

    Raises:
        ValueError: if datasketch is missing.
    """
    seen, found = Seen(), []
    for prompt in prompts:
        alike = seen.check(prompt)
        if not alike:
            seen.add(prompt)
        reason, like = alike or ("", "")
        found.append(Checked(prompt, (*checks.problems(prompt), *([reason] if reason else [])), like))
    return found
