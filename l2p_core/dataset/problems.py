"""Problems of single samples of a data set, and the share of them that a run tolerates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_BAD_SHARE = 0.05
SHOWN = 50
_NAMED = 3


@dataclass(frozen=True)
class Problem:
    """Something that was skipped.

    Attributes:
        where: an image's name, or a table's name and line.
        reason: what is wrong with it.
        count: how many samples it costs at most.
    """

    where: str
    reason: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class TooManyProblems(ValueError):
    """More of a data set is bad than a run tolerates; the message lists the problems."""


def count(problems: Sequence[Problem]) -> int:
    """The number of samples that the problems cost."""
    return sum(problem.count for problem in problems)


def some(texts: Sequence[str]) -> str:
    """The first three texts, and how many more there are."""
    more = len(texts) - _NAMED
    return ", ".join(texts[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def check_share(problems: Sequence[Problem], total: int, max_share: float) -> None:
    """Stop if more than `max_share` of `total` samples are bad.

    Raises:
        TooManyProblems: naming them, at most the first 50.
    """
    bad = count(problems)
    if bad <= max_share * total:
        return
    lines = [
        f"{bad} of {total} samples are bad, more than {max_share:.0%}: repair or remove them, or allow a larger share.",
        *(f"  {problem}" for problem in problems[:SHOWN]),
    ]
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more")
    raise TooManyProblems("\n".join(lines))
