"""A run from recipe to delta: preparing, training, saving, showing, stopping and resuming it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..dataset.problems import Problem, count
from ..device import accelerator
from ..device.determinism import deterministic
from ..distributed.ranks import Ranks
from ..files.atomic import write_bytes
from ..training import loading as training_model
from ..training.soundness import all_finite
from ..training.trainer import Trainer, TrainingDiverged
from . import card, data, montage, preparation, report, source_images
from .base import pixel_config, starts_fitted, warmed_up
from .caption_source import CaptionSource
from .data import RunData
from .divergence import DivergenceWatch
from .events import Events
from .folder import RunFolder
from .hooks import Hooks
from .memory_plan import after_running_out
from .metrics import Clock, RunMetrics, duration, read_metrics
from .recipe import Recipe
from .saves import Saves

AfterStep = Callable[[Trainer], None]
"""Called after every optimiser step."""


class _Stopped(Exception):
    """A montage was skipped because the user wants to stop."""


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        folder: of the run.
        step: number of steps done.
        finished: whether the run is complete.
        saved: the step of the last save; 0 without one.
    """

    folder: RunFolder
    step: int
    finished: bool
    saved: int


def train(
    recipe: Recipe,
    folder: Path,
    *,
    captions: CaptionSource | None = None,
    hooks: Hooks | None = None,
    ranks: Ranks | None = None,
    restart: bool = False,
    published: Path | None = None,
) -> RunResult:
    """Train a recipe, resuming from the last save in the folder if there is one.

    The folder is held during the call, so that no other process trains there. The call also works in inference mode,
    which it leaves temporarily.

    Args:
        recipe: with absolute paths, see `recipe.with_paths`.
        folder: of the run, created if missing; `folder.RunFolder` describes its files.
        captions: cache of caption features and its encoder, for data of the kind "folder"; optional for the tiny
            model, which knows its words.
        hooks: to watch and stop the run.
        ranks: the processes that train together; each makes this call.
        restart: start a new run; after all checks have passed, the folder's content is moved into a subfolder.
        published: where the caller will copy the delta; disk space is checked for it as well.

    Raises:
        ValueError: for data, models and folders that cannot be used or are in use, or a full disk; the message says
            what to do.
        TrainingDiverged: when the loss or the weights are not finite or the loss keeps rising; the message says which
            save is left to resume from.
        MemoryRanOut: when the device has less memory than planned; the last save stays.
    """
    ranks = ranks or Ranks()
    hooks = (hooks or Hooks()).of(ranks)
    run_folder = RunFolder(folder)
    exact = deterministic(recipe.training.deterministic)
    with ExitStack() as stack, torch.inference_mode(False), torch.enable_grad(), exact:
        ranks.first_only(lambda: stack.enter_context(run_folder.held(hooks.note)))
        try:
            found = ranks.first_then_others(
                lambda: preparation.prepare(recipe, run_folder, captions, hooks, ranks, restart, published)
            )
            recipe = replace(recipe, training=preparation.agreed(recipe.training, found.recipe.training, ranks))
            run = Run(recipe, run_folder, found.base, found.data, ranks, hooks, found.pace)
            finished = run.go()
        except RuntimeError as error:
            if not accelerator.is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the memory
            raise after_running_out(recipe, pixel_config(recipe.model, run_folder.init), ranks) from None
        return RunResult(run.folder, run.trainer.step, finished, run.saves.step)


