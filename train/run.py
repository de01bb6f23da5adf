"""`l2p train`: a recipe becomes a run folder with a delta in it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ..l2p_core import convert, delta, tiny
from ..l2p_core.checkpoint import load_model, open_checkpoint
from ..l2p_core.config import variant_row
from ..l2p_core.tiny.words import CAPTION_DIM
from ..l2p_core.trainer import BatchSource, Trainer
from . import bundled, data
from . import recipe as recipes
from .console import byte_progress, count_progress, train_progress
from .interrupt import deferred_interrupt
from .pictures import montage, save_png
from .recipe import DataSection, Recipe
from .run_folder import RunFolder

MONTAGE_COLUMNS = 6


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
    path = recipes.find(name)
    recipe = recipes.load(path)
    folder = RunFolder(output or Path("runs") / path.stem)
    if restart and path.resolve() != folder.recipe.resolve():
        folder.clear()
    folder.begin(path, recipe)
    base = initialisation(recipe, path.parent, folder.init)
    model = load_model(base, dtype=torch.float32, device=default_device())
    if model.config.caption_dim != CAPTION_DIM:
        raise ValueError(
            f"The data of kind {recipe.data.kind!r} has the tiny model's captions ({CAPTION_DIM} numbers a "
            f"token), but {base} takes {model.config.caption_dim}."
        )
    words = tiny.load_words()
    trainer = Trainer(model, recipe.training, empty_caption=words.encode(""))
    if folder.state.exists():
        trainer.resume(folder.state)
        print(f"Going on after step {trainer.step} of {recipe.training.steps}.", file=sys.stderr)
    folder.rewind(trainer.step)
    batches = data.Batches(images(recipe.data, folder.images), words.encode, recipe.data.batch_size, recipe.data.seed)
    _Watch(trainer, recipe, folder, base).run(batches)
    print(f"{folder.delta} written: {trainer.step} of {recipe.training.steps} steps.")


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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
        return data.generated(source.images, section.images, section.seed, folder, source.name(), progress)


class _Watch:
    """Runs a trainer and keeps the run folder up to date."""

    def __init__(self, trainer: Trainer, recipe: Recipe, folder: RunFolder, base: Path):
        self.trainer, self.recipe, self.folder, self.base = trainer, recipe, folder, base

    def run(self, batches: BatchSource) -> None:
        """Train to the end, or to Ctrl-C, and save."""
        watch, total = self.recipe.watch, self.recipe.training.steps
        with deferred_interrupt() as interrupt, train_progress(total, self.trainer.step) as show:
            for metrics in self.trainer.run(batches):
                self.folder.add_metrics(metrics)
                show(metrics)
                finished = metrics.step == total
                if finished or interrupt.requested or metrics.step % watch.save_every == 0:
                    self.save()
                if watch.prompts and (finished or metrics.step % watch.montage_every == 0):
                    self.montage()
                if interrupt.requested:
                    raise KeyboardInterrupt
        if not self.folder.delta.exists():
            self.save()

    def save(self) -> None:
        """State and delta, each whole or not at all."""
        self.trainer.save(self.folder.state)
        delta.save(self.trainer.trained(), self.base, self.folder.delta, overwrite=True)

    def montage(self) -> None:
        """The recipe's prompts as images, from the averaged weights."""
        watch = self.recipe.watch
        with self.trainer.averaged() as model:
            row = variant_row(str(model.config.variant))
            pixels = bundled.pixel_images(
                model,
                tiny.load_words(),
                watch.prompts,
                [watch.seed + i for i in range(len(watch.prompts))],
                steps=watch.steps or row.steps,
                cfg=row.cfg if watch.cfg is None else watch.cfg,
            )
        save_png(montage(pixels, MONTAGE_COLUMNS), self.folder.montage(self.trainer.step), overwrite=True, scale=2)
