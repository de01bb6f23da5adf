"""Training recipes: TOML files checked against the dataclasses below, which are the schema."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .. import ranges, training_config
from ..config import VARIANTS
from ..dataset.problems import MAX_BAD_SHARE
from ..files.paths import settled, typed
from ..initialise import INITS
from ..training_config import TrainingConfig

TINY = "tiny"
"""The word for the bundled source, in place of a path."""

_Section = TypeVar("_Section")

_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list[str]: "a list of texts",
}

RANGES = {
    "model": {"head_width": ranges.HEAD_WIDTH, "seed": ranges.SEED},
    "data": {
        "size": ranges.SIDE,
        "workers": ranges.WORKERS,
        "max_bad_share": ranges.SHARE,
        "images": ranges.COUNT,
        "batch_size": ranges.BATCH,
        "seed": ranges.SEED,
        "steps": ranges.SAMPLING_STEPS,
        "cfg": ranges.CFG,
    },
    "captions": {},
    "training": training_config.RANGES,
    "watch": {
        "save_every": ranges.COUNT,
        "montage_every": ranges.COUNT,
        "seed": ranges.SEED,
        "size": ranges.SIDE,
        "steps": ranges.SAMPLING_STEPS,
        "cfg": ranges.CFG,
        "divergence_factor": ranges.DIVERGENCE,
        "divergence_steps": ranges.COUNT_OR_NONE,
    },
}
"""{section: {key: range}} of every number in a recipe."""


@dataclass(frozen=True)
class ModelSection:
    """`[model]`: what training starts from.

    Attributes:
        base: an L2P file, a latent source (converted into the run folder first), or "tiny" for the bundled source.
            A relative path starts at the recipe's folder.
        variant, head_width, seed, init: how a latent source is converted, see `l2p convert`; an L2P file of a smaller
            variant is converted too, any other is taken as it is.
    """

    base: str
    variant: str = "1k"
    head_width: float = 1.0
    seed: int = 0
    init: str = "random"

    def __post_init__(self) -> None:
        ranges.check(self, RANGES["model"])
        for name, choices in (("variant", tuple(VARIANTS)), ("init", INITS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")


@dataclass(frozen=True)
class DataSection:
    """`[data]`: the images.

    Attributes:
        kind: "folder", captioned images on disk; "tiny", images that the bundled source itself makes; or "renderings",
            clean ones of the same set.
        path: of "folder": the data folder, or one table in it, see `dataset.readers`. A relative path starts at the
            recipe's folder.
        size: of "folder": side in pixels of a square of the area that images are brought to, each in the shape of its
            bucket; left out, what the variant was trained at.
        workers: of "folder": threads that decode images ahead of use.
        max_bad_share: of "folder": share of broken images and missing captions from which on the run stops.
        images: of the other kinds: how many.
        batch_size: images of a micro-batch.
        seed: of the shuffling, and of the captions and images of the other kinds.
        steps, cfg: of "tiny": Euler steps and guidance that the source makes an image with.
    """

    kind: str = "tiny"
    path: str = ""
    size: int | None = None
    workers: int = 4
    max_bad_share: float = MAX_BAD_SHARE
    images: int = 2048
    batch_size: int = 32
    seed: int = 0
    steps: int = 20
    cfg: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in ("folder", "tiny", "renderings"):
            raise ValueError(f"kind must be folder, tiny or renderings, not {self.kind!r}.")
        if self.kind == "folder" and not self.path:
            raise ValueError("kind \"folder\" needs the key 'path', the folder with the captioned images.")
        if self.kind != "folder" and self.path:
            raise ValueError(
                f'path names the folder {self.path!r}, but kind = "{self.kind}" makes its own images: set '
                'kind = "folder" to train on the folder, or remove path.'
            )
        ranges.check(self, RANGES["data"])


@dataclass(frozen=True)
class CaptionsSection:
    """`[captions]`: how the captions of a data folder become features, once.

    Attributes:
        encoder: the text encoder, for Z-Image the folder or file of Qwen3-4B; the tiny model needs none. A relative
            path starts at the recipe's folder.
        tokenizer: its tokenizer's folder, where that lies elsewhere.
        cache: the folder that features are kept in and shared between runs; left out, "captions" beside the run folder.
    """

    encoder: str = ""
    tokenizer: str = ""
    cache: str = ""


@dataclass(frozen=True)
class WatchSection:
    """`[watch]`: what a run saves and shows while it goes.

    Attributes:
        save_every: steps between saves of the state and the delta.
        montage_every: steps between montages.
        prompts: captions of a montage, an image each.
        seed: of a montage's noise; its image i has the noise of seed + i.
        size: side in pixels of a montage's square images; left out, that of the training images.
        steps, cfg: of a montage's sampling; left out, those of the variant.
        divergence_factor, divergence_steps: the run stops when its smoothed loss has been above `factor` times its
            best for this many steps, see `divergence`; 0 steps never does.
    """

    save_every: int = 500
    montage_every: int = 500
    prompts: list[str] = field(default_factory=list)
    seed: int = 0
    size: int | None = None
    steps: int | None = None
    cfg: float | None = None
    divergence_factor: float = 2.0
    divergence_steps: int = 200

    def __post_init__(self) -> None:
        ranges.check(self, RANGES["watch"])


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, a section each."""

    model: ModelSection
    data: DataSection = field(default_factory=DataSection)
    captions: CaptionsSection = field(default_factory=CaptionsSection)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    watch: WatchSection = field(default_factory=WatchSection)


