"""What trains: the shallow layers, as a pure function of the configuration (arXiv 2605.12013 section 3.2)."""

from __future__ import annotations

from torch import nn

from .config import ModelConfig
from .model import key_shapes

POLICIES = ("shallow", "all", "lora")

_SHALLOW_PARTS = (
    "x_embedder",
    "t_embedder",
    "cap_embedder",
    "x_pad_token",
    "cap_pad_token",
    "noise_refiner",
    "context_refiner",
    "local_decoder",
)
_NEW_PARTS = ("x_embedder", "local_decoder")


def trainable_names(config: ModelConfig, blocks: int = 5, policy: str = "shallow") -> set[str]:
    """The parameters that train; every other one stays as the source has it.

    Args:
        config: an L2P model.
        blocks: how many backbone blocks at each end train besides the embedders, refiners, pad tokens and head;
            5 of 30 is the published choice. Twice as many as there are, or more, trains all blocks.
        policy: "shallow" as published; "lora", which trains these in full and adapters on the others (see `lora`);
            or "all".

    Raises:
        ValueError: for another policy or a negative number of blocks.
    """
    if policy not in POLICIES:
        raise ValueError(f"There is no training policy {policy!r}; choose one of {', '.join(POLICIES)}.")
    if blocks < 0:
        raise ValueError(f"The number of blocks to train at each end must be 0 or more, not {blocks}.")
    names = set(key_shapes(config))
    if policy == "all":
        return names
    return {name for name in names if _is_shallow(name, blocks, config.n_layers)}


def _is_shallow(name: str, blocks: int, n_layers: int) -> bool:
    part, _, rest = name.partition(".")
    if part != "layers":
        return part in _SHALLOW_PARTS
    block = int(rest.partition(".")[0])
    return block < blocks or block >= n_layers - blocks


def is_new(name: str) -> bool:
    """Whether a parameter has no counterpart in the source: the patch embedder and the head."""
    return name.partition(".")[0] in _NEW_PARTS


def freeze_all_but(model: nn.Module, names: set[str]) -> None:
    """Let exactly `names` take gradients; frozen layers then cost no weight gradient."""
    parameters = dict(model.named_parameters())
    unknown = names - set(parameters)
    assert not unknown, f"not parameters of this model: {sorted(unknown)[:3]}"
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
