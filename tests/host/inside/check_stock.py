"""The host's own loaders with L2P files: the same image as L2P Loader's, and other models as ever."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.cli_args
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.weight_adapter
import golden_vectors as golden
import kit
import pytest
import torch
from torch import Tensor

import nodes
from comfyui_l2p.l2p_core.config import COMFY_PREFIX, ModelConfig
from comfyui_l2p.l2p_core.files.metadata import DELTA, KIND, MERGED, PIXEL_INIT
from comfyui_l2p.l2p_core.layouts import to_comfy
from comfyui_l2p.l2p_core.model import key_shapes
from comfyui_l2p.nodes.messages import progress
from comfyui_l2p.nodes.model import stock
from comfyui_l2p.nodes.model.host import L2PBaseModel
from comfyui_l2p.nodes.model.lora import FittingPatches
from comfyui_l2p.nodes.options import UNTRAINED
from comfyui_l2p.nodes.pixels import pixels_to_image

PREFIX = ("",) if "unet_key_prefix" in inspect.signature(comfy.supported_models.ZImage.matches).parameters else ()
"""What newer hosts hand to the rows of their list beside a state dict."""
X = golden.array("x", (1, 3, 48, 64), 0)
MODELS = comfy.supported_models.models


@pytest.fixture(autouse=True)
def row() -> Iterator[None]:
    """Ours in the host's list, as the pack puts it there when the host loads it."""
    before = list(MODELS)
    stock.register()
    yield
    MODELS[:] = before


def output(model: Any) -> Tensor:
    return kit.velocity(model, X, 0.7, kit.caption()[0][0])


def write(folder: Path, weights: dict[str, Tensor], name: str = "file") -> str:
    path = folder / f"{name}.safetensors"
    kit.save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return str(path)


def diffusion_model(path: str, **options: Any) -> Any:
    """What Load Diffusion Model does."""
    return comfy.sd.load_diffusion_model(path, model_options=options)


def checkpoint(path: str, **_: Any) -> Any:
    """What Load Checkpoint does; its MODEL."""
    return comfy.sd.load_checkpoint_guess_config(path, output_vae=True, output_clip=True)[0]


LOADERS = pytest.mark.parametrize("load", [diffusion_model, checkpoint])


@LOADERS
def check_an_untrained_initialisation_is_called_that_when_it_samples(
    tmp_path: Path, load: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the log, and to the workflow at the host's own sampler."""
    sent: list[dict[str, Any]] = []
    server = SimpleNamespace(last_node_id="7", send_sync=lambda _, message: sent.append(message))
    monkeypatch.setattr(progress, "running_server", lambda: server)
    weights = to_comfy(golden.diffusers_weights())
    for kind in (PIXEL_INIT, MERGED):
        path = tmp_path / f"{kind}.safetensors"
        kit.save_file({key: value.contiguous() for key, value in weights.items()}, path, {KIND: kind})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            model = load(str(path))
            kit.ksample(model.clone())
        assert (UNTRAINED in caplog.text) == (kind == PIXEL_INIT)
        assert ({"node": "7", "kind": "warning", "text": UNTRAINED} in sent) == (kind == PIXEL_INIT)
        assert model.model.untrained == (kind == PIXEL_INIT)
        sent.clear()


@LOADERS
def check_a_broken_file_is_named_by_its_weight(tmp_path: Path, load: Any) -> None:
    weights = to_comfy(golden.diffusers_weights())
    weights["layers.0.ffn_norm1.weight"] = weights["layers.0.ffn_norm1.weight"] * float("nan")
    with pytest.raises(ValueError, match="not finite numbers.*its weight 'layers.0.ffn_norm1.weight'"):
        kit.ksample(load(write(tmp_path, weights)))


@LOADERS
@pytest.mark.parametrize("prefix", ["", COMFY_PREFIX])
@pytest.mark.parametrize(("layout", "name"), [("comfy", "dit_16"), ("diffusers", "dit_64")])
def check_every_layout_makes_the_same_image(tmp_path: Path, load: Any, prefix: str, layout: str, name: str) -> None:
    weights = golden.diffusers_weights(name)
    weights = to_comfy(weights) if layout == "comfy" else weights
    path = write(tmp_path, {prefix + key: value for key, value in weights.items()})
    theirs, ours = load(path), kit.load_model(path)
    assert isinstance(theirs.model, L2PBaseModel) and type(theirs) is type(ours)
    assert theirs.model.l2p == ours.model.l2p
    assert torch.equal(output(theirs), output(ours))


def scaled_fp8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    quantised: dict[str, Tensor] = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for key, value in weights.items():
        if key.endswith(("qkv.weight", "w1.weight", "w2.weight")):
            scale = value.abs().amax() / 448
            quantised |= {
                key: (value / scale).to(torch.float8_e4m3fn),
                key.replace(".weight", ".scale_weight"): scale,
            }
        else:
            quantised[key] = value
    return quantised


def int8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    import comfy.quant_ops

    if "int8_tensorwise" not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip("this host has no int8 weights")
    quantised = dict(weights)
    mark = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    for key in [key for key in weights if key.endswith(("qkv.weight", "w1.weight"))]:
        layer, scale = key.removesuffix(".weight"), weights[key].abs().amax() / 127
        quantised |= {key: (weights[key] / scale).round().to(torch.int8), f"{layer}.weight_scale": scale}
        quantised[f"{layer}.comfy_quant"] = mark.clone()
    return quantised


def cast_to_fp8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: value.to(torch.float8_e4m3fn) if key.startswith("layers.") and value.ndim == 2 else value
        for key, value in weights.items()
    }


