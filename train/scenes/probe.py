"""A probe that teaches the source's middle blocks what is where, which a renderer knows.

Diffusion models learn faster when hidden states are aligned with good features of the clean image (REPA, arXiv
2410.06940). Here the best features need no network: how much of a token each object covers, times what that object is.
The probe is a linear layer on the hidden states of one block, and is not shipped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...l2p_core.model import LatentModel
from ...l2p_core.sources import source_of
from ...l2p_core.tiny.scenes.content import COLOURS, KINDS, TEXTURES, Scenes
from ...l2p_core.tiny.scenes.rendering import coverage

OBJECTS = 2


class Probe(nn.Module):
    """Reads the scene from the hidden states behind the middle block of the model's last pass with gradients.

    Args:
        model: of which the middle block of the trunk is read.
    """

    def __init__(self, model: LatentModel):
        super().__init__()
        self.linear = nn.Linear(model.config.dim, OBJECTS + len(KINDS) + len(COLOURS) + len(TEXTURES))
        self._hidden: Tensor | None = None
        trunk = list(source_of(model.config).blocks(model.config, trunk=True))
        model.get_submodule(trunk[len(trunk) // 2 - 1]).register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        self._hidden = output

    def loss(self, shown: Tensor) -> Tensor:
        """The squared error of what is read, summed over features and averaged over tokens; a scalar.

        Args:
            shown: what there is to read, see `what_is_shown`.
        """
        assert self._hidden is not None, "the model has not been run"
        read = self.linear(F.rms_norm(self._hidden[:, : shown.shape[1]], self._hidden.shape[-1:]))
        self._hidden = None
        return (read - shown).square().sum(-1).mean()


@torch.no_grad()
def what_is_shown(scenes: Scenes, cells: int) -> Tensor:
    """What each token shows, (B, cells * cells, features): the coverage by each object, of each kind, colour and
    texture."""
    place = torch.arange(OBJECTS, device=scenes.kind.device).expand_as(scenes.kind)
    tables = (
        (place, OBJECTS),
        (scenes.kind, len(KINDS)),
        (scenes.colour, len(COLOURS)),
        (scenes.texture, len(TEXTURES)),
    )
    shown = torch.cat([F.one_hot(index, count) for index, count in tables], -1).float()
    return coverage(scenes, cells).flatten(2).mT @ shown
