"""Autocast in the host's torch widens other operations than newer versions do: the stream stays bfloat16 there too."""

from __future__ import annotations

import tiny_models
import torch
from torch import Tensor, nn

from comfyui_l2p.l2p_core.backbone import RMSNorm
from comfyui_l2p.l2p_core.sources.next_dit import Block


def check_the_stream_stays_bfloat16_under_autocast() -> None:
    model = tiny_models.pixel_model()
    seen: dict[str, set[torch.dtype]] = {}

    def watch(kind: str, module: nn.Module) -> None:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.setdefault(kind, set()).update({inputs[0].dtype, output.dtype})

        module.register_forward_hook(note)

    for module in model.modules():
        if isinstance(module, (Block, RMSNorm)) and module is not model.cap_embedder[0]:
            watch(type(module).__name__, module)
    for stage in model.local_decoder.stages:
        # What a decoder stage's first convolution reads is the map that was doubled.
        watch("decoder stage", model.get_submodule(f"local_decoder.up{stage.name}.1"))
    arguments = torch.randn(1, 3, 32, 48), torch.tensor([0.6]), tiny_models.captions(9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*arguments).square().mean()
        with torch.no_grad():
            model(*arguments)
    loss.backward()
    assert seen == dict.fromkeys(("Block", "RMSNorm", "decoder stage"), {torch.bfloat16})
