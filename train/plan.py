"""`l2p plan`: estimates a recipe's memory, disk and time without its data, and without its model if that is a
published source."""

from __future__ import annotations

import dataclasses
import math
from contextlib import suppress
from pathlib import Path

import torch

from ..l2p_core.config import PixelConfig
from ..l2p_core.device.accelerator import CPU, default_device
from ..l2p_core.distributed.ranks import Ranks
from ..l2p_core.distributed.together import check_together, go_together
from ..l2p_core.memory.checkpointing import kept_sentence
from ..l2p_core.memory.plan import GB, plan
from ..l2p_core.memory.room import Room, fitting, keeping_what_fits, refuse_if_too_much
from ..l2p_core.model import key_shapes
from ..l2p_core.run import disk, pace
from ..l2p_core.run.base import pixel_config
from ..l2p_core.run.folder import RunFolder
from ..l2p_core.run.memory_plan import decided, workload
from ..l2p_core.run.recipe import TINY, Recipe
from ..l2p_core.sources import SOURCES
from ..l2p_core.training_config import TrainingConfig
from .console import table
from .run import PathOverrides, read_recipe

_HALF = 2  # bytes of a parameter in the published files of Z-Image
_GPU = torch.device("cuda")
"""The precision that is planned for, regardless of this machine."""
CARDS = (8, 12, 16, 24, 48, 80)


def plan_command(name: str, paths: PathOverrides, gpu_memory: float | None, cards: bool, processes: int = 1) -> None:
    """Print the plan of a recipe; with `cards`, a table of the settings that make it fit into common GPUs.

    Args:
        name: a recipe file, a bundled recipe's name, or a run folder.
        paths: see `run.PathOverrides`.
        gpu_memory: in GB (10^9 bytes), that each process must fit into.
        processes: number of processes that train together, one GPU each.

    Raises:
        ValueError: if it does not fit, with the change that would make it fit, or if this number of processes does not
            work.
    """
    recipe, folder = read_recipe(name, None, paths)
    config = _config(name, recipe, folder, given=paths.base is not None)
    check_together(recipe.training, processes, _GPU)
    work = workload(recipe, config, Ranks(count=processes, device=CPU))
    if cards:
        print(card_table(config, recipe, processes))
    elif gpu_memory is None:
        for training in _ways(recipe.training, processes):
            of_each = _of_each(training, processes)
            print(of_each + plan(config, training, work, processes=processes).sentence())
        _print_disk_and_time(config, training, recipe, folder, processes)
    else:
        room = Room(round(gpu_memory * GB), processes=processes)
        training = decided(config, recipe.training, work, room)
        refuse_if_too_much(config, training, work, room)
        training = keeping_what_fits(config, training, work, room)
        needed = room.plan(config, training, work).sentence() + kept_sentence(config, training)
        print(_of_each(training, processes) + needed)
        _print_disk_and_time(config, training, recipe, folder, processes)


def _print_disk_and_time(
    config: PixelConfig, training: TrainingConfig, recipe: Recipe, folder: Path, processes: int
) -> None:
    print(_of_the_disk(config, training, recipe, folder, processes))
    # On the device that `l2p train` would select.
    time = pace.expected(recipe, RunFolder(folder), pace.key_of(config, recipe, default_device(), processes))
    if time:
        print(time)


def _ways(training: TrainingConfig, processes: int) -> list[TrainingConfig]:
    """The methods by which the processes may train together: both if the GPU's memory would decide."""
    if processes == 1 or training.parallel != "auto":
        return [training]
    ways = (dataclasses.replace(training, parallel=way) for way in ("ddp", "fsdp"))
    return [way for way in ways if go_together(way, processes, _GPU)]


def _of_each(training: TrainingConfig, processes: int) -> str:
    return f'Each of {processes} processes, with parallel = "{training.parallel}": ' if processes > 1 else ""


def _of_the_disk(config: PixelConfig, training: TrainingConfig, recipe: Recipe, folder: Path, processes: int) -> str:
    """The run's disk usage as a sentence, and what to change if its disk has too little space."""
    base = recipe.model.base
    there = base == TINY or Path(base).exists()
    published = None if there else _HALF * sum(math.prod(shape) for shape in key_shapes(config).values())
    found = disk.planned(recipe, config, training, RunFolder(folder), initialisation=published)
    return f"{found.sentence()} {found.complaint(processes)}".strip()


def card_table(config: PixelConfig, recipe: Recipe, processes: int = 1) -> str:
    """The changes to a recipe for each common GPU, and each process's memory then, as a Markdown table."""
    rows = []
    work = workload(recipe, config, Ranks(count=processes, device=CPU))
    for card in CARDS:
        room = Room(card * GB, processes=processes)
        training = dataclasses.replace(recipe.training, parallel="ddp")
        with suppress(ValueError):  # settings that shards do not support may work with replicas
            training = decided(config, recipe.training, work, room)
        way = [f"`{training.parallel}`"] if processes > 1 else []
        found = fitting(config, training, work, room)
        if found is None:
            rows.append([f"{card} GB", *way, "does not fit", "", ""])
            continue
        change, needed = found
        settings = ", ".join(f"`{words}`" for words in change.words.split(" and ")) if change.words else "none"
        sizes = [f"{size / GB:.1f} GB" if size else "" for size in (needed.device_bytes, needed.ram_bytes)]
        rows.append([f"{card} GB", *way, settings, *sizes])
    return table(["GPU", *(["parallel"] if processes > 1 else []), "changes", "GPU memory", "RAM"], rows)


def _config(name: str, recipe: Recipe, folder: Path, given: bool) -> PixelConfig:
    base = recipe.model.base
    if base == TINY or given or Path(base).exists():
        return pixel_config(recipe.model, folder / "init.safetensors")
    first, *others = SOURCES.values()
    row = next((row for row in others if row.recipe and name.startswith(row.recipe)), first)
    print(f"{base} does not exist yet; the plan is for {row.title} as published.")
    return row.config().with_head(recipe.model.variant, recipe.model.head_width)
