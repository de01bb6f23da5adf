"""Making the second tiny world: the source's training resumes exactly, and its parts do what they say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from comfyui_l2p.l2p_core.backbone import RefinedCaptions
from comfyui_l2p.l2p_core.config import ModelConfig
from comfyui_l2p.l2p_core.convert import convert
from comfyui_l2p.l2p_core.files.tensor_file import load_tensors
from comfyui_l2p.l2p_core.model import LatentModel
from comfyui_l2p.l2p_core.tiny import generate, image_set, scenes
from comfyui_l2p.l2p_core.tiny.autoencoder import reconstruction_loss
from comfyui_l2p.l2p_core.tiny.scenes import captions
from comfyui_l2p.l2p_core.tiny.scenes.autoencoder import CHANNELS, TrainedAutoencoder
from comfyui_l2p.l2p_core.tiny.scenes.content import COLOURS, KINDS, random_scenes
from comfyui_l2p.l2p_core.tiny.scenes.words import PhraseWords
from comfyui_l2p.l2p_core.tiny.words import CAPTION_DIM
from comfyui_l2p.l2p_core.tiny.worlds import SCENES
from comfyui_l2p.train.benchmark import transfer
from comfyui_l2p.train.benchmark.hybrid_worlds import open_world
from comfyui_l2p.train.benchmark.transfer_arms import GROUPS
from comfyui_l2p.train.scenes import __main__ as scenes_command
from comfyui_l2p.train.scenes import large_training
from comfyui_l2p.train.scenes.__main__ import main
from comfyui_l2p.train.scenes.autoencoder_training import rendered
from comfyui_l2p.train.scenes.muon import orthogonal
from comfyui_l2p.train.scenes.probe import OBJECTS, what_is_shown
from comfyui_l2p.train.scenes.source_training import (
    SceneSourceRecipe,
    SourceTraining,
    padded_captions,
    stratified_sigmas,
)

CPU = torch.device("cpu")
RECIPE = SceneSourceRecipe(batch=2, warmup=2)


SMALL = ModelConfig(
    in_channels=CHANNELS,
    dim=32,
    head_dim=16,
    n_layers=2,
    n_refiner_layers=1,
    caption_dim=CAPTION_DIM,
    ffn_dim=32,
    t_freq_dim=32,
    t_hidden_dim=32,
    t_dim=32,
)


@pytest.fixture(scope="module")
def autoencoder() -> TrainedAutoencoder:
    torch.manual_seed(0)
    model = TrainedAutoencoder(width=8, deep_width=8, encoder_width=8)
    model.fit_components(rendered(4, torch.Generator().manual_seed(0), CPU))
    return model.eval()


def training(out: Path, start: Path | None = None, encoder: str = "one") -> SourceTraining:
    return SourceTraining(RECIPE, out, CPU, encoder, start, SMALL)


def test_a_resumed_run_is_the_run_that_was_stopped(autoencoder: TrainedAutoencoder, tmp_path: Path) -> None:
    words = PhraseWords.make()
    through = training(tmp_path)
    for _ in range(2):
        through.advance(autoencoder, words)
    through.save()
    resumed = training(tmp_path)
    assert (resumed.step, resumed.images) == (2, 4)
    for run in (through, resumed):
        run.advance(autoencoder, words)
    for name, tensor in through.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    for name, tensor in through.average.state_dict().items():
        assert torch.equal(tensor, resumed.average.state_dict()[name]), name


def test_averaged_weights_begin_a_run_with_fresh_optimisers(autoencoder: TrainedAutoencoder, tmp_path: Path) -> None:
    first = training(tmp_path)
    first.advance(autoencoder, PhraseWords.make())
    first.save()
    other = tmp_path / "other"
    other.mkdir()
    begun = training(other, tmp_path / "source.safetensors")
    assert (begun.step, begun.since, begun.images) == (1, 0, 2)
    assert all(not optimiser.state for optimiser in begun.optimisers)
    weights, about = load_tensors(tmp_path / "source.safetensors")
    assert ModelConfig.from_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}) == SMALL
    assert about["l2p.images"] == "2"
    for name, tensor in begun.model.state_dict().items():
        assert torch.equal(tensor, weights[name].float()), name


def test_another_autoencoder_is_refused(tmp_path: Path) -> None:
    training(tmp_path).save()
    with pytest.raises(ValueError, match="another autoencoder"):
        training(tmp_path, encoder="two")
    other = tmp_path / "other"
    with pytest.raises(ValueError, match="another autoencoder"):
        training(other, tmp_path / "source.safetensors", encoder="two")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes", "0"], "0 is not above 0"),
        (["--batch", "-1"], "-1 is not above 0"),
        (["--device", "abacus"], "no device 'abacus'"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--out", str(tmp_path / "out"), *arguments])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_training_stops_at_the_images_of_its_recipe(autoencoder: TrainedAutoencoder, tmp_path: Path) -> None:
    run = SourceTraining(SceneSourceRecipe(batch=2, images=4, report_steps=1), tmp_path, CPU, "one", None, SMALL)
    run.train(autoencoder, PhraseWords.make(), minutes=5, finish=True)
    assert run.images == 4
    assert (tmp_path / "state.safetensors").exists()
    assert len((tmp_path / "source_run.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_latents_are_normalised_and_both_halves_are_trained(autoencoder: TrainedAutoencoder) -> None:
    pixels = rendered(4, torch.Generator().manual_seed(1), CPU)
    latents = autoencoder.train().encode(pixels)
    assert latents.shape == (4, CHANNELS, 16, 16)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(CHANNELS), atol=0.01)
    reconstruction_loss(autoencoder, pixels, torch.zeros(1)).backward()
    autoencoder.eval()
    assert all(parameter.grad is not None for parameter in autoencoder.parameters())


def test_noise_levels_are_one_from_each_part_of_the_grid() -> None:
    levels = stratified_sigmas(10, torch.Generator().manual_seed(0))
    assert len(levels) == 10
    u = levels / (3 - 2 * levels)  # the shift of 3 undone
    assert ((1 - u.sort(descending=True).values) * 10).long().tolist() == list(range(10))


@pytest.mark.parametrize("shape", [(3, 24, 8), (2, 8, 24), (1, 16, 16)])
def test_directions_become_orthogonal(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.3 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert ((left @ right) * orthogonal(matrices)).sum() > 0.9 * values.sum() * 0.9


def test_words_know_their_phrase() -> None:
    words = PhraseWords.make()
    one = words.encode("a red circle above a blue square")
    assert one.shape == (8, CAPTION_DIM)
    assert words.encode("").shape == (1, CAPTION_DIM)
    exchanged = words.encode("a blue square above a red circle")
    assert not torch.allclose(one[3], exchanged[7])  # the circle is the first object in one, the second in the other
    said = one[7] @ words.table.T / CAPTION_DIM
    known = {word for word, share in zip(words.vocabulary, said.tolist(), strict=True) if share > 0.5}
    assert known == {"square", "blue", "above", "<second>"}
    with pytest.raises(ValueError, match="'horse'"):
        words.encode("a red horse")


def test_the_probe_is_taught_what_covers_each_token() -> None:
    scenes = random_scenes(6, torch.Generator().manual_seed(3))
    taught = what_is_shown(scenes, 8)
    assert taught.shape[:2] == (6, 64)
    covered = taught[..., :OBJECTS].sum(-1)
    assert covered.max() <= 1.001
    kinds, colours = (
        taught[..., OBJECTS : OBJECTS + len(KINDS)],
        taught[..., OBJECTS + len(KINDS) :][..., : len(COLOURS)],
    )
    assert torch.allclose(kinds.sum(-1), covered, atol=1e-5)
    for row in range(6):
        assert set(colours[row].sum(0).nonzero()[:, 0].tolist()) == set(scenes.colour[row].tolist())
    x = (torch.arange(8) + 0.5) * 16
    first = taught[..., 0].view(6, 8, 8)
    middle = (first.sum(1) * x).sum(1) / first.sum((1, 2))
    assert (middle - scenes.centre[:, 0, 0]).abs().max() < 8


def test_the_bundled_source_belongs_to_its_autoencoder(tmp_path: Path) -> None:
    encoder = TrainedAutoencoder.load(scenes.AUTOENCODER_PATH).encoder_identity()
    begun = SourceTraining(RECIPE, tmp_path, CPU, encoder, scenes.SOURCE_PATH)
    assert begun.images > 0
    texts = captions.evaluation_captions(2)
    images = generate(
        SCENES.load_source(), SCENES.load_autoencoder(), SCENES.load_words(), texts, range(2), steps=2, size=128
    )
    assert images.shape == (2, 3, 128, 128)
    assert not torch.equal(images[0], images[1])


def test_pixel_models_are_compared_on_the_folders_own_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: dict[str, Any] = {}
    monkeypatch.setattr(scenes_command, "benchmark_transfer", lambda output, **given: compared.update(given))
    shutil.copy(scenes.SOURCE_PATH, tmp_path)
    main(["--out", str(tmp_path), "--stage", "picture", "--transfer", "7"])
    assert (compared["compared_steps"], compared["groups"]) == (7, tuple(GROUPS))
    assert 0 < compared["minutes"] < 9.0  # what the training and the picture left of it
    assert compared["world"].files == (
        tmp_path / scenes.SOURCE_PATH.name,
        scenes.AUTOENCODER_PATH,
        scenes.WORDS_PATH,
    )
    assert compared["world"].load_source().config == SCENES.load_source().config
    assert (tmp_path / "scenes.png").is_file()


def test_a_pixel_model_of_larger_images_begins_with_the_smaller_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(image_set, "PART", 2)
    for name, value in (("IMAGES", 2), ("BATCH", 2), ("HEAD_WIDTH", 1 / 16)):
        monkeypatch.setattr(large_training, name, value)
    for name in ("WATCHED", "SCORES_ON_THE_WAY", "SAMPLING_STEPS"):
        monkeypatch.setattr(transfer, name, 1)
    pixels = tmp_path / "pixels.safetensors"
    convert(scenes.SOURCE_PATH, pixels, head_width=1 / 16)
    command = ["--out", str(tmp_path), "--stage", "large", "--steps", "1"]
    with pytest.raises(SystemExit):
        main(command)
    assert "name its file with --pixels" in capsys.readouterr().err
    main([*command, "--pixels", str(pixels)])
    made = tmp_path / "large" / "large.safetensors"
    assert f"{made} written." in capsys.readouterr().out
    world = open_world("scenes", pixels, made)
    assert world.large is not None and world.large_side == 256 and world.large.config.variant == "4k"
    blocks = {name: tensor for name, tensor in world.pixels.state_dict().items() if name.startswith("layers.3.")}
    assert blocks and all(torch.equal(world.large.state_dict()[name], tensor) for name, tensor in blocks.items())
    monkeypatch.setattr(transfer, "Run", None)  # a finished run is not trained again
    main([*command, "--pixels", str(pixels)])


def test_captions_padded_to_one_length_are_those_of_the_model() -> None:
    torch.manual_seed(0)
    model = LatentModel(SMALL)
    torch.nn.init.normal_(model.cap_pad_token)
    words = PhraseWords.make()
    texts = ["", "a red circle above a blue square", "a plain letter E left of a cyan spotted cross"]
    features = [words.encode(text) for text in texts]
    rows = torch.full((3, 32, CAPTION_DIM), 7.0)
    exists = torch.zeros(3, 32, 1, dtype=torch.bool)
    for row, feature in enumerate(features):
        rows[row, : len(feature)], exists[row, : len(feature)] = feature, True
    refined = model.refined(features)
    assert isinstance(refined, RefinedCaptions)
    padded = padded_captions(model, rows, exists)
    assert padded.lengths == refined.lengths
    assert torch.allclose(padded.tokens, refined.tokens, atol=1e-6)
