"""Detection of a run that diverges without NaN.

The rule: the loss, smoothed over about the last 100 steps (an exponential mean with memory 0.99), has stayed above
`factor` times its own best for `patience` consecutive steps (2 and 200 unless a recipe says otherwise; a spike of a few
steps has left the mean by then). The best counts from step 100 on, because the mean is unreliable before. A single
step's loss says little: it varies tenfold with the noise levels drawn.

The watch depends on the losses alone, so a resumed run rebuilds it from metrics.jsonl.
"""

from __future__ import annotations

import math

MEMORY = 0.99
YOUNG = 100
"""Steps before which the smoothed loss is not reliable."""


class DivergenceWatch:
    """Follows the losses of a run.

    Args:
        factor: above 1.
        patience: steps; 0 turns the rule off.
    """

    def __init__(self, factor: float, patience: int):
        self.factor, self.patience = factor, patience
        self.best = math.inf
        self.steps_above = 0
        self.first = math.nan  # the loss of the first step
        self._sum = self._weight = 0.0
        self._steps = 0

    @property
    def smoothed(self) -> float:
        """The mean of the losses so far, weighted towards later ones; NaN before the first."""
        return self._sum / self._weight if self._weight else math.nan

    @property
    def rising(self) -> bool:
        """Whether the loss is above the limit now, so that a save might be bad."""
        return self.steps_above > 0

    @property
    def diverged(self) -> bool:
        """Whether it has been above the limit for long enough to stop."""
        return bool(self.patience) and self.steps_above >= self.patience

    def add(self, loss: float) -> None:
        """Add the loss of one more step."""
        self._steps += 1
        if self._steps == 1:
            self.first = loss
        self._sum = MEMORY * self._sum + (1 - MEMORY) * loss
        self._weight = MEMORY * self._weight + 1 - MEMORY
        if not self.patience or self._steps < YOUNG:
            return
        self.best = min(self.best, self.smoothed)
        self.steps_above = self.steps_above + 1 if self.smoothed > self.factor * self.best else 0
