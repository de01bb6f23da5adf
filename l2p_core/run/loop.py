"""A run from its recipe to its delta: prepared, trained, saved and shown on the way, stopped and gone on with."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .. import delta, sharding, training_model
from ..atomic import write_bytes
from ..checkpoint import open_checkpoint
from ..config import ModelConfig
from ..parallel import Ranks
from ..recompute import kept_sentence
from ..tiny.words import CAPTION_DIM
from ..trainer import Trainer, TrainingDiverged, check_possible
from ..training_config import TrainingConfig
from . import data, montage, report
from .base import fingerprint, initialisation, pixel_config
from .captions import Captions, of_words
from .data import RunData
from .divergence import DivergenceWatch
from .events import Events
from .folder import RunFolder
from .hooks import Hooks
from .metrics import Clock, RunMetrics, duration, read_metrics
from .planning import after_running_out, planned
from .recipe import Recipe

AfterStep = Callable[[Trainer], None]
"""Called after every optimiser step."""


class _Stopped(Exception):
    """A montage was left unmade because the user wants to stop."""


@dataclass(frozen=True)
class Result:
    """What a run has come to: its folder, the steps done, and whether these are all."""

    folder: RunFolder
    step: int
    finished: bool


def train(
    recipe: Recipe,
    folder: Path,
    *,
    captions: Captions | None = None,
    hooks: Hooks | None = None,
    ranks: Ranks | None = None,
    restart: bool = False,
) -> Result:
    """Train as the recipe says, from the last save in the folder if there is one.

    It works under inference mode too, which it leaves for its length.

    Args:
        recipe: with absolute paths, see `recipe.with_paths`.
        folder: of the run, made where it is missing; `folder.RunFolder` says what it holds afterwards.
        captions: the cache of caption features for data of the kind "folder", and the encoder that fills it; may be
            left out for the tiny model, which knows its words.
        hooks: to watch and stop the run.
        ranks: the processes that train together; each makes this call.
        restart: forget what the folder holds.

    Raises:
        ValueError: for data, models and folders that cannot be used, or a full disk; the message says what to do.
        TrainingDiverged: when the loss is no longer finite or keeps rising; the last good save stays.
        MemoryRanOut: when a GPU has less memory than was planned; the last save stays.
    """
    hooks, ranks = hooks or Hooks(), ranks or Ranks()
    with torch.inference_mode(False), torch.enable_grad():
        try:
            run = prepare(recipe, RunFolder(folder), captions, hooks, ranks, restart)
            recipe = run.recipe
            finished = run.go()
        except torch.cuda.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold what has filled the memory
            raise after_running_out(recipe, pixel_config(recipe.model, RunFolder(folder).init), ranks) from None
        return Result(run.folder, run.trainer.step, finished)


def prepare(
    recipe: Recipe, folder: RunFolder, captions: Captions | None, hooks: Hooks, ranks: Ranks, restart: bool = False
) -> Run:
    """The run, ready to go on; arguments and errors as for `train`."""

    if not ranks.first:
        hooks = Hooks(should_stop=hooks.should_stop, working=hooks.working)

    def make_files() -> tuple[Path, RunData, TrainingConfig]:
        ranks.part(recipe.training.accumulate, recipe.data.batch_size)
        check_possible(recipe.training, ranks)
        if ranks.first:
            if restart:
                folder.clear()
            folder.begin(recipe)
        training = _plan(recipe, folder, hooks, ranks)
        base = initialisation(recipe.model, folder.init, partial(hooks.working, "converting"))
        config = open_checkpoint(base).config()
        found = prepare_data(recipe, folder, config, captions, hooks)
        if ranks.first:
            folder.identify({"base": fingerprint(base), "data": found.fingerprint})
        return base, found, training

    base, found, training = ranks.first_then_others(make_files)
    if ranks.any(training.parallel == "fsdp"):
        training = replace(training, parallel="fsdp")
    training = replace(
        training,
        keep_activations=min(ranks.gather(training.keep_activations)),
        gradient_checkpointing=ranks.any(training.gradient_checkpointing),
    )
    return Run(replace(recipe, training=training), folder, base, found, ranks, hooks)


def _plan(recipe: Recipe, folder: RunFolder, hooks: Hooks, ranks: Ranks) -> TrainingConfig:
    """State what the run needs of memory; its configuration with what depends on that decided."""
    config = pixel_config(recipe.model, folder.init)
    found, training = planned(recipe, config, ranks)
    if ranks.first:
        sentence = found.sentence(ranks.device.type) + kept_sentence(config, training)
        write_bytes(folder.plan, f"{sentence}\n".encode())
        hooks.note(sentence)
    return training


def prepare_data(
    recipe: Recipe, folder: RunFolder, config: ModelConfig, captions: Captions | None, hooks: Hooks
) -> RunData:
    """A run's data with all caption features in their cache; arguments and errors as for `train`."""
    if captions is None and config.caption_dim == CAPTION_DIM:
        captions = of_words(caption_folder(recipe, folder.path))
    found = data.prepare(recipe, config, folder.images, folder.index, captions, hooks.working)
    for note in found.notes:
        hooks.note(note)
    return found


