"""What the networks of all sources share: their contract with the rest of the package, and common layers.

The networks themselves are in `sources`, a file each. Parameter names are the ComfyUI layout, so a state dict of these
modules is a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .ops.memory_saving import Recomputing, scaled_norm
from .ops.precision import LACKED, computed_in, product

Runs = tuple[tuple[int, int], ...]
"""A batch of sequences of several lengths, padded to the longest: (samples, tokens of each) of neighbours that are
equally long."""


@dataclass(frozen=True)
class Conditioning:
    """A caption for networks that read a pooled vector: features (L, caption_dim), pooled (width,)."""

    features: Tensor
    pooled: Tensor | None = None


Caption = Tensor | Conditioning
"""A caption's features (L, caption_dim), alone or with a pooled vector."""


def features_of(caption: Caption) -> Tensor:
    """A caption's features (L, caption_dim)."""
    return caption if isinstance(caption, Tensor) else caption.features


def each_tensor(caption: Caption, function: Callable[[Tensor], Tensor]) -> Caption:
    """A caption with a function applied to each tensor of it."""
    if isinstance(caption, Tensor):
        return function(caption)
    return Conditioning(function(caption.features), None if caption.pooled is None else function(caption.pooled))


@dataclass(frozen=True)
class RefinedCaptions:
    """Captions as the joint blocks read them, which depends on neither image nor noise level.

    Attributes:
        tokens: (B, longest, dim).
        lengths: of each caption, with its own padding.
        pooled: (B, width) where the network reads such a vector.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)


Captions = Sequence[Caption] | RefinedCaptions


class Backbone(Recomputing):
    """The contract of a source's network, from patches to hidden states; its class is named by the source's row.

    `gradient_checkpointing` recomputes each block (and, in L2PModel, each stage of the head) in the backward pass, but
    for the trunk's blocks whose numbers are in `kept_blocks`.
    `always_pad` gives parameters that not every batch uses a gradient, of zeros, where they are not used.
    `read_part` is set while weights are on the device "meta": it reads those of one module of the model, whose name it
    also receives.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.kept_blocks: frozenset[int] = frozenset()
        self.always_pad = False
        self.read_part: Callable[[nn.Module, str], None] | None = None

    if TYPE_CHECKING:  # which parts there are is the source's

        def __getattr__(self, name: str) -> Any: ...

    def hidden_states(
        self, patches: Tensor, grid: tuple[int, int], sigma: Tensor, conditioning: Captions
    ) -> tuple[Tensor, Tensor]:
        """Run the backbone.

        Args:
            patches: (B, rows * columns, P*P*C), see `patch.patchify`.
            grid: the token grid as (rows, columns).
            sigma: (B,) noise levels in [0, 1], whatever the source's own time is.
            conditioning: B captions, or what `refined` made of them; lengths may differ, each sample equals running it
                alone.

        Returns:
            The last block's raw hidden states of the image tokens (B, rows * columns, dim), and the timestep
            embedding (B, t_dim).

        Raises:
            ValueError: if there are not as many captions as images, or a caption does not suit this model.
        """
        raise NotImplementedError

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Every block with its name in the model, in the order in which they are computed."""
        raise NotImplementedError

    def refined(self, captions: Sequence[Caption]) -> Captions:
        """Compute once what is the same for captions in all steps; captions as for `hidden_states`."""
        return captions

    def _run_trunk(self, number: int, block: nn.Module, *inputs: Any) -> Any:
        """`_run` a block of the trunk, unless it keeps its activations."""
        return block(*inputs) if number in self.kept_blocks else self._run(block, *inputs)

    def _check_captions(self, captions: Sequence[Caption]) -> None:
        """Refuse captions from another text encoder."""
        pooled = (self.config.pooled_dim,) if self.config.pooled_dim else None
        for caption in captions:
            features = features_of(caption)
            if features.ndim != 2 or len(features) == 0 or features.shape[1] != self.config.caption_dim:
                raise ValueError(
                    f"Caption features have the shape {tuple(features.shape)}, but this model takes (tokens, "
                    f"{self.config.caption_dim}): use the text encoder that belongs to it."
                )
            beside = None if isinstance(caption, Tensor) or caption.pooled is None else tuple(caption.pooled.shape)
            if beside != pooled:
                raise ValueError(
                    f"A caption's pooled vector has the shape {beside}, but this model takes "
                    f"{'none' if pooled is None else pooled}: use the text encoder that belongs to it."
                )


def check_count(captions: Captions, batch: int) -> None:
    """Refuse any number of captions other than one per image.

    Raises:
        ValueError: saying how many there are.
    """
    if len(captions) != batch:
        raise ValueError(f"{batch} images came with {len(captions)} captions; give one caption for each image.")


class RMSNorm(nn.RMSNorm):
    """RMS norm in the dtype of its input, so that float32 master weights do not widen a bfloat16 residual stream."""

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """Normalise the last dimension of (B, ..., N, D); times `factor` (B, 1, D) if there is one."""
        assert self.eps is not None
        return scaled_norm(x, self.weight, factor, self.eps)


class Linear(nn.Linear):
    """A linear layer that, without gradients, avoids dtypes that the CPU cannot compute in."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        dtype = computed_in(x)
        if not LACKED.get(dtype, False):
            return super().forward(x)
        return product(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


def runs_of(lengths: Sequence[int], before: int = 0) -> Runs | None:
    """The runs of existing tokens in sequences of these lengths, each after `before` tokens; None if all are equally
    long."""
    if min(lengths) == max(lengths):
        return None
    return tuple((len(list(run)), before + length) for length, run in groupby(lengths))


def attended(q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> Tensor:
    """Attention of (B, heads, N, head_dim) within the tokens that exist; zero for the others.

    A call for each run: torch's fastest kernels take no mask.
    """
    counts = [count for count, _ in runs]
    parts = [
        F.pad(F.scaled_dot_product_attention(*(x[:, :, :tokens] for x in parts)), (0, 0, 0, q.shape[2] - tokens))
        for (_, tokens), *parts in zip(runs, q.split(counts), k.split(counts), v.split(counts), strict=True)
    ]
    return torch.cat(parts)


def finite(x: Tensor) -> Tensor:
    """Large activations overflow float16; clamp them to its range as the host does (comfy/ldm/lumina/model.py)."""
    if x.dtype == torch.float16:
        return torch.nan_to_num(x, nan=0.0, posinf=65504.0, neginf=-65504.0)
    return x
