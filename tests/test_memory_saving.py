"""The steps that keep only their inputs: their gradients are autograd's, and they do keep less."""

from __future__ import annotations

import weakref

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor

from comfyui_l2p.l2p_core.config import NORM_EPS
from comfyui_l2p.l2p_core.memory.live_memory import trace
from comfyui_l2p.l2p_core.ops.memory_saving import GatedSilu, ScaledNorm
from comfyui_l2p.l2p_core.ops.rope import image_rope, joint_rope
from comfyui_l2p.l2p_core.sources.next_dit import Block
from comfyui_l2p.l2p_core.sources.z_image import TRAITS


def plain_norm(x: Tensor, weight: Tensor, factor: Tensor | None) -> Tensor:
    normed = F.rms_norm(x, weight.shape, weight.to(x.dtype), NORM_EPS)
    return normed if factor is None else normed * factor


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("trained", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_the_norm_has_autograds_gradients(
    dtype: torch.dtype, error: float, trained: tuple[bool, bool], heads: bool
) -> None:
    shape = (2, 3, 7, 16) if heads else (2, 7, 16)
    x = torch.randn(shape).mul_(3).to(dtype).requires_grad_()
    weight = torch.randn(16).requires_grad_(trained[0])
    factor = None if heads else torch.randn(2, 1, 16).to(dtype).requires_grad_(trained[1])
    gradient = torch.randn(shape).to(dtype)
    inputs = [tensor for tensor in (x, weight, factor) if tensor is not None and tensor.requires_grad]

    ours = ScaledNorm.apply(x, weight, factor, NORM_EPS)
    assert ours.dtype == dtype
    # What the gradients should be, in float32 throughout.
    exact = [None if tensor is None else tensor.detach().float().requires_grad_() for tensor in (x, weight, factor)]
    assert exact[0] is not None and exact[1] is not None
    reference = plain_norm(exact[0], exact[1], exact[2])
    pairs = zip(exact, (x, weight, factor), strict=True)
    trains = [e for e, tensor in pairs if e is not None and tensor is not None and tensor.requires_grad]
    wanted = torch.autograd.grad(reference, trains, gradient.float())
    assert (ours.float() - reference).norm() <= error * reference.norm()
    for found, should, tensor in zip(torch.autograd.grad(ours, inputs, gradient), wanted, inputs, strict=True):
        assert found.dtype == tensor.dtype
        assert (found.float() - should).norm() <= error * should.norm()


def test_a_row_of_zeros_has_finite_gradients() -> None:
    x = torch.zeros(1, 2, 8, requires_grad=True)
    ScaledNorm.apply(x, torch.ones(8), torch.ones(1, 1, 8), NORM_EPS).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_gate_has_autograds_gradients(dtype: torch.dtype, error: float) -> None:
    gate, x, gradient = (torch.randn(2, 5, 12).to(dtype) for _ in range(3))
    gate.requires_grad_(), x.requires_grad_()
    ours, plain = GatedSilu.apply(gate, x), F.silu(gate) * x
    assert torch.equal(ours, plain)
    exact = [tensor.detach().float().requires_grad_() for tensor in (gate, x)]
    wanted = torch.autograd.grad(F.silu(exact[0]) * exact[1], exact, gradient.float())
    for found, should in zip(torch.autograd.grad(ours, (gate, x), gradient), wanted, strict=True):
        assert (found.float() - should).norm() <= error * should.norm()


def test_a_frozen_block_keeps_what_its_gradients_need_and_no_more() -> None:
    config = tiny_models.SOURCE
    with torch.device("meta"):
        block = Block(config).requires_grad_(False)
        x = torch.empty(1, 32, config.dim, requires_grad=True)
        t = torch.empty(1, config.t_dim, requires_grad=True)
    rope = image_rope(TRAITS.positions(config), (4, 8), 32, torch.device("meta"))
    kept = trace(lambda x, t: block(x, rope, t=t), [x, t], block.parameters()).retained
    width = 4 * 32 * config.dim
    # Two norms' inputs (the block's own is not counted), q, k and v as they come and q and k as they are rotated, what
    # attention gives as it comes and projected, the gate and what it gates, what they become; and the output.
    of_attention, of_gate = 2 + 3 + 2 + 2, 2 * config.ffn_dim / config.dim
    assert kept <= 1.15 * width * (of_attention + of_gate + 1)


def test_rotary_tables_of_a_trainings_captions_do_not_pile_up() -> None:
    positions, cpu = TRAITS.positions(tiny_models.SOURCE), torch.device("cpu")
    made = [weakref.ref(joint_rope(positions, (4, 8), (32, 32 * count), cpu)) for count in range(2, 42)]
    assert sum(table() is not None for table in made) <= 8
