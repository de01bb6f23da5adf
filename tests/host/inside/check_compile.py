"""The host's torch.compile node on an L2P MODEL."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import golden_vectors as golden
import kit
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import TorchCompileModel
from torch._dynamo.utils import counters

ONE_SHAPE: dict[str, Any] = {"cfg": 1.0, "steps": 2}
"""Without guidance there is one caption, of one length: inductor would take a minute for every other."""


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def check_the_graph_is_captured(tmp_path: Path) -> None:
    """Without a compiler behind it, so that it runs everywhere."""
    model = kit.model(tmp_path)
    expected = kit.ksample(model)
    compiled = model.clone(disable_dynamic=True)
    set_torch_compile_wrapper(model=compiled, backend="eager")
    assert golden.relative_error(kit.ksample(compiled), expected) < 1e-5
    assert counters["stats"]["unique_graphs"] > 0
    # The host's attention on a CPU asks the system how much memory is free, which opens a file.
    ours = [reason for reason in counters["graph_break"] if "builtin operator `open`" not in reason]
    assert not ours, ours


@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C++ compiler on a CPU")
def check_the_node_with_inductor(tmp_path: Path) -> None:
    model = kit.model(tmp_path)
    expected = kit.ksample(model, **ONE_SHAPE)
    compiled = TorchCompileModel.execute(model, "inductor").args[0]
    result = kit.ksample(compiled, **ONE_SHAPE)
    assert counters["inductor"] and counters["stats"]["unique_graphs"] > 0
    assert golden.relative_error(result, expected) < 1e-4
