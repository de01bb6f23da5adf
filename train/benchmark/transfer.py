"""`l2p benchmark transfer`: what transfer keeps of a bundled source, and what it depends on.

One long run measures what a pixel model keeps. Shorter arms of equal length, each with several seeds, compare starts,
policies, training images and noise levels. Every run and every score is a stage in the output folder and is computed
once, so the benchmark can be stopped and started again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ...l2p_core import convert, delta
from ...l2p_core.checkpoint import load_latent, save
from ...l2p_core.dataset.images import from_uint8, to_uint8
from ...l2p_core.files import metadata
from ...l2p_core.files.atomic import write_bytes
from ...l2p_core.files.tensor_file import load_tensors
from ...l2p_core.initialise import FITTED
from ...l2p_core.model import L2PModel
from ...l2p_core.run.data import RunData, tiny_images, tiny_pairs
from ...l2p_core.run.folder import RunFolder
from ...l2p_core.run.loop import Run
from ...l2p_core.run.metrics import read_metrics
from ...l2p_core.run.recipe import Recipe
from ...l2p_core.tiny import bundled
from ...l2p_core.tiny.generate import STEPS
from ...l2p_core.tiny.image_set import ImageSet
from ...l2p_core.tiny.worlds import SHAPES, TinyWorld
from ...l2p_core.training.trainer import Trainer
from ..console import note
from ..own_folder import OwnFolder
from ..run import shown
from ..scores import ImageGenerator, Scored, evaluate
from . import transfer_report as report
from .transfer_arms import FULL, GROUPS, STARTS, Arm, compared_arms, full_arm, world_recipe

EVALUATED = 480  # captions of the full run's final score: every combination of attributes once
WATCHED = 96  # captions of every other score
SAMPLING_STEPS = 12  # of every other score
SEEDS = 3
SCORES_ON_THE_WAY = 8  # of the full run
PARTS = (0.01, 0.05, 0.2, 0.5, 1.0)  # of a compared start's steps, after which it is scored


def benchmark_transfer(
    output: Path,
    steps: int | None = None,
    compared_steps: int | None = None,
    seeds: int = SEEDS,
    groups: Collection[str] = (FULL, *GROUPS),
    write_delta: Path | None = None,
    world: TinyWorld = SHAPES,
    minutes: float | None = None,
) -> None:
    """Run the missing stages, then write the results as JSON, Markdown and figures, and print the tables.

    Args:
        output: the folder of all stages; those of another world than "shapes" go into a subfolder for its source.
        steps: of the full run; None takes those of the recipe "tiny".
        compared_steps: of each compared arm; None takes those of the recipe "demo".
        seeds: of each compared arm.
        groups: what to measure: `FULL`, keys of `GROUPS`.
        write_delta: where to write the full run's delta on the source, in bfloat16, in the bundled form.
        world: whose source is transferred.
        minutes: by the clock, from now; further seeds of the compared arms are left for another call if they would take
            longer. None measures them all.

    Raises:
        ValueError: if the folder has results of something else or is in use by another process, or a delta is asked
            for without the full run.
    """
    if write_delta and FULL not in groups:
        raise ValueError(f'--write-delta writes the full run\'s delta: add "{FULL}" to --only, or remove --only.')
    if world is not SHAPES:
        output = output / f"{world.name}-{world.identity()}"  # its source may be trained on between two calls
    FOLDER.check(output)
    ends = math.inf if minutes is None else time.monotonic() + 60 * minutes
    with FOLDER.held(output):
        stages = Stages(output, world)
        parts = []
        if FULL in groups:
            parts.append(_full_part(stages, full_arm(world_recipe(world, "tiny"), steps), write_delta))
        if any(group in GROUPS for group in groups):
            arms = compared_arms(world_recipe(world, "demo"), groups, compared_steps)
            parts.append(_compared_part(stages, arms, seeds, ends))
        report.write(output, parts, world)


def _full_part(stages: Stages, arm: Arm, write_delta: Path | None) -> report.ResultsSection:
    source = stages.score("source", report.SOURCE, stages.source_sampler(STEPS), EVALUATED)
    folder = stages.train(arm, arm.recipe)
    if write_delta:
        write_bundled_delta(folder, write_delta, stages.world)
        print(f"{write_delta} written ({write_delta.stat().st_size / 1e6:.1f} MB).")
    model = delta.load_model(folder.delta, folder.init, dtype=torch.float32).eval()
    trained = stages.score(folder.path.name, arm.name, stages.sampler(model, STEPS), EVALUATED)
    scored = {report.SOURCE: source, arm.name: trained}
    return report.full(arm, scored, read_metrics(folder.metrics), read_metrics(_curve_path(folder)), stages.world)


def _compared_part(stages: Stages, arms: list[Arm], seeds: int, ends: float) -> report.ResultsSection:
    """The arms seed by seed, so that a stopped benchmark has complete comparisons of its first seeds.

    After the first, a seed begins only if it will be done at `ends`, should it take as long as the one before.
    """
    scored = stages.score("source-compared", report.SOURCE, stages.source_sampler(SAMPLING_STEPS), WATCHED)
    runs: dict[str, list[report.ArmRun]] = {arm.name: [] for arm in arms}
    took = 0.0
    for seed in range(seeds):
        began = time.monotonic()
        if seed and began + took > ends:
            print(f"Seed {seed} and later ones would take longer than --minutes: run the command again to add them.")
            break
        for arm in arms:
            folder = stages.train(arm, arm.seeded(seed), f"-seed{seed}")
            curve = read_metrics(_curve_path(folder))
            runs[arm.name].append(report.ArmRun(curve, read_metrics(folder.metrics), _kept_images(folder)))
        took = time.monotonic() - began
    return report.compared(arms, scored, runs, stages.world)


def write_bundled_delta(folder: RunFolder, target: Path, world: TinyWorld = SHAPES) -> None:
    """The run's delta on the pixel initialisation, rewritten as a bfloat16 delta on the source itself."""
    tensors, about = load_tensors(folder.delta)
    halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    kept = {key: about[key] for key in (metadata.SOURCE_SHA256, metadata.SEED, metadata.INIT)}
    delta.save(halved, world.source, target, kept, overwrite=True)


