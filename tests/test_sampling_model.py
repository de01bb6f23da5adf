"""A model to sample with, in each form of its weights: what it computes, what it holds, and which form is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_models import pixel_model
from torch import Tensor, nn

from comfyui_l2p.l2p_core.checkpoint import open_checkpoint, save
from comfyui_l2p.l2p_core.config import VARIANTS, ModelConfig
from comfyui_l2p.l2p_core.deltas.low_rank import LowRank
from comfyui_l2p.l2p_core.device import accelerator
from comfyui_l2p.l2p_core.memory.frozen_store import FrozenLinear
from comfyui_l2p.l2p_core.memory.placement import Form
from comfyui_l2p.l2p_core.memory.plan import GB
from comfyui_l2p.l2p_core.memory.sampling_model import load, weight_memory
from comfyui_l2p.l2p_core.model import L2PModel
from comfyui_l2p.l2p_core.ops.eight_bit import FLOAT8, packed
from comfyui_l2p.train import sample_memory
from comfyui_l2p.train.sample_memory import Need, place

pytestmark = pytest.mark.usefixtures("unflushed")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP8 = Form(torch.bfloat16), Form(torch.bfloat16, float8=True)
STREAMED, STREAMED_FP8 = Form(torch.bfloat16, streamed=True), Form(torch.bfloat16, float8=True, streamed=True)
BIG = ModelConfig().with_head("1k")
SIDE = VARIANTS["1k"].pixels


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / "model.safetensors"
    save({name: weight.bfloat16() for name, weight in pixel_model().state_dict().items()}, target)
    return target


def velocity(model: L2PModel) -> Tensor:
    pixels = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(pixels, torch.tensor([0.7]), tiny_models.captions(5))


def in_form(path: Path, form: Form) -> L2PModel:
    return load(open_checkpoint(path), form, CPU)


def test_streamed_blocks_compute_what_the_whole_model_does(path: Path) -> None:
    streamed = in_form(path, STREAMED)
    assert torch.equal(velocity(streamed), velocity(in_form(path, BF16)))
    linear = [name for name, module in streamed.named_modules() if isinstance(module, nn.Linear)]
    assert linear and not any(name.startswith(("layers", "noise_refiner", "context_refiner")) for name in linear)


def test_float8_computes_what_the_rounded_weights_do(path: Path) -> None:
    rounded, kept = in_form(path, BF16), in_form(path, FP8)
    layers = {name for name, module in kept.named_modules() if isinstance(module, FrozenLinear)}
    assert layers
    plain = velocity(rounded)
    for name in layers:
        weight = rounded.get_parameter(f"{name}.weight")
        if "adaLN" not in name:
            weight.copy_(packed(weight, FLOAT8).as_dtype(torch.bfloat16))
    assert torch.equal(velocity(kept), velocity(rounded)) and not torch.equal(plain, velocity(kept))
    assert torch.equal(velocity(in_form(path, STREAMED_FP8)), velocity(kept))


@pytest.mark.parametrize("form", [BF16, FP8, STREAMED])
def test_adapters_are_added_before_a_weight_gets_its_form(path: Path, form: Form, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(path)
    rows, columns = checkpoint.shapes["layers.1.attention.out.weight"]
    adapter = LowRank(torch.randn(rows, 2), torch.randn(2, columns), 2.0)
    adapted = load(checkpoint, form, CPU, adapters={"layers.1.attention.out": adapter})
    state = {name: weight.bfloat16() for name, weight in pixel_model().state_dict().items()}
    state["layers.1.attention.out.weight"] = adapter.added_to(state["layers.1.attention.out.weight"])
    save(state, tmp_path / "merged.safetensors")
    assert torch.equal(velocity(adapted), velocity(in_form(tmp_path / "merged.safetensors", form)))
    assert not torch.equal(velocity(adapted), velocity(in_form(path, form)))


def test_the_6b_model_takes_what_a_gpu_held() -> None:
    """Measured on an H100."""
    assert weight_memory(BIG, BF16).device == pytest.approx(12.5 * GB, rel=0.03) and weight_memory(BIG, BF16).ram == 0
    assert weight_memory(BIG, FP8).device == pytest.approx(6.4 * GB, rel=0.03)


def test_streamed_it_fits_the_smallest_gpus() -> None:
    weights = weight_memory(BIG, STREAMED)
    # Two blocks, the embedders and the head stay on the device.
    assert weights.device < 2 * GB and 11 * GB < weights.ram < 14 * GB
    assert weight_memory(BIG, STREAMED_FP8).ram < 0.55 * weights.ram


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is free of a GPU that stands in, and of RAM."""
    free = {"gpu": 24 * GB, "ram": 64 * GB, "swap": 0}
    monkeypatch.setattr(accelerator, "default_device", lambda: GPU)
    monkeypatch.setattr(accelerator, "named", lambda name: torch.device(name))
    monkeypatch.setattr(accelerator, "choose", lambda device: None)
    monkeypatch.setattr(accelerator, "free_bytes", lambda device: free["gpu"])
    monkeypatch.setattr(sample_memory, "available_memory", lambda: free["ram"])
    monkeypatch.setattr(sample_memory, "free_memory_and_swap", lambda: free["ram"] + free["swap"])
    return free


