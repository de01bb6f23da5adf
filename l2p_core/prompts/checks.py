"""Checks of one text: whether it is a prompt of the published kind, and if not, why.

Each check is a function from a text to whether it fails. They target what language models write instead of a prompt,
and err on the side of rejection: the model can write another.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable

from ..dataset.tables import is_text
from . import reasons
from .scheme import LONGEST, SHORTEST

MOST = 4000
"""Characters of an answer that are checked; a longer one is too long in any case."""

_THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_LABEL = re.compile(r"\A[*_#\s]*(?:image |new |rewritten |final )?prompt[*_\s]*:[*_\s]*", re.IGNORECASE)
_PAIRS = {'"': '"', "“": "”", "'": "'", "‘": "’", "«": "»", "`": "`"}

_REFUSAL = re.compile(
    r"\b(i[’']?m (?:sorry|unable)|i am (?:sorry|unable)|i apologi[sz]e|i cannot|i won[’']?t|"
    r"i can(?:no|[’'])t (?:help|assist|write|create|provide|fulfil)|"
    r"as an? (?:ai|language model|assistant)|against my guidelines)\b",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"\A(?:sure|certainly|of course|okay|here(?:[’']s| is| are)|below is|(?:this|the|a|this is a) prompt)\b|"
    r"\bprompts?\s*:|\b(?:characters|words) (?:long|in length|count)\b|\((?:about )?\d+ (?:characters|words)\)|"
    r"\b(?:note|explanation|negative prompt|word count|character count)\s*:|\blet me know\b|\bfeel free\b|"
    # our instructions, which small models repeat
    r"\bsub-class\b|\bwrite (?:a|the) prompt\b|\bwrite it anew\b|\bthat can be seen:",
    re.IGNORECASE,
)
_ITEM = re.compile(r"\A\s*(?:[-*•–]\s|\d{1,3}[.)]\s)")
_ITEMS_WITHIN = re.compile(r"(?<!\S)(?:[-*•]|\d{1,3}[.)])\s")
_MARKUP = re.compile(
    r"```|\*\*|__|<[/a-z|][^>]*>|\A#|[{}\[\]\\|~^]|&[a-z]{2,6};|https?://|--\w+ |\(\w[^()]*:\d", re.IGNORECASE
)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_END = re.compile(r"[.!?…][\"”’')]?\Z")

_COMMON = frozenset(
    """a an the of in on at to with and or by from for into over under above below between behind beside near through
    across against around along is are was as its his her their while where that this which beneath upon off out up
    down""".split()  # noqa: SIM905 (a list of them would fill a page)
)
"""The small words of English sentences: about a third of a description's words. Lists of tags have next to none."""
_LEAST_COMMON = 0.14
_ENOUGH = 12  # words for judging a language
_LATIN = 0.95
_DISTINCT = 0.45
_TIMES = 3  # that the same four words make a loop
_STEM = 4  # letters that a word and its inflections have in common
_NOUN = 3  # letters of the shortest words that name a thing, such as fox
_KEPT = 0.5


def cleaned(answer: str) -> str:
    """A model's answer without its thinking, a label before the text, quotation marks around it, and white space."""
    text = unicodedata.normalize("NFC", _THINKING.sub("", answer[:MOST])).strip()
    text = _LABEL.sub("", text)
    if len(text) > 1 and _PAIRS.get(text[0]) == text[-1] and text[0] not in text[1:-1] and text[-1] not in text[1:-1]:
        text = text[1:-1].strip()
    return re.sub(r"[ \t]+", " ", text)


def problem(text: str, *, short: str = "") -> str | None:
    """The first reason why a model's text is rejected, a key of `reasons`; None if it is accepted.

    Args:
        text: see `cleaned`.
        short: the short prompt that it should expand.
    """
    found = next((reason for reason, fails in _CHECKS if fails(text)), None)
    return reasons.LOST if not found and short and _loses(text, short) else found


def problems(text: str) -> list[str]:
    """Every reason why a text written by people is rejected; it may omit the last full stop."""
    return [reason for reason, fails in _CHECKS if reason != reasons.UNFINISHED and fails(text)]


def words(text: str) -> list[str]:
    """The words of a text in lower case, in order."""
    return [word.lower() for word in _WORD.findall(text)]


def _is_list(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) > 1 or bool(_ITEM.match(text)) or len(_ITEMS_WITHIN.findall(text)) > 1


def _has_markup(text: str) -> bool:
    odd = any(unicodedata.category(letter) in ("Cc", "Cf", "Co", "Cn", "Cs") for letter in text if letter != "\n")
    return odd or "\ufffd" in text or not is_text(text) or bool(_MARKUP.search(text))


def _is_foreign(text: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    if latin < _LATIN * len(letters):
        return True
    found = words(text)
    return len(found) >= _ENOUGH and sum(word in _COMMON for word in found) < _LEAST_COMMON * len(found)


def _has_odd_quotes(text: str) -> bool:
    return text.count('"') % 2 == 1 or text.count("“") != text.count("”") or text.count("«") != text.count("»")


def _repeats(text: str) -> bool:
    found = words(text)
    if len(found) < _ENOUGH:
        return False
    fours = Counter(zip(found, found[1:], found[2:], found[3:], strict=False))
    return max(fours.values()) >= _TIMES or len(set(found)) < _DISTINCT * len(found)


def _loses(text: str, short: str) -> bool:
    """Whether fewer than half of the short prompt's own words appear in any form."""
    asked = {word[:_STEM] for word in words(short) if word not in _COMMON and word.isascii() and len(word) >= _NOUN}
    there = set(words(text))
    kept = sum(any(word.startswith(stem) for word in there) for stem in asked)
    return kept < _KEPT * len(asked)


_CHECKS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    (reasons.EMPTY, lambda text: not any(letter.isalnum() for letter in text)),
    (reasons.REFUSAL, lambda text: bool(_REFUSAL.search(text[:SHORTEST]))),
    (reasons.LIST, _is_list),
    (reasons.MARKUP, _has_markup),
    (reasons.REMARK, lambda text: bool(_REMARK.search(text))),
    (reasons.LANGUAGE, _is_foreign),
    (reasons.QUOTES, _has_odd_quotes),
    (reasons.REPETITION, _repeats),
    # A text that was cut off is too long as a rule, and is then shortened, not discarded.
    (reasons.LONG, lambda text: len(text) > LONGEST),
    (reasons.UNFINISHED, lambda text: not _END.search(text)),
    (reasons.SHORT, lambda text: len(text) < SHORTEST),
)
