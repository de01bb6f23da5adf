"""The tables and figures of `l2p benchmark transfer`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from ...l2p_core.files.atomic import write_bytes
from ...l2p_core.run.metrics import loss_by_sigma
from ...l2p_core.tiny.worlds import TinyWorld
from .. import figure
from ..console import table
from ..scores import Scored, score_table
from .transfer_arms import GROUPS, STARTS, Arm, in_group

SHOWN = 8
"""Images per row."""
SOURCE = "latent source"
RESULTS = ("results.json", "results.md", "results.png", "compared.png")
_CURVE_POINTS = 40
_MOST = 0.9  # of the source's score, as the aim of a start
_LAST = 0.1  # of the steps, over which the velocity error is averaged

Lines = Sequence[dict[str, Any]]
"""A JSON Lines file, one mapping per line."""
ImagesByStep = Mapping[int, Tensor]
"""(SHOWN, 3, H, W) in [-1, 1] after each scored step."""


@dataclass(frozen=True)
class ArmRun:
    """One run of a compared arm: its scores by step, its training metrics and a few images."""

    curve: Lines
    metrics: Lines
    images: ImagesByStep


@dataclass(frozen=True)
class ResultsSection:
    """A part of the results: the text with its tables, what goes into results.json, and the figure."""

    name: str
    text: str
    numbers: Mapping[str, Any]
    picture: str
    rows: Sequence[figure.ImageRow]
    curves: Sequence[figure.Curves]
    bars: Mapping[str, float]
    errors: Mapping[str, float] | None = None


def write(output: Path, parts: Sequence[ResultsSection], world: TinyWorld) -> None:
    """Write all results, and print the tables."""
    text = "\n\n".join(part.text for part in parts)
    numbers = {"torch": torch.__version__, "world": world.name} | {part.name: part.numbers for part in parts}
    write_bytes(output / "results.json", (json.dumps(numbers, indent=1) + "\n").encode())
    write_bytes(output / "results.md", (text + "\n").encode())
    for part in parts:
        captions = world.captions(len(part.rows[0].images))
        figure.draw(output / part.picture, captions, part.rows, part.curves, part.bars, part.errors)
    print(text)
    print(f"results.md, results.json and {', '.join(part.picture for part in parts)} written to {output}.")


def full(arm: Arm, scored: Mapping[str, Scored], metrics: Lines, curve: Lines, world: TinyWorld) -> ResultsSection:
    """The long run beside the source."""
    scores = {name: one.scores for name, one in scored.items()}
    captions = len(next(iter(scored.values())).images)
    steps, losses = loss_by_sigma(metrics, window=max(1, len(metrics) // _CURVE_POINTS))
    on_the_way = {name: [line[name] for line in curve] for name in ("whole", "attributes")}
    return ResultsSection(
        name="full",
        text=f"{captions} captions, one seed.\n\n{score_table(scores, SOURCE, world)}",
        numbers={
            "captions": captions,
            "recipe": dataclasses.asdict(arm.recipe),
            "scores": scores,
            "curve": list(curve),
        },
        picture="results.png",
        rows=[figure.ImageRow(name, one.images[:SHOWN]) for name, one in scored.items()],
        curves=[
            figure.Curves(steps, {f"sigma {name}": line for name, line in losses.items()}, "velocity error, full run"),
            figure.Curves([line["step"] for line in curve], on_the_way, "captions right, full run", percent=True),
        ],
        bars={name: values["whole"] for name, values in scores.items()},
    )


def compared(
    arms: Sequence[Arm], source: Scored, runs: Mapping[str, Sequence[ArmRun]], world: TinyWorld
) -> ResultsSection:
    """The compared arms, group by group, with means and standard errors over their seeds."""
    seeds = len(runs[arms[0].name])
    recipe = arms[0].recipe
    groups = [group for group in GROUPS if any(arm.group == group for arm in arms[1:])]
    over = f"{seeds} seeds; mean ± standard error of the mean over them" if seeds > 1 else "one seed"
    text = [
        f"{recipe.training.steps} steps of {recipe.data.batch_size} images, {len(source.images)} captions, {over}.",
        *(f"{GROUPS[group].capitalize()}:\n\n{_group_table(arms, group, source, runs, world)}" for group in groups),
    ]
    starts = in_group(arms, STARTS)
    if STARTS in groups:
        text.append(f"Whole captions on the way:\n\n{_way_table(starts, runs, source)}")
    whole = {arm.name: _last(runs[arm.name], "whole") for arm in arms}
    return ResultsSection(
        name="compared",
        text="\n\n".join(text),
        numbers={
            "captions": len(source.images),
            "recipe": dataclasses.asdict(recipe),
            "source": source.scores,
            "arms": {arm.name: [list(run.curve) for run in runs[arm.name]] for arm in arms},
        },
        picture="compared.png",
        rows=[figure.ImageRow(SOURCE, source.images[:SHOWN]), *(row for arm in starts for row in _way_rows(arm, runs))],
        curves=[_way_curves(starts, runs)],
        bars={SOURCE: source.scores["whole"]} | {name: mean(values) for name, values in whole.items()},
        errors={SOURCE: 0.0} | {name: _error(values) for name, values in whole.items()},
    )


def _group_table(
    arms: Sequence[Arm], group: str, source: Scored, runs: Mapping[str, Sequence[ArmRun]], world: TinyWorld
) -> str:
    """One row per arm, at the end of its training."""
    columns = ("whole", *world.attributes)
    rows = [[SOURCE, *(f"{source.scores[column]:.1%}" for column in columns), f"{source.scores['patch_grid']:.2f}", ""]]
    for arm in in_group(arms, group):
        of_arm = runs[arm.name]
        each = [_with_error(_last(of_arm, column), percent=True) for column in columns]
        grid = _with_error(_last(of_arm, "patch_grid"), digits=2)
        rows.append([arm.name, *each, grid, _with_error([_final_loss(run) for run in of_arm], digits=3)])
    return table(["arm", "whole caption", *world.attributes, "patch grid", "velocity error"], rows)


def _way_table(starts: Sequence[Arm], runs: Mapping[str, Sequence[ArmRun]], source: Scored) -> str:
    """One row per start, one column for each step that is scored, and when it reached most of the source's score."""
    batch = starts[0].recipe.data.batch_size
    seen = [step * batch for step in _scored_steps(starts, runs)]
    rows = []
    for arm in starts:
        scores = _on_the_way(runs[arm.name])
        reached = _reached(seen, [mean(values) for values in scores], _MOST * source.scores["whole"])
        rows.append([arm.name, *(_with_error(values, percent=True) for values in scores), reached])
    return table(["start", *(f"{images} images" for images in seen), f"{_MOST:.0%} of the source's after"], rows)


