"""The options that nodes offer, separate from the code that implements them."""

from __future__ import annotations

import torch

WEIGHT_DTYPES = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
"""Storage types of weights that a user can choose; fp8 concerns the backbone's linear layers only."""

FROM_MODEL = -1
"""The value that stands for the model's published steps or guidance."""

UNTRAINED = (
    "This is a pixel initialisation that has not been trained: it generates noise. Train it with Train L2P first."
)
"""A note shown wherever such a model is used."""

PUBLISHED = "L2P (published)"
"""L2P's own noise levels among the host's schedulers."""

VARIANTS = ("1k", "4k", "8k", "10k")
POLICIES = ("shallow", "all", "lora")
QUANTISED_FORMATS = ("float8_e4m3fn", "int8_tensorwise", "bf16")
PROMPT_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl")
DEEP_SUFFIXES = (".png", ".tif", ".tiff", ".exr", ".dcm", ".dicom", ".ima")
"""These equal those of `l2p_core`, which takes longer to import; a test compares them."""

HYBRID_TASKS = ("auto", "fast", "detail", "large", "edit", "restore", "upscale", "custom")
"""The tasks of Hybrid Sampler, see `hybrid_tasks`."""

TIFF_DEPTHS = ("16-bit", "32-bit float")

AS_TRAINED = "as trained"
DELTA_DTYPES = {AS_TRAINED: None, "bf16": torch.bfloat16}
"""The dtypes in which a delta's weights may be saved."""

OF_MODEL = 0
"""The width or height that means the side that the model was trained at."""

MIN_SIDE, MAX_SIDE = 16, 16384

AS_TYPED = "width and height"
ASPECTS: dict[str, tuple[int, int]] = {
    "1:1 square": (1, 1),
    "5:4 landscape": (5, 4),
    "4:3 landscape": (4, 3),
    "3:2 landscape": (3, 2),
    "16:9 landscape": (16, 9),
    "21:9 landscape": (21, 9),
    "4:5 portrait": (4, 5),
    "3:4 portrait": (3, 4),
    "2:3 portrait": (2, 3),
    "9:16 portrait": (9, 16),
}
"""Width to height; the area is the model's own."""


def steps_problem(steps: int, name: str = "steps") -> str | None:
    """The problem with the number of steps of an input as a sentence; None if there is none."""
    if steps >= 1 or steps == FROM_MODEL:
        return None
    return f"{name} is {steps}: use 1 or more, or {FROM_MODEL} for the model's published value."


def cfg_problem(cfg: float, name: str = "cfg") -> str | None:
    """The problem with the guidance of an input as a sentence; None if there is none."""
    if cfg >= 0 or cfg == FROM_MODEL:
        return None
    return f"{name} is {cfg}: use 0 or more, or {FROM_MODEL} for the model's published value."
