"""Finding recipes: the user's files, and those that come with the package."""

from __future__ import annotations

from pathlib import Path

from ..files.paths import typed

BUNDLED = Path(__file__).parent / "recipes"
RECIPE_OF_RUN = "recipe.toml"


def bundled() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(BUNDLED.glob("*.toml"))}


def find(name: str) -> Path:
    """The recipe file that a path, a run folder or the name of a bundled recipe means.

    Raises:
        ValueError: if there is no such file.
    """
    path = typed(name)
    if (path / RECIPE_OF_RUN).is_file():
        return path / RECIPE_OF_RUN
    if path.is_file():
        return path
    if name in bundled():
        return bundled()[name]
    raise ValueError(
        f"There is no recipe {name}: give a TOML file, a run folder or one of the bundled {', '.join(bundled())}."
    )


def beside(path: Path) -> Path:
    """The folder that a recipe's relative paths start at: its own; for a bundled one, the current folder."""
    return Path.cwd() if path.parent == BUNDLED else path.parent
