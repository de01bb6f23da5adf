"""Parity with the published model code: float32, relative error below 1e-5 (see tests/golden_vectors.py)."""

from __future__ import annotations

import golden_vectors as golden
import pytest
import torch

from comfyui_l2p.l2p_core import flow

PARITY = 1e-5


@pytest.mark.parametrize("name", ["dit_16", "dit_64", "dit_128", "dit_160"])
def test_velocity_of_every_variant(name: str) -> None:
    config, stored = golden.load(name)
    model = golden.model(name)
    stride = config["output_stride"]
    for i, case in enumerate(config["cases"]):
        x = golden.array(f"case{i}.x", (3, case["height"], case["width"]), config["seed"])
        caption = golden.array(f"case{i}.cap_feats", (case["caption_tokens"], config["cap_feat_dim"]), config["seed"])
        with torch.no_grad():
            velocity = model(x[None], torch.tensor([case["sigma"]]), [caption])[0]
        assert golden.relative_error(velocity[:, ::stride, ::stride], stored[f"case{i}.velocity"]) < PARITY


def test_sampling_with_guidance() -> None:
    config, stored = golden.load("sample_euler_cfg")
    seed = config["seed"]
    noise = golden.array("noise", (3, config["height"], config["width"]), seed)[None]
    positive = golden.array("pos", (config["pos_tokens"], config["cap_feat_dim"]), seed)
    negative = golden.array("neg", (config["neg_tokens"], config["cap_feat_dim"]), seed)
    schedule = flow.sigmas(config["steps"], config["shift"], config["denoise"])
    assert golden.relative_error(schedule[:-1], stored["sigmas"][: config["steps"]]) < PARITY
    pixels, _ = flow.integrate(
        golden.model(seed=seed), noise, [positive], sigmas=schedule, cfg=config["cfg"], negative=[negative]
    )
    assert golden.relative_error(pixels[0], stored["final"]) < PARITY
    assert golden.relative_error(flow.to_image(pixels)[0], stored["image"]) < PARITY


def test_loss_and_gradients() -> None:
    config, stored = golden.load("flow_loss")
    seed = config["seed"]
    assert golden.relative_error(flow.training_sigmas(config["shift"]), stored["sigma_grid"]) < PARITY
    shape = (3, config["height"], config["width"])
    x0 = torch.tanh(golden.array("x0", shape, seed))[None]
    caption = golden.array("cap_feats", (config["caption_tokens"], config["cap_feat_dim"]), seed)
    model = golden.model(seed=seed)
    for i, index in enumerate(config["grid_indices"]):
        model.zero_grad()
        noise = golden.array(f"case{i}.noise", shape, seed)[None]
        loss = flow.velocity_loss(model, x0, noise, stored["sigma_grid"][index : index + 1], [caption])
        loss.backward()
        assert loss.dtype == torch.float32
        assert golden.relative_error(loss.detach(), stored[f"case{i}.loss"][0]) < PARITY
        embedder = model.x_embedder.weight.grad
        out_conv = model.get_parameter("local_decoder.out_conv.weight").grad
        assert embedder is not None and out_conv is not None
        assert golden.relative_error(embedder[:8], stored[f"case{i}.grad_x_embedder_weight"]) < PARITY
        assert golden.relative_error(out_conv, stored[f"case{i}.grad_out_conv_weight"]) < PARITY