def _reached(images: Sequence[int], scores: Sequence[float], aim: float) -> str:
    """Between which scored numbers of images the score first reached the aim."""
    first = next((index for index, score in enumerate(scores) if score >= aim), None)
    if first is None:
        return f"more than {images[-1]}"
    return f"{images[first - 1]} to {images[first]}" if first else f"{images[0]}"


def _way_rows(arm: Arm, runs: Mapping[str, Sequence[ArmRun]]) -> list[figure.ImageRow]:
    """The first seed's images on the way."""
    batch = arm.recipe.data.batch_size
    return [
        figure.ImageRow(f"{arm.name}, {step * batch} images", images)
        for step, images in runs[arm.name][0].images.items()
    ]


def _way_curves(starts: Sequence[Arm], runs: Mapping[str, Sequence[ArmRun]]) -> figure.Curves:
    lines = {arm.name: [mean(values) for values in _on_the_way(runs[arm.name])] for arm in starts}
    return figure.Curves(_scored_steps(starts, runs), lines, "whole captions right", percent=True)


def _scored_steps(starts: Sequence[Arm], runs: Mapping[str, Sequence[ArmRun]]) -> list[int]:
    return [line["step"] for line in runs[starts[0].name][0].curve]


def _on_the_way(runs: Sequence[ArmRun]) -> list[list[float]]:
    """The seeds' scores of whole captions after each scored step."""
    return [[float(line["whole"]) for line in lines] for lines in zip(*(run.curve for run in runs), strict=True)]


def _last(runs: Sequence[ArmRun], column: str) -> list[float]:
    """Each seed's score after the last step."""
    return [float(run.curve[-1][column]) for run in runs]


def _final_loss(run: ArmRun) -> float:
    count = max(1, round(_LAST * len(run.metrics)))
    return mean(float(line["loss"]) for line in run.metrics[-count:])


def _with_error(values: Sequence[float], percent: bool = False, digits: int = 1) -> str:
    """The mean, and its standard error where there are two values or more."""
    factor, unit = (100, "%") if percent else (1, "")
    error = f" ± {_error(values) * factor:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values) * factor:.{digits}f}{error}{unit}"


def _error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
