"""A run's saves: made when they are due and the weights are sound, so that no bad one takes a good one's place."""

from __future__ import annotations

from pathlib import Path

from .. import delta
from ..distributed import sharding
from ..distributed.ranks import Ranks
from ..training.soundness import flaw
from ..training.trainer import Trainer, TrainingDiverged
from .divergence import DivergenceWatch
from .folder import RunFolder
from .hooks import Hooks


class Saves:
    """The saves of one run.

    Args:
        trainer: what is saved; where the folder has a state, it has been resumed from that.
        base: the L2P file that training starts from.
        folder: that they go to.
        watch: of the run.
        ranks: the processes of the run; all make the calls of this class at the same points.
        hooks: that are told why a save is not made.

    Attributes:
        step: of the last save; 0 if there is none.
    """

    def __init__(
        self, trainer: Trainer, base: Path, folder: RunFolder, watch: DivergenceWatch, ranks: Ranks, hooks: Hooks
    ):
        self._trainer, self._base, self._folder = trainer, base, folder
        self._watch, self._ranks, self._hooks = watch, ranks, hooks
        self.step = trainer.step

    def make(self, finished: bool, stopping: bool) -> bool:
        """Save, unless the loss is rising or the weights are ruined and training may yet get out of that.

        Args:
            finished: whether this is the end of the run, where a rising loss keeps nothing from being saved.
            stopping: whether the user has asked to stop.

        Returns:
            Whether it was saved.

        Raises:
            TrainingDiverged: if the weights are worth nothing and no further step can change that.
            ValueError: if the disk is full or refuses; the save before stays.
        """
        if self._watch.rising and self.step and not finished:
            if stopping:
                self._note(f"The loss is rising, so that the save of step {self.step} stays the last.")
            return False
        wrong = flaw(self._trainer, self._watch.first)
        if wrong:
            said = f"after step {self._trainer.step} {wrong.words}"
            if finished or wrong.for_good:
                raise TrainingDiverged(f"Training diverged: {said}. Nothing of that was saved.")
            self._note(f"Not saved: {said}. {self._last()}")
            return False
        if self._watch.rising:
            self._note("The loss was rising at the end: look at the montages before using the delta.")
        self._write()
        return True

    def resumable(self) -> str:
        """What there is to resume from after training has diverged in the step to come, and what to do."""
        step = self._trainer.step
        if not self.step:
            if not step:
                return (
                    "It was the first step, so that training is not to blame: a weight of the base, or an image, has "
                    "numbers that are not finite."
                )
            return "Nothing was saved before that: begin anew with a lower learning rate."
        if self.step == step:
            return (
                f"The last save, of step {step}, is what this step started from, so that it would diverge again: begin "
                "anew with a lower learning rate."
            )
        return (
            f"The last save, of step {self.step}, is from before that, and its weights are finite: resume from it with "
            "a lower learning rate."
        )

    def start_again(self) -> str:
        """What a run that stops here does when it is started again, as the end of a sentence."""
        return f"resumes from the save of step {self.step}" if self.step else "begins with the first step"

    def _last(self) -> str:
        return f"The save of step {self.step} stays the last." if self.step else "There is no save yet."

    def _note(self, sentence: str) -> None:
        if self._ranks.first:
            self._hooks.note(sentence)

    def _write(self) -> None:
        """Delta and state, each whole or not at all; the state last, since it is what a run is resumed from."""
        sharding.write_from_first(
            self._ranks,
            self._trainer.trained(),
            lambda weights: delta.save(weights, self._base, self._folder.delta, overwrite=True),
        )
        self._trainer.save(self._folder.state)
        self.step = self._trainer.step