class Run:
    """One training run in its folder, resumed from the last save there.

    Args:
        recipe: how to train.
        folder: where everything goes; `RunFolder.begin` has been called.
        base: the L2P file that training starts from.
        found: what it trains on.
        ranks: the processes of the run; the first writes its files.
        hooks: to watch and stop it.
        pace: see `metrics.RunMetrics`.

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
        pace: str = "",
    ):
        self._pace = pace
        self.recipe, self.folder, self.base, self.data = recipe, folder, base, found
        self.ranks, self.hooks = ranks or Ranks(), hooks or Hooks()
        self._to_fit = starts_fitted(base)
        if self._to_fit:
            self.recipe = recipe = warmed_up(recipe)
        model = training_model.load(base, recipe.training, self.ranks, partial(self.hooks.working, "loading"))
        self.trainer = Trainer(model, recipe.training, empty_caption=found.features(""), ranks=self.ranks)
        if folder.state.exists():
            self._resume()
        self.ranks.first_only(lambda: folder.rewind(self.trainer.step))
        self.watch = self._divergence_watch()
        self.saves = Saves(self.trainer, base, folder, self.watch, self.hooks, recipe.delta)
        self._events = Events(folder.events, self.trainer.step)
        if not self._events.available:
            self.hooks.note("TensorBoard is not installed, so no event files are written; see report.html.")
        if self.trainer.step:
            self.hooks.note(self._resumed())

    def _resume(self) -> None:
        self.trainer.resume(self.folder.state)
        if not all_finite(self.trainer):
            raise ValueError(
                f"{self.folder.state} holds weights that are not finite numbers, so it cannot be resumed: "
                "begin the run anew with a lower learning rate."
            )

    def _resumed(self) -> str:
        done, steps = self.trainer.step, self.recipe.training.steps
        if done < steps:
            return f"Resuming after step {done} of {steps}."
        asked = "" if done == steps else f", and the recipe asks for {steps}"
        return f"{done} steps are done already{asked}: there is nothing left to train; raise steps to continue."

    def go(self, after_step: AfterStep | None = None) -> bool:
        """Train to the end, or until asked to stop; returns whether it finished. Sound weights are saved either way.

        Raises:
            TrainingDiverged: see `divergence` and `saves`; the delta and the state of the last save stay.
        """
        try:
            finished = self._go(after_step)
        except TrainingDiverged as error:
            said = f"{error} {self.saves.resumable()}"
            # A failure of the report must not hide the training result.
            with suppress(ValueError):
                self._write_report(said)
            error.args = (said,)
            raise
        finally:
            self._events.close()
        done = f"after {self.trainer.step} of {self.recipe.training.steps} steps"
        again = f"Stopped {done}; started again, it {self.saves.start_again()}."
        self._write_report(f"Finished {done}." if finished else again)
        self._write_card()
        return finished

    def _go(self, after_step: AfterStep | None) -> bool:
        total = self.recipe.training.steps
        self.fit_head()
        clock = Clock(total, self.ranks.device, self._pace)
        self.saves.restore_delta()
        if not self._make_up_montage():
            return False
        finished = self.trainer.step >= total
        if self.trainer.step and not finished:
            # Until the next save the report would say that the run has stopped.
            self._write_report(f"Running: resumed after step {self.trainer.step} of {total}.")
        with self.data.stream(self.recipe, self.ranks) as (batches, problems):
            for plain in self.trainer.run(batches):
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
                    # A skipped montage is drawn first when the run resumes.
                    finished = finished and not self._montage_is_due(finished)
                    break
                if saved and not finished:
                    left = duration(metrics.seconds_left)
                    self._write_report(f"Running: step {metrics.step} of {total}, about {left} left.")
        self._name_problems(problems())
        return finished

    def fit_head(self) -> None:
        """Fit the Detailer Head of a run that starts "fitted", once, before its first step; `go` sees to it.

        Raises:
            ValueError: as for `Trainer.fit_head`.
        """
        if self.trainer.step or not self._to_fit:
            return
        with self.data.stream(self.recipe, self.ranks) as (batches, _):
            done = self.trainer.fit_head(batches, self.hooks.working)
        unfitted = "The Detailer Head starts unfitted: fitting needs the 1k variant, a wider head and one process."
        self.hooks.note(done.summary() if done else unfitted)
        self._to_fit = False

    def _report_step(self, metrics: RunMetrics) -> None:
        self.ranks.first_only(lambda: self.folder.add_metrics(metrics))
        self.watch.add(metrics.loss)
        if self.ranks.first:
            self._events.add(metrics)
            self.hooks.progress(metrics)

    def _save_if_due(self, finished: bool, stopping: bool) -> bool:
        """Save at intervals, when asked to stop and at the end; returns whether it saved."""
        due = finished or stopping or self.trainer.step % self.recipe.watch.save_every == 0
        saved = due and self.saves.make(finished, stopping)
        if saved:
            self._events.flush()
        return saved

    def _write_report(self, status: str) -> None:
        if self.ranks.first:
            report.write(self.folder, status, self.recipe.watch.prompts)

    def _write_card(self) -> None:
        """The model card of the last save's delta."""
        if self.ranks.first and self.saves.step:
            card.write(self.folder.delta, card.RunDetails(self.folder, self.recipe, self.saves.step))

    def _montage_is_due(self, finished: bool) -> bool:
        due = finished or self.trainer.step % self.recipe.watch.montage_every == 0
        return due and bool(self.recipe.watch.prompts)

    def _make_up_montage(self) -> bool:
        """Draw the montage that a stop or kill after a save has prevented; False if asked to stop."""
        step = self.trainer.step
        if step and self._montage_is_due(step >= self.recipe.training.steps):
            missing = self.ranks.first and not self.folder.montage(step).exists()
            if self.ranks.any(missing):
                return self._montage()
        return True

    def _montage(self) -> bool:
        """The recipe's prompts as images, from the averaged weights; False if asked to stop before they are done."""
        watch = self.recipe.watch
        try:
            with self.trainer.averaged() as model:
                side = watch.size or data.image_side(self.recipe, model.config)
                features = self.data.features
                pixels = montage.sample(model, features, watch, side, self.ranks, self._montage_step)
        except _Stopped:
            return False
        self.ranks.first_only(lambda: source_images.write(self.folder, self.recipe, self.data, side))
        target = self.folder.montage(self.trainer.step)
        self.ranks.first_only(lambda: write_bytes(target, montage.file_content(pixels)))
        if self.ranks.first:
            self._events.add_montage(self.trainer.step, pixels)
            self.hooks.montage(self.trainer.step, pixels)
        return True

    def _montage_step(self, done: int, steps: int) -> None:
        self.hooks.sampling(done, steps)
        if self.ranks.any(self.hooks.should_stop()):
            raise _Stopped

    def _divergence_watch(self) -> DivergenceWatch:
        """The watch as it was at the save that the run resumes from."""
        watch = DivergenceWatch(self.recipe.watch.divergence_factor, self.recipe.watch.divergence_steps)
        if self.folder.metrics.exists():
            for line in read_metrics(self.folder.metrics):
                watch.add(line["loss"])
        return watch

    def _sentence(self) -> str:
        watch = self.watch
        return (
            f"Training diverged: at step {self.trainer.step} the smoothed loss, {watch.smoothed:.4f}, has been above "
            f"{watch.factor:g} times its best, {watch.best:.4f}, for {watch.steps_above} steps."
        )

    def _name_problems(self, problems: Sequence[Problem]) -> None:
        """Count the skipped samples and list them in the run folder."""
        if problems and self.ranks.first:
            write_bytes(self.folder.problems, "".join(f"{problem}\n" for problem in problems).encode())
            self.hooks.note(f"{count(problems)} samples were skipped; {self.folder.problems} lists them.")
