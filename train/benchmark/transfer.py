"""`l2p benchmark transfer`: what transfer keeps of the bundled source, and the paper's ablation at small scale.

Every training run and every score is a separate stage in the output folder and is computed once, so the benchmark can
be stopped and started again. Seeds are fixed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...l2p_core import convert, delta, tiny
from ...l2p_core.checkpoint import load_latent, save
from ...l2p_core.dataset.images import from_uint8, to_uint8
from ...l2p_core.files import metadata
from ...l2p_core.files.tensor_file import load_tensors
from ...l2p_core.model import L2PModel
from ...l2p_core.run import recipe as recipes
from ...l2p_core.run.data import RunData, tiny_images
from ...l2p_core.run.find import find
from ...l2p_core.run.folder import RunFolder
from ...l2p_core.run.loop import Run
from ...l2p_core.run.metrics import loss_by_sigma, read_metrics
from ...l2p_core.run.recipe import Recipe
from ...l2p_core.tiny import bundled
from ...l2p_core.tiny.shapes import evaluation_captions
from ...l2p_core.training.trainer import Trainer
from .. import figure
from ..own_folder import OwnFolder
from ..run import shown
from ..scores import Scored, evaluate, score_table

EVALUATED = 480  # captions of a final score: every combination of attributes once
WATCHED = 96  # captions of an intermediate score
SCORES_ON_THE_WAY = 8
SHOWN = 8  # images per row
CURVE_POINTS = 40
ABLATION_STEPS = 600
SOURCE = "latent source"
RESULTS = ("results.json", "results.md", "results.png")
MAIN = "L2P, full run"


@dataclass(frozen=True)
class Arm:
    """One training run: its name in tables, its folder, its recipe, and whether it starts from random weights."""

    name: str
    folder: str
    recipe: Recipe
    from_scratch: bool = False


def benchmark_transfer(
    output: Path,
    steps: int | None = None,
    ablation_steps: int | None = None,
    renderings: bool = False,
    write_delta: Path | None = None,
) -> None:
    """Run the missing stages, then write results.json, results.md and results.png, and print the table.

    Args:
        output: the folder of all stages.
        steps: of the full run; None uses the recipe "tiny".
        ablation_steps: of each run of the ablation.
        renderings: also train on clean renderings instead of the source's images, for comparison.
        write_delta: where to write the full run's delta on the source, in bfloat16, in the bundled form.

    Raises:
        ValueError: if the folder has results of something else.
    """
    FOLDER.check(output)
    recipe = recipes.load(find("tiny"))
    FOLDER.mark(output)
    all_arms = arms(recipe, steps or recipe.training.steps, ablation_steps or ABLATION_STEPS, renderings)
    source = bundled.TinySource()
    results = {SOURCE: _score(output / "source", SOURCE, lambda: source.images)}
    for arm in all_arms:
        folder = _train(arm, output)
        if write_delta and arm.name == MAIN:
            write_bundled_delta(folder, write_delta)
            print(f"{write_delta} written ({write_delta.stat().st_size / 1e6:.1f} MB).")
        results[arm.name] = _score(folder.path, arm.name, partial(_sampler, folder))
        _report(output, all_arms[0], results)


def arms(recipe: Recipe, steps: int, ablation_steps: int, renderings: bool) -> list[Arm]:
    """The full run, then the runs of the ablation at equal steps."""

    def arm(name: str, folder: str, count: int, kind: str = "tiny", from_scratch: bool = False, **training: Any) -> Arm:
        changed = dataclasses.replace(
            recipe,
            data=dataclasses.replace(recipe.data, kind=kind),
            training=dataclasses.replace(recipe.training, steps=count, **training),
        )
        return Arm(name, f"{folder}-{count}", changed, from_scratch)

    short = f"{ablation_steps} steps"
    found = [
        arm(MAIN, "full", steps),
        arm(f"shallow, {short}", "shallow", ablation_steps),
        arm(f"all layers, {short}", "all", ablation_steps, policy="all"),
        arm(f"from scratch, {short}", "scratch", ablation_steps, policy="all", from_scratch=True),
    ]
    if renderings:
        found.append(arm(f"shallow on renderings, {short}", "renderings", ablation_steps, kind="renderings"))
    return found


def write_bundled_delta(folder: RunFolder, target: Path) -> None:
    """The run's delta on the pixel initialisation, rewritten as a bfloat16 delta on the source itself."""
    tensors, about = load_tensors(folder.delta)
    halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    kept = {key: about[key] for key in (metadata.SOURCE_SHA256, metadata.SEED, metadata.INIT)}
    delta.save(halved, bundled.SOURCE, target, kept, overwrite=True)


def _train(arm: Arm, output: Path) -> RunFolder:
    """Train an arm, resuming if it was stopped; the arms share their images."""
    folder = RunFolder(output / arm.folder)
    with folder.held():
        _train_in(folder, arm, output)
    return folder


