"""Reads the results of GenEval's and DPG-Bench's scorers: scores by task, beside those of the source.

GenEval's results are JSON lines, one an image, with `tag` and `correct`; its score is the mean over the six tasks of
the share of correct images. DPG-Bench's text has a line an image, then the means of its categories in per cent.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...l2p_core.dataset.tables import decoded

OVERALL = "Overall"
_NUMBER = r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|nan)"
_CATEGORY = re.compile(rf"^\t([^:]+): {_NUMBER}\s*$")
_DPG_SCORE = re.compile(rf"^DPG-Bench score: {_NUMBER}\s*$", re.MULTILINE)
_DPG_IMAGE = re.compile(rf"\.png(, {_NUMBER})+$")
_DPG_LEVELS = {"L1 category scores:": True, "L2 category scores:": False}
"""Headings of the text, and whether the lines below are read: the second level repeats the first in more detail."""


@dataclass(frozen=True)
class Scores:
    """One scorer's result.

    Attributes:
        benchmark: its title.
        path: of the file.
        images: that were scored; DPG-Bench counts squares of four.
        shares: the score of each task or category, and `OVERALL`, in [0, 1].
    """

    benchmark: str
    path: Path
    images: int
    shares: dict[str, float]


@dataclass(frozen=True)
class ScoreRow:
    """A line of the table: a pixel model's score, its source's, and their quotient; None without a source's, or if that
    is 0."""

    benchmark: str
    task: str
    pixel: float
    source: float | None

    @property
    def kept(self) -> float | None:
        """The share of the source's score that is kept."""
        return self.pixel / self.source if self.source else None


def read(path: Path) -> Scores:
    """Read a scorer's result file.

    Raises:
        ValueError: if it does not exist, is incomplete, or is neither GenEval's nor DPG-Bench's.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}: give the file that the benchmark's scorer wrote.")
    text = decoded(path)
    for read_as in (_geneval, _dpg):
        found = read_as(path, text)
        if found is not None:
            return found
    raise ValueError(
        f"{path} is not a result of GenEval's scorer (lines of JSON with tag and correct) or of DPG-Bench's (a text "
        "that ends in its score)."
    )


def table(pixel: Iterable[Scores], source: Iterable[Scores]) -> tuple[list[ScoreRow], list[str]]:
    """The scores of a pixel model beside those of its source, and notes on how comparable they are.

    Args:
        pixel: one or more results, of different benchmarks.
        source: those of the source for the same benchmarks, or none at all.

    Raises:
        ValueError: if a benchmark is given twice, or by one side only.
    """
    ours, theirs = _by_benchmark(pixel), _by_benchmark(source)
    for these, those, whose in ((ours, theirs, "the source"), (theirs, ours, "the pixel model")):
        for name, found in these.items():
            if theirs and name not in those:
                raise ValueError(
                    f"{found.path} is a result of {name}, and there is none of {name} from {whose}: compare results of "
                    "the same benchmark."
                )
    rows, notes = [], []
    for name, found in ours.items():
        other = theirs.get(name)
        for task, share in found.shares.items():
            rows.append(ScoreRow(name, task, share, other.shares.get(task) if other else None))
        if other and other.images != found.images:
            notes.append(
                f"{name}: the pixel model was scored on {found.images} images and the source on {other.images}, so "
                "they are not fully comparable."
            )
    return rows, notes


def _by_benchmark(results: Iterable[Scores]) -> dict[str, Scores]:
    found: dict[str, Scores] = {}
    for result in results:
        if result.benchmark in found:
            raise ValueError(
                f"{found[result.benchmark].path} and {result.path} are both results of {result.benchmark}: give one of "
                "the pixel model, and the source's behind --source."
            )
        found[result.benchmark] = result
    return found


def _geneval(path: Path, text: str) -> Scores | None:
    by_task: dict[str, list[bool]] = defaultdict(list)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            tag, correct = entry["tag"], entry["correct"]
        except (ValueError, KeyError, TypeError, RecursionError):
            tag, correct = None, None
        if not isinstance(tag, str) or not isinstance(correct, bool):
            if not by_task:
                return None
            raise ValueError(f"Line {number} of {path} is not an image's result of GenEval: score the images again.")
        by_task[tag].append(correct)
    if not by_task:
        return None
    shares = {task: sum(results) / len(results) for task, results in by_task.items()}
    shares[OVERALL] = sum(shares.values()) / len(shares)
    return Scores("GenEval", path, sum(map(len, by_task.values())), shares)


def _dpg(path: Path, text: str) -> Scores | None:
    lines = text.splitlines()
    images = [line for line in lines if _DPG_IMAGE.search(line)]
    score = _DPG_SCORE.search(text)
    if score is None:
        if images:
            raise ValueError(f"{path} has no line 'DPG-Bench score': the scorer was stopped, so let it finish.")
        return None
    shares: dict[str, float] = {}
    reading = False
    for line in lines:
        reading = _DPG_LEVELS.get(line.strip(), reading)
        category = _CATEGORY.match(line)
        if reading and category:
            shares[category[1].strip()] = float(category[2]) / 100
    shares[OVERALL] = float(score[1]) / 100
    if any(not 0 <= share <= 1 for share in shares.values()):
        raise ValueError(f"{path} has a score that is not between 0 and 100: score the images again.")
    return Scores("DPG-Bench", path, len(images), shares)
