"""The instructions to the language model, which writes the prompts: these words never become part of one."""

from __future__ import annotations

import hashlib
import random

from . import reasons
from .scheme import LONGEST, SHORTEST, Slot
from .writer import Request, Turn

_SYSTEM = (
    "You write prompts for a text-to-image model. A prompt describes one image so exactly that a painter could paint "
    "it: the subject, what surrounds it, composition, light, colours, materials and style. Only what can be seen.\n\n"
    "Answer with the prompt alone: one paragraph of plain English in full sentences, about 45 words, at least "
    f"{SHORTEST} and at most {LONGEST} characters. No title, list, quotation marks, markdown, remark or second "
    'version. Do not begin with "The image" or "A prompt".'
)
_NEW = "Write a prompt of the class {of}, sub-class {kind}. It is about: {area}. Choose something specific and unusual."
_DETAILS = "Work these in if they suit the subject: {details}."
_REWRITE = (
    "Here is a prompt. Write it anew in this style: keep everything that it names, contradict nothing, and add "
    "what else can be seen.\n\n{short}"
)
_TOO_LONG = (
    f"That has {{count}} characters. Shorten it to 40 words, at most {LONGEST} characters. Answer with it alone."
)
_TOO_SHORT = (
    f"That has {{count}} characters. Add details that can be seen: 45 words, at least {SHORTEST} characters. Answer "
    "with it alone."
)
CORRECTIONS = {reasons.LONG: _TOO_LONG, reasons.SHORT: _TOO_SHORT}
"""The requests after a text whose only fault is its length. Models count badly, but correct themselves well."""

_HINTS = (
    ("seen from close up", "seen from far away", "seen from above", "seen from below", "seen at eye level",
     "seen from the side", "seen through an opening", "with a wide empty space", "filling the whole frame"),
    ("early morning light", "midday light", "late afternoon light", "dusk", "night with artificial light", "overcast "
     "light", "light from behind", "candlelight or firelight", "a single hard light", "soft light from a window"),
    ("muted colours", "strong contrasting colours", "a single dominant colour", "warm colours", "cold colours",
     "black, white and grey", "pastel colours", "earth colours", "dark colours with one bright accent"),
    ("spring", "summer", "autumn", "winter", "after rain", "in dry heat", "in calm weather", "in strong wind"),
    ("in northern Europe", "around the Mediterranean", "in West Africa", "in East Africa", "in the Middle East",
     "in South Asia", "in East Asia", "in Southeast Asia", "in Oceania", "in North America", "in Central America",
     "in South America", "in no real place"),
    ("a calm mood", "a tense mood", "a playful mood", "a solemn mood", "a lonely mood", "a cheerful mood", "a "
     "mysterious mood", "a tender mood"),
    ("two things of different size side by side", "three or more of a kind", "a reflection", "a strong shadow", "a "
     "texture that can be felt", "something moving", "something broken or worn", "something very small",
     "something with writing on it", "a pattern that repeats"),
)  # fmt: skip
"""Details of which an instruction names some, so that the same sub-class does not become the same image."""
_NAMED = 3


def seed_of(seed: int, slot: Slot, attempt: int) -> int:
    """The seed of a slot's attempt, 0 to 2**31 - 1: independent of all other slots and of earlier attempts."""
    digest = hashlib.sha256(f"{seed} {attempt} {slot.key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def request(slot: Slot, seed: int, attempt: int, correct: tuple[str, str] | None = None) -> Request:
    """What the model is asked for a slot.

    Args:
        slot: the prompt to write.
        seed: of the whole work.
        attempt: counts from 0.
        correct: (text, reason) of the attempt before, if it is to be corrected: the reason is a key of CORRECTIONS.
    """
    own = seed_of(seed, slot, attempt)
    # A correction repeats what the text answered.
    asked = _asked(slot, seed_of(seed, slot, attempt - 1) if correct else own)
    turns = [Turn("system", _SYSTEM), Turn("user", asked)]
    if correct:
        text, reason = correct
        turns += [Turn("assistant", text), Turn("user", CORRECTIONS[reason].format(count=len(text)))]
    return Request(tuple(turns), own)


def _asked(slot: Slot, seed: int) -> str:
    if slot.kind is None:
        return _REWRITE.format(short=slot.short)
    chance = random.Random(seed)
    area = slot.kind.areas[slot.number % len(slot.kind.areas)]
    details = [chance.choice(hints) for hints in chance.sample(_HINTS, _NAMED)]
    new = _NEW.format(of=slot.kind.of, kind=slot.kind.name, area=area)
    return f"{new} {_DETAILS.format(details=', '.join(details))}"
