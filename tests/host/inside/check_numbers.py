"""Numbers that the host does not hold to a node's limits, because another node gave them, end in a sentence."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest
from comfy_api.latest import io

from comfyui_l2p import comfy_entrypoint
from comfyui_l2p.nodes.pixel_nodes import EmptyPixels
from comfyui_l2p.nodes.sampler_node import PixelSampler

NUMBERS = (io.Int.Input, io.Float.Input)


def nodes() -> list[type[io.ComfyNode]]:
    async def found() -> list[type[io.ComfyNode]]:
        return await (await comfy_entrypoint()).get_node_list()

    return asyncio.run(found())


INPUTS = [(node, input) for node in nodes() for input in node.GET_SCHEMA().inputs if isinstance(input, NUMBERS)]


def wrong(input: Any) -> list[Any]:
    values: list[Any] = [math.nan, math.inf, -math.inf, "7", True, input.max + 1, input.min - 1]
    return [*values, 1.5] if isinstance(input, io.Int.Input) else values


def refused(node: type[io.ComfyNode], **given: Any) -> str:
    """What a node says of inputs, all others as they are by default."""
    inputs = {input.id: getattr(input, "default", None) for input in node.GET_SCHEMA().inputs} | given
    with pytest.raises(ValueError) as error:
        node.execute(**inputs)
    return str(error.value)


@pytest.mark.parametrize(("node", "input"), INPUTS, ids=lambda value: getattr(value, "id", None))
def check_every_number_is_held_to_its_limits(node: type[io.ComfyNode], input: Any) -> None:
    for value in wrong(input):
        said = refused(node, **{input.id: value})
        assert said.startswith(f"{input.id} must be ") and said.count("\n") == 0, said


def check_there_are_numbers_to_hold() -> None:
    assert {"width", "steps", "cfg", "denoise", "seed", "blocks"} <= {input.id for _, input in INPUTS}
    assert EmptyPixels.execute(width=16, height=16, batch_size=np.int64(1)).args[0]["samples"].shape == (1, 3, 16, 16)


def check_no_steps_is_refused_on_every_way() -> None:
    assert PixelSampler.validate_inputs(steps=1) is PixelSampler.validate_inputs(steps=-1) is True
    assert "steps is 0: use 1 or more" in str(PixelSampler.validate_inputs(steps=0))
