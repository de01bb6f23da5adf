"""The published scheme of prompts: four classes, 17 sub-classes, 200 to 350 characters (arXiv 2605.12013).

The paper names the classes only. The sub-classes, and the areas in each that the language model is pointed to, are
ours (`scheme.toml`): without them a model returns to the same few scenes within a hundred prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..run.toml_text import read_toml

SHORTEST, LONGEST = 200, 350
"""Characters of a prompt."""


@dataclass(frozen=True)
class SubClass:
    """A sub-class: its class, its name, and areas within it, which instructions name in turn."""

    of: str
    name: str
    areas: tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """A prompt to be written.

    Attributes:
        key: names it in the journal; seeds follow from it.
        kind: its sub-class; None for the rewriting of a short prompt.
        number: of the slot within its sub-class.
        short: the short prompt to rewrite; "" for a new one.
    """

    key: str
    kind: SubClass | None = None
    number: int = 0
    short: str = ""


SUB_CLASSES = tuple(
    SubClass(of, name, tuple(areas))
    for of, kinds in read_toml(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")).items()
    for name, areas in kinds.items()
)
"""The 17 sub-classes, those of a class together."""
CLASSES = tuple(dict.fromkeys(kind.of for kind in SUB_CLASSES))


def slots(count: int) -> list[Slot]:
    """The prompts to write, balanced: of any number from the first on, classes differ by one prompt at most, and so do
    the sub-classes of a class. A list that was interrupted is therefore balanced too, and a longer one begins with the
    slots of a shorter one."""
    of_class = {name: [kind for kind in SUB_CLASSES if kind.of == name] for name in CLASSES}
    found = []
    for index in range(count):
        turn, kinds = index // len(CLASSES), of_class[CLASSES[index % len(CLASSES)]]
        found.append(Slot(str(index), kinds[turn % len(kinds)], turn // len(kinds)))
    return found
