"""A fused decoder stage equals the two convolutions that it stands for, at the image's borders too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from golden_vectors import relative_error

from comfyui_l2p.l2p_core.config import VARIANTS
from comfyui_l2p.l2p_core.detailer import DetailerHead
from comfyui_l2p.l2p_core.ops import fused_decoder
from comfyui_l2p.l2p_core.ops.fused_decoder import Fusion


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Fuse at any size, and count how often."""
    calls = [0]
    composed = fused_decoder.compose

    def counted(up: torch.nn.Conv2d, dec: torch.nn.Conv2d) -> tuple[torch.Tensor, torch.Tensor]:
        calls[0] += 1
        return composed(up, dec)

    monkeypatch.setattr(fused_decoder, "compose", counted)
    monkeypatch.setattr(fused_decoder, "MIN_PIXELS", 0)
    yield calls


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tile", [None, 77])
def test_fused_equals_as_written(variant: str, tile: int | None, count: list[int]) -> None:
    torch.manual_seed(0)
    row = VARIANTS[variant]
    head = DetailerHead(row.head.scaled(0.1), 8)
    side = 2 * row.patch_size
    pixels = torch.randn(2, 3, side, 2 * side)
    features = torch.randn(2, 8, 2, 4)
    as_written = head(pixels, features).detach()
    assert count == [0], "training must not fuse"
    with torch.no_grad():
        fused = head(pixels, features, tile)
    assert count == [len(head.stages)], "composed once, for all tiles"
    assert relative_error(fused, as_written) < 1e-6
    # A border that was wrong would hardly show in the norm over the whole image.
    for edge in (fused[..., 0, :], fused[..., -1, :], fused[..., 0], fused[..., -1]):
        assert edge.isfinite().all()
    assert (fused - as_written).abs().max() < 1e-4 * as_written.abs().max()


def test_composed_weights_are_those_of_the_two_convolutions() -> None:
    torch.manual_seed(0)
    up, dec = torch.nn.Conv2d(3, 4, 3, padding=1).double(), torch.nn.Conv2d(4 + 2, 5, 3, padding=1).double()
    x, skip = torch.randn(1, 3, 6, 7).double(), torch.randn(1, 2, 12, 14).double()
    with torch.no_grad():
        through, rest = fused_decoder.fused_stage(x, skip, up, dec, Fusion())
        expected = dec(torch.cat([up(torch.nn.functional.interpolate(x, scale_factor=2.0)), skip], dim=1))
    inside = (..., slice(1, -1), slice(1, -1))
    # Weights are composed in float32.
    assert relative_error((through + rest)[inside], expected[inside]) < 1e-6


def test_weights_are_composed_once_for_all_steps_until_they_change(count: list[int]) -> None:
    torch.manual_seed(0)
    head = DetailerHead(VARIANTS["1k"].head.scaled(0.1), 8).requires_grad_(False)
    stages = len(head.stages)
    pixels, features = torch.randn(1, 3, 32, 32), torch.randn(1, 8, 2, 2)
    with torch.no_grad():
        first = head(pixels, features)
        assert torch.equal(head(pixels, features), first) and count == [stages]

        def renewed() -> None:
            """One stage's weights have changed."""
            before = count[0]
            head.fused = False
            expected = head(pixels, features)
            head.fused = None
            assert relative_error(head(pixels, features), expected) < 1e-5
            assert count == [before + 1]

        up = head.get_submodule("up1.1")
        assert isinstance(up, torch.nn.Conv2d)
        up.weight.mul_(2)  # in place
        renewed()
        up.weight.data = up.weight * 2  # in other memory
        renewed()
        head.load_state_dict({**head.state_dict(), "up1.1.weight": up.weight / 3}, assign=True)
        head.requires_grad_(False)
        renewed()
        up.weight.requires_grad_(True)
        head(pixels, features), head(pixels, features)
        assert count[0] == stages + 5, "weights that train are composed each time"


def test_layers_of_a_host_are_left_alone(count: list[int]) -> None:
    class Operations:
        class Conv2d(torch.nn.Conv2d):
            """As a host's layers, whose weights are not what they compute with."""

    config = VARIANTS["1k"].head.scaled(0.1)
    for operations, expected in ((Operations, 0), (torch.nn, len(config.stages))):
        head = DetailerHead(config, 8, operations)
        head.fused = True
        with torch.no_grad():
            head(torch.randn(1, 3, 32, 32), torch.randn(1, 8, 2, 2))
        assert count == [expected]


def test_a_gpu_fuses_from_the_size_at_which_it_was_measured_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", None)
    assert Fusion(at_once=4096 * 4096).pays(gpu, 1)
    assert not Fusion(at_once=2048 * 2048).pays(gpu, 2048 * 2048)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not Fusion(at_once=4096 * 4096).pays(gpu, 4096 * 4096)
    cpu = torch.device("cpu")
    assert Fusion().pays(cpu, 512 * 512) and not Fusion().pays(cpu, 512 * 511)
    assert Fusion(wanted=True).pays(gpu, 1) and not Fusion(wanted=False).pays(cpu, 1 << 30)
