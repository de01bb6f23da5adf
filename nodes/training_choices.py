"""The choices of the Train node, separate from the training code, which is loaded on first use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

AUTO = "auto"
AS_RECIPE = "as the recipe"
MEMORY: dict[str, dict[str, Any]] = {
    AS_RECIPE: {},
    "on the GPU": {"frozen": "full", "stream": False, "offload": False},
    "frozen in fp8": {"frozen": "fp8", "stream": False, "offload": False},
    "offloaded": {"frozen": "fp8", "stream": True, "offload": True},
}
"""Storage of weights, for GPUs from large to small."""


@dataclass(frozen=True)
class Choices:
    """A user's choices for a run; numbers of 0 (for `blocks`, -1) and `AS_RECIPE` keep the recipe's values.

    Attributes:
        dataset: name of a folder in the host's datasets folder.
        model: a file in models/diffusion_models, or `files.TINY`.
        recipe: name of a bundled recipe, or `AUTO` for the one that fits the model.
        run_name: of the folder in output/l2p_runs.
        anew: start a new run in that folder.
        filename: of the delta in models/diffusion_models; by default the run's name.
        overwrite: whether another file of that name may be replaced.
        prompts: of the montages, one per line; empty keeps the recipe's.
        changes: further keys of the recipe, as TOML.
    """

    dataset: str
    model: str
    recipe: str
    run_name: str
    anew: bool
    steps: int
    learning_rate: float
    image_size: int
    batch_size: int
    accumulate: int
    policy: str
    blocks: int
    precision: str
    memory: str
    seed: int
    prompts: str
    filename: str
    overwrite: bool
    save_every: int
    montage_every: int
    changes: str
