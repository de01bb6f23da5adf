"""Compiled block by block, a model computes the same, in one graph a block and one compilation a kind of block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from golden_vectors import relative_error
from torch import Tensor

from comfyui_l2p.l2p_core.memory import block_store, compiled
from comfyui_l2p.l2p_core.memory.compiled import check_compiler, compile_blocks
from comfyui_l2p.l2p_core.memory.frozen_store import FrozenLinear
from comfyui_l2p.l2p_core.memory.placement import Form, for_sampling
from comfyui_l2p.l2p_core.model import L2PModel
from comfyui_l2p.l2p_core.ops.eight_bit import FLOAT8, PackedWeight
from comfyui_l2p.l2p_core.ops.rope import image_rope
from comfyui_l2p.l2p_core.sources.next_dit import Block
from comfyui_l2p.l2p_core.sources.z_image import TRAITS
from comfyui_l2p.l2p_core.training.trainer import Trainer
from comfyui_l2p.l2p_core.training_config import TrainingConfig
from comfyui_l2p.train.cli import main

dynamo = pytest.importorskip("torch._dynamo")
pytestmark = pytest.mark.skipif(compiled._too_old(), reason="needs torch 2.5")


@pytest.fixture(autouse=True)
def graphs() -> Iterator[None]:
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


def breaks() -> int:
    return sum(dynamo.utils.counters["graph_break"].values())


def deep(layers: int = 6, refiners: int = 1) -> L2PModel:
    """Each kind of block takes seconds to compile: without refiners there are a third as many."""
    torch.manual_seed(0)
    config = dataclasses.replace(tiny_models.SOURCE, n_layers=layers, n_refiner_layers=refiners)
    return L2PModel(config.with_head("1k", 0.125))


def arguments(height: int = 32, width: int = 48) -> tuple[Tensor, Tensor, list[Tensor]]:
    return torch.randn(1, 3, height, width), torch.tensor([0.6]), tiny_models.captions(9)


@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_a_compiled_model_computes_the_same_without_graph_breaks(precision: str) -> None:
    model = deep(refiners=1 if precision == "float32" else 0)
    given = arguments()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        expected = model(*given)
        compile_blocks(model, backend="eager")
        assert model.local_decoder.compiled is not None
        if precision == "autocast":
            model.local_decoder.compiled = None  # once is enough of what takes longest
        found = model(*given)
    assert relative_error(found, expected) < (1e-5 if precision == "float32" else 2e-2)
    assert breaks() == 0
    # Noise refiners, context refiners, joint blocks and the head: six joint blocks are compiled once.
    assert dynamo.utils.counters["stats"]["unique_graphs"] == (4 if precision == "float32" else 1)


def test_other_sizes_and_mixed_captions_are_compiled_a_few_times_and_then_no_more() -> None:
    model = deep(1, refiners=0)
    compile_blocks(model, backend="eager")
    model.local_decoder.compiled = None
    with torch.no_grad():
        for number, (side, lengths) in enumerate([(32, (9, 70)), (48, (40, 3)), (64, (33, 90)), (80, (1, 129))]):
            model(torch.randn(2, 3, side, 64), torch.tensor([0.6, 0.2]), tiny_models.captions(*lengths))
            if number == 2:
                known = dynamo.utils.counters["stats"]["unique_graphs"]
    assert breaks() == 0
    assert dynamo.utils.counters["stats"]["unique_graphs"] == known


@pytest.mark.parametrize(
    ("changes", "backend"),
    [({"policy": "lora", "lora_rank": 2}, "aot_eager"), ({"frozen": "fp8", "stream": True, "offload": True}, "eager")],
    ids=["adapters, checkpointed", "stored, streamed, offloaded"],
)
def test_training_compiled_comes_to_the_same_weights(changes: dict[str, Any], backend: str) -> None:
    config = TrainingConfig(steps=1, lr=1e-3, blocks=1, precision="fp32", clip_norm=1e9, **changes)
    ends = []
    for compiling in (False, True):
        trainer = Trainer(deep(1, refiners=0), config, tiny_models.captions(1)[0])
        if compiling:
            compile_blocks(trainer.model, backend=backend)
        losses = [metrics.loss for metrics in trainer.run(tiny_models.RandomBatches(batch_size=1))]
        ends.append((losses, trainer.trained()))
    (plain, ours), (fused, theirs) = ends
    assert fused == pytest.approx(plain, rel=1e-5)
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() < 1e-5, name


def test_sampling_compiled_converts_float8_within_the_graphs_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_reads_float8", lambda device: True)
    eager: list[torch.Size] = []
    in_graphs: list[int] = []
    as_dtype = PackedWeight.as_dtype

    def counting(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        if not torch.compiler.is_compiling():
            eager.append(weight.elements.shape)
        return as_dtype(weight, dtype)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        in_graphs.append(sum(given.dtype == FLOAT8 for given in inputs if isinstance(given, Tensor)))
        return graph.forward

    model = deep(refiners=0).eval().requires_grad_(False)
    block_store.store_loaded(model, for_sampling(model.config, Form(torch.float32, float8=True)), torch.device("cpu"))
    stored = [module.read().elements for module in model.layers[0].modules() if isinstance(module, FrozenLinear)]
    layers = sum(elements.dtype == FLOAT8 for elements in stored)
    given = arguments()
    with torch.no_grad():
        expected = model(*given)
        compile_blocks(model, backend=backend)
        model.local_decoder.compiled = None
        monkeypatch.setattr(PackedWeight, "as_dtype", counting)
        found = model(*given)
    assert relative_error(found, expected) < 1e-5
    assert layers > 3 and in_graphs == [layers]  # one graph, which all joint blocks share
    assert eager == [] and breaks() == 0


@pytest.mark.parametrize(("capability", "traced"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_float8_is_left_to_torch_where_triton_cannot_read_it(
    capability: tuple[int, int], traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert compiled._reads_float8(torch.device("cuda")) == traced
    assert not compiled._reads_float8(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not compiled._reads_float8(torch.device("cuda"))


def test_a_block_keeps_no_more_for_its_gradients_when_compiled() -> None:
    config = dataclasses.replace(tiny_models.SOURCE, dim=64, head_dim=16, ffn_dim=160)
    rope = image_rope(TRAITS.positions(config), (4, 8), 32, torch.device("cpu"))
    kept = []
    for backend in (None, "aot_eager_decomp_partition"):
        torch.manual_seed(0)
        block = Block(config).requires_grad_(False)
        if backend:
            block.compile(backend=backend)
        x, t = (torch.randn(size, requires_grad=True) for size in ((1, 32, config.dim), (1, config.t_dim)))
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(x, rope, t=t)
        kept.append(sum(sizes.values()))
    assert kept[1] <= 1.1 * kept[0]


def test_what_cannot_compile_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs Triton"):
        check_compiler(torch.device("cuda"))
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    with pytest.raises(ValueError, match="torch 2.5"):
        check_compiler(torch.device("cpu"))


def test_sample_compiles_where_it_is_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[L2PModel] = []
    monkeypatch.setattr("comfyui_l2p.train.sampler.compile_blocks", asked.append)
    monkeypatch.setattr("comfyui_l2p.train.sampler.check_compiler", lambda device: None)
    command = [
        "sample",
        "--prompt",
        "a red circle",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--width",
        "16",
        "--height",
        "16",
    ]
    assert main([*command, "--output", str(tmp_path / "plain.png")]) == 0 and not asked
    assert main([*command, "--output", str(tmp_path / "compiled.png"), "--compile"]) == 0 and len(asked) == 1
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    assert main([*command, "--output", str(tmp_path / "refused.png"), "--compile"]) == 2
    assert "torch 2.5" in capsys.readouterr().err
