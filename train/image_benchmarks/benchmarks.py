"""The prompts of GenEval and DPG-Bench, read from the user's copy of them.

GenEval (arXiv 2310.11513): 553 lines of JSON, evaluation_metadata.jsonl. DPG-Bench (arXiv 2403.05135): 1,065 text
files, one prompt each. Both score four images per prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...l2p_core.dataset.synthesis import PlannedImage
from ...l2p_core.dataset.tables import decoded, is_text

SEED = 42
"""GenEval's own seed, reset for every prompt."""
PER_PROMPT = 4


@dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark.

    Attributes:
        name: of its folder or file in the layout, without suffix.
        text: the caption.
        line: what the layout stores beside its images; GenEval's line of metadata, empty for DPG-Bench.
        task: the group it is scored in, empty if unknown.
    """

    name: str
    text: str
    line: str = ""
    task: str = ""


@dataclass(frozen=True)
class Shot(PlannedImage):
    """An image to generate: number `number` of a prompt's, counted from 0.

    Its seed is that of its prompt's noise; see `noise_rule`.
    """

    number: int
    of: Prompt


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        key: on the command line.
        title: its name.
        count: prompts of the published list.
        read: the prompts of a user's copy.
    """

    key: str
    title: str
    count: int
    read: Callable[[Path], list[Prompt]]


def read_geneval(path: Path) -> list[Prompt]:
    """GenEval's prompts, from evaluation_metadata.jsonl or the folder that holds it.

    Raises:
        ValueError: if there is no such file, or it is something else.
    """
    if path.is_dir():
        path = path / "evaluation_metadata.jsonl"
    if not path.is_file():
        raise ValueError(f"There is no file {path}: give evaluation_metadata.jsonl of your copy of GenEval's prompts.")
    # Not at the other ends of lines that Unicode knows, which JSON may contain.
    lines = [line.strip() for line in decoded(path).split("\n") if line.strip()]
    prompts = []
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            text, task = entry["prompt"], entry["tag"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = task = None
        if not isinstance(text, str) or not text.strip() or not is_text(text) or not isinstance(task, str):
            raise ValueError(
                f"Line {number + 1} of {path} is not JSON with a prompt and a tag: give evaluation_metadata.jsonl of "
                "GenEval."
            )
        prompts.append(Prompt(f"{number:05d}", text, line, task))
    if not prompts:
        raise ValueError(f"{path} holds no prompts: give evaluation_metadata.jsonl of GenEval.")
    return prompts


def read_dpg(path: Path) -> list[Prompt]:
    """DPG-Bench's prompts, from the folder of its text files.

    Raises:
        ValueError: if it is not such a folder, or a file is empty or has a name that the scorer would cut.
    """
    if not path.is_dir():
        raise ValueError(f"There is no folder {path}: give the folder with the .txt files of DPG-Bench's prompts.")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt" and not file.name.startswith("."))
    if not files:
        raise ValueError(f"{path} holds no .txt files: give the folder with DPG-Bench's prompts, one file each.")
    prompts = []
    for file in files:
        if "." in file.stem:
            raise ValueError(
                f"{file} has another dot in its name, at which DPG-Bench's scorer would cut it: rename it."
            )
        text = " ".join(decoded(file).split())
        if not text:
            raise ValueError(f"{file} is empty, so its prompt is missing: copy DPG-Bench's prompts again.")
        prompts.append(Prompt(file.stem, text))
    return prompts


BENCHMARKS = {
    each.key: each
    for each in (
        Benchmark("geneval", "GenEval", 553, read_geneval),
        Benchmark("dpg", "DPG-Bench", 1065, read_dpg),
    )
}


def shots(benchmark: Benchmark, prompts: Sequence[Prompt], seed: int, own_seeds: bool) -> list[Shot]:
    """The images of a benchmark, those of a prompt in sequence.

    Args:
        benchmark: for the names of the images.
        prompts: of it.
        seed: reset for every prompt.
        own_seeds: whether each image has a seed of its own, `seed` plus its number, because it is generated alone; else
            all images of a prompt take the noise of one generator in turn, as GenEval's own script does.
    """
    name = "{0}/samples/{1:04d}.png" if benchmark.key == "geneval" else "{0}.png#{1}"
    return [
        Shot(prompt.text, seed + number * own_seeds, name.format(prompt.name, number), number, prompt)
        for prompt in prompts
        for number in range(PER_PROMPT)
    ]


def noise_rule(seed: int, own_seeds: bool) -> str:
    """How the noise of images is drawn, as a phrase."""
    if own_seeds:
        return f"seeds {seed} to {seed + PER_PROMPT - 1} for the {PER_PROMPT} images of every prompt"
    return f"seed {seed}, reset for every prompt, whose {PER_PROMPT} images take its noise in turn"
