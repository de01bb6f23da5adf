"""What nodes offer to choose from, apart from the code that does the work."""

from __future__ import annotations

import torch

WEIGHT_DTYPES = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
"""What a user can choose weights to be kept in; fp8 concerns the backbone's linear layers only."""

FROM_MODEL = -1
"""Steps or guidance that the model was published with."""

PUBLISHED = "L2P (published)"
"""L2P's own noise levels among the host's schedulers."""

VARIANTS = ("1k", "4k", "8k", "10k")
POLICIES = ("shallow", "all", "lora")
PROMPT_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl")
"""These three as in `l2p_core`, which takes longer to import; a test compares them."""


def steps_problem(steps: int) -> str | None:
    """What is wrong with a number of steps, if anything, in a sentence."""
    if steps >= 1 or steps == FROM_MODEL:
        return None
    return f"steps is {steps}: take 1 or more, or {FROM_MODEL} for what the model was published with."
