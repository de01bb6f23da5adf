"""The reasons to reject a text: their names in the journal, and their wording in reports."""

from __future__ import annotations

EMPTY, REFUSAL, LIST, MARKUP, REMARK = "empty", "refusal", "list", "markup", "remark"
LANGUAGE, QUOTES, REPETITION, UNFINISHED = "language", "quotes", "repetition", "unfinished"
SHORT, LONG, LOST, SAME, NEAR = "short", "long", "lost", "same", "near"

TEXTS = {
    EMPTY: "empty",
    REFUSAL: "a refusal, not a prompt",
    LIST: "several paragraphs or a list",
    MARKUP: "markup, brackets to fill in, or characters that cannot be shown",
    REMARK: "contains a remark about the prompt",
    LANGUAGE: "not English sentences",
    QUOTES: "quotation marks that do not match",
    REPETITION: "repeats itself",
    UNFINISHED: "ends within a sentence",
    SHORT: "too short",
    LONG: "too long",
    LOST: "lacks what the short prompt names",
    SAME: "repeats an earlier prompt",
    NEAR: "nearly repeats an earlier prompt",
}
"""Every reason with its wording, in the order of the checks."""