@dataclass(frozen=True)
class Stages:
    """Everything that is computed once and kept in the output folder: training images, runs and scores.

    Attributes:
        output: the folder.
        world: whose source is transferred.
    """

    output: Path
    world: TinyWorld

    def train(self, arm: Arm, recipe: Recipe, suffix: str = "") -> RunFolder:
        """Train an arm with this recipe, resuming if it was stopped; the arms share their images."""
        folder = RunFolder(self.output / (arm.folder + suffix))
        with folder.held(note):
            # Also for a finished arm: another recipe's must not pass for this one.
            folder.begin(recipe)
            if not (folder.path / "finished").exists():
                print(f"{arm.name}: {folder.path}", flush=True)
                self._train_in(folder, arm, recipe)
                (folder.path / "finished").write_text("", encoding="utf-8")
        return folder

    def _train_in(self, folder: RunFolder, arm: Arm, recipe: Recipe) -> None:
        with shown(arm.steps) as hooks:
            images = tiny_images(recipe.data, self.output / "images", hooks.working, self.world)
            if not folder.init.exists():
                (self._scratch if arm.from_scratch else partial(self._convert, images))(recipe, folder.init)
            data = RunData(images, self.world.load_words().encode)
            run = Run(recipe, folder, folder.init, data, hooks=hooks)
            run.fit_head()
            watch = partial(self._score_on_the_way, folder, _scored_steps(arm))
            watch(run.trainer)
            finished = run.go(watch)
        if not finished or hooks.should_stop():
            raise KeyboardInterrupt

    def _convert(self, images: ImageSet, recipe: Recipe, target: Path) -> None:
        convert.convert(
            self.world.source,
            target,
            variant=recipe.model.variant,
            head_width=recipe.model.head_width,
            seed=recipe.model.seed,
            init=recipe.model.init,
            pairs=tiny_pairs(images, self.world) if recipe.model.init == FITTED else None,
        )

    def _scratch(self, recipe: Recipe, target: Path) -> None:
        """The same architecture with nothing from the source."""
        torch.manual_seed(recipe.model.seed)
        config = load_latent(self.world.source).config.with_head(recipe.model.variant, recipe.model.head_width)
        save(L2PModel(config).state_dict(), target, metadata.describe(metadata.PIXEL_INIT, config, init="scratch"))

    def _score_on_the_way(self, folder: RunFolder, steps: set[int], trainer: Trainer) -> None:
        """Add a line to the run's score curve and keep a few images, for the averaged weights."""
        if trainer.step not in steps:
            return
        path = _curve_path(folder)
        lines = read_metrics(path) if path.exists() else []
        with trainer.averaged() as model:
            sampler = self.sampler(model, SAMPLING_STEPS)
            scored = evaluate(f"step {trainer.step}", sampler, WATCHED, self.world)
        few = to_uint8(scored.images[: report.SHOWN])
        save({"images": few}, _images_path(folder, trainer.step), {"l2p.kind": "images"}, overwrite=True)
        # A resumed run recomputes the lines after its save.
        lines = [line for line in lines if line["step"] < trainer.step] + [{"step": trainer.step, **scored.scores}]
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def sampler(self, model: L2PModel, steps: int) -> ImageGenerator:
        """Generates images with a pixel model."""
        world = self.world
        return partial(bundled.pixel_images, model, world.load_words(), steps=steps, side=world.side, cfg=world.cfg)

    def source_sampler(self, steps: int) -> ImageGenerator:
        """Generates images with the world's source."""
        return partial(bundled.TinySource(self.world).images, steps=steps, cfg=self.world.cfg)

    def score(self, folder: str, name: str, sampler: ImageGenerator, captions: int) -> Scored:
        """A stage's final images and scores, computed once."""
        path = _scores_path(self.output / folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            scored = evaluate(name, sampler, captions, self.world)
            save({"images": to_uint8(scored.images)}, path, {"scores": json.dumps(scored.scores)})
        tensors, about = load_tensors(path)
        return Scored(from_uint8(tensors["images"]), json.loads(about["scores"]))


def _scored_steps(arm: Arm) -> set[int]:
    """The steps after which an arm is scored; 0 is before training."""
    if arm.group == FULL:
        every = max(1, arm.steps // SCORES_ON_THE_WAY)
        return set(range(every, arm.steps + 1, every))
    if arm.group == STARTS:
        return {0, *(max(1, round(part * arm.steps)) for part in PARTS)}
    return {arm.steps}


def _kept_images(folder: RunFolder) -> report.ImagesByStep:
    return {
        line["step"]: from_uint8(load_tensors(_images_path(folder, line["step"]))[0]["images"])
        for line in read_metrics(_curve_path(folder))
    }


def _curve_path(folder: RunFolder) -> Path:
    return folder.path / "scores.jsonl"


def _images_path(folder: RunFolder, step: int) -> Path:
    return folder.path / f"images-{step:06d}.safetensors"


def _has_stages(output: Path) -> bool:
    """Whether this benchmark of an earlier version created the folder: the source is scored first."""
    return _scores_path(output / "source").is_file()


def _scores_path(folder: Path) -> Path:
    return folder / "evaluation.safetensors"


FOLDER = OwnFolder("l2p benchmark transfer", "benchmark-transfer.txt", _has_stages, report.RESULTS)