def _train_in(folder: RunFolder, arm: Arm, output: Path) -> None:
    # Also for a finished arm: another recipe's must not pass for this one.
    folder.begin(arm.recipe)
    if (folder.path / "finished").exists():
        return
    if not folder.init.exists():
        (_scratch if arm.from_scratch else _convert)(arm.recipe, folder.init)
    print(f"{arm.name}: {folder.path}")
    every = max(1, arm.recipe.training.steps // SCORES_ON_THE_WAY)
    with shown(arm.recipe.training.steps) as hooks:
        images = tiny_images(arm.recipe.data, output / "images", hooks.working)
        run = Run(arm.recipe, folder, folder.init, RunData(images), hooks=hooks)
        finished = run.go(partial(_score_on_the_way, folder, every) if arm.name == MAIN else None)
    if not finished:
        raise KeyboardInterrupt
    (folder.path / "finished").write_text("", encoding="utf-8")


def _convert(recipe: Recipe, target: Path) -> None:
    convert.convert(
        bundled.SOURCE,
        target,
        variant=recipe.model.variant,
        head_width=recipe.model.head_width,
        seed=recipe.model.seed,
        init=recipe.model.init,
    )


def _scratch(recipe: Recipe, target: Path) -> None:
    """The same architecture with nothing from the source."""
    torch.manual_seed(recipe.model.seed)
    config = load_latent(bundled.SOURCE).config.with_head(recipe.model.variant, recipe.model.head_width)
    save(L2PModel(config).state_dict(), target, metadata.describe(metadata.PIXEL_INIT, config, init="scratch"))


def _score_on_the_way(folder: RunFolder, every: int, trainer: Trainer) -> None:
    """Add a line to the run's score curve, for the averaged weights."""
    if trainer.step % every:
        return
    path = _curve_path(folder)
    lines = read_metrics(path) if path.exists() else []
    with trainer.averaged() as model:
        sampler = partial(bundled.pixel_images, model, tiny.load_words())
        scores = evaluate(f"step {trainer.step}", sampler, WATCHED).scores
    # A resumed run recomputes the lines after its save.
    lines = [line for line in lines if line["step"] < trainer.step] + [{"step": trainer.step, **scores}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _curve_path(folder: RunFolder) -> Path:
    return folder.path / "scores.jsonl"


def _sampler(folder: RunFolder) -> Any:
    """Generates images with an arm's trained model, from its delta."""
    model = delta.load_model(folder.delta, folder.init, dtype=torch.float32).eval()
    return partial(bundled.pixel_images, model, tiny.load_words())


def _has_stages(output: Path) -> bool:
    """Whether this benchmark of an earlier version created the folder: the source is scored first."""
    return _scores_path(output / "source").is_file()


def _scores_path(folder: Path) -> Path:
    return folder / "evaluation.safetensors"


FOLDER = OwnFolder("l2p benchmark transfer", "benchmark-transfer.txt", _has_stages, RESULTS)


def _score(folder: Path, name: str, make_sampler: Callable[[], Any]) -> Scored:
    """A stage's final images and scores, computed once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _scores_path(folder)
    if not path.exists():
        scored = evaluate(name, make_sampler(), EVALUATED)
        save({"images": to_uint8(scored.images)}, path, {"scores": json.dumps(scored.scores)})
    tensors, about = load_tensors(path)
    return Scored(from_uint8(tensors["images"]), json.loads(about["scores"]))


def _report(output: Path, main: Arm, results: dict[str, Scored]) -> None:
    """The table, the numbers and the figure of all stages."""
    scores = {name: scored.scores for name, scored in results.items()}
    curve = read_metrics(_curve_path(RunFolder(output / main.folder)))
    text = score_table(scores, source=SOURCE)
    numbers = {
        "captions": EVALUATED,
        "torch": torch.__version__,
        "recipe": dataclasses.asdict(main.recipe),
        "scores": scores,
        "curve": curve,
    }
    (output / "results.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    (output / "results.md").write_text(text + "\n", encoding="utf-8")
    metrics = read_metrics(RunFolder(output / main.folder).metrics)
    steps, losses = loss_by_sigma(metrics, window=max(1, len(metrics) // CURVE_POINTS))
    on_the_way = {name: [line[name] for line in curve] for name in ("whole", "attributes")}
    figure.draw(
        output / "results.png",
        evaluation_captions(SHOWN),
        [figure.Row(name, scored.images[:SHOWN]) for name, scored in results.items()],
        [
            figure.Curves(steps, {f"sigma {name}": line for name, line in losses.items()}, "velocity error, full run"),
            figure.Curves([line["step"] for line in curve], on_the_way, "captions right, full run", percent=True),
        ],
        {name: values["whole"] for name, values in scores.items()},
    )
    print(text)
    print(f"{output / 'results.png'}, results.json and results.md written.")
