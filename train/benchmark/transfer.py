"""`l2p benchmark transfer`: what transfer keeps of the bundled source, and what it depends on.

One long run measures what a pixel model keeps. Shorter arms of equal length, each with several seeds, compare starts,
policies, training images and noise levels. Every run and every score is a stage in the output folder and is computed
once, so the benchmark can be stopped and started again.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch

from ...l2p_core import convert, delta, tiny
from ...l2p_core.checkpoint import load_latent, save
from ...l2p_core.dataset.images import from_uint8, to_uint8
from ...l2p_core.files import metadata
from ...l2p_core.files.atomic import write_bytes
from ...l2p_core.files.tensor_file import load_tensors
from ...l2p_core.initialise import FITTED
from ...l2p_core.model import L2PModel
from ...l2p_core.run import recipe as recipes
from ...l2p_core.run.data import RunData, tiny_images, tiny_pairs
from ...l2p_core.run.find import find
from ...l2p_core.run.folder import RunFolder
from ...l2p_core.run.loop import Run
from ...l2p_core.run.metrics import read_metrics
from ...l2p_core.run.recipe import Recipe
from ...l2p_core.tiny import bundled
from ...l2p_core.tiny.generate import STEPS
from ...l2p_core.tiny.image_set import ImageSet
from ...l2p_core.training.trainer import Trainer
from ..console import note
from ..own_folder import OwnFolder
from ..run import shown
from ..scores import ImageGenerator, Scored, evaluate
from . import transfer_report as report
from .transfer_arms import FULL, GROUPS, STARTS, Arm, compared_arms, full_arm

EVALUATED = 480  # captions of the full run's final score: every combination of attributes once
WATCHED = 96  # captions of every other score
SAMPLING_STEPS = 12  # of every other score
SEEDS = 3
SCORES_ON_THE_WAY = 8  # of the full run
PARTS = (0.01, 0.05, 0.2, 1.0)  # of a compared start's steps, after which it is scored


def benchmark_transfer(
    output: Path,
    steps: int | None = None,
    compared_steps: int | None = None,
    seeds: int = SEEDS,
    groups: Collection[str] = (FULL, *GROUPS),
    write_delta: Path | None = None,
) -> None:
    """Run the missing stages, then write the results as JSON, Markdown and figures, and print the tables.

    Args:
        output: the folder of all stages.
        steps: of the full run; None takes those of the recipe "tiny".
        compared_steps: of each compared arm; None takes those of the recipe "demo".
        seeds: of each compared arm.
        groups: what to measure: `FULL`, keys of `GROUPS`.
        write_delta: where to write the full run's delta on the source, in bfloat16, in the bundled form.

    Raises:
        ValueError: if the folder has results of something else or is in use by another process, or a delta is asked
            for without the full run.
    """
    if write_delta and FULL not in groups:
        raise ValueError(f'--write-delta writes the full run\'s delta: add "{FULL}" to --only, or remove --only.')
    FOLDER.check(output)
    with FOLDER.held(output):
        parts = []
        if FULL in groups:
            parts.append(_full_part(output, full_arm(recipes.load(find("tiny")), steps), write_delta))
        if any(group in GROUPS for group in groups):
            arms = compared_arms(recipes.load(find("demo")), groups, compared_steps)
            parts.append(_compared_part(output, arms, seeds))
        report.write(output, parts)


def _full_part(output: Path, arm: Arm, write_delta: Path | None) -> report.ResultsSection:
    source = bundled.TinySource()
    scored = {report.SOURCE: _score(output / "source", report.SOURCE, source.images, EVALUATED)}
    folder = _train(arm, arm.recipe, output)
    if write_delta:
        write_bundled_delta(folder, write_delta)
        print(f"{write_delta} written ({write_delta.stat().st_size / 1e6:.1f} MB).")
    scored[arm.name] = _score(folder.path, arm.name, _sampler(folder), EVALUATED)
    return report.full(arm, scored, read_metrics(folder.metrics), read_metrics(_curve_path(folder)))


def _compared_part(output: Path, arms: list[Arm], seeds: int) -> report.ResultsSection:
    """The arms seed by seed, so that a stopped benchmark has complete comparisons of its first seeds."""
    source = partial(bundled.TinySource().images, steps=SAMPLING_STEPS)
    scored = _score(output / "source-compared", report.SOURCE, source, WATCHED)
    runs: dict[str, list[report.ArmRun]] = {arm.name: [] for arm in arms}
    for seed in range(seeds):
        for arm in arms:
            folder = _train(arm, arm.seeded(seed), output, f"-seed{seed}")
            curve = read_metrics(_curve_path(folder))
            runs[arm.name].append(report.ArmRun(curve, read_metrics(folder.metrics), _kept_images(folder)))
    return report.compared(arms, scored, runs)


def write_bundled_delta(folder: RunFolder, target: Path) -> None:
    """The run's delta on the pixel initialisation, rewritten as a bfloat16 delta on the source itself."""
    tensors, about = load_tensors(folder.delta)
    halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    kept = {key: about[key] for key in (metadata.SOURCE_SHA256, metadata.SEED, metadata.INIT)}
    delta.save(halved, bundled.SOURCE, target, kept, overwrite=True)


