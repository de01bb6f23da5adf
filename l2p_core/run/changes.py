"""A recipe with some of its values changed, by a caller that has them in its own fields or as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import recipe as recipes
from .recipe import Recipe
from .toml_text import read_toml

Changes = Mapping[str, Mapping[str, Any]]
"""{section: {key: value}}, as in a recipe."""


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with these values replaced, checked like a recipe file.

    Raises:
        ValueError: naming the key and what was expected; a misspelt key with the closest valid one.
    """
    # The changes alone first, so that errors name them as they were written.
    recipes.parse({**changes, "model": {"base": recipe.model.base, **changes.get("model", {})}})
    values = {
        section: {key: value for key, value in of_section.items() if value is not None}
        for section, of_section in dataclasses.asdict(recipe).items()
    }
    for section, of_section in changes.items():
        values[section] |= of_section
    return recipes.parse(values)


def read_changes(text: str, fixed: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, Any]]:
    """Changes written as TOML.

    Args:
        text: sections and keys of a recipe; may be empty.
        fixed: {section: keys} that must not be changed in this way.

    Raises:
        ValueError: if it is not valid TOML, has no sections, or changes a fixed key.
    """
    try:
        values = read_toml(text)
    except ValueError as error:
        raise ValueError(f"The changes to the recipe are {error}.") from error
    for section, of_section in values.items():
        if not isinstance(of_section, Mapping):
            raise ValueError(f"'{section}' must be in a section: write [training], or another, above it.")
        for key in of_section:
            if key in fixed.get(section, ()):
                raise ValueError(f"[{section}] {key} may not be changed here.")
    return values