@LOADERS
@pytest.mark.parametrize("prefix", ["", COMFY_PREFIX])
@pytest.mark.parametrize("quantised", [scaled_fp8, int8, cast_to_fp8])
def check_quantised_files(tmp_path: Path, load: Any, prefix: str, quantised: Any) -> None:
    weights = to_comfy(golden.diffusers_weights())
    path = write(tmp_path, {prefix + key: value for key, value in quantised(weights).items()})
    assert torch.equal(output(load(path)), output(kit.load_model(path)))


def is_8_bits(model: Any, part: str) -> bool:
    return any(value.dtype.itemsize == 1 for key, value in model.model.state_dict().items() if f".{part}." in key)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("fast", [False, True])
def check_8_bits_asked_of_load_diffusion_model_leave_the_head_alone(
    tmp_path: Path, dtype: torch.dtype, fast: bool
) -> None:
    path = kit.write(tmp_path)
    theirs, ours = diffusion_model(path, dtype=dtype, fp8_optimizations=fast), kit.load_model(path, None, "fp8_e4m3fn")
    assert is_8_bits(theirs, "layers") and not is_8_bits(theirs, "local_decoder")
    assert torch.equal(output(theirs), output(ours))
    assert 0 < golden.relative_error(output(theirs), output(kit.model(tmp_path))) < 0.05


@LOADERS
def check_8_bits_by_the_hosts_flag_leave_the_head_alone(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comfy.cli_args.args, "fp8_e4m3fn_unet", True)
    path = kit.write(tmp_path)
    theirs = load(path)
    assert is_8_bits(theirs, "layers") and not is_8_bits(theirs, "local_decoder")
    assert torch.equal(output(theirs), output(kit.load_model(path)))


def prefixed(folder: Path) -> str:
    """A file as the host's own Save Checkpoint writes it."""
    return write(folder, {COMFY_PREFIX + key: value for key, value in to_comfy(golden.diffusers_weights()).items()})


