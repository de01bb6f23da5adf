"""A run's saves: made when they are due and the weights are sound, so that no bad save replaces a good one."""

from __future__ import annotations

from pathlib import Path

from .. import delta
from ..distributed import sharding
from ..files.safetensors_header import CheckpointError
from ..training.soundness import flaw
from ..training.trainer import Trainer, TrainingDiverged
from .delta_section import DELTA_DTYPES, DeltaSection
from .divergence import DivergenceWatch
from .folder import RunFolder
from .hooks import Hooks


class Saves:
    """The saves of one run.

    Args:
        trainer: to be saved; if the folder has a state, it has been resumed from it. Its processes all make the calls
            of this class at the same points.
        base: the L2P file that training starts from.
        folder: target of the saves.
        watch: of the run.
        hooks: are told why a save is skipped.
        delta: the recipe's section about the delta.

    Attributes:
        step: of the last save; 0 without one.
    """

    def __init__(
        self,
        trainer: Trainer,
        base: Path,
        folder: RunFolder,
        watch: DivergenceWatch,
        hooks: Hooks,
        delta: DeltaSection,
    ):
        self._trainer, self._base, self._folder = trainer, base, folder
        self._watch, self._ranks, self._note = watch, trainer.ranks, hooks.note
        self._section = delta
        self.step = trainer.step

    def make(self, finished: bool, stopping: bool) -> bool:
        """Save, unless the loss is rising or the weights are bad and further training may repair that.

        Args:
            finished: whether this is the end of the run, where a rising loss does not prevent the save.
            stopping: whether the user has asked to stop.

        Returns:
            Whether it was saved.

        Raises:
            TrainingDiverged: if the weights are worthless and further steps cannot change that.
            CheckpointError: if the disk is full or refuses; the previous save stays, and the sentence says which.
        """
        if self._watch.rising and self.step and not finished:
            if stopping:
                self._note(f"The loss is rising, so the save of step {self.step} remains the last.")
            return False
        wrong = flaw(self._trainer, self._watch.first)
        if wrong:
            said = f"after step {self._trainer.step} {wrong.words}"
            if finished or wrong.for_good:
                raise TrainingDiverged(f"Training diverged: {said}. These weights were not saved.")
            self._note(f"Not saved: {said}. {self._last()}")
            return False
        if self._watch.rising:
            self._note("The loss was rising at the end: look at the montages before using the delta.")
        try:
            self._write_delta()
            self._trainer.save(self._folder.state)  # last, because a run is resumed from it
        except CheckpointError as error:
            error.args = (f"{error} {self._last()}",)
            raise
        self.step = self._trainer.step
        return True

    def resumable(self) -> str:
        """Which save to resume from, and what to change, after training has diverged in the coming step."""
        step = self._trainer.step
        if not self.step:
            if not step:
                return (
                    "It was the first step, so training is not to blame: a weight of the base, or an image, contains "
                    "values that are not finite."
                )
            return "Nothing was saved before that: begin the run anew with a lower learning rate."
        if self.step == step:
            return (
                f"The last save, of step {step}, is where this step started, so it would diverge again: begin "
                "the run anew with a lower learning rate."
            )
        return (
            f"The last save, of step {self.step}, precedes that and its weights are finite: resume from it with a "
            "lower learning rate."
        )

    def start_again(self) -> str:
        """What a run that stops here will do on restart, as the end of a sentence."""
        return f"resumes from the save of step {self.step}" if self.step else "begins with the first step"

    def _last(self) -> str:
        return f"The save of step {self.step} remains the last." if self.step else "There is no save yet."

    def restore_delta(self) -> None:
        """Write the delta of the last save again if it was deleted; errors as `make`."""
        missing = self._ranks.first and self.step > 0 and not self._folder.delta.exists()
        if self._ranks.any(missing):
            self._note("The delta is missing from the run's folder: writing it again from the saved state.")
            self._write_delta()

    def _write_delta(self) -> None:
        sharding.write_from_first(
            self._ranks,
            self._trainer.trained(),
            lambda weights: delta.save(
                weights,
                self._base,
                self._folder.delta,
                self._section.about,
                dtype=DELTA_DTYPES[self._section.dtype],
                overwrite=True,
            ),
        )
