"""The comparison of latents, pixels and both: its rows, its table, and that it resumes."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from comfyui_l2p.l2p_core.convert import convert
from comfyui_l2p.l2p_core.hybrid import levels
from comfyui_l2p.l2p_core.tiny import bundled, scenes, shapes
from comfyui_l2p.l2p_core.tiny.scenes import captions as scene_captions
from comfyui_l2p.l2p_core.tiny.scenes import rendering
from comfyui_l2p.l2p_core.tiny.scenes.content import COLOURS, RELATIONS, random_scenes
from comfyui_l2p.l2p_core.tiny.worlds import WORLDS, rendered_scenes
from comfyui_l2p.train.benchmark import hybrid, hybrid_rows
from comfyui_l2p.train.benchmark.hybrid_worlds import open_world
from comfyui_l2p.train.benchmark.patch_distance import patch_distance


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "4k.safetensors"
    convert(bundled.SOURCE, path, variant="4k", head_width=1 / 16)
    return path


def test_rows_that_are_compared_have_equal_evaluations(large: Path) -> None:
    world = open_world("shapes", large=large)
    assert (world.side, world.large_side) == (64, 256)
    methods = hybrid_rows.methods_in(world)
    assert len({method.name for method in methods}) == len(methods)
    assert {method.evaluations for method in methods if "12 steps" not in method.name} == {12}
    assert {method.size[0] for method in methods} == {64, 128, 256}
    for method in methods:
        assert levels(method.stages, space_shift=method.shift)[-1][1] == 0


def test_growth_is_compared_with_the_same_stages_without_it(large: Path) -> None:
    world = open_world("shapes", large=large)
    methods = {method.name: method for method in hybrid_rows.methods_in(world)}
    small = methods["into the large model, growing at 0.35"].without_growth()
    assert small is not None and [stage.size for stage in small.stages] == [(64, 64)] * 2
    assert all(stage.model is world.pixels for stage in small.stages)
    assert levels(small.stages) == [(1.0, 0.35), (0.35, 0.0)]
    assert methods["pixels only, 6 steps"].without_growth() is None
    assert methods["latents to 0.5, then pixels, shift 1"].without_growth() is None


def test_growth_keeps_what_was_seen_without_it() -> None:
    seen = [("cross", "red"), ("", "blue"), ("", "")]
    assert hybrid._kept([("cross", "red"), ("", "green"), ("", "")], seen) == pytest.approx(2 / 3)
    assert math.isnan(hybrid._kept(seen, [("", "")] * 3))


def test_shapes_are_judged_at_any_size() -> None:
    world, rng = open_world("shapes"), random.Random(0)
    wanted = [shapes.random_scene(rng).attributes for _ in range(4)]
    clean, texts = shapes.render([shapes.Scene(one) for one in wanted]), [shapes.caption(one) for one in wanted]
    for factor in (0.5, 1, 2):
        images = F.interpolate(clean, scale_factor=factor, mode="area") if factor != 1 else clean
        judged = world.judged(images, texts)
        assert judged.whole == 1 and judged.distance < (0.1 if factor < 1 else 0.02)
        assert judged.attributes == [(one.shape, one.colour, one.place, one.background) for one in wanted]
        assert judged.layout == [(one.colour, one.place, one.background) for one in wanted]


def test_the_second_world_takes_a_pixel_model_and_its_judge_counts_attributes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No pixel model comes with the world scenes"):
        open_world("scenes")
    convert(scenes.SOURCE_PATH, tmp_path / "pixels.safetensors", variant="1k", head_width=1 / 16)
    world = open_world("scenes", tmp_path / "pixels.safetensors")
    assert world.side == 128 and world.identity.startswith("scenes-") and len(world.captions(2)) == 2
    generator = torch.Generator().manual_seed(3)
    made = random_scenes(6, generator)
    texts = [scene_captions.caption(content) for content in scene_captions.contents(made, generator)]
    judged = world.judged(rendering.render(made), texts)
    assert judged.whole > 0.8 and judged.distance < 0.6
    assert judged.attributes == world.judged(rendering.render(made, 256), texts).attributes
    assert {len(names) for names in judged.attributes} == {7}
    for names, layout in zip(judged.attributes, judged.layout, strict=True):
        assert set(layout) <= {*COLOURS, *RELATIONS} and set(layout) == set(names) & {*COLOURS, *RELATIONS}


def test_the_distance_of_patches_sees_noise_and_lost_detail_but_not_other_places() -> None:
    texts = WORLDS["scenes"].captions(16)
    clean, others = rendered_scenes(texts, range(16)), rendered_scenes(texts, range(16, 32))
    blurred = F.interpolate(F.avg_pool2d(others, 4), scale_factor=4.0, mode="bilinear")
    noisy = others + 0.1 * torch.randn(others.shape, generator=torch.Generator().manual_seed(0))
    assert patch_distance(clean, clean) == 0
    near = patch_distance(others, clean)
    assert patch_distance(blurred, clean) > 2 * near < patch_distance(noisy, clean)


def test_a_model_for_large_images_has_larger_patches() -> None:
    with pytest.raises(ValueError, match="give one of a larger variant"):
        open_world("shapes", large=bundled.DELTA)


def test_the_benchmark_keeps_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    all_methods = hybrid_rows.methods_in
    names = ("pixels only, 6 steps", "latents to 0.5, then pixels, shift 1", "from half the size, growing at 0.57")
    monkeypatch.setattr(
        hybrid, "methods_in", lambda world: [method for method in all_methods(world) if method.name in names]
    )
    config = open_world("shapes").latent.config
    monkeypatch.setattr(hybrid, "_real_costs", lambda: [hybrid._cost("latents", config, 64, 8)])
    hybrid.benchmark_hybrid(tmp_path, captions=1, seeds=2)
    first = (tmp_path / "results.md").read_text()
    assert "1 captions, 2 seeds" in first and "errors |" in first and "TFLOP" in first
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(0 <= kept <= 1 for kept in results[names[2]]["kept"]) and math.isnan(results[names[0]]["kept"][0])
    (kept,) = tmp_path.glob("shapes-*-pixels-only--6-steps-1-1.json")
    capsys.readouterr()
    values = {"whole": 0.0, "distance": 1.0, "seconds": 1.0, "kept": math.nan, "kept_layout": math.nan}
    kept.write_text(json.dumps(values))
    hybrid.benchmark_hybrid(tmp_path, captions=1, seeds=2)
    assert "50.0% ± 50.0" in (tmp_path / "results.md").read_text()
    assert "seed" not in capsys.readouterr().out.splitlines()[0].replace("seeds", "")
    del values["kept_layout"]  # as an earlier version wrote it
    kept.write_text(json.dumps(values))
    hybrid.benchmark_hybrid(tmp_path, captions=1, seeds=2)
    assert "100.0% ± 0.0" in (tmp_path / "results.md").read_text()
    assert capsys.readouterr().out.startswith("pixels only, 6 steps, seed 1\n")
