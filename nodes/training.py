"""A training run inside the host: it uses the host's memory, interruption and display; the loop is the core's."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from torch import Tensor

from ..l2p_core.checkpoint import open_checkpoint
from ..l2p_core.config import PixelConfig
from ..l2p_core.dataset.images import opened
from ..l2p_core.device.accelerator import CPU, has_own_memory
from ..l2p_core.distributed.ranks import Ranks
from ..l2p_core.files.units import counted
from ..l2p_core.memory.room import DoesNotFit
from ..l2p_core.run import card, loop
from ..l2p_core.run import recipe as recipes
from ..l2p_core.run.base import pixel_config
from ..l2p_core.run.changes import changed, read_changes
from ..l2p_core.run.find import find
from ..l2p_core.run.folder import RunFolder
from ..l2p_core.run.hooks import Hooks
from ..l2p_core.run.metrics import RunMetrics, read_metrics
from ..l2p_core.run.recipe import Recipe
from ..l2p_core.sources import source_of
from ..l2p_core.tiny.bundled import is_tiny
from ..l2p_core.tiny.shapes import IMAGE_SIZE
from .clip_captions import host_captions
from .folders import datasets, files, run_files
from .messages.live import Live, shown_montage
from .messages.sentences import by_folders
from .training_choices import AS_RECIPE, AUTO, MEMORY, Choices

FIXED = {"model": ("base",), "data": ("kind", "path"), "captions": ("encoder", "tokenizer", "cache")}
"""Keys that a run's changes must not contain, because the node has inputs for them."""
_KEPT = (
    "Models that ComfyUI keeps in RAM for other nodes count as used: Unload Models and Execution Cache, in its Edit "
    "menu, frees them."
)


@dataclass(frozen=True)
class Trained:
    """The result of a run.

    Attributes:
        delta: its name in models/diffusion_models.
        losses: of every step from the first.
        montage: the last one, (1, H, W, 3) in [0, 1]; None if the run draws none.
        state: as `Live.state`.
        files: the run's files, whose absence or change makes the node run again.
    """

    delta: str
    losses: list[float]
    montage: Tensor | None
    state: dict[str, Any]
    files: list[Path]


def recipe_of(choices: Choices) -> Recipe:
    """The recipe for the user's choices, with absolute paths.

    Raises:
        ValueError: for a missing data set, model or recipe, and for values out of range.
    """
    base = files.existing(choices.model)
    name = _fitting_recipe(base) if choices.recipe == AUTO else choices.recipe
    recipe = recipes.load(find(name))
    data = recipe.data.size if recipe.data.kind == "folder" else IMAGE_SIZE
    prompts = [line.strip() for line in choices.prompts.splitlines() if line.strip()] or recipe.watch.prompts
    fixed: dict[str, dict[str, Any]] = {
        "model": {"base": recipes.TINY if choices.model == files.TINY else base, "seed": choices.seed},
        "data": {
            "kind": "folder",
            "path": str(datasets.existing(choices.dataset)),
            "size": choices.image_size or data or AS_RECIPE,
            "batch_size": choices.batch_size or AS_RECIPE,
            "seed": choices.seed,
        },
        "captions": {"encoder": "", "tokenizer": "", "cache": ""},
        "training": {
            "steps": choices.steps or AS_RECIPE,
            "lr": choices.learning_rate or AS_RECIPE,
            "accumulate": choices.accumulate or AS_RECIPE,
            "policy": choices.policy,
            "blocks": AS_RECIPE if choices.blocks < 0 else choices.blocks,
            "precision": choices.precision,
            **_memory(choices),
            "seed": choices.seed,
        },
        # Without prompts, the montage shows the empty prompt.
        "watch": {
            "prompts": prompts or [""],
            "save_every": choices.save_every or AS_RECIPE,
            "montage_every": choices.montage_every or AS_RECIPE,
        },
    }
    own = {name: {k: v for k, v in of_one.items() if v != AS_RECIPE} for name, of_one in fixed.items()}
    return changed(changed(recipe, own), read_changes(choices.changes, FIXED))


def _memory(choices: Choices) -> dict[str, Any]:
    """The storage settings; if the whole model trains, no frozen weights can be rounded."""
    chosen = MEMORY[choices.memory]
    return chosen | {"frozen": "full"} if choices.policy == "all" and chosen.get("offload") else chosen