def caption_folder(recipe: Recipe, folder: Path) -> Path:
    """Where a run in `folder` keeps caption features, unless told otherwise by its caller."""
    return Path(recipe.captions.cache) if recipe.captions.cache else folder.resolve().parent / "captions"


class Run:
    """One training run in its folder, resumed from the last save there.

    Args:
        recipe: how to train.
        folder: where everything goes; `RunFolder.begin` has been called.
        base: the L2P file that training starts from.
        found: what it trains on.
        ranks: the processes of the run; the first writes its files.
        hooks: to watch and stop it.

    Raises:
        ValueError: if the save is of another run.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        base: Path,
        found: RunData,
        ranks: Ranks | None = None,
        hooks: Hooks | None = None,
    ):
        self.recipe, self.folder, self.base, self.data = recipe, folder, base, found
        self.ranks, self.hooks = ranks or Ranks(), hooks or Hooks()
        model = training_model.load(base, recipe.training, self.ranks, partial(self.hooks.working, "loading"))
        self.trainer = Trainer(model, recipe.training, empty_caption=found.features(""), ranks=self.ranks)
        if folder.state.exists():
            self.trainer.resume(folder.state)
        self.ranks.first_only(lambda: folder.rewind(self.trainer.step))
        self.watch = self._divergence_watch()
        self._saved_step = self.trainer.step
        self._events = Events(folder.events, self.trainer.step)
        if self.ranks.first and not self._events.available:
            self.hooks.note("TensorBoard is not installed, so that no event files are written; report.html shows it.")
        if self.trainer.step and self.ranks.first:
            self.hooks.note(f"Going on after step {self.trainer.step} of {recipe.training.steps}.")

    def go(self, after_step: AfterStep | None = None) -> bool:
        """Train to the end, or until asked to stop; whether it came to the end. Both ways all is saved.

        Raises:
            TrainingDiverged: see `divergence`; the delta and the state of the last good save stay.
        """
        try:
            finished = self._go(after_step)
        except TrainingDiverged as error:
            # The report is second to saying what happened.
            with suppress(ValueError):
                self._write_report(str(error))
            raise
        finally:
            self._events.close()
        done = f"after {self.trainer.step} of {self.recipe.training.steps} steps"
        self._write_report(f"Finished {done}." if finished else f"Stopped {done}; started again, it goes on there.")
        return finished

    def _go(self, after_step: AfterStep | None) -> bool:
        stream = self.data.stream(self.recipe, self.ranks)
        total, clock = self.recipe.training.steps, Clock(self.recipe.training.steps, self.ranks.device)
        if not self._make_up_montage():
            return False
        finished = self.trainer.step >= total
        with stream.block:
            for plain in self.trainer.run(stream.batches):
                metrics = clock.add(plain)
                self._report_step(metrics)
                if after_step:
                    after_step(self.trainer)
                finished = metrics.step >= total
                stopping = self.ranks.any(self.hooks.should_stop())
                if self.watch.diverged:
                    raise TrainingDiverged(self._sentence())
                saved = self._save_if_due(finished, stopping)
                if not stopping and self._montage_is_due(finished) and not self._montage():
                    stopping = True
                    if not saved:
                        self._save_if_due(finished, stopping)
                if stopping:
                    # A montage that was left out is made first when the run goes on.
                    finished = finished and not self._montage_is_due(finished)
                    break
                if saved and not finished:
                    left = duration(metrics.seconds_left)
                    self._write_report(f"Running: step {metrics.step} of {total}, about {left} left.")
        self._name_problems(stream)
        return finished

    def _report_step(self, metrics: RunMetrics) -> None:
        self.ranks.first_only(lambda: self.folder.add_metrics(metrics))
        self.watch.add(metrics.loss)
        if self.ranks.first:
            self._events.add(metrics)
            self.hooks.progress(metrics)

    def _save_if_due(self, finished: bool, stopping: bool) -> bool:
        """Save at intervals, when asked to stop and at the end; before the end not while the loss is rising, so that
        the last good save stays."""
        due = finished or stopping or self.trainer.step % self.recipe.watch.save_every == 0
        if not due:
            return False
        if self.watch.rising and self._saved_step:
            if not finished:
                if stopping and self.ranks.first:
                    self.hooks.note(f"The loss is rising, so that the save of step {self._saved_step} stays the last.")
                return False
            if self.ranks.first:
                self.hooks.note("The loss was rising at the end: look at the montages before using the delta.")
        self._save()
        return True

    def _save(self) -> None:
        """Delta and state, each whole or not at all; the state last, since it is what a run goes on from."""
        sharding.write_from_first(
            self.ranks,
            self.trainer.trained(),
            lambda weights: delta.save(weights, self.base, self.folder.delta, overwrite=True),
        )
        self.trainer.save(self.folder.state)
        self._saved_step = self.trainer.step
        self._events.flush()

    def _write_report(self, status: str) -> None:
        if self.ranks.first:
            report.write(self.folder, status, self.recipe.watch.prompts)

    def _montage_is_due(self, finished: bool) -> bool:
        due = finished or self.trainer.step % self.recipe.watch.montage_every == 0
        return due and bool(self.recipe.watch.prompts)

    def _make_up_montage(self) -> bool:
        """Make the montage that a stop or kill between a save and its montage has left out; False if asked to stop."""
        step = self.trainer.step
        if step and self._montage_is_due(step >= self.recipe.training.steps):
            missing = self.ranks.first and not self.folder.montage(step).exists()
            if self.ranks.any(missing):
                return self._montage()
        return True

    def _montage(self) -> bool:
        """The recipe's prompts as images, from the averaged weights; False if asked to stop before they are there."""
        watch = self.recipe.watch
        try:
            with self.trainer.averaged() as model:
                side = watch.size or data.image_side(self.recipe, model.config)
                features = self.data.features
                pixels = montage.sample(model, features, watch, side, self.ranks.device, self._montage_step)
        except _Stopped:
            return False
        target = self.folder.montage(self.trainer.step)
        self.ranks.first_only(lambda: write_bytes(target, montage.file_content(pixels)))
        if self.ranks.first:
            self._events.add_montage(self.trainer.step, pixels)
            self.hooks.montage(self.trainer.step, pixels)
        return True

    def _montage_step(self, done: int, steps: int) -> None:
        if self.ranks.first:
            self.hooks.sampling(done, steps)
        if self.ranks.any(self.hooks.should_stop()):
            raise _Stopped

    def _divergence_watch(self) -> DivergenceWatch:
        """The watch as it was at the save that the run goes on from."""
        watch = DivergenceWatch(self.recipe.watch.divergence_factor, self.recipe.watch.divergence_steps)
        if self.folder.metrics.exists():
            for line in read_metrics(self.folder.metrics):
                watch.add(line["loss"])
        return watch

    def _sentence(self) -> str:
        watch = self.watch
        return (
            f"Training diverged: at step {self.trainer.step} the smoothed loss, {watch.smoothed:.4f}, has been above "
            f"{watch.factor:g} times its best, {watch.best:.4f}, for {watch.steps_above} steps. The last save, of step "
            f"{self._saved_step}, is from before that; go on from it with a lower learning rate."
        )

    def _name_problems(self, stream: data.Stream) -> None:
        """Count what was left out, and list it in the run folder."""
        problems = stream.problems()
        if problems and self.ranks.first:
            write_bytes(self.folder.problems, "".join(f"{problem}\n" for problem in problems).encode())
            left_out = sum(problem.count for problem in problems)
            self.hooks.note(f"{left_out} samples were left out; {self.folder.problems} lists them.")