@pytest.mark.parametrize(
    ("gpu", "ram", "device", "form", "said"),
    [
        (23.5, 30, GPU, BF16, ""),
        (15.4, 30, GPU, BF16, ""),
        (11.5, 30, GPU, FP8, "kept in fp8 (6."),
        (7.6, 30, GPU, FP8, "in bf16 they would need 13."),
        (5.5, 30, GPU, STREAMED, "kept in bf16, streamed from RAM block by block ("),
        (5.5, 10, GPU, STREAMED_FP8, "kept in fp8, streamed from RAM block by block ("),
        (1.0, 30, CPU, BF16, "this runs on the CPU"),
        (1.0, 10, CPU, FP8, "kept in fp8 ("),
    ],
)
def test_the_form_follows_from_free_memory(
    gpu: float, ram: float, device: torch.device, form: Form, said: str, memory: dict[str, int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    memory |= {"gpu": int(gpu * GB), "ram": int(ram * GB)}
    choice = place(None, Need(BIG, SIDE, SIDE, torch.bfloat16))
    assert (choice.device, choice.form) == (device, form)
    err = capsys.readouterr().err
    assert said in err and bool(err) == bool(said)


def test_the_tile_follows_from_the_memory_that_is_free_where_the_model_is(
    memory: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[torch.device] = []
    monkeypatch.setattr(accelerator, "empty_cache", emptied.append)
    side = VARIANTS["10k"].pixels
    need = Need(ModelConfig().with_head("10k"), side, side, torch.bfloat16)
    memory["gpu"] = 60 * GB
    assert need.tile(BF16, 128, GPU) is None, "fused, the whole image is within what GPUs count"
    memory["gpu"] = 8 * GB
    assert need.tile(BF16, 128, GPU) == 5120
    assert need.tile(BF16, 128, CPU) == 5120, "a CPU fuses stage by stage"
    assert emptied == [GPU, GPU, CPU], "memory that loading left unused is free"


def test_a_file_in_float32_becomes_bfloat16_where_that_fits(
    memory: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    need = Need(BIG, SIDE, SIDE, torch.float32)
    memory["gpu"] = 40 * GB
    assert place(None, need).form == Form(torch.float32) and not capsys.readouterr().err
    memory["gpu"] = 20 * GB
    assert place(None, need).form == BF16
    assert "kept in bf16 (12." in capsys.readouterr().err


@pytest.mark.parametrize(("weights", "form"), [("bf16", BF16), ("fp8", FP8), ("streamed", STREAMED)])
def test_a_form_that_is_asked_for_is_taken(weights: str, form: Form, memory: dict[str, int]) -> None:
    need = Need(BIG, SIDE, SIDE, torch.float32)
    assert place(None, need, weights).form == form
    memory["gpu"] = GB
    with pytest.raises(ValueError, match=r"Sampling needs about .* and cuda:0 has 1\.0 GB free.*remove --weights"):
        place("cuda:0", need, weights)
    if weights == "streamed":
        with pytest.raises(ValueError, match="for GPUs with memory of their own"):
            place("cpu", need, weights)
    else:
        assert place("cpu", need, weights).form == form


def test_ram_is_checked_before_blocks_go_there(memory: dict[str, int]) -> None:
    memory |= {"gpu": 5 * GB, "ram": 3 * GB}
    need = Need(BIG, SIDE, SIDE, torch.bfloat16)
    with pytest.raises(ValueError, match=r"GB of RAM for its weights, and 3\.0 GB are free"):
        place("cuda:0", need, "streamed")
    with pytest.raises(ValueError, match=r"GB of RAM, and 3\.0 GB are free: close other programs"):
        place("cpu", need)
    memory["swap"] = 10 * GB
    assert place("cpu", need).form == FP8
