"""The captions of the second tiny world: from content to words, with parts left open, and back."""

from __future__ import annotations

import re

import torch

from .content import (
    COLOURS,
    FIGURES,
    KINDS,
    LETTERS,
    RELATIONS,
    TEXTURES,
    Content,
    Object,
    Scenes,
    random_scenes,
    relation_of,
)

OMITTED = 0.2
"""How often a caption leaves an object's colour open, and how often a figure's texture."""

_OBJECT = (
    rf"an? (?:(?P<colour{{0}}>{'|'.join(COLOURS)}) )?(?:(?P<texture{{0}}>{'|'.join(TEXTURES)}) )?"
    rf"(?:(?P<figure{{0}}>{'|'.join(FIGURES)})|letter (?P<letter{{0}}>{'|'.join(LETTERS)}))"
)
_CAPTION = re.compile(
    rf"\s*{_OBJECT.format(1)} (?P<relation>{'|'.join(RELATIONS)}) {_OBJECT.format(2)}\s*", re.IGNORECASE
)


def caption(content: Content) -> str:
    """The content in words, such as "a red striped circle above a letter T"."""
    return f"{_phrase(content.first)} {content.relation} {_phrase(content.second)}"


def _phrase(told: Object) -> str:
    noun = f"letter {told.kind}" if told.kind in LETTERS else told.kind
    return " ".join(word for word in ("a", told.colour, told.texture, noun) if word)


def parse(text: str) -> Content:
    """The content of a caption.

    Raises:
        ValueError: if it is not one of this world's.
    """
    found = _CAPTION.fullmatch(text)
    if not found:
        raise ValueError(
            f"{text!r} is not a caption of this world; write one like 'a red striped circle above a blue letter T', "
            f"of the colours {', '.join(COLOURS)}, the textures {', '.join(TEXTURES)}, the kinds {', '.join(FIGURES)} "
            f"and letter {', '.join(LETTERS)}, and the relations {', '.join(RELATIONS)}."
        )
    part = {name: value.lower() for name, value in found.groupdict().items() if value}

    def told(number: int) -> Object:
        letter = part.get(f"letter{number}")
        kind = letter.upper() if letter else part[f"figure{number}"]
        return Object(kind, part.get(f"colour{number}"), part.get(f"texture{number}"))

    return Content(told(1), part["relation"], told(2))


def contents(scenes: Scenes, generator: torch.Generator) -> list[Content]:
    """What captions say about scenes, some of it omitted."""
    omitted = (torch.rand(len(scenes), 2, 2, generator=generator) < OMITTED).tolist()
    relations = relation_of(scenes.centre).tolist()
    names = list(COLOURS)
    rows = zip(scenes.kind.tolist(), scenes.colour.tolist(), scenes.texture.tolist(), omitted, relations, strict=True)
    found = []
    for kinds, colours, textures, without, relation in rows:
        first, second = (
            Object(
                KINDS[kind],
                None if no_colour else names[colour],
                None if no_texture or KINDS[kind] in LETTERS else TEXTURES[texture],
            )
            for kind, colour, texture, (no_colour, no_texture) in zip(kinds, colours, textures, without, strict=True)
        )
        found.append(Content(first, RELATIONS[relation], second))
    return found


def evaluation_captions(count: int, seed: int = 0) -> list[str]:
    """A fixed list to score a model by; a longer one begins with the shorter."""
    generator = torch.Generator().manual_seed(0x5CE4E5 + seed)
    return [caption(contents(random_scenes(1, generator), generator)[0]) for _ in range(count)]
