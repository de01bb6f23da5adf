"""A run as a caller in the host sees it: hooks, results, parts for several processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from test_run_resume import RECIPE, assert_same, folder  # noqa: F401 (a fixture)
from torch import Tensor

from comfyui_l2p.l2p_core.checkpoint import load_tensors
from comfyui_l2p.l2p_core.dataset.caption_cache import TextEncoder
from comfyui_l2p.l2p_core.distributed.ranks import Ranks
from comfyui_l2p.l2p_core.run import loop, preparation
from comfyui_l2p.l2p_core.run import recipe as recipes
from comfyui_l2p.l2p_core.run.base import pixel_config
from comfyui_l2p.l2p_core.run.caption_source import CaptionSource
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.run.hooks import Hooks
from comfyui_l2p.l2p_core.run.metrics import RunMetrics
from comfyui_l2p.l2p_core.run.recipe import Recipe
from comfyui_l2p.l2p_core.tiny import load_words
from comfyui_l2p.l2p_core.tiny.word_encoder import WordEncoder
from comfyui_l2p.l2p_core.training import loading as training_model

pytestmark = pytest.mark.usefixtures("unflushed")


def recipe_in(folder: Path) -> Recipe:  # noqa: F811
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return recipes.with_paths(recipes.load(folder / "recipe.toml"), folder)


def test_a_run_is_watched_stopped_and_gone_on_with(folder: Path) -> None:  # noqa: F811
    """Under inference mode, as nodes run in."""
    recipe, loaded = recipe_in(folder), []
    encoder = WordEncoder(load_words())

    def make_encoder() -> TextEncoder:
        loaded.append(encoder)
        return encoder

    captions = CaptionSource(folder / "features", encoder.identity, make_encoder, max_tokens=512)
    shown: list[RunMetrics] = []
    montages: list[tuple[int, Tensor]] = []
    worked: list[str] = []
    hooks = Hooks(
        progress=shown.append,
        montage=lambda step, pixels: montages.append((step, pixels)),
        should_stop=lambda: len(shown) == 4,
        working=lambda text, done, total: worked.append(text),
    )
    with torch.inference_mode():
        result = loop.train(recipe, folder / "run", captions=captions, hooks=hooks)
        assert torch.is_inference_mode_enabled()
    assert (result.step, result.finished) == (4, False)
    assert load_tensors(result.folder.state)[1]["l2p.step"] == "4"
    assert [step for step, _ in montages] == [3] and montages[0][1].shape == (1, 3, 32, 32)
    assert set(worked) == {"converting", "looking at images", "encoding captions", "loading"} and len(loaded) == 1
    assert list((folder / "features").rglob("*.safetensors")), "the features are not where the caller wanted them"
    result = loop.train(recipe, folder / "run", captions=captions, hooks=hooks)
    assert (result.step, result.finished) == (6, True)
    assert [metrics.step for metrics in shown] == [1, 2, 3, 4, 5, 6] and len(loaded) == 1


def test_a_montage_can_be_stopped_and_nothing_is_lost(folder: Path) -> None:  # noqa: F811
    recipe = recipe_in(folder)
    recipe = dataclasses.replace(
        recipe, watch=dataclasses.replace(recipe.watch, save_every=2, montage_every=3, steps=3)
    )

    def go(stop_after: int | None = None) -> loop.RunResult:
        """Ask to stop after so many sampling steps."""
        sampled: list[tuple[int, int]] = []
        hooks = Hooks(
            should_stop=lambda: len(sampled) == stop_after, sampling=lambda done, steps: sampled.append((done, steps))
        )
        result = loop.train(recipe, folder / "stopped", hooks=hooks)
        assert sampled == ([(1, 3), (2, 3), (3, 3)] * 2)[:stop_after]
        return result

    result = go(2)  # in the first montage, whose step is not one for saving
    assert (result.step, result.finished) == (3, False) and not result.folder.montages()
    assert load_tensors(result.folder.state)[1]["l2p.step"] == "3"
    result = go(1)  # while it is made up for
    assert (result.step, result.finished) == (3, False) and not result.folder.montages()
    result = go(4)  # in the last montage
    assert (result.step, result.finished) == (6, False) and len(result.folder.montages()) == 1
    result = loop.train(recipe, folder / "stopped")
    assert (result.step, result.finished) == (6, True)
    loop.train(recipe, folder / "straight")
    assert_same(RunFolder(folder / "straight"), result.folder)


def test_preparation_can_be_stopped_and_keeps_what_is_done(folder: Path) -> None:  # noqa: F811
    recipe = recipe_in(folder)

    def stop(text: str, done: int, total: int) -> None:
        if text == "loading":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(recipe, folder / "run", hooks=Hooks(working=stop))
    found = RunFolder(folder / "run")
    assert found.init.exists() and not found.state.exists()
    assert len(list((folder / "captions").rglob("*.safetensors"))) == 6


def test_two_processes_share_the_samples_of_one(folder: Path) -> None:  # noqa: F811
    recipe, run = recipe_in(folder), RunFolder(folder / "run")
    run.begin(recipe)
    data = preparation.prepare_data(recipe, run, pixel_config(recipe.model, run.init), None, Hooks())
    cpu = torch.device("cpu")
    one, first, second = [data.stream(recipe, Ranks(rank, count, cpu)) for rank, count in ((0, 1), (0, 2), (1, 2))]
    with one as (all_batches, _), first as (upper, _), second as (lower, _):
        for number in range(6):
            whole, *parts = [batches.batch(number) for batches in (all_batches, upper, lower)]
            assert torch.equal(whole.pixels, torch.cat([part.pixels for part in parts]))
            assert whole.numbers == [n for part in parts for n in part.numbers]
            assert whole.seeds == [seed for part in parts for seed in part.seeds]


def test_frozen_weights_are_read_in_the_precision_they_are_kept_in(folder: Path) -> None:  # noqa: F811
    recipe, ranks = recipe_in(folder), Ranks(device=torch.device("cpu"))
    base = preparation.prepare(recipe, RunFolder(folder / "run"), None, Hooks(), ranks).base
    weights = training_model.load(base, recipe.training, ranks).state_dict()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    half = dataclasses.replace(recipe.training, precision="bf16")
    dtypes = {name: value.dtype for name, value in training_model.load(base, half, ranks).state_dict().items()}
    assert dtypes["layers.1.attention.qkv.weight"] == torch.bfloat16
    assert dtypes["x_embedder.weight"] == dtypes["layers.0.attention.qkv.weight"] == torch.float32
