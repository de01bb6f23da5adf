"""What a file says about its model for people: licence, base, author, trigger words.

The keys are those that ComfyUI's model library and asset list, and the sites that share models, read from a safetensors
header: ModelSpec (https://github.com/Stability-AI/ModelSpec) and a few older names. A new file inherits them from the
files that it is made from.
"""

from __future__ import annotations

from collections.abc import Mapping

from .safetensors_header import CheckpointError

LICENSE, AUTHOR, TITLE = "modelspec.license", "modelspec.author", "modelspec.title"
DESCRIPTION, TRIGGER = "modelspec.description", "modelspec.trigger_phrase"
BASE_MODEL, ARCHITECTURE = "modelspec.base_model", "modelspec.architecture"
TRAINED_WORDS = "trained_words"
"""The trigger words where ComfyUI's asset list looks for them."""

TRAVELS = (
    LICENSE,
    AUTHOR,
    TRIGGER,
    TRAINED_WORDS,
    BASE_MODEL,
    "modelspec.usage_hint",
    "modelspec.tags",
    "modelspec.merged_from",
    "license",
    "author",
    "base_model",
    "ss_base_model_version",
)
"""Metadata that every model made from another one inherits."""

SAME_MODEL = (TITLE, DESCRIPTION, "modelspec.thumbnail", "modelspec.resolution")
"""Metadata that the same model in another form also inherits: quantised, as a delta, or merged."""

_MOST = 1 << 20
"""Characters of a value; thumbnails are the longest."""

STATED = {
    "title": (TITLE,),
    "author": (AUTHOR,),
    "license": (LICENSE,),
    "trigger_words": (TRIGGER, TRAINED_WORDS),
    "description": (DESCRIPTION,),
}
"""{what a user may state: the keys under which it is written}."""


def inherited(*known: Mapping[str, str], same_model: bool = False) -> dict[str, str]:
    """Metadata of a new file inherited from the files that it is made from; the first file that has an entry wins."""
    names = (*TRAVELS, *SAME_MODEL) if same_model else TRAVELS
    found: dict[str, str] = {}
    for metadata in reversed(known):
        found |= {name: metadata[name] for name in names if 0 < len(metadata.get(name, "")) <= _MOST}
    return found


def stated(**words: str | None) -> dict[str, str]:
    """Metadata that a user states, by the names of `STATED`; empty texts and None are ignored.

    Raises:
        CheckpointError: for a text that is too long to be one.
    """
    result: dict[str, str] = {}
    for name, text in words.items():
        text = (text or "").strip()
        if len(text) > _MOST:
            raise CheckpointError(
                f"The {name.replace('_', ' ')} has {len(text):,} characters: state at most {_MOST:,}."
            )
        if text:
            result |= dict.fromkeys(STATED[name], text)
    return result
