"""What trains: the shallow layers, as a pure function of the configuration (arXiv 2605.12013 section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .config import HEAD, ModelConfig
from .model import key_shapes
from .ranges import check_known
from .sources import source_of
from .sources.source import Source

POLICIES = ("shallow", "all", "lora")


def trainable_names(config: ModelConfig, blocks: int = 5, policy: str = "shallow") -> set[str]:
    """The parameters that train; all others keep the source's values.

    Args:
        config: an L2P model.
        blocks: how many backbone blocks at each end train besides the embedders, refiners, pad tokens and head;
            5 of 30 is the published choice. Twice as many as there are, or more, trains all blocks.
        policy: "shallow" as published; "lora", which trains these in full and adapters on the others (see `lora`);
            or "all".

    Raises:
        ValueError: for another policy or a negative number of blocks.
    """
    check_known("training policy", policy, POLICIES)
    if blocks < 0:
        raise ValueError(f"The number of blocks to train at each end must be 0 or more, not {blocks}.")
    names = set(key_shapes(config))
    if policy == "all":
        return names
    source = source_of(config)
    trunk = list(source.blocks(config, trunk=True))
    frozen = set(trunk[blocks : len(trunk) - blocks])
    always = (HEAD, *source.trained)
    return {
        name
        for name in names
        if (source.block_of(name) and source.block_of(name) not in frozen) or _is_of(name, always)
    }


def is_new(name: str, source: Source) -> bool:
    """Whether a parameter has no counterpart in the source: the patch embedder and the head."""
    return _is_of(name, (HEAD, source.embedder))


def _is_of(name: str, parts: Iterable[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def freeze_all_but(model: nn.Module, names: set[str]) -> None:
    """Let exactly `names` take gradients; frozen layers then cost no weight gradient."""
    parameters = dict(model.named_parameters())
    unknown = names - set(parameters)
    assert not unknown, f"not parameters of this model: {sorted(unknown)[:3]}"
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
