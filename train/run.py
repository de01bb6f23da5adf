"""`l2p train`: a recipe becomes a run folder with a delta in it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..l2p_core import convert, delta, parallel, sharding, tiny
from ..l2p_core.batch import Part
from ..l2p_core.checkpoint import load_model, open_checkpoint
from ..l2p_core.config import variant_row
from ..l2p_core.parallel import Ranks
from ..l2p_core.tiny.words import CAPTION_DIM, Words
from ..l2p_core.trainer import Trainer
from . import bundled, data
from . import recipe as recipes
from .console import byte_progress, count_progress, train_progress
from .interrupt import deferred_interrupt
from .pictures import montage, save_png
from .recipe import DataSection, Recipe
from .run_folder import RunFolder

MONTAGE_COLUMNS = 6
MONTAGE_SCALE = 2

AfterStep = Callable[[Trainer], None]
"""Called after every optimiser step, the run folder being up to date."""


def train(name: str, output: Path | None = None, restart: bool = False) -> None:
    """Train as the recipe says, from the last save in the run folder if there is one.

    Args:
        name: a recipe file, or a bundled recipe's name.
        output: the run folder; None is runs/<name of the recipe>.
        restart: forget what the folder holds.

    Raises:
        ValueError: for a wrong recipe, or a folder that holds another run.
        KeyboardInterrupt: after Ctrl-C, when everything is saved.
    """
    with parallel.process_group() as ranks:

        def prepare() -> tuple[Recipe, RunFolder, Path, data.ImageSet]:
            path = recipes.find(name)
            recipe, text = recipes.load(path), path.read_text(encoding="utf-8")
            ranks.part(recipe.training.accumulate, recipe.data.batch_size)
            folder = RunFolder(output or Path("runs") / path.stem)
            if ranks.first:
                if restart:
                    folder.clear()
                folder.begin(text, recipe)
            base = initialisation(recipe, path.parent, folder.init)
            _check_captions(base, recipe.data.kind)
            return recipe, folder, base, images(recipe.data, folder.images)

        recipe, folder, base, image_set = ranks.first_then_others(prepare)
        run = Run(recipe, folder, base, image_set, ranks)
        if run.trainer.step and ranks.first:
            print(f"Going on after step {run.trainer.step} of {recipe.training.steps}.", file=sys.stderr)
        run.go()
        if ranks.first:
            print(f"{folder.delta} written after {run.trainer.step} steps.")


def initialisation(recipe: Recipe, beside: Path, target: Path) -> Path:
    """The L2P file that training starts from; a latent source is converted to `target` first, once."""
    base = bundled.resolve(recipe.model.base)
    if base != bundled.SOURCE and not base.is_absolute():
        base = beside / base
    if open_checkpoint(base).config().head is not None:
        return base
    if not target.exists():
        with byte_progress("converting") as progress:
            convert.convert(
                base,
                target,
                variant=recipe.model.variant,
                seed=recipe.model.seed,
                init=recipe.model.init,
                head_width=recipe.model.head_width,
                progress=progress,
            )
    return target


def images(section: DataSection, folder: Path) -> data.ImageSet:
    """The images of a recipe, from the cache in `folder` or made now."""
    if section.kind == "renderings":
        return data.generated(data.rendered, section.images, section.seed, folder, "renderings")
    source = bundled.TinySource()
    with count_progress("images of the source", "image") as progress:
        generate = partial(source.images, steps=section.steps, cfg=section.cfg)
        name = source.name(section.steps, section.cfg)
        return data.generated(generate, section.images, section.seed, folder, name, progress)


class Run:
    """One training run in its folder, resumed from the last save there.

    Args:
        recipe: how to train.
        folder: where everything goes; `RunFolder.begin` has been called.
        base: the L2P file that training starts from.
        image_set: what it trains on.
        ranks: the processes of the run; the first writes its files.

    Raises:
        ValueError: if the save is of another run.
    """

    def __init__(
        self, recipe: Recipe, folder: RunFolder, base: Path, image_set: data.ImageSet, ranks: Ranks | None = None
    ):
        self.recipe, self.folder, self.base = recipe, folder, base
        self.ranks = ranks or Ranks()
        # Shards are cut on the way to the device, which need not hold the whole.
        device = self.ranks.device if self.ranks.count == 1 else "cpu"
        model = load_model(base, dtype=torch.float32, device=device)
        self.words: Words = tiny.load_words()
        self.trainer = Trainer(model, recipe.training, empty_caption=self.words.encode(""), ranks=self.ranks)
        if folder.state.exists():
            self.trainer.resume(folder.state)
        self.ranks.first_only(lambda: folder.rewind(self.trainer.step))
        whole = data.Batches(image_set, self.words.encode, recipe.data.batch_size, recipe.data.seed)
        self.batches = Part(whole, *self.ranks.part(recipe.training.accumulate, recipe.data.batch_size))

    def go(self, after_step: AfterStep | None = None) -> None:
        """Train to the end, or to Ctrl-C, saving on the way and then."""
        watch, total = self.recipe.watch, self.recipe.training.steps
        with deferred_interrupt() as interrupt, train_progress(total, self.trainer.step) as show:
            for metrics in self.trainer.run(self.batches):
                if self.ranks.first:
                    self.folder.add_metrics(metrics)
                show(metrics)
                finished = metrics.step == total
                stopping = self.ranks.any(interrupt.requested)
                if after_step:
                    after_step(self.trainer)
                if finished or stopping or metrics.step % watch.save_every == 0:
                    self._save()
                if watch.prompts and (finished or metrics.step % watch.montage_every == 0):
                    self._montage()
                if stopping and not finished:
                    raise KeyboardInterrupt

    def _save(self) -> None:
        """Delta and state, each whole or not at all; the state last, since it is what a run goes on from."""
        sharding.write_from_first(
            self.ranks,
            self.trainer.trained(),
            lambda weights: delta.save(weights, self.base, self.folder.delta, overwrite=True),
        )
        self.trainer.save(self.folder.state)

    def _montage(self) -> None:
        """The recipe's prompts as images, from the averaged weights."""
        watch = self.recipe.watch
        with self.trainer.averaged() as model:
            row = variant_row(str(model.config.variant))
            pixels = bundled.pixel_images(
                model,
                self.words,
                watch.prompts,
                [watch.seed + i for i in range(len(watch.prompts))],
                steps=watch.steps or row.steps,
                cfg=row.cfg if watch.cfg is None else watch.cfg,
            )
        target = self.folder.montage(self.trainer.step)
        picture = montage(pixels, MONTAGE_COLUMNS)
        self.ranks.first_only(lambda: save_png(picture, target, overwrite=True, scale=MONTAGE_SCALE))


def _check_captions(base: Path, kind: str) -> None:
    width = open_checkpoint(base).config().caption_dim
    if width != CAPTION_DIM:
        raise ValueError(
            f"Data of kind {kind!r} has the tiny model's captions, {CAPTION_DIM} numbers a token, but {base} takes "
            f"{width}."
        )
