"""Training recipes: TOML files checked against the dataclasses below, which are the schema."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..l2p_core.training_config import TrainingConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUNDLED = Path(__file__).parent / "recipes"

_Section = TypeVar("_Section")

_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list[str]: "a list of texts",
}


@dataclass(frozen=True)
class ModelSection:
    """`[model]`: what training starts from.

    Attributes:
        base: an L2P file, a latent source (converted into the run folder first), or "tiny" for the bundled source.
            A relative path starts at the recipe's folder.
        variant, head_width, seed, init: how a latent source is converted, see `l2p convert`.
    """

    base: str
    variant: str = "1k"
    head_width: float = 1.0
    seed: int = 0
    init: str = "random"


@dataclass(frozen=True)
class DataSection:
    """`[data]`: the images.

    Attributes:
        kind: "tiny", the images that the bundled source itself makes, or "renderings", clean ones of the same set.
        images: how many.
        batch_size: images of a micro-batch.
        seed: of the captions, the images and the shuffling.
        steps, cfg: Euler steps and guidance that the source makes an image with.
    """

    kind: str = "tiny"
    images: int = 2048
    batch_size: int = 32
    seed: int = 0
    steps: int = 20
    cfg: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in ("tiny", "renderings"):
            raise ValueError(f"kind must be tiny or renderings, not {self.kind!r}.")
        if min(self.images, self.batch_size, self.steps) < 1:
            raise ValueError("images, batch_size and steps must be 1 or more.")


@dataclass(frozen=True)
class WatchSection:
    """`[watch]`: what a run saves and shows while it goes.

    Attributes:
        save_every: steps between saves of the state and the delta.
        montage_every: steps between montages.
        prompts: captions of a montage, an image each.
        seed: of a montage's noise; its image i has the noise of seed + i.
        steps, cfg: of a montage's sampling; left out, those of the variant.
    """

    save_every: int = 500
    montage_every: int = 500
    prompts: list[str] = field(default_factory=list)
    seed: int = 0
    steps: int | None = None
    cfg: float | None = None

    def __post_init__(self) -> None:
        if self.save_every < 1 or self.montage_every < 1:
            raise ValueError("save_every and montage_every must be 1 or more.")


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, a section each."""

    model: ModelSection
    data: DataSection = field(default_factory=DataSection)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    watch: WatchSection = field(default_factory=WatchSection)


def find(name: str) -> Path:
    """The recipe file that a path or the name of a bundled recipe means.

    Raises:
        ValueError: if there is no such file.
    """
    bundled = {path.stem: path for path in sorted(BUNDLED.glob("*.toml"))}
    path = Path(name)
    if path.is_file():
        return path
    if name in bundled:
        return bundled[name]
    raise ValueError(f"There is no recipe {name}: give a TOML file or one of the bundled {', '.join(bundled)}.")


def load(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ValueError: naming the file, the key and what was expected; a misspelt key with the nearest right one.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return parse(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse(values: Mapping[str, Any]) -> Recipe:
    """The recipe in a parsed TOML document; errors as for `load`, without the file's name."""
    hints = typing.get_type_hints(Recipe)
    _check_names(values, hints, "the recipe")
    if "model" not in values:
        raise ValueError('The recipe has no section [model]; it needs at least base = "..." there.')
    sections = {}
    for name, value in values.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"'{name}' must be a section: write [{name}] and its keys below.")
        sections[name] = _section(hints[name], value, f"[{name}]")
    return Recipe(**sections)


def _section(kind: type[_Section], values: Mapping[str, Any], where: str) -> _Section:
    hints = typing.get_type_hints(kind)
    _check_names(values, hints, where)
    assert dataclasses.is_dataclass(kind)
    for entry in dataclasses.fields(kind):
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in values:
            raise ValueError(f"{where} needs the key '{entry.name}'.")
    converted = {name: _value(hints[name], value, f"{where} {name}") for name, value in values.items()}
    try:
        return kind(**converted)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error


def _check_names(values: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            advice = f"did you mean '{nearest[0]}'?" if nearest else f"it knows {', '.join(known)}."
            raise ValueError(f"{where} has no key '{name}': {advice}")


def _value(hint: Any, value: Any, where: str) -> Any:
    """The value as the type that a field declares."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is float and type(value) is int:
            return float(value)
        if option == list[str] and isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        # Exactly the type: True is an int to Python, but not to whoever wrote steps = true.
        if type(value) is option:
            return value
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        list[str]: "a list of texts",
    }
    expected = names[next(option for option in options if option is not types.NoneType)]
    raise ValueError(f"{where} must be {expected}, not {value!r}.")


def to_toml(recipe: Recipe) -> str:
    """The recipe as the text of a file that `load` reads."""
    parts = []
    for section in dataclasses.fields(recipe):
        values = dataclasses.asdict(getattr(recipe, section.name))
        # JSON writes numbers, texts, booleans and lists as TOML does; TOML leaves out what is not set.
        lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]
        parts.append("\n".join([f"[{section.name}]", *lines]))
    return "\n\n".join(parts) + "\n"
