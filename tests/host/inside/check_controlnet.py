"""The host's own Z-Image ControlNet patch on an L2P MODEL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.ops
import golden_vectors as golden
import kit
import torch
from comfy.ldm.lumina.controlnet import ZImage_Control
from comfy_extras import nodes_model_patch


class VAE:
    """Counts what it is asked to encode, and gives the latent's shape back."""

    def __init__(self) -> None:
        self.encoded: list[tuple[int, ...]] = []

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        self.encoded.append(tuple(image.shape))
        return golden.array("latent", (1, 16, image.shape[1] // 8, image.shape[2] // 8), 0)


def control_of(model: Any) -> Any:
    """A ControlNet as wide as the model, of random weights."""
    l2p = model.model.l2p
    control = ZImage_Control(
        dim=l2p.dim,
        n_heads=l2p.n_heads,
        n_kv_heads=l2p.n_heads,
        multiple_of=1,
        n_control_layers=3,
        refiner_control=True,
        dtype=torch.float32,
        operations=comfy.ops.manual_cast,
    )
    control.load_state_dict(
        {key: golden.array(key, value.shape, 0, 0.1) for key, value in control.state_dict().items()}
    )
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(control, load_device=cpu, offload_device=cpu)


def check_the_control_image_is_encoded_once_at_its_own_size(tmp_path: Path) -> None:
    model = kit.model(tmp_path)
    pixels = kit.latent(96, 64)
    plain = kit.ksample(model, pixels, cfg=1.0)
    vae, image = VAE(), golden.array("control", (1, 64, 96, 3), 0).sigmoid()
    (controlled,) = nodes_model_patch.ZImageFunControlnet().diffsynth_controlnet(
        model, control_of(model), vae, image=image, strength=1.0
    )
    result = kit.ksample(controlled, pixels, cfg=1.0)
    assert vae.encoded == [(1, 64, 96, 3)]
    assert result.isfinite().all() and golden.relative_error(result, plain) > 1e-4
