"""Linear regression from sums over rows, for more rows than memory holds."""

from __future__ import annotations

import torch
from torch import Tensor


class LeastSquares:
    """Sums over rows of inputs (n, I) and outputs (n, O), in system memory."""

    def __init__(self, inputs: int, outputs: int):
        self.count = 0
        self.xx, self.xy = torch.zeros(inputs, inputs), torch.zeros(inputs, outputs)
        self.x, self.y = torch.zeros(inputs, dtype=torch.float64), torch.zeros(outputs, dtype=torch.float64)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add rows."""
        x, y = inputs.float().cpu(), outputs.float().cpu()
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.x += x.sum(0, dtype=torch.float64)
        self.y += y.sum(0, dtype=torch.float64)
        self.count += len(x)

    def mean(self) -> Tensor:
        """Of the inputs, (I,)."""
        return self.x / self.count

    def covariance(self) -> Tensor:
        """Of the inputs, (I, I) float64."""
        return self.xx.double().div_(self.count).sub_(torch.outer(self.mean(), self.mean()))

    def solved(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Weight (O, I) and bias (O,) of the best linear prediction, float64."""
        covariance = self.covariance()
        variance = covariance.diagonal()
        variance += ridge * float(variance.mean()) + 1e-12
        mean, wanted = self.mean(), self.y / self.count
        crossed = self.xy.double() / self.count - torch.outer(mean, wanted)
        weight = torch.cholesky_solve(crossed, torch.linalg.cholesky(covariance)).T
        return weight, wanted - weight @ mean


def added(squares: LeastSquares | None, inputs: Tensor, outputs: Tensor) -> LeastSquares:
    """The sums with these rows added; None begins anew."""
    squares = squares or LeastSquares(inputs.shape[1], outputs.shape[1])
    squares.add(inputs, outputs)
    return squares