_BACKSLASHES = "a path with \\ goes into single quotes, or is written with /"


def load(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ValueError: naming the file, the key and what was expected; a misspelt key with the nearest right one.
    """
    try:
        return parse(read_toml(path.read_text(encoding="utf-8-sig")))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: save it as UTF-8, or give another file.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_toml(text: str) -> dict[str, Any]:
    """A TOML document; a ValueError, "not valid TOML" and where, for anything else."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in thousands
        advice = f"; {_BACKSLASHES}" if "\\" in text else ""
        raise ValueError(f"not valid TOML: {error}{advice}") from error


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
            try:
                return float(value)
            except OverflowError:
                return math.inf  # which no range has
        if option == list[str] and isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        # Exactly the type: True is an int to Python, but not to whoever wrote steps = true.
        if type(value) is option:
            if isinstance(value, str) and any(ord(letter) < 32 for letter in value):
                # "C:\new\train" is right TOML, with a line break and a tab.
                raise ValueError(f"{where} holds a control character, {value!r}; {_BACKSLASHES}")
            return value
    expected = _TYPE_NAMES[next(option for option in options if option is not types.NoneType)]
    raise ValueError(f"{where} must be {expected}, not {value!r}.")


def with_paths(recipe: Recipe, beside: Path) -> Recipe:
    """The recipe with absolute paths, relative ones starting at the folder `beside`, `~` being the home folder."""

    def absolute(text: str) -> str:
        return str(settled(beside / typed(text))) if text and text != TINY else text

    replace = dataclasses.replace
    captions = {name: absolute(value) for name, value in dataclasses.asdict(recipe.captions).items()}
    return replace(
        recipe,
        model=replace(recipe.model, base=absolute(recipe.model.base)),
        data=replace(recipe.data, path=absolute(recipe.data.path)),
        captions=CaptionsSection(**captions),
    )


def to_toml(recipe: Recipe) -> str:
    """The recipe as the text of a file that `load` reads."""
    parts = []
    for section in dataclasses.fields(recipe):
        values = dataclasses.asdict(getattr(recipe, section.name))
        # JSON writes numbers, texts, booleans and lists as TOML does; TOML leaves out what is not set.
        lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]
        parts.append("\n".join([f"[{section.name}]", *lines]))
    return "\n\n".join(parts) + "\n"
