"""Linear regression from sums over rows, for more rows than memory holds."""

from __future__ import annotations

import torch
from torch import Tensor


class LeastSquares:
    """Sums over rows of inputs (n, I) and outputs (n, O), in system memory.

    Inputs are measured from the mean of the first rows: float32 sums of squares of large values would not leave enough
    digits for a small variance.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add rows."""
        x, y = inputs.float().cpu(), outputs.float().cpu()
        if not self.count:
            self._origin = x.mean(0)
            self.xx, self.xy = torch.zeros(x.shape[1], x.shape[1]), torch.zeros(x.shape[1], y.shape[1])
            self.x, self.y = (torch.zeros(rows.shape[1], dtype=torch.float64) for rows in (x, y))
        x = x - self._origin
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.x += x.sum(0, dtype=torch.float64)
        self.y += y.sum(0, dtype=torch.float64)
        self.count += len(x)

    def mean(self) -> Tensor:
        """The mean of the inputs, (I,)."""
        return self._origin + self._shift()

    def covariance(self) -> Tensor:
        """The covariance of the inputs, (I, I) float64."""
        return self.xx.double().div_(self.count).addr_(self._shift(), self._shift(), alpha=-1)

    def solved(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Weight (O, I) and bias (O,) of the best linear prediction, float64.

        Args:
            ridge: is added to each input's variance, half of it as a share of its own, so that inputs of any size are
                shrunk alike, and half of the mean, so that inputs that hardly vary get no huge weights.
        """
        covariance = self.covariance()
        variance = covariance.diagonal()
        variance += ridge / 2 * (variance + float(variance.mean())) + 1e-12
        wanted = self.y / self.count
        crossed = self.xy.double() / self.count - torch.outer(self._shift(), wanted)
        weight = torch.cholesky_solve(crossed, torch.linalg.cholesky(covariance)).T
        return weight, wanted - weight @ self.mean()

    def _shift(self) -> Tensor:
        """The mean, measured from the origin."""
        return self.x / self.count
