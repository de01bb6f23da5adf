"""Quantised models in every spelling that ComfyUI reads, small: as comfy/quant_ops.py of 0.33 has their tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

FLOAT8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}

State = dict[str, Tensor]


def linears(state: Mapping[str, Tensor]) -> list[str]:
    """The layers that repacks quantise: those of the blocks' attention and feed-forward."""
    ends = (".qkv.weight", ".out.weight", ".w1.weight", ".w2.weight", ".w3.weight")
    return [key.removesuffix(".weight") for key in state if key.endswith(ends)]


def marker(**settings: object) -> Tensor:
    """A layer's `comfy_quant`."""
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def per_layer(state: Mapping[str, Tensor], make: Callable[[Tensor], State]) -> State:
    """The state with each of `linears` replaced by what `make` gives for its weight, by the last part of the key."""
    result = dict(state)
    for layer in linears(state):
        result |= {f"{layer}.{leaf}": tensor for leaf, tensor in make(result.pop(f"{layer}.weight")).items()}
    return result


def float8(weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """A weight in 8 bits and its scale."""
    scale = weight.float().abs().amax() / FLOAT8[dtype]
    return (weight.float() / scale).to(dtype), scale


def scaled_fp8(state: Mapping[str, Tensor], dtype: torch.dtype = torch.float8_e4m3fn) -> State:
    """The older spelling: one marker a file."""

    def make(weight: Tensor) -> State:
        stored, scale = float8(weight, dtype)
        return {"weight": stored, "scale_weight": scale, "scale_input": torch.ones(())}

    return {**per_layer(state, make), "scaled_fp8": torch.zeros(2).to(dtype)}


def unmarked_fp8(state: Mapping[str, Tensor]) -> State:
    """The older spelling without its marker."""
    return {key: tensor for key, tensor in scaled_fp8(state).items() if key != "scaled_fp8"}


def fp8(state: Mapping[str, Tensor], dtype: torch.dtype = torch.float8_e4m3fn) -> State:
    """A marker a layer; the products exact, so that images can be compared."""
    name = str(dtype).removeprefix("torch.")

    def make(weight: Tensor) -> State:
        stored, scale = float8(weight, dtype)
        settings = marker(format=name, full_precision_matrix_mult=True)
        return {"weight": stored, "weight_scale": scale, "comfy_quant": settings}

    return per_layer(state, make)


def int8(state: Mapping[str, Tensor]) -> State:
    """8-bit integers with a scale a row."""

    def make(weight: Tensor) -> State:
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        stored = (weight.float() / scale).round().to(torch.int8)
        return {"weight": stored, "weight_scale": scale, "comfy_quant": marker(format="int8_tensorwise")}

    return per_layer(state, make)


def nvfp4(state: Mapping[str, Tensor]) -> State:
    """4-bit floats, two in a byte, with a scale a block of 16 and one a tensor. The numbers mean nothing."""

    def make(weight: Tensor) -> State:
        rows, columns = (-(-side // 16) * 16 for side in weight.shape)
        blocks = torch.ones(-(-rows // 128) * 128, -(-columns // 64) * 4).to(torch.float8_e4m3fn)
        return {
            "weight": torch.zeros(rows, columns // 2, dtype=torch.uint8),
            "weight_scale": blocks,
            "weight_scale_2": torch.ones(()),
            "pre_quant_scale": torch.ones(columns),
            "comfy_quant": marker(format="nvfp4"),
        }

    return per_layer(state, make)


def w4a8(state: Mapping[str, Tensor]) -> State:
    """4-bit integers, two in a byte, with three kinds of scales. The numbers mean nothing."""

    def make(weight: Tensor) -> State:
        rows, columns = weight.shape
        return {
            "weight": torch.zeros(rows, columns // 2, dtype=torch.int8),
            "weight_s_rel": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
            "weight_s_channel": torch.ones(rows),
            "weight_codebook": torch.linspace(-1, 1, 16),
            "comfy_quant": marker(format="asym_w4a8_int8", group_size=16, ratio=0.5),
        }

    return per_layer(state, make)


def metadata_of(state: Mapping[str, Tensor], prefix: str = "") -> tuple[State, dict[str, str]]:
    """A file whose layers' markers are in its header instead: its tensors and its metadata."""
    layers = {}
    kept = {}
    for key, tensor in state.items():
        if key.endswith(".comfy_quant"):
            layers[prefix + key.removesuffix(".comfy_quant")] = json.loads(bytes(tensor.tolist()))
        else:
            kept[key] = tensor
    return kept, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
