"""How callers watch and stop a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..distributed.ranks import Ranks
from .metrics import RunMetrics


def _ignore(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """Callbacks of a run; with several processes only the first calls them, except `should_stop` and
    `working`.

    Attributes:
        progress: called after every step with its metrics.
        montage: called with the step and its montage's images, (B, 3, H, W) in [-1, 1] on the CPU.
        should_stop: called after every step, of training and of a montage's sampling; once it returns true, everything
            is saved and the run returns.
        note: called with sentences that the user should read.
        forecast: called with the expected duration as a sentence, "" if nothing is left to do; used until the run has
            measured its own steps.
        working: called during preparation with (description, done, total); an exception from it stops the preparation,
            which resumes the next time.
        sampling: called while a montage is sampled with (steps done, total steps); must not raise.
    """

    progress: Callable[[RunMetrics], None] = _ignore
    montage: Callable[[int, Tensor], None] = _ignore
    should_stop: Callable[[], bool] = lambda: False
    note: Callable[[str], None] = _ignore
    forecast: Callable[[str], None] = _ignore
    working: Callable[[str, int, int], None] = _ignore
    sampling: Callable[[int, int], None] = _ignore

    def of(self, ranks: Ranks) -> Hooks:
        """Those that this process calls."""
        return self if ranks.first else Hooks(should_stop=self.should_stop, working=self.working)