def train(choices: Choices, clip: Any, node_id: str) -> Trained:
    """Train to the end, from the last save of that run if there is one, and copy the delta to L2P Loader's folder.

    Raises:
        ValueError: for invalid choices, unsuitable data or models, or a full disk; the message says what to do.
        MemoryRanOut: when a GPU has less memory than planned; the last save is kept.
        comfy.model_management.InterruptProcessingException: when the user has interrupted; everything is saved.
    """
    folder = RunFolder(run_files.run_folder(choices.run_name))
    recipe = recipe_of(choices)
    target = run_files.check_target(choices.filename.strip() or choices.run_name, choices.overwrite, folder.delta)
    live = Live(node_id, choices.run_name.strip())
    try:
        with _memory_of_the_host():
            config = pixel_config(recipe.model, None if choices.anew else folder.init)
            captions = host_captions(clip, run_files.caption_folder(), config)
            hooks = _hooks(live, folder)
            ranks = Ranks(device=_device_of_the_host())
            result = loop.train(
                recipe,
                folder.path,
                captions=captions,
                hooks=hooks,
                ranks=ranks,
                restart=choices.anew,
                published=target,
            )
        if not result.finished:
            done = f"Stopped after {result.step} of {recipe.training.steps} steps"
            kept = "all is saved" if result.saved == result.step else f"the last save is of step {result.saved}"
            live.end("stopped", f"{done}; {kept}.")
            comfy.model_management.throw_exception_if_processing_interrupted()
        if live.is_empty:
            _begin(live, folder, result.step + 1)
        run_files.publish(folder.delta, target)
        if card.write(target, card.RunDetails(folder, recipes.load(folder.recipe), result.saved)) is None:
            live.note(f"{card.path_of(target).name} is a model card of your own and was kept.")
    except comfy.model_management.InterruptProcessingException:
        if live.state["status"] != "stopped":
            live.end("stopped", "Stopped; run it again to resume from the last save.")
        raise
    except Exception as error:
        if isinstance(error, ValueError):
            error.args = (by_folders(f"{error} {_KEPT}" if isinstance(error, DoesNotFit) else str(error)),)
        live.end("failed", str(error))
        raise
    name = files.name_of(target)
    live.end("finished", f"Finished after {counted(result.step, 'step')}: {name}")
    losses = [line["loss"] for line in read_metrics(folder.metrics)]
    left = [target, folder.delta, folder.report, *folder.montages()[-1:]]
    return Trained(name, losses, _last_montage(folder), dict(live.state), left)


def _device_of_the_host() -> torch.device:
    """The host's device, which its user may have chosen (--cpu); with Apple's GPUs training runs on the CPU."""
    device: torch.device = comfy.model_management.get_torch_device()
    return device if has_own_memory(device.type) else CPU


def _fitting_recipe(base: str) -> str:
    """The bundled recipe for a model: by its size and variant; a latent model becomes a 1k one."""
    config = open_checkpoint(base).config()
    if is_tiny(config):
        return "tiny"
    recipes = source_of(config).recipe
    if recipes is None:
        raise ValueError(
            f"There is no bundled recipe for a {source_of(config).title} model: choose your own recipe file."
        )
    return f"{recipes}-{config.variant if isinstance(config, PixelConfig) else '1k'}"


def _hooks(live: Live, folder: RunFolder) -> Hooks:
    bars: dict[str, Any] = {}

    def show(work: str, done: int, total: int) -> None:
        # One bar for each kind of work: the host's skips updates that are too close to the last one it showed.
        if work not in bars:
            bars[work] = comfy.utils.ProgressBar(total)
        bars[work].update_absolute(done, max(1, total))

    def progress(metrics: RunMetrics) -> None:
        if "training" not in bars:
            _begin(live, folder, metrics.step)
        live.step(metrics)
        try:
            show("training", metrics.step, metrics.steps)
        except comfy.model_management.InterruptProcessingException:
            # The host's bar takes the interruption before the step is saved: given back, it is the loop's to act on.
            comfy.model_management.interrupt_current_processing()

    def working(text: str, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        live.work(text, done, total)
        show(text, done, total)

    def note(text: str) -> None:
        text = by_folders(text)
        logging.info("L2P: %s", text)
        live.note(text)

    def forecast(text: str) -> None:
        logging.info("L2P: %s", text)
        live.forecast(text)

    return Hooks(
        progress=progress,
        montage=lambda step, _: live.montage(folder.montage(step)),
        should_stop=comfy.model_management.processing_interrupted,
        note=note,
        forecast=forecast,
        working=working,
        sampling=lambda done, steps: live.work("montage", done, steps),
    )


def _begin(live: Live, folder: RunFolder, first: int) -> None:
    """Show the steps and the montage of a resumed run from before step `first`."""
    live.begin(line for line in read_metrics(folder.metrics) if line["step"] < first)
    montages = folder.montages()
    live.state["montage"] = shown_montage(montages[-1]) if montages else None


@contextmanager
def _memory_of_the_host() -> Iterator[None]:
    """Unload the host's models within the block; afterwards, in any case, nothing of the block stays in memory."""
    manager = comfy.model_management
    manager.unload_all_models()
    manager.soft_empty_cache()
    manager.in_training = True
    try:
        yield
    except BaseException as error:
        _let_go(error)
        raise
    finally:
        manager.in_training = False
        gc.collect()
        manager.soft_empty_cache()


def _let_go(error: BaseException) -> None:
    """Keep an error from holding the model that was being trained."""
    traceback.clear_frames(error.__traceback__)


def _last_montage(folder: RunFolder) -> Tensor | None:
    montages = folder.montages()
    if not montages:
        return None
    with opened(montages[-1], ("PNG",)) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 255)[None]
