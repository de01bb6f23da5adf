"""Numbers that are none end in a sentence on every path of the core that makes an image, and not in a black one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import pixel_config, weights, write

from comfyui_l2p.l2p_core import flow, tiny
from comfyui_l2p.l2p_core.checkpoint import open_checkpoint
from comfyui_l2p.l2p_core.distributed.ranks import Ranks
from comfyui_l2p.l2p_core.files.tensor_file import save
from comfyui_l2p.l2p_core.memory.placement import Form
from comfyui_l2p.l2p_core.memory.sampling_model import load
from comfyui_l2p.l2p_core.ops.finite import cause, check_finite, is_finite
from comfyui_l2p.l2p_core.run import montage
from comfyui_l2p.l2p_core.run.recipe import WatchSection
from comfyui_l2p.l2p_core.tiny.bundled import TinySource, is_tiny, pixel_images
from comfyui_l2p.train.cli import main

SENTENCE = "values that are not finite numbers and would be black"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_pixel_is_enough(value: float) -> None:
    images = torch.zeros(2, 3, 8, 8)
    check_finite(images)
    images[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=SENTENCE):
        check_finite(images)


def broken(noisy: torch.Tensor, sigma: torch.Tensor, captions: object) -> torch.Tensor:
    return noisy * float("nan")


def test_sampling_and_montages() -> None:
    with pytest.raises(ValueError, match=SENTENCE):
        flow.sample(broken, torch.zeros(1, 3, 8, 8), [torch.zeros(1, 4)], sigmas=flow.sigmas(2))

    class Broken:
        config = pixel_config()
        embedder_weight = torch.zeros(1)

        def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
            return broken(*arguments)

    features = tiny.load_words().encode
    watch = WatchSection(prompts=["a red circle"], steps=1)
    with pytest.raises(ValueError, match=SENTENCE):
        montage.sample(Broken(), features, watch, 16, Ranks(device=torch.device("cpu")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=SENTENCE):
        pixel_images(Broken(), tiny.load_words(), ["a red circle"], [1], steps=1)  # type: ignore[arg-type]


def test_the_bundled_source() -> None:
    source = TinySource()
    source.model.x_embedder.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"its weight 'x_embedder\.bias' is not finite"):
        source.images(["a red circle"], [1], steps=1)


def test_l2p_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = weights(pixel_config(), torch.float32)
    state["local_decoder.out_conv.bias"].fill_(float("nan"))
    model = write(state, tmp_path / "model.safetensors")
    save({"positive": torch.zeros(3, 24)}, tmp_path / "caption.safetensors")
    command = ["sample", str(model), "--output", str(tmp_path / "image.png"), "--cfg", "1", "--steps", "1"]
    size = ["--width", "32", "--height", "32", "--caption-features", str(tmp_path / "caption.safetensors")]
    assert main([*command, *size]) == 2
    said = capsys.readouterr().err
    assert SENTENCE in said and "its weight 'local_decoder.out_conv.bias' is not finite" in said
    assert not (tmp_path / "image.png").exists()


NAN, WEIGHT = torch.full((2, 2), float("nan")), ("layers.0.weight", torch.ones(2, 2))


@pytest.mark.parametrize(("parts", "words"), [
    ({"weights": [WEIGHT, ("out.weight", NAN)]}, "the model's file is broken: its weight 'out.weight' is not finite"),
    ({"weights": [WEIGHT, ("out.weight", NAN)], "adapted": True}, "'out.weight' is not finite with the applied LoRAs"),
    ({"weights": [("q.weight", NAN.to(torch.float8_e4m3fn))]}, "'q.weight' is not finite"),
    ({"weights": [WEIGHT]}, "all weights are finite, so values overflow"),
    ({"weights": [WEIGHT], "adapted": True}, "at a lower strength"),
    ({"weights": [("out.weight", NAN)], "adapters": [("q.weight", NAN)]}, "its part for the weight 'q.weight'"),
    ({"weights": [("out.weight", NAN)], "inputs": [("the prompt", NAN)]}, "the prompt already has values"),
])  # fmt: skip
def test_the_cause_is_named(parts: dict[str, Any], words: str) -> None:
    assert words in cause(**parts)


def test_nothing_is_asked_for_a_cause_while_images_are_good() -> None:
    def asked() -> str:
        raise AssertionError("it reads all weights")

    check_finite(torch.zeros(1, 3, 4, 4), asked)


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("form", [Form(FLOAT32), Form(FLOAT32, float8=True), Form(BFLOAT16, float8=True)], ids=str)
def test_weights_that_are_stored_in_another_form_are_looked_at(form: Form, tmp_path: Path) -> None:
    state = weights(pixel_config(), torch.float32)
    state["layers.1.feed_forward.w2.weight"][3, 4] = float("nan")
    model = load(open_checkpoint(write(state, tmp_path / "model.safetensors")), form, torch.device("cpu"))
    noise, captions = torch.randn(1, 3, 32, 32), [torch.randn(3, 24)]
    with pytest.raises(ValueError, match=r"its weight 'layers\.1\.feed_forward\.w2\.weight' is not finite"):
        flow.sample(model, noise, captions, sigmas=flow.sigmas(1))
    with pytest.raises(ValueError, match="the caption's text encoding already has values that are not finite"):
        flow.sample(model, noise, [torch.full((3, 24), float("nan"))], sigmas=flow.sigmas(1))


def test_words_of_the_tiny_model_are_for_its_backbone_alone() -> None:
    """Another model may have captions as wide."""
    source = TinySource().model.config
    assert is_tiny(source) and is_tiny(source.with_head("4k", 0.25))
    wider = type(source)(**{**vars(source), "ffn_dim": 512})
    assert wider.caption_dim == source.caption_dim and not is_tiny(wider)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_float8(dtype: torch.dtype) -> None:
    for code in range(256):
        values = torch.tensor([0, code], dtype=torch.uint8).view(dtype)
        assert is_finite(values) == bool(values.float().isfinite().all()), code
