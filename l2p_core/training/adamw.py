"""AdamW with its two moments in 32 bits (torch's own) or in 8 (bitsandbytes, an optional library; arXiv 2110.02861)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..freeze import is_new
from ..sources.source import Source
from ..training_config import TrainingConfig

_EIGHT_BIT_NAMES = {
    "state1": "exp_avg",
    "state2": "exp_avg_sq",
    "absmax1": "exp_avg_scale",
    "absmax2": "exp_avg_sq_scale",
}
"""bitsandbytes' names of a parameter's states, and ours. Below 4096 elements they stay in float32, without scales."""


def check_installed(config: TrainingConfig) -> None:
    """Refuse a configuration that needs a missing library.

    Raises:
        ValueError: naming the library and what to do.
    """
    if config.optimiser_bits == 8 and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "optimiser_bits = 8 needs the library bitsandbytes, which is not installed: install it (pip install "
            "bitsandbytes), or set optimiser_bits = 32."
        )


def make(parameters: Mapping[str, Tensor], config: TrainingConfig, source: Source) -> torch.optim.Optimizer:
    """AdamW over two groups, layers that conversion initialised and layers of the source, with moments of zero.

    Each group has the key "scale", its factor on the learning rate.
    """
    new = [p for name, p in parameters.items() if is_new(name, source)]
    known = [p for name, p in parameters.items() if not is_new(name, source)]
    groups = [{"params": new, "scale": 1.0}, {"params": known, "scale": config.backbone_lr_scale}]
    groups = [group for group in groups if group["params"]]
    if config.optimiser_bits == 8:
        return _eight_bit(groups, config)
    optimiser = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    for parameter in parameters.values():
        optimiser.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimiser


def _eight_bit(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    optimiser = bitsandbytes.optim.AdamW8bit(groups, lr=config.lr, weight_decay=config.weight_decay)
    for number, group in enumerate(optimiser.param_groups):
        for position, parameter in enumerate(group["params"]):
            optimiser.init_state(group, parameter, number, position)
    return optimiser


def moments(optimiser: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter's states by their names in saves, without copying: exp_avg and exp_avg_sq, and in 8 bits for each the
    scales of its blocks."""
    state = optimiser.state[parameter]
    if "exp_avg" in state:
        return {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
    return {ours: state[theirs] for theirs, ours in _EIGHT_BIT_NAMES.items() if theirs in state}


def set_step(optimiser: torch.optim.Optimizer, parameter: Tensor, step: int) -> None:
    """Set the number of steps that a parameter has made, which the bias correction of its moments depends on."""
    state = optimiser.state[parameter]
    if isinstance(state["step"], Tensor):
        state["step"].fill_(float(step))
    else:
        state["step"] = step


def takes_pieces(optimiser: torch.optim.Optimizer) -> bool:
    """Whether `step_pieces` works with an optimiser of ours: bitsandbytes steps whole parameters only."""
    return isinstance(optimiser, torch.optim.AdamW)


@torch.no_grad()
def step_pieces(optimiser: torch.optim.Optimizer, parameter: Tensor, gradient: Iterable[Tensor]) -> None:
    """One step of a contiguous parameter, so that what is done to a piece of its gradient, before and in the step,
    happens in the processor's cache.

    Args:
        optimiser: see `takes_pieces`.
        parameter: one of the optimiser's.
        gradient: in consecutive flat pieces, float32; each is used before the next is requested, and may be changed.
    """
    state = optimiser.state[parameter]
    group = next(group for group in optimiser.param_groups if any(own is parameter for own in group["params"]))
    state["step"] += 1
    beta1, beta2 = group["betas"]
    settings = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
    settings |= {"beta1": beta1, "beta2": beta2}
    tensors = [tensor.detach().view(-1) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])]
    start = 0
    for piece in gradient:
        own, first, second = (tensor[start : start + len(piece)] for tensor in tensors)
        start += len(piece)
        torch._fused_adamw_([own], [piece], [first], [second], [], [state["step"]], **settings)
    assert start == parameter.numel()


def step_unless(optimiser: torch.optim.Optimizer, broken: Tensor) -> None:
    """Step, but change nothing if `broken`, a scalar beside the parameters, is 1 rather than 0.

    torch's fused AdamW reads it on the device, so that Python need not wait; bitsandbytes has no equivalent.
    """
    if isinstance(optimiser, torch.optim.AdamW):
        optimiser.found_inf = broken  # type: ignore[attr-defined]
        optimiser.step()
    elif not bool(broken):
        optimiser.step()
