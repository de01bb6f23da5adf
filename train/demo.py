"""`l2p demo`: the bundled latent model becomes a pixel model while you watch, with the same files and functions as a
large one."""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from pathlib import Path

import torch

from ..l2p_core import convert, delta, tiny
from ..l2p_core.initialise import FITTED
from ..l2p_core.model import L2PModel
from ..l2p_core.run import recipe as recipes
from ..l2p_core.run.data import RunData, tiny_images, tiny_pairs
from ..l2p_core.run.find import find
from ..l2p_core.run.folder import RunFolder
from ..l2p_core.run.loop import Run
from ..l2p_core.run.metrics import loss_by_sigma, read_metrics
from ..l2p_core.run.recipe import Recipe
from ..l2p_core.tiny import bundled
from ..l2p_core.tiny.shapes import evaluation_captions
from . import figure
from .console import note
from .own_folder import OwnFolder
from .run import shown
from .scores import Scored, evaluate, score_table

EVALUATED = 96  # captions of a score
SAMPLING_STEPS = 12
SHOWN = 8  # images per row
CURVE_POINTS = 12
PICTURE = "demo.png"
LR_AFTER_FIT = 3e-4  # at 5e-4 training undoes much of the fit first

SOURCE_NAME = "latent source"
INIT_NAME = "fitted, untrained"
LIVE_NAME = "trained live"
BUNDLED_NAME = "bundled delta"


def demo(output: Path, steps: int | None = None, seed: int = 0) -> None:
    """Convert, fit, train, sample, score and draw; all files go to `output`.

    Args:
        output: the folder: new, empty or a demo's. Images that the source generated in an earlier demo are reused;
            everything else is created again.
        steps: of training; None uses the bundled recipe "demo".
        seed: of initialisation and training.

    Raises:
        ValueError: for a folder that holds something else.
    """
    recipe = _recipe(steps, seed)
    folder = RunFolder(output)
    FOLDER.check(output)
    with folder.held(note):
        if folder.recipe.exists() and not _is_demo_recipe(folder.recipe):
            print(f"A run that was not a demo's was moved to {folder.set_aside()}.")
        folder.clear()
        FOLDER.mark(output)
        folder.begin(recipe)
        _demo(recipe, folder)


def _is_of_version_0_1(output: Path) -> bool:
    """Whether a demo of version 0.1 created the folder: it left no marker, but its image and its recipe."""
    kept = RunFolder(output).recipe
    return (output / PICTURE).is_file() and kept.is_file() and _is_demo_recipe(kept)


def _is_demo_recipe(path: Path) -> bool:
    try:
        found = recipes.load(path)
    except ValueError:
        return False
    plain = _plain_recipe(found.training.steps, found.model.seed)
    return found in (fitted(plain), plain)  # version 0.1 had no fit


FOLDER = OwnFolder("a demo", "demo.txt", _is_of_version_0_1)
"""A demo deletes the run of the last one, so it takes no folder with anything else in it."""


def _demo(recipe: Recipe, folder: RunFolder) -> None:
    started = time.monotonic()
    output = folder.path
    print(f"1. The bundled latent source generates {recipe.data.images} images to train on.")
    with shown(recipe.training.steps) as hooks:
        images = tiny_images(recipe.data, folder.images, hooks.working)

    print("2. It becomes a pixel model, whose new layers are fitted to those images before any training.")
    report = convert.convert(
        bundled.SOURCE,
        folder.init,
        variant=recipe.model.variant,
        head_width=recipe.model.head_width,
        seed=recipe.model.seed,
        init=recipe.model.init,
        pairs=tiny_pairs(images),
    )
    print(report.summary())
    results = {}
    with shown(recipe.training.steps) as hooks:
        run = Run(recipe, folder, folder.init, RunData(images), hooks=hooks)
        run.fit_head()
        with run.trainer.averaged() as model:
            results[INIT_NAME] = _scored(INIT_NAME, model)

        print("3. Its first and last blocks, embedders and head train on them; the middle stays frozen.")
        finished = run.go()
    if not finished or hooks.should_stop():
        raise KeyboardInterrupt

    print(f"4. Every model draws the same {EVALUATED} captions, and the judge scores them.")
    results = _evaluate(folder, results)
    _draw(output / PICTURE, folder, results)
    print()
    print(score_table({name: scored.scores for name, scored in results.items()}, source=SOURCE_NAME))
    print(f"\n{output / PICTURE} shows the result. The demo took {time.monotonic() - started:.0f} seconds.")


def fitted(recipe: Recipe) -> Recipe:
    """The recipe with a fitted start, and with the learning rate that was best after it."""
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, init=FITTED),
        training=dataclasses.replace(recipe.training, lr=LR_AFTER_FIT),
    )


def _recipe(steps: int | None, seed: int) -> Recipe:
    # Train L2P takes the same recipe without the fit, for folders that may hold too few images for one.
    return fitted(_plain_recipe(steps, seed))


def _plain_recipe(steps: int | None, seed: int) -> Recipe:
    recipe = recipes.load(find("demo"))
    training = dataclasses.replace(recipe.training, steps=steps or recipe.training.steps, seed=seed)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, seed=seed), training=training)


def _evaluate(folder: RunFolder, before: dict[str, Scored]) -> dict[str, Scored]:
    """Each model's images and scores, the source's first; `before` holds those from before the training."""
    source = bundled.TinySource()
    results = {SOURCE_NAME: evaluate(SOURCE_NAME, partial(source.images, steps=SAMPLING_STEPS), EVALUATED), **before}
    models = {
        LIVE_NAME: delta.load_model(folder.delta, folder.init, dtype=torch.float32),
        BUNDLED_NAME: delta.load_model(bundled.DELTA, bundled.SOURCE, dtype=torch.float32),
    }
    return results | {name: _scored(name, model) for name, model in models.items()}


def _scored(name: str, model: L2PModel) -> Scored:
    sampler = partial(bundled.pixel_images, model.eval(), tiny.load_words(), steps=SAMPLING_STEPS)
    return evaluate(name, sampler, EVALUATED)


def _draw(path: Path, folder: RunFolder, results: dict[str, Scored]) -> None:
    metrics = read_metrics(folder.metrics)
    steps, curves = loss_by_sigma(metrics, window=max(1, len(metrics) // CURVE_POINTS))
    figure.draw(
        path,
        evaluation_captions(SHOWN),
        [figure.ImageRow(name, scored.images[:SHOWN]) for name, scored in results.items()],
        [figure.Curves(steps, {f"sigma {name}": curve for name, curve in curves.items()}, "velocity error, live run")],
        {name: scored.scores["whole"] for name, scored in results.items()},
    )
