"""Every node of the host from MODEL to MODEL: what works on the bundled source works on the bundled pixel model."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

import nodes
from comfyui_l2p.nodes.model.demo import load_demo
from comfyui_l2p.nodes.model.demo_source import load_demo_source

SIDE = 80
"""Pixels; not 64, the width of a caption's features: the host's context windows would cut those too."""
CAPTION = "a red circle in the centre on a white background"
SKIPPED = {
    "TorchCompileModel": "compiling takes minutes, check_compile.py does it",
    "LoraLoader": "needs a file, check_lora.py has some",
    "LoraLoaderModelOnly": "needs a file, check_lora.py has some",
    "LoraLoaderBypass": "needs a file, check_lora.py has some",
    "LoraLoaderBypassModelOnly": "needs a file, check_lora.py has some",
    "ModelPatchLoader": "needs a file, check_controlnet.py has one",
}
EXPECTED = {"ModelSamplingFlux", "ModelSamplingSD3", "ModelSamplingAuraFlow", "RescaleCFG", "ModelMergeSimple"}
"""Nodes that people use with Z-Image; they work on both, whatever becomes of the rest."""

Errors = tuple[str, str]
"""What went wrong on the source and on the pixel model; empty where nothing did."""


@pytest.fixture(scope="module")
def errors() -> dict[str, Errors]:
    """By node; those whose inputs cannot be made of what the bundled models give are not in it."""
    # The host's own nodes beside those in nodes.py, without other people's and without those that call services.
    asyncio.run(nodes.init_builtin_extra_nodes())
    with torch.inference_mode():
        source, clip, vae = load_demo_source()
        pixels, _ = load_demo()
        positive, negative = encoded(clip, CAPTION), encoded(clip, "")
        # Of a prompt of its own: PerpNeg divides by how far it is from the positive one.
        links = {"CLIP": clip, "VAE": vae, "CONDITIONING": encoded(clip, "a square"), "LATENT": empty_latent()}
        links["IMAGE"] = torch.ones(1, SIDE, SIDE, 3)
        links["MASK"] = torch.ones(1, SIDE, SIDE)
        links["SIGMAS"] = torch.tensor([1.0, 0.5, 0.0])
        found = {}
        for name, node in nodes.NODE_CLASS_MAPPINGS.items():
            if "MODEL" not in node.RETURN_TYPES or name in SKIPPED:
                continue
            sides = [inputs_of(node, links | {"MODEL": model}) for model in (source, pixels)]
            if None not in sides:
                of_source, of_pixels = (error_of(node, inputs or {}, positive, negative) for inputs in sides)
                found[name] = of_source, of_pixels
        return found


def encoded(clip: Any, text: str) -> Any:
    return nodes.CLIPTextEncode().encode(clip, text)[0]


def empty_latent() -> Any:
    return nodes.EmptyLatentImage().generate(SIDE, SIDE, 1)[0]


def inputs_of(node: Any, links: dict[str, Any]) -> dict[str, Any] | None:
    """Links, defaults and first choices for a node's inputs; None if it has no MODEL among them, or needs more."""
    inputs: dict[str, Any] = {}
    required = node.INPUT_TYPES().get("required", {})
    for name, (kind, *settings) in required.items():
        options = kind if isinstance(kind, list) else settings[0].get("options") if settings else None
        if str(kind) in links:
            inputs[name] = links[kind]
        elif settings and "default" in settings[0]:
            inputs[name] = settings[0]["default"]
        elif options:
            inputs[name] = options[0]
        else:
            return None
    return inputs if any(kind == "MODEL" for kind, *_ in required.values()) else None


def error_of(node: Any, inputs: dict[str, Any], positive: Any, negative: Any) -> str:
    """What goes wrong in one step of sampling with the MODEL that a node gives; empty if nothing does."""
    try:
        model = run(node, inputs)[node.RETURN_TYPES.index("MODEL")]
        (latent,) = nodes.common_ksampler(model, 1, 1, 2.0, "euler", "simple", positive, negative, empty_latent())
    except Exception as error:  # whatever a node of somebody else's raises
        return f"{type(error).__name__}: {error}"
    # Of its source too, which the host does not look at.
    return "" if latent["samples"].isfinite().all() else "not finite"


def run(node: Any, inputs: dict[str, Any]) -> Any:
    """A node's outputs, as the host calls it."""
    is_v3 = hasattr(node, "GET_SCHEMA")
    result = getattr(node if is_v3 else node(), node.FUNCTION)(**inputs)
    return result.result if is_v3 else result


def check_nodes_work_on_a_pixel_model_as_on_its_source(errors: dict[str, Errors]) -> None:
    differing = {name: both for name, both in errors.items() if bool(both[0]) != bool(both[1])}
    assert differing == {}
    assert len(errors) > 40


def check_the_nodes_that_people_use_work_on_both(errors: dict[str, Errors]) -> None:
    assert {name: errors.get(name) for name in EXPECTED} == dict.fromkeys(EXPECTED, ("", ""))
    assert sum(both == ("", "") for both in errors.values()) > 35
