"""The Detailer Head's informed start: what least squares put into it, and runs that begin with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from comfyui_l2p.l2p_core import flow, head_fit, head_pairs, tiny
from comfyui_l2p.l2p_core.checkpoint import load_latent
from comfyui_l2p.l2p_core.config import PixelConfig
from comfyui_l2p.l2p_core.convert import convert
from comfyui_l2p.l2p_core.detailer import DetailerHead
from comfyui_l2p.l2p_core.distributed.ranks import Ranks
from comfyui_l2p.l2p_core.files.tensor_file import load_tensors
from comfyui_l2p.l2p_core.files.tensor_io import ProgressCallback
from comfyui_l2p.l2p_core.head_fit import HeadFit
from comfyui_l2p.l2p_core.head_windows import Windows
from comfyui_l2p.l2p_core.ops.least_squares import LeastSquares
from comfyui_l2p.l2p_core.run import preparation
from comfyui_l2p.l2p_core.run.data import tiny_pairs
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.run.hooks import Hooks
from comfyui_l2p.l2p_core.run.loop import Run, train
from comfyui_l2p.l2p_core.run.metrics import read_metrics
from comfyui_l2p.l2p_core.run.recipe import Recipe, load
from comfyui_l2p.l2p_core.tiny import bundled, image_set
from comfyui_l2p.l2p_core.tiny.shapes import evaluation_captions
from comfyui_l2p.l2p_core.training import head_start, loading
from comfyui_l2p.l2p_core.training.batch import Batch
from comfyui_l2p.l2p_core.training.trainer import Trainer
from comfyui_l2p.l2p_core.training_config import TrainingConfig

IMAGES = 256


def config(variant: str = "1k", width: float = 0.25) -> PixelConfig:
    return load_latent(bundled.SOURCE).config.with_head(variant, width)


@pytest.fixture(scope="module")
def drawn() -> image_set.ImageSet:
    captions = list(evaluation_captions(IMAGES))
    pixels = image_set.rendered(captions, list(range(IMAGES)))
    return image_set.ImageSet((pixels.clamp(-1, 1) * 127.5 + 127.5).round().byte(), captions, list(range(IMAGES)))


@pytest.fixture(scope="module")
def begun(drawn: image_set.ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fitted") / "init.safetensors"
    convert(bundled.SOURCE, target, init="fitted", head_width=0.25, pairs=tiny_pairs(drawn))
    return target


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_fit, "WINDOWS", 64)
    monkeypatch.setattr(head_fit, "ROWS", 4)


def trainer_of(start: Path, drawn: image_set.ImageSet, **settings: object) -> tuple[Trainer, image_set.Batches]:
    features = tiny.load_words().encode
    chosen = TrainingConfig(steps=2, lr=1e-5, precision="fp32", blocks=2, noise="fresh", ema_decay=0.9, **settings)  # type: ignore[arg-type]
    trainer = Trainer(loading.load(start, chosen, Ranks()), chosen, empty_caption=features(""))
    return trainer, image_set.Batches(drawn, features, 8, 0)


@torch.no_grad()
def error(trainer: Trainer, batch: Batch) -> float:
    """With noise that no fit has seen."""
    generator = torch.Generator().manual_seed(1234)
    noise = torch.randn(batch.pixels.shape, generator=generator)
    sigma = torch.linspace(0.2, 1, len(batch.pixels))
    return float(flow.velocity_loss(trainer.model.eval(), batch.pixels, noise, sigma, batch.captions))


def test_a_fitted_head_predicts_before_the_first_step(
    begun: Path, drawn: image_set.ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_fit, "WINDOWS", 128)
    monkeypatch.setattr(head_fit, "ROWS", 4)
    trainer, batches = trainer_of(begun, drawn)
    shown: list[tuple[str, int, int]] = []
    unseen = batches.batch(3)
    before = error(trainer, unseen)
    done = trainer.fit_head(batches, lambda *work: shown.append(work))
    assert done and done.windows == 128 and done.after < 0.3 < 1 < done.before
    assert before > 1 and error(trainer, unseen) < 0.4
    fitted = trainer.model.state_dict()["local_decoder.out_conv.weight"].clone()
    with trainer.averaged() as model:  # averages begin there too
        assert torch.equal(model.state_dict()["local_decoder.out_conv.weight"], fitted)
    assert error(trainer, unseen) < 0.4
    assert {text for text, *_ in shown} == {"noising images for the head's fit", "fitting the head"}
    assert all(0 < done <= total for _, done, total in shown) and shown[-1][1] == shown[-1][2]


@pytest.mark.usefixtures("few")
def test_every_way_of_training_begins_with_the_same_head(begun: Path, drawn: image_set.ImageSet) -> None:
    found = []
    for settings in ({}, {"step_early": True}, {"offload": True, "stream": True}):
        trainer, batches = trainer_of(begun, drawn, **settings)
        trainer.fit_head(batches, lambda *_: None)
        list(trainer.run(batches))
        found.append(trainer.trained())
    for other in found[1:]:
        assert all(torch.allclose(weight, other[name], atol=1e-4) for name, weight in found[0].items())


def test_a_pair_amplifies_by_the_regression_of_velocity_on_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    noisy, sigma = torch.randn(64, 3, 32, 32, generator=generator), torch.rand(64, generator=generator).sort().values
    factor = (torch.arange(64) // 4 / 8).clamp(max=1.9)  # of the 16 levels
    windows = Windows(torch.zeros(64, 1, 2, 2), noisy, -factor[:, None, None, None] * noisy, sigma)
    gain = head_pairs.gains_of(windows)[:, None, None, None]
    small = torch.full((64, 3, 1, 1), 1e-3)
    amplified = head_pairs.amplified(small, gain) / small
    assert torch.allclose(amplified[:, 0, 0, 0], factor, atol=2e-3)


def test_pairs_go_up_unchanged_by_silu() -> None:
    up = torch.nn.Conv2d(8, 8, 3, padding=1)
    values = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head_pairs.hand_up(up, 4)
        pairs = torch.stack([F.silu(values), F.silu(-values)], 2).flatten(1, 2)
        fine = up(F.interpolate(pairs, scale_factor=2))[:, :4]
    assert torch.allclose(fine, F.interpolate(values, scale_factor=2), atol=1e-6)


@torch.no_grad()
def test_the_encoder_hands_means_of_pixels_to_every_stage() -> None:
    head = DetailerHead(config().head, 4)
    smooth = F.interpolate(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 64, mode="bicubic")
    windows = Windows(torch.zeros(2, 4, 4, 4), smooth, smooth, torch.ones(2))
    fitter = head_fit._Fitter(head, windows, lambda *_: None)
    fitter.encoder()
    for stage in head.stages[:3]:
        inputs = fitter._inputs(windows, stage)
        first = inputs.shape[1] - stage.enc
        found = inputs[:, first : first + 6 : 2] - inputs[:, first + 1 : first + 6 : 2]
        wanted = F.avg_pool2d(smooth, 64 // found.shape[-1])
        assert (found - wanted).square().mean() < 0.1 * wanted.var()


@pytest.mark.parametrize("width", [0.1875, 0.25, 1.0])
def test_pairs_fill_the_channels_of_every_stage(width: float) -> None:
    head = DetailerHead(config(width=width).head, 4)
    fitter = head_fit._Fitter(head, Windows(*(torch.zeros(2, 3, 16, 16),) * 3, torch.ones(2)), lambda *_: None)
    last, *inner = head.stages
    assert fitter._pairs(last) == (3, 3, 0) and last.dec >= 12
    for stage in inner:
        pairs = fitter._pairs(stage)
        assert pairs.fitted == 4 and sum(pairs) == stage.dec // 2 and pairs.details >= 0
        assert fitter._handed_to(stage) <= stage.up
    assert [fitter._pairs(stage).amplified for stage in inner] == [0 if width < 0.25 else 3, 3, 0]


def test_directions_predict_most_with_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 4, generator=generator) * torch.tensor([1.0, 5.0, 1.0, 1.0]) + 2
    squares = LeastSquares()
    squares.add(x, torch.stack([x[:, 1], x[:, 1] + 0.1 * x[:, 2], 0.1 * x[:, 2]], 1))
    weight, _ = squares.solved(1e-9)
    (first, constant), (second, _) = head_fit._directions(squares, weight, 0, 2)
    value = x.double() @ first + constant
    assert abs(float(value.mean())) < 1e-3 and abs(float(value.var()) - 1) < 1e-2
    assert first.abs().argmax() == 1 and second.abs().argmax() == 2


def test_least_squares_find_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator) + 3
    weight, bias = torch.randn(2, 6, generator=generator), torch.tensor([5.0, -1.0])
    squares = LeastSquares()
    for rows in x.split(100):
        squares.add(rows, rows @ weight.T + bias)
    found, constant = squares.solved(1e-9)
    assert torch.allclose(found.float(), weight, atol=1e-3) and torch.allclose(constant.float(), bias, atol=1e-2)
    assert torch.allclose(squares.covariance().float(), torch.cov(x.T, correction=0), atol=1e-3)


def test_least_squares_far_from_zero_keep_their_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator)
    squares = LeastSquares()
    for rows in x.split(100):
        squares.add(rows + 2**14, rows[:, :1])
    weight, bias = squares.solved(1e-9)
    assert torch.allclose(weight.float(), torch.tensor([[1.0, 0, 0]]), atol=1e-2)
    assert torch.allclose(squares.mean().float(), x.mean(0) + 2**14)
    assert abs(float(weight.sum()) * 2**14 + float(bias)) < 1e-2


def test_places_keep_off_borders_that_a_window_cut() -> None:
    head = DetailerHead(config().head, 4)
    pixels = torch.zeros(2, 3, 128, 128)
    windows = Windows(torch.zeros(2, 4, 8, 8), pixels, pixels, torch.linspace(0, 1, 2), margin=1)
    fitter = head_fit._Fitter(head, windows, lambda *_: None)
    marked = torch.zeros(2, 1, 16, 16)
    marked[..., 2:-2, 2:-2] = 1
    read, wanted = fitter._rows(marked, marked, margin=1)
    assert wanted.min() == 1 and read.shape[1] == 9 and read.min() == 0


@dataclass(frozen=True)
class Sizes:
    """Two images of noise of each height and width in turn."""

    sizes: Sequence[tuple[int, int]]
    words: Callable[[str], Tensor]
    value: float = 1.0

    def batch(self, number: int) -> Batch:
        """The micro-batch `number`."""
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randn(2, 3, *self.sizes[number % len(self.sizes)], generator=generator).clamp(-1, 1)
        captions = [self.words("a red circle")] * 2
        return Batch(pixels * self.value, captions, [2 * number, 2 * number + 1], [None, None])


@pytest.mark.parametrize("sizes", [[(48, 48), (32, 64), (80, 48)], [(16, 16), (16, 64)], [(160, 144), (144, 176)]])
@pytest.mark.usefixtures("few")
def test_windows_of_images_of_many_sizes(
    begun: Path, drawn: image_set.ImageSet, sizes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_fit, "WINDOWS", 24)
    found: list[Windows] = []

    def kept(_: DetailerHead, windows: Windows, working: ProgressCallback) -> HeadFit:
        found.append(windows)
        return HeadFit(len(windows.sigma), 1.0, 2.0)

    fit = head_fit.fit
    monkeypatch.setattr(head_fit, "fit", kept)
    trainer, _ = trainer_of(begun, drawn)
    state = {name: tensor.clone() for name, tensor in trainer.state().items()}
    done = trainer.fit_head(Sizes(sizes, tiny.load_words().encode), lambda *_: None)
    smallest = min(8, *(side // 16 for size in sizes for side in size))
    (windows,) = found
    assert windows.features.shape[-2:] == (smallest,) * 2 and windows.target.shape[-2:] == (16 * smallest,) * 2
    assert windows.margin == (smallest > 2) and len(windows.sigma) == 24
    # What does not lower the error is not kept.
    assert done and not done.better and done.summary().startswith("The Detailer Head starts unfitted")
    assert all(torch.equal(tensor, trainer.state()[name]) for name, tensor in state.items())
    head = DetailerHead(trainer.model.config.head, trainer.model.config.dim)
    fit(head, windows)
    assert all(weight.isfinite().all() for weight in head.state_dict().values())


def test_windows_do_not_keep_whole_images_in_memory() -> None:
    pixels = torch.zeros(1, 3, 256, 256)
    images = Windows(torch.zeros(1, 4, 16, 16), pixels, pixels, torch.zeros(1), 1)
    window = head_start._cut(images, (16, 16), 8, 16, 0)
    for tensor in (window.features, window.noisy, window.target):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.usefixtures("few")
def test_values_that_are_not_finite_are_named(begun: Path, drawn: image_set.ImageSet) -> None:
    trainer, batches = trainer_of(begun, drawn)
    broken = Sizes([(64, 64)], tiny.load_words().encode, value=math.nan)
    with pytest.raises(ValueError, match="features of an image are not finite"):
        trainer.fit_head(broken, lambda *_: None)
    with torch.no_grad():
        trainer.parameters["local_decoder.out_conv.bias"].fill_(math.inf)
    with pytest.raises(ValueError, match="first weights"):
        trainer.fit_head(batches, lambda *_: None)


def test_heads_that_are_not_fitted() -> None:
    assert head_fit.can_fit(config()) and head_fit.can_fit(config(width=1))
    assert not head_fit.can_fit(config("4k")) and not head_fit.can_fit(config(width=0.125))


RECIPE = """
[model]
base = "tiny"
variant = "1k"
head_width = {width}
init = "fitted"
[data]
kind = "renderings"
images = 256
batch_size = 4
[training]
steps = {steps}
lr = 1e-5
blocks = 2
precision = "fp32"
gradient_checkpointing = false
caption_dropout = 0.1
ema_decay = 0.9
[watch]
save_every = 1
montage_every = 100
"""


def recipe(folder: Path, steps: int, width: float = 0.25) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(steps=steps, width=width), encoding="utf-8")
    return load(path)


@pytest.mark.usefixtures("few")
def test_a_run_fits_once_and_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    train(recipe(tmp_path, 2), tmp_path / "whole", hooks=Hooks(note=notes.append))
    rates = [metrics["lr"] for metrics in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert rates == [1e-5 / head_fit.WARM_UP, 2e-5 / head_fit.WARM_UP]  # the recipe asks for no warm-up
    assert any(note.startswith("The Detailer Head starts fitted to 64 noisy images") for note in notes)
    train(recipe(tmp_path, 2), tmp_path / "parts", hooks=Hooks(should_stop=lambda: True))
    monkeypatch.setattr(Trainer, "fit_head", None)  # a second fit would fail
    resumed = train(recipe(tmp_path, 2), tmp_path / "parts")
    assert resumed.finished
    whole, parts = (load_tensors(tmp_path / name / "state.safetensors")[0] for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


@pytest.mark.usefixtures("few")
def test_a_fit_that_is_stopped_leaves_nothing_and_is_made_again(tmp_path: Path) -> None:
    def stop(text: str, done: int, total: int) -> None:
        if text == "fitting the head":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe(tmp_path, 1), tmp_path / "run", hooks=Hooks(working=stop))
    assert not (tmp_path / "run" / "state.safetensors").exists()
    assert train(recipe(tmp_path, 1), tmp_path / "run").finished


def test_a_head_that_is_too_narrow_is_named(tmp_path: Path) -> None:
    notes: list[str] = []
    train(recipe(tmp_path, 1, width=0.125), tmp_path / "run", hooks=Hooks(note=notes.append))
    assert any(note.startswith("The Detailer Head starts unfitted") for note in notes)


def test_only_the_first_of_several_processes_says_that_they_do_not_fit(tmp_path: Path) -> None:
    for ranks in (Ranks(rank=0, count=2), Ranks(rank=1, count=2)):
        notes: list[str] = []
        folder = RunFolder(tmp_path / str(ranks.rank))
        folder.path.mkdir()
        found = preparation.prepare(recipe(tmp_path, 1), folder, None, Hooks(), Ranks())
        run = Run(found.recipe, folder, found.base, found.data, hooks=Hooks(note=notes.append).of(ranks))
        run.ranks = run.trainer.ranks = ranks
        run.fit_head()
        assert any(note.startswith("The Detailer Head starts unfitted") for note in notes) == ranks.first


@pytest.mark.usefixtures("few")
def test_rounding_errors_of_features_are_not_amplified() -> None:
    """Features of one dimension in 64 channels, as of images that differ in one value: a fit that makes all directions
    equally large holds weights that training cannot move without exploding."""
    generator = torch.Generator().manual_seed(0)
    value, noise = torch.randn(64, 1, 1, 1, generator=generator), torch.randn(64, 3, 16, 16, generator=generator)
    features = value * torch.randn(64, 1, 1, generator=generator)
    sigma = torch.linspace(0.5, 1, 64)
    noisy = (1 - sigma[:, None, None, None]) * value + sigma[:, None, None, None] * noise
    torch.manual_seed(0)
    head = DetailerHead(config().head, 64)
    done = head_fit.fit(head, Windows(features, noisy, value - noise, sigma, 0))
    assert done.better
    assert head.bottleneck[0].weight.abs().max() < 10  # type: ignore[operator]