def check_load_checkpoint_empty_latent_ksampler_vae_decode(tmp_path: Path) -> None:
    path = prefixed(tmp_path)
    model, _, vae, _ = comfy.sd.load_checkpoint_guess_config(path)
    (latent,) = nodes.EmptyLatentImage().generate(64, 48)
    settings = {"seed": 1, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple"}
    conds = {"positive": kit.caption(), "negative": kit.caption("negative", 5)}
    with torch.inference_mode():
        (sampled,) = nodes.KSampler().sample(model=model, latent_image=latent, **settings, **conds)
        (image,) = nodes.VAEDecode().decode(vae, sampled)
    expected = pixels_to_image({"samples": kit.ksample(kit.load_model(path))})
    assert image.shape == (1, 48, 64, 3)
    assert (image - expected).abs().max() < 0.5 / 255


@LOADERS
def check_areas_and_a_lora(tmp_path: Path, load: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = prefixed(tmp_path)
    dim = ModelConfig.from_shapes(key_shapes_of(path)).dim
    lora: dict[str, Tensor] = {}
    for name, (rows, columns) in {
        "layers.0.attention.to_k": (dim, dim),
        "all_x_embedder.2-1": (dim, 64),
        "all_final_layer.2-1.linear": (64, dim),
    }.items():
        lora[f"transformer.{name}.lora_B.weight"] = golden.array(f"{name}.up", (rows, 2), 0, 0.2)
        lora[f"transformer.{name}.lora_A.weight"] = golden.array(f"{name}.down", (2, columns), 0, 0.2)
    (area,) = nodes.ConditioningSetArea().append(kit.caption("area"), 32, 24, 16, 8, 0.7)
    images = []
    for model in (load(path), kit.load_model(path)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            patched, _ = comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0.0)
            images.append(kit.ksample(patched, positive=kit.caption() + area))
        lines = [record.getMessage() for record in caplog.records]
        about = [line for line in lines if "skipped" in line or "ERROR" in line or "not loaded" in line.lower()]
        assert about == ["L2P: 1 weights patched; skipped, not being made for this model: final_layer, x_embedder"]
    assert torch.equal(*images)
    assert not torch.equal(images[0], kit.ksample(load(path), positive=kit.caption() + area))
    assert not torch.equal(images[0], kit.ksample(patched, positive=kit.caption()))


def key_shapes_of(path: str) -> dict[str, tuple[int, ...]]:
    from safetensors.torch import load_file

    return {key: tuple(value.shape) for key, value in load_file(path).items()}


@LOADERS
def check_what_cannot_be_sampled_ends_in_a_sentence(tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(prefixed(tmp_path)).clone()
    with pytest.raises(ValueError, match="has the shape .* 3 channels"):
        kit.ksample(model, torch.full((1, 16, 8, 8), 0.5))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 2**20)
    with pytest.raises(ValueError, match="choose a smaller size or batch"):
        kit.ksample(model)


def check_memory_and_tiles_are_those_of_l2p_loader(tmp_path: Path) -> None:
    path = kit.write(tmp_path)
    theirs, ours = diffusion_model(path).model, kit.load_model(path).model
    shape = [2, 3, 1024, 1024]
    assert theirs.memory_required(shape) == ours.memory_required(shape) < 4 * 2**30
    assert theirs.diffusion_model.head_tile is None


def check_the_host_can_load_the_model_anew(tmp_path: Path) -> None:
    for model in (diffusion_model(kit.write(tmp_path)), checkpoint(prefixed(tmp_path))):
        load, arguments, *index = model.cached_patcher_init
        again = load(*arguments, disable_dynamic=True)
        again = again[index[0]] if index else again
        assert again.model is not model.model and isinstance(again, FittingPatches)
        assert torch.equal(output(again), output(model))


def check_clones_stay_ours_and_other_models_stay_the_hosts(tmp_path: Path) -> None:
    model = diffusion_model(kit.write(tmp_path))
    other = comfy.model_patcher.ModelPatcher(torch.nn.Linear(2, 2), torch.device("cpu"), torch.device("cpu"))
    diffusion_model(kit.write(tmp_path))
    assert isinstance(model.clone(), FittingPatches)
    assert type(other) is comfy.model_patcher.ModelPatcher


@LOADERS
@pytest.mark.parametrize("dropped", ["layers.1.", "layers.0.", "local_decoder.enc2.0.weight"])
def check_a_delta_and_a_damaged_file_end_in_a_sentence(tmp_path: Path, load: Any, dropped: str) -> None:
    weights = to_comfy(golden.diffusers_weights())
    part = {COMFY_PREFIX + key: value for key, value in weights.items() if not key.startswith(dropped)}
    with pytest.raises(ValueError, match="a part of an L2P model.*L2P Loader"):
        load(write(tmp_path, part))


@LOADERS
def check_a_delta_with_every_tensor_is_refused_as_a_delta(tmp_path: Path, load: Any) -> None:
    """A run that trains all blocks leaves such a one."""
    path = tmp_path / "delta.safetensors"
    weights = {COMFY_PREFIX + key: value.contiguous() for key, value in to_comfy(golden.diffusers_weights()).items()}
    kit.save_file(weights, path, {KIND: DELTA})
    with pytest.raises(ValueError, match="only the trained part of an L2P model: load it with L2P Loader"):
        load(str(path))


@LOADERS
@pytest.mark.parametrize("prefix", ["", COMFY_PREFIX])
@pytest.mark.parametrize("block", ["layers.0", "layers.1", "context_refiner.0", "noise_refiner.1"])
def check_no_memory_takes_the_place_of_a_missing_q_or_k(tmp_path: Path, load: Any, prefix: str, block: str) -> None:
    """The host stacks the three by itself, and leaves the rows of a missing one as the memory was."""
    for part in ("to_q", "to_k"):
        missing = f"{block}.attention.{part}.weight"
        weights = {prefix + key: value for key, value in golden.diffusers_weights().items() if key != missing}
        with pytest.raises(ValueError, match=f"'{missing}' is missing") as caught:
            load(write(tmp_path, weights))
        assert caught.type is ValueError


@LOADERS
def check_keys_beside_the_prefix_are_those_of_all_in_one_files(tmp_path: Path, load: Any) -> None:
    state = {COMFY_PREFIX + key: value for key, value in to_comfy(golden.diffusers_weights()).items()}
    for key in ("foo", "layers.9.attention.out.weight", "final_layer.linear.weight"):
        path = write(tmp_path, {**state, key: torch.zeros(3)})
        for loader in (load, kit.load_model):
            with pytest.raises(ValueError, match=f"outside its diffusion model .*'{key}' is unknown"):
                loader(path)
    assert isinstance(load(write(tmp_path, {**state, "vae.post_quant_conv.bias": torch.zeros(3)})).model, L2PBaseModel)


@LOADERS
def check_any_key_of_the_head_tells_an_l2p_file(tmp_path: Path, load: Any) -> None:
    weights = to_comfy(golden.diffusers_weights())
    heads = [key for key in weights if key.startswith("local_decoder.")]
    backbone = {key: value for key, value in weights.items() if key not in heads}
    assert all(stock.L2PRow.matches({"image_model": "lumina2"}, {**backbone, key: None}, *PREFIX) for key in heads)
    last = "local_decoder.out_conv.weight"
    renamed = {f"{key}_" if key == last else key: value for key, value in weights.items()}
    without = {key: value for key, value in weights.items() if key != last}
    for damaged, missing in (
        (without, last),
        (renamed, last),
        ({**backbone, last: weights[last]}, "local_decoder.enc1.0.weight"),
    ):
        with pytest.raises(ValueError, match=f"a part of an L2P model.*'{missing}'"):
            load(write(tmp_path, damaged))


# Files of other models by the keys that the host tells them by, and what it takes them for.
BACKBONE = {"cap_embedder.1.weight": (3840, 2560), "noise_refiner.0.attention.k_norm.weight": (128,)}
LATENT = {**key_shapes(ModelConfig())}
OTHERS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "latent Z-Image": (LATENT, "ZImage"),
    "Lumina 2": ({**BACKBONE, "cap_embedder.1.weight": (2304, 2304)}, "Lumina2"),
    "Aura Flow": (
        {
            "double_layers.0.attn.w1q.weight": (3072, 3072),
            "positional_encoding": (1, 1024, 3072),
            "cond_seq_linear.weight": (3072, 2048),
        },
        "AuraFlow",
    ),
}
ZETA = {
    **BACKBONE,
    "x_embedder.weight": (3840, 3072),
    "dec_net.cond_embed.weight": (3840, 3840),
    "dec_net.final_layer.linear.weight": (3072, 3840),
    "dec_net.input_embedder.embedder.0.weight": (3840, 3136),
    "local_decoder.out_conv.weight": (3, 64, 3, 3),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("prefix", ["", COMFY_PREFIX])
def check_other_models_are_told_as_before(name: str, prefix: str) -> None:
    shapes, expected = OTHERS[name]
    state = {prefix + key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    found = comfy.model_detection.model_config_from_unet(state, prefix)
    MODELS.remove(stock.L2PRow)
    before = comfy.model_detection.model_config_from_unet(state, prefix)
    assert type(found) is type(before) and type(found).__name__ == expected
    assert found.unet_config == before.unet_config


def check_our_row_answers_for_files_with_the_head_alone() -> None:
    for other in MODELS:
        if other is not stock.L2PRow:
            assert not stock.L2PRow.matches(dict(other.unet_config), dict.fromkeys(other.required_keys))
            assert not stock.L2PRow.matches(dict(other.unet_config))
    zeta = {key: torch.empty(shape, device="meta") for key, shape in ZETA.items()}
    assert not stock.L2PRow.matches({"image_model": "zimage_pixel"}, zeta)


class NativeByDetection(comfy.supported_models.ZImage):
    """As a host has it that gives L2P files a name of their own."""

    unet_config = {"image_model": "l2p_of_the_host"}


class NativeByKey(comfy.supported_models.ZImage):
    """As a host has it that tells L2P files by a key."""

    unet_config = {"image_model": "lumina2"}
    required_keys: dict[str, Any] = {("{}" if PREFIX else "") + "local_decoder.enc1.0.weight": {}}


@pytest.mark.parametrize(("native", "image_model"), [(NativeByDetection, "l2p_of_the_host"), (NativeByKey, "lumina2")])
def check_a_hosts_own_row_wins_and_the_log_says_so(
    native: type, image_model: str, caplog: pytest.LogCaptureFixture
) -> None:
    MODELS.append(native)
    MODELS.remove(comfy.supported_models.Lumina2)
    state = to_comfy(golden.diffusers_weights())
    with caplog.at_level(logging.INFO):
        found = comfy.model_detection.model_config_from_unet_config({"image_model": image_model}, state)
    assert type(found) is native
    assert any("this ComfyUI supports L2P" in record.getMessage() for record in caplog.records)


def check_a_row_that_the_host_never_comes_to_leaves_the_file_to_ours() -> None:
    """As another pack may append one, behind the latent model's that takes every file of its backbone."""
    MODELS.append(NativeByKey)
    state = to_comfy(golden.diffusers_weights())
    found = comfy.model_detection.model_config_from_unet_config({"image_model": "lumina2"}, state)
    assert isinstance(found, stock.L2PRow)


class RowOfAnOlderHost(comfy.supported_models.ZImage):
    """ComfyUI 0.15.1 asks without the prefix of the keys."""

    @classmethod
    def matches(cls, unet_config: Any, state_dict: Any = None) -> bool:
        return False


@pytest.mark.parametrize("prefix", ["", COMFY_PREFIX])
def check_an_older_host_gives_no_prefix(prefix: str) -> None:
    MODELS[:] = [stock.L2PRow, RowOfAnOlderHost]
    state = {prefix + key: value for key, value in to_comfy(golden.diffusers_weights()).items()}
    assert stock.L2PRow.matches({"image_model": "lumina2"}, state)
    assert not stock.L2PRow.matches({"image_model": "lumina2"}, {f"{prefix}final_layer.linear.weight": None})


def check_l2p_loader_stays_ours_in_a_host_that_knows_l2p(tmp_path: Path) -> None:
    MODELS.insert(0, NativeByKey)
    assert isinstance(kit.model(tmp_path).model, L2PBaseModel)


def check_registering_once() -> None:
    stock.register()
    assert MODELS.count(stock.L2PRow) == 1 and MODELS[0] is stock.L2PRow


def check_the_lora_format_answers_to_l2p_models_alone() -> None:
    """A LoRA for the latent model, in names that our format knows, is read on it as without the pack."""
    from comfyui_l2p.nodes.model.lora_names import L2PNames, make_known

    make_known()
    file = {
        f"{prefix}{name}.lora_{end}.weight": torch.ones(2, 2)
        for prefix in ("", "transformer.", "diffusion_model.")
        for name in ("x_embedder", "all_x_embedder.2-1", "all_x_embedder.16-1", "layers.0.attention.to_q")
        for end in ("A", "B")
    }
    names = ["x_embedder", "all_x_embedder.2-1", "final_layer.linear", "layers.0.attention.qkv", "img_in"]
    for name in [*names, *(f"diffusion_model.{name}" for name in names), *(f"lora_unet_{name}" for name in names)]:
        assert L2PNames.load(name, file, None, None, set()) is None
