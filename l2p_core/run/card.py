"""The model card of a delta: a Markdown file beside it, with montage, recipe, base and licence, for the people it is
shared with. Base, variant and licence are read from the delta's own header. The card of a run adds its recipe, its last
montage and its captions. The front matter is what model sites read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import Checkpoint, open_checkpoint
from ..config import VARIANTS, PixelConfig
from ..deltas.unchanged_tensors import parse_unchanged
from ..files import metadata
from ..files.about import TITLE
from ..files.atomic import write_bytes
from ..files.safetensors_header import CheckpointError
from ..files.units import bytes_text
from ..sources import source_of
from ..tiny.bundled import is_tiny
from ..tiny.shapes import IMAGE_SIZE
from . import recipe as recipes
from .folder import RunFolder, montage_step
from .recipe import Recipe

MARK = "<!-- Written by ComfyUI-L2P with the delta beside it; a card without this line is never replaced. -->"
_TINY = "the tiny source of ComfyUI-L2P"
_LICENCES = ("modelspec.license", "license")
_TRIGGERS = ("modelspec.trigger_phrase", "trained_words")
_AUTHORS = ("modelspec.author", "author")


@dataclass(frozen=True)
class RunDetails:
    """What a run knows about its delta.

    Attributes:
        folder, recipe: of the run.
        step: of the save.
    """

    folder: RunFolder
    recipe: Recipe
    step: int

    @property
    def montage(self) -> Path | None:
        """The last montage before the save, if there is one."""
        montages = [path for path in self.folder.montages() if montage_step(path) <= self.step]
        return montages[-1] if montages else None


def path_of(delta: Path) -> Path:
    """The card's path: the delta's name with the suffix .md."""
    return delta.with_suffix(".md")


def write(delta: Path, run: RunDetails | None = None) -> Path | None:
    """Write the card of a delta beside it, and its montage as a picture of its own.

    Args:
        delta: the file, complete.
        run: the run that trained it; None for a delta that was extracted from two files.

    Returns:
        The card; None if a card by somebody else exists there, which stays.

    Raises:
        ValueError: if it cannot be written.
    """
    card = path_of(delta)
    if card.exists() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
        return None
    picture = delta.with_name(f"{delta.stem}-montage.png")
    if run and run.montage:
        write_bytes(picture, run.montage.read_bytes())
    write_bytes(card, ("\n".join(_lines(delta, run, picture.name)) + "\n").encode(errors="backslashreplace"))
    return card


def _lines(delta: Path, run: RunDetails | None, picture: str) -> Iterator[str]:
    opened = open_checkpoint(delta)
    known = opened.metadata
    config = metadata.stored_config(known)
    if not isinstance(config, PixelConfig):
        raise CheckpointError(f"{delta} does not state its model's sizes: write the delta again.")
    bundled = is_tiny(config)  # Z-Image's architecture, but neither its weights nor its terms
    row = source_of(config)
    base = _TINY if bundled else known.get("modelspec.base_model") or row.base_title(config)
    licence = _first(known, _LICENCES)
    yield from ("---", *_front_matter(licence), "---", MARK, "", f"# {_first(known, (TITLE,)) or delta.stem}", "")
    side = IMAGE_SIZE if bundled else VARIANTS[config.variant].pixels if row.is_published(config) else None
    images = f", for images of {side} x {side} pixels" if side else ""
    yield (
        f"A delta that makes {base} a pixel model by L2P ([arXiv 2605.12013](https://arxiv.org/abs/2605.12013)): it "
        f"draws in pixels, without a VAE. Variant {config.variant}{images}."
    )
    yield from _montage(run, picture)
    yield from ("", "## Use", "")
    yield (
        f"Put `{delta.name}` into ComfyUI's `models/diffusion_models`, where the base lies, and choose both in L2P "
        "Loader (ComfyUI-L2P). In a terminal: "
        f"`l2p sample BASE --delta {delta.name} --prompt TEXT`, or, for a whole file, "
        f"`l2p merge {delta.name} BASE TARGET`."
    )
    if words := _first(known, _TRIGGERS):
        yield f"\nTrigger words: {words}"
    yield from ("", "## Base", "")
    yield f"- {base}: the latent model, or the pixel initialisation made of it; its unchanged tensors are checked"
    if digest := known.get(metadata.SOURCE_SHA256):
        yield f"- SHA-256 of the latent source: `{digest}`"
    yield from (f"- {line}" for line in _contents(opened, delta))
    yield from ("", "## Licence", "", _licence(licence, base))
    if author := _first(known, _AUTHORS):
        yield f"\nAuthor: {author}"
    if run:
        steps = f"Trained for {run.step} of {run.recipe.training.steps} steps."
        yield from ("", "## Recipe", "", steps, "", "```toml")
        yield from (recipes.to_toml(recipes.without_folders(run.recipe)).strip(), "```")


def _front_matter(licence: str) -> Iterator[str]:
    """YAML, in which JSON texts are valid."""
    yield f"license: {json.dumps(licence.lower() if licence else 'other')}"
    yield "pipeline_tag: text-to-image"
    yield 'tags: ["l2p", "pixel-space", "comfyui"]'


def _montage(run: RunDetails | None, picture: str) -> Iterator[str]:
    if run and run.montage:
        yield from ("", f"![Montage of step {run.step}](<{picture}>)", "", "In reading order:", "")
        yield from (f"- {_plain(prompt)}" for prompt in run.recipe.watch.prompts)
    elif run:
        yield from ("", "The run has drawn no montage.")
    else:
        yield from ("", "Extracted from two model files, which hold neither recipe nor montage.")


def _contents(opened: Checkpoint, delta: Path) -> Iterator[str]:
    count, kept, known = len(opened.tensors), len(parse_unchanged(opened)), opened.metadata
    yield f"{count} trained tensors here ({bytes_text(delta.stat().st_size)}), {kept} unchanged ones in the base"
    if seed := known.get(metadata.SEED):
        yield f"new layers initialised {known.get(metadata.INIT, 'random')}, seed {seed}"


def _licence(licence: str, base: str) -> str:
    if licence:
        return f"{licence}, as the file's metadata states. The terms of {base} apply to what is made of it as well."
    return f"The file states none. The terms of {base} apply to what is made of it: look them up before sharing."


def _first(known: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((_plain(known[name]) for name in names if known.get(name, "").strip()), "")


def _plain(text: str) -> str:
    """A text on one line that Markdown takes literally."""
    line = " ".join(text.split())[:2000]
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|!" else letter for letter in line)
