"""`l2p train`: runs a recipe in a folder and saves a delta there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..l2p_core.dataset.image_folder import ImageFolder
from ..l2p_core.device.accelerator import named
from ..l2p_core.distributed import ranks as parallel
from ..l2p_core.files.paths import settled, typed
from ..l2p_core.files.units import counted
from ..l2p_core.run import loop, preparation
from ..l2p_core.run import recipe as recipes
from ..l2p_core.run.base import pixel_config
from ..l2p_core.run.caption_source import CaptionSource
from ..l2p_core.run.find import beside, find
from ..l2p_core.run.folder import RunFolder
from ..l2p_core.run.hooks import Hooks
from ..l2p_core.run.metrics import RunMetrics
from ..l2p_core.run.preparation import caption_folder
from ..l2p_core.run.recipe import Recipe
from ..l2p_core.sources import source_of
from . import text_encoder
from .console import bar, note, train_progress
from .interrupt import deferred_interrupt

_BYTES: dict[str, Any] = {"unit": "B", "unit_scale": True}
_OPTIONS: dict[str, dict[str, Any]] = {
    "converting": _BYTES,
    "loading": _BYTES,
    "montage": {"unit": "step", "leave": False},
}
"""Options of the bars for some kinds of work."""


@dataclass(frozen=True)
class PathOverrides:
    """Paths that override those of a recipe, relative to the current folder; None keeps the recipe's."""

    base: str | None = None
    data: str | None = None
    encoder: str | None = None


def train(
    name: str,
    output: Path | None = None,
    restart: bool = False,
    paths: PathOverrides | None = None,
    device: str | None = None,
) -> None:
    """Train a recipe, from the last save in the run folder if there is one.

    Args:
        name: a recipe file, a bundled recipe's name, or a run folder to resume.
        output: the run folder; None is runs/<name of the recipe>, or the run folder that `name` is.
        restart: begin anew instead of resuming; the folder's content is moved into a subfolder.
        paths: see `PathOverrides`.
        device: for training and encoding captions; None selects a GPU if there is one.

    Raises:
        ValueError: for an invalid recipe, a missing device, or a folder that holds another run.
        KeyboardInterrupt: after Ctrl-C or a signal that ends the process, when everything is saved.
    """
    with parallel.process_group(device=None if device is None else named(device)) as ranks:
        recipe, folder = read_recipe(name, output, paths or PathOverrides())
        captions = captions_of(recipe, folder, ranks.device, restart)
        with shown(recipe.training.steps) as hooks:
            result = loop.train(recipe, folder, captions=captions, hooks=hooks, ranks=ranks, restart=restart)
        if not result.finished:
            raise KeyboardInterrupt
        if ranks.first:
            print(f"{result.folder.delta} written after {result.step} steps.")


def cache(name: str, output: Path | None = None, paths: PathOverrides | None = None, device: str | None = None) -> None:
    """Check a recipe's data folder and encode its captions before training; arguments as for `train`.

    Raises:
        ValueError: for an invalid recipe, unusable data, or a run folder in use by another process.
    """
    of_encoder = None if device is None else named(device)
    recipe, folder = read_recipe(name, output, paths or PathOverrides())
    if recipe.data.kind != "folder":
        raise ValueError(
            f"Data of kind {recipe.data.kind!r} has captions that need no encoding: there is nothing to cache."
        )
    captions, run = captions_of(recipe, folder, of_encoder), RunFolder(folder)
    with shown(0) as hooks, run.held(hooks.note, "checks images and encodes captions"):
        found = preparation.prepare_data(recipe, run, pixel_config(recipe.model, run.init), captions, hooks)
    assert isinstance(found.images, ImageFolder)
    sizes = ", ".join(f"{count} of {size}" for size, count in found.images.sizes.items())
    encoded = len(found.images.captions)
    captions_said = f"{counted(encoded, 'caption')} {'is' if encoded == 1 else 'are'} encoded"
    print(f"{counted(len(found.images.images), 'image')} ({sizes}); {captions_said}.")


def read_recipe(name: str, output: Path | None, paths: PathOverrides) -> tuple[Recipe, Path]:
    """The recipe with absolute paths, and the run folder."""
    path = find(name)
    recipe = recipes.load(path)
    sections = {"model": ("base", paths.base), "data": ("path", paths.data), "captions": ("encoder", paths.encoder)}
    for section, (key, value) in sections.items():
        if value is not None:
            here = value if value == recipes.TINY else str(settled(typed(value)))
            changed = dataclasses.replace(getattr(recipe, section), **{key: here})
            recipe = dataclasses.replace(recipe, **{section: changed})
    of_run = path.parent if typed(name).is_dir() else Path("runs") / path.stem
    return recipes.with_paths(recipe, beside(path)), output or of_run


def captions_of(
    recipe: Recipe, folder: Path, device: torch.device | None = None, restart: bool = False
) -> CaptionSource | None:
    """The caption cache of a run in `folder`, and the recipe's text encoder on `device`; None if it names none.

    Raises:
        ValueError: if the encoder does not exist, or the base cannot be read.
    """
    if not recipe.captions.encoder:
        return None
    config = pixel_config(recipe.model, None if restart else RunFolder(folder).init)
    published = source_of(config).encoder
    files = text_encoder.find(recipe.captions.encoder, recipe.captions.tokenizer or None, published)
    return CaptionSource(
        caption_folder(recipe, folder),
        text_encoder.identity(files),
        lambda: text_encoder.TransformersEncoder(files, device),
        max_tokens=published.max_tokens,
        itemsize=text_encoder.DTYPE.itemsize,
    )


@contextmanager
def shown(steps: int) -> Iterator[Hooks]:
    """Hooks that show a run on the terminal, and save and stop it at Ctrl-C or a signal that ends the process."""
    with deferred_interrupt() as interrupt, ExitStack() as training, _Bars() as bars:
        show = None

        def progress(metrics: RunMetrics) -> None:
            nonlocal show
            bars.close()
            if show is None:
                show = training.enter_context(train_progress(steps, metrics.step - 1))
            show(metrics)

        def working(text: str, done: int, total: int) -> None:
            # Preparation stores its results as it goes and has nothing to save.
            if interrupt.requested:
                raise KeyboardInterrupt
            bars.show(text, done, total)

        yield Hooks(
            progress,
            should_stop=lambda: interrupt.requested,
            note=note,
            forecast=lambda sentence: note(sentence) if sentence else None,
            working=working,
            sampling=lambda done, steps: bars.show("montage", done, steps),
        )


class _Bars:
    """One progress bar for each kind of work, in sequence."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._text = ""

    def show(self, text: str, done: int, total: int) -> None:
        """Show the progress of a kind of work in its own bar."""
        if text != self._text:
            self.close()
            self._bar, self._text = bar(text, **_OPTIONS.get(text, {})), text
        assert self._bar is not None
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Close the current bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._text = None, ""

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