def _train(arm: Arm, recipe: Recipe, output: Path, suffix: str = "") -> RunFolder:
    """Train an arm with this recipe, resuming if it was stopped; the arms share their images."""
    folder = RunFolder(output / (arm.folder + suffix))
    with folder.held(note):
        # Also for a finished arm: another recipe's must not pass for this one.
        folder.begin(recipe)
        if not (folder.path / "finished").exists():
            print(f"{arm.name}: {folder.path}", flush=True)
            _train_in(folder, arm, recipe, output / "images")
            (folder.path / "finished").write_text("", encoding="utf-8")
    return folder


def _train_in(folder: RunFolder, arm: Arm, recipe: Recipe, kept_images: Path) -> None:
    with shown(arm.steps) as hooks:
        images = tiny_images(recipe.data, kept_images, hooks.working)
        if not folder.init.exists():
            (_scratch if arm.from_scratch else partial(_convert, images))(recipe, folder.init)
        run = Run(recipe, folder, folder.init, RunData(images), hooks=hooks)
        run.fit_head()
        watch = partial(_score_on_the_way, folder, _scored_steps(arm))
        watch(run.trainer)
        finished = run.go(watch)
    if not finished:
        raise KeyboardInterrupt


def _convert(images: ImageSet, recipe: Recipe, target: Path) -> None:
    convert.convert(
        bundled.SOURCE,
        target,
        variant=recipe.model.variant,
        head_width=recipe.model.head_width,
        seed=recipe.model.seed,
        init=recipe.model.init,
        pairs=tiny_pairs(images) if recipe.model.init == FITTED else None,
    )


def _scratch(recipe: Recipe, target: Path) -> None:
    """The same architecture with nothing from the source."""
    torch.manual_seed(recipe.model.seed)
    config = load_latent(bundled.SOURCE).config.with_head(recipe.model.variant, recipe.model.head_width)
    save(L2PModel(config).state_dict(), target, metadata.describe(metadata.PIXEL_INIT, config, init="scratch"))


def _scored_steps(arm: Arm) -> set[int]:
    """The steps after which an arm is scored; 0 is before training."""
    if arm.group == FULL:
        every = max(1, arm.steps // SCORES_ON_THE_WAY)
        return set(range(every, arm.steps + 1, every))
    if arm.group == STARTS:
        return {0, *(max(1, round(part * arm.steps)) for part in PARTS)}
    return {arm.steps}


def _score_on_the_way(folder: RunFolder, steps: set[int], trainer: Trainer) -> None:
    """Add a line to the run's score curve and keep a few images, for the averaged weights."""
    if trainer.step not in steps:
        return
    path = _curve_path(folder)
    lines = read_metrics(path) if path.exists() else []
    with trainer.averaged() as model:
        scored = evaluate(f"step {trainer.step}", _pixel_sampler(model, SAMPLING_STEPS), WATCHED)
    few = to_uint8(scored.images[: report.SHOWN])
    save({"images": few}, _images_path(folder, trainer.step), {"l2p.kind": "images"}, overwrite=True)
    # A resumed run recomputes the lines after its save.
    lines = [line for line in lines if line["step"] < trainer.step] + [{"step": trainer.step, **scored.scores}]
    write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _kept_images(folder: RunFolder) -> report.ImagesByStep:
    return {
        line["step"]: from_uint8(load_tensors(_images_path(folder, line["step"]))[0]["images"])
        for line in read_metrics(_curve_path(folder))
    }


def _curve_path(folder: RunFolder) -> Path:
    return folder.path / "scores.jsonl"


def _images_path(folder: RunFolder, step: int) -> Path:
    return folder.path / f"images-{step:06d}.safetensors"


def _sampler(folder: RunFolder) -> ImageGenerator:
    """Generates images with a run's trained model, from its delta."""
    return _pixel_sampler(delta.load_model(folder.delta, folder.init, dtype=torch.float32).eval(), STEPS)


def _pixel_sampler(model: L2PModel, steps: int) -> ImageGenerator:
    return partial(bundled.pixel_images, model, tiny.load_words(), steps=steps)


def _score(folder: Path, name: str, sampler: ImageGenerator, captions: int) -> Scored:
    """A stage's final images and scores, computed once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _scores_path(folder)
    if not path.exists():
        scored = evaluate(name, sampler, captions)
        save({"images": to_uint8(scored.images)}, path, {"scores": json.dumps(scored.scores)})
    tensors, about = load_tensors(path)
    return Scored(from_uint8(tensors["images"]), json.loads(about["scores"]))


def _has_stages(output: Path) -> bool:
    """Whether this benchmark of an earlier version created the folder: the source is scored first."""
    return _scores_path(output / "source").is_file()


def _scores_path(folder: Path) -> Path:
    return folder / "evaluation.safetensors"


FOLDER = OwnFolder("l2p benchmark transfer", "benchmark-transfer.txt", _has_stages, report.RESULTS)
