"""`l2p plan`: what a recipe needs of memory, disk and time, without its data, and without its model where that is the
6B Z-Image."""

from __future__ import annotations

import math
from pathlib import Path

from ..l2p_core.accelerator import default_device
from ..l2p_core.config import ModelConfig
from ..l2p_core.fit import Room, fitting, keeping_what_fits, refuse_if_too_much
from ..l2p_core.model import key_shapes
from ..l2p_core.plan import GB, plan
from ..l2p_core.recompute import kept_sentence
from ..l2p_core.run import disk, pace
from ..l2p_core.run.base import pixel_config
from ..l2p_core.run.folder import RunFolder
from ..l2p_core.run.planning import workload
from ..l2p_core.run.recipe import TINY, Recipe
from ..l2p_core.training_config import TrainingConfig
from .console import table
from .run import Places, read_recipe

_HALF = 2  # bytes of a parameter in the published files of Z-Image
CARDS = (8, 12, 16, 24, 48, 80)


def plan_command(name: str, places: Places, gpu_memory: float | None, cards: bool) -> None:
    """Print the plan of a recipe; with `cards`, a table of what makes it fit into usual GPUs.

    Args:
        name: a recipe file, a bundled recipe's name, or a run folder.
        places: see `run.Places`.
        gpu_memory: in GB (10^9 bytes), that it must fit into.

    Raises:
        ValueError: if it does not fit, with the change that would make it fit.
    """
    recipe, folder = read_recipe(name, None, places)
    config = _config(recipe, folder, given=places.base is not None)
    work = workload(recipe, config)
    if cards:
        print(card_table(config, recipe))
    elif gpu_memory is None:
        print(plan(config, recipe.training, work).sentence())
        _print_disk_and_time(config, recipe.training, recipe, folder)
    else:
        room = Room(round(gpu_memory * GB))
        refuse_if_too_much(config, recipe.training, work, room)
        training = keeping_what_fits(config, recipe.training, work, room)
        print(room.plan(config, training, work).sentence() + kept_sentence(config, training))
        _print_disk_and_time(config, training, recipe, folder)


def _print_disk_and_time(config: ModelConfig, training: TrainingConfig, recipe: Recipe, folder: Path) -> None:
    print(_of_the_disk(config, training, recipe, folder))
    # On the device that `l2p train` would take.
    time = pace.expected(recipe, RunFolder(folder), pace.key_of(config, recipe, default_device()))
    if time:
        print(time)


def _of_the_disk(config: ModelConfig, training: TrainingConfig, recipe: Recipe, folder: Path) -> str:
    """What the run needs of the disk that it would be on, and what to change where that has too little room."""
    base = recipe.model.base
    there = base == TINY or Path(base).exists()
    published = None if there else _HALF * sum(math.prod(shape) for shape in key_shapes(config).values())
    found = disk.planned(recipe, config, training, RunFolder(folder), initialisation=published)
    return f"{found.sentence()} {found.complaint()}".strip()


def card_table(config: ModelConfig, recipe: Recipe) -> str:
    """What to change in a recipe for each usual GPU, and what it then needs, as a Markdown table."""
    rows = []
    for card in CARDS:
        found = fitting(config, recipe.training, workload(recipe, config), Room(card * GB))
        if found is None:
            rows.append([f"{card} GB", "does not fit", "", ""])
            continue
        change, needed = found
        settings = ", ".join(f"`{words}`" for words in change.words.split(" and ")) if change.words else "none"
        sizes = [f"{size / GB:.1f} GB" if size else "" for size in (needed.device_bytes, needed.computer_bytes)]
        rows.append([f"{card} GB", settings, *sizes])
    return table(["GPU", "changes", "GPU memory", "computer's memory"], rows)


def _config(recipe: Recipe, folder: Path, given: bool) -> ModelConfig:
    base = recipe.model.base
    if base == TINY or given or Path(base).exists():
        return pixel_config(recipe.model, folder / "init.safetensors")
    print(f"There is no {base} yet; planned for the 6B Z-Image.")
    return ModelConfig().with_head(recipe.model.variant, recipe.model.head_width)
