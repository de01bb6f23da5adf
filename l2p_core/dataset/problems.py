"""What is wrong with single samples of a data set, and how much of that a run puts up with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_BAD_SHARE = 0.05
SHOWN = 50


@dataclass(frozen=True)
class Problem:
    """Something that was left out.

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
    """More of a data set is bad than a run is to put up with; the message lists what."""


def count(problems: Sequence[Problem]) -> int:
    """Samples that the problems cost."""
    return sum(problem.count for problem in problems)


def check_share(problems: Sequence[Problem], total: int, max_share: float) -> None:
    """Stop where more than `max_share` of `total` samples are bad.

    Raises:
        TooManyProblems: naming them, the first 50 where they are more.
    """
    bad = count(problems)
    if bad <= max_share * total:
        return
    lines = [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more")
    raise TooManyProblems(
        "\n".join(
            [
                f"{bad} of {total} samples are bad, more than {max_share:.0%}: repair them, take them out, "
                "or allow a larger share.",
                *lines,
            ]
        )
    )
