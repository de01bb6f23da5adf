"""Near-duplicates among prompts: MinHash and locality-sensitive hashing of datasketch, an optional library."""

from __future__ import annotations

from typing import Any

from . import reasons
from .checks import words

SIMILARITY = 0.5
"""Share of word pairs that two prompts have in common (Jaccard) from which they count as the same image in other
words."""
_PERMUTATIONS = 128
_BANDS, _ROWS = 42, 3
"""The shape of the hash table: a pair at SIMILARITY is found with a chance of 1 - (1 - 0.5^3)^42 = 0.996; what is found
is then compared exactly."""
NEEDED = (
    "Finding near-duplicates among prompts needs the library datasketch: install it into the Python that runs this, "
    "with: pip install datasketch"
)


class Seen:
    """The prompts so far.

    Raises:
        ValueError: if datasketch is not installed.
    """

    def __init__(self) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ValueError(NEEDED) from error
        self._sketch: Any = MinHash
        self._table: Any = MinHashLSH(num_perm=_PERMUTATIONS, params=(_BANDS, _ROWS))
        self._known: list[tuple[str, frozenset[str]]] = []
        self._exact: dict[str, str] = {}

    def check(self, text: str) -> tuple[str, str] | None:
        """(reason, the earlier prompt) if the same or nearly the same prompt exists; None if it is new."""
        key = _plain(text)
        if key in self._exact:
            return reasons.SAME, self._exact[key]
        pairs = _pairs(text)
        found = (self._known[number] for number in self._table.query(_hashed(self._sketch, pairs)))
        nearest, like = max(((_jaccard(pairs, its), other) for other, its in found), default=(0.0, ""))
        return (reasons.NEAR, like) if nearest >= SIMILARITY else None

    def add(self, text: str) -> None:
        """Add a prompt."""
        pairs = _pairs(text)
        self._table.insert(len(self._known), _hashed(self._sketch, pairs))
        self._known.append((text, pairs))
        self._exact.setdefault(_plain(text), text)


def _hashed(sketch: Any, pairs: frozenset[str]) -> Any:
    """The MinHash of a text's pairs."""
    made = sketch(num_perm=_PERMUTATIONS, seed=1)
    made.update_batch([pair.encode() for pair in pairs])
    return made


def _plain(text: str) -> str:
    return " ".join(words(text)) or text.strip()


def _pairs(text: str) -> frozenset[str]:
    """The pairs of neighbouring words; single words where there are no two."""
    found = words(text) or [text]
    return frozenset(f"{one} {other}" for one, other in zip(found, found[1:], strict=False)) or frozenset(found)


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)
