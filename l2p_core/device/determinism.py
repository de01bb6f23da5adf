"""Training that computes the same bits each time on a GPU.

A CPU does so anyway. On a GPU several algorithms sum in whatever order their threads finish, and libraries choose among
algorithms by timing them; `deterministic = true` disables both, which costs time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS, CUBLAS_SETTING = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""cuBLAS needs workspaces of a fixed size to sum in a fixed order (NVIDIA's cuBLAS documentation)."""


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Make torch use deterministic algorithms within the block, if `wanted`; restore its settings afterwards.

    Raises:
        ValueError: out of the block, if an operation of the training has no such algorithm on this device.
    """
    if not wanted:
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    of_cudnn, of_cublas = (cudnn.deterministic, cudnn.benchmark), os.environ.get(CUBLAS)
    os.environ.setdefault(CUBLAS, CUBLAS_SETTING)
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error).lower():
            raise
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"deterministic = true does not work here, because this version of torch has no deterministic way: "
            f"{reason}. Set it to false, or install another version of torch."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = of_cudnn
        if of_cublas is None:
            del os.environ[CUBLAS]
