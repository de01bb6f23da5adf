"""Refuses images with NaN or infinity, which would be saved as black pixels without an error, and names the cause."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PIECE = 1 << 24
"""Elements that are checked together, so that no large weight is copied."""

_FIRST_BROKEN = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
"""The bits of the smallest positive float8 that is not a finite number: NaN, and infinity."""


def check_finite(images: Tensor, cause: Callable[[], str] = lambda: _UNKNOWN) -> None:
    """Refuse images that contain NaN or infinity, with one pass over the finished pixels.

    Args:
        images: of any shape.
        cause: finds the reason, see `cause`; called only for a bad image, because it may read all weights.

    Raises:
        ValueError: with a sentence for the user. Not a class of ours, which ComfyUI shows with the pack's path.
    """
    if is_finite(images):
        return
    raise ValueError(f"An image contains values that are not finite numbers and would be black: {cause()}")


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite numbers."""
    if not tensor.numel():
        return True
    flat = tensor.detach().reshape(-1)
    if flat.dtype in _FIRST_BROKEN:
        # Float8 has no extremes in torch; its bits without the sign are in the order of magnitudes.
        return all(
            int((piece.view(torch.uint8) & 0x7F).max()) < _FIRST_BROKEN[flat.dtype] for piece in flat.split(_PIECE)
        )
    # The extremes take on any NaN, and need no second tensor of the image's size.
    low, high = torch.aminmax(flat)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def cause(
    weights: Iterable[tuple[str, Tensor]],
    inputs: Iterable[tuple[str, Tensor]] = (),
    adapters: Iterable[tuple[str, Tensor]] = (),
    adapted: bool = False,
) -> str:
    """Why images of a model are not finite, and what to do, as the end of a sentence.

    Args:
        weights: of the model with their names, as it computes with them.
        inputs: captions and an image to start from, with their names in messages.
        adapters: weights of LoRAs on it and of models merged into it, with the names of the weights that they change.
        adapted: whether LoRAs are on it, whose weights may be in `weights` already.
    """
    given = _first_broken(inputs)
    if given:
        return (
            f"{given} already has values that are not finite, so the model is not at fault: check where it comes from."
        )
    adapter = _first_broken(adapters)
    if adapter:
        return (
            f"a LoRA, or a model merged into this one, is broken: its part for the weight '{adapter}' is not finite. "
            "Remove it."
        )
    weight = _first_broken(weights)
    if weight and adapted:
        return (
            f"the model's weight '{weight}' is not finite with the applied LoRAs. Try without LoRAs; if that does not "
            "help, the model's file is broken: download or make it again."
        )
    if weight:
        return f"the model's file is broken: its weight '{weight}' is not finite. Download or make it again."
    lower = " or with the LoRAs at a lower strength" if adapted else ""
    return (
        f"all weights are finite, so values overflow on the way: try with the weights in bf16 or fp32{lower}, or with "
        "another sampler or guider."
    )


def weights_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model, if it is a module, one by one, including those that layers hold in another form."""
    if not isinstance(model, nn.Module):
        return
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name, tensor
    for name, module in model.named_modules():
        if hasattr(module, "read_weight"):
            yield f"{name}.weight", module.read_weight()


def _first_broken(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    return next((name for name, tensor in tensors if tensor.is_floating_point() and not is_finite(tensor)), None)


_UNKNOWN = (
    "the weights of the model or of a LoRA are broken, or overflow in their dtype. Try without LoRAs, with the weights "
    "in bf16 or fp32, or with another file."
)
