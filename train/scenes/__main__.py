"""Make the second tiny world: its autoencoder, its source, and the source's scores.

    python -m comfyui_l2p.train.scenes --out DIR --minutes 60
    python -m comfyui_l2p.train.scenes --out DIR --minutes 9 --device cuda --batch 32 --finish --transfer 450
    python -m comfyui_l2p.train.scenes --out DIR --stage large --pixels FILE

Without --stage, the source is trained and then scored; --stage picture draws some of its images. --transfer then
compares pixel models made from it in all groups of `l2p benchmark transfer`; the training of the source takes 0.6 of
--minutes then, and the comparison, seed by seed, the rest. The same command again resumes it. --stage large trains a
pixel model for images of 256 pixels from one of 128, which `l2p benchmark transfer --world scenes --only full
--write-delta FILE` makes. Training resumes from DIR, or else begins from the weights that come with the package, with
fresh optimisers; --anew begins from random ones. The autoencoder of DIR is used, or else the package's; a new
autoencoder (--stage autoencoder) needs a new source.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...l2p_core.dataset.pictures import montage, picture
from ...l2p_core.device import accelerator
from ...l2p_core.tiny import load_source, scenes
from ...l2p_core.tiny.scenes import captions
from ...l2p_core.tiny.scenes.autoencoder import TrainedAutoencoder
from ...l2p_core.tiny.scenes.content import random_scenes
from ...l2p_core.tiny.scenes.rendering import render
from ...l2p_core.tiny.scenes.words import PhraseWords
from ...l2p_core.tiny.worlds import SCENES, scenes_of
from ..benchmark.transfer import benchmark_transfer
from ..benchmark.transfer_arms import GROUPS
from ..make_tiny_source import RunLog
from .autoencoder_training import SceneAutoencoderRecipe, train_autoencoder
from .large_training import STEPS, train_large
from .source_training import SceneSourceRecipe, SourceTraining, score_source, source_images

SCORED_CAPTIONS = 480
SCORED_STEPS = (30, 4)
SHOWN = 6
TRAINED_SHARE = 0.6
"""Of the minutes, where pixel models are compared afterwards."""
AHEAD = 32
"""Steps whose images a GPU renders at once."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's mistake is one sentence and exit code 2."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def run(arguments: argparse.Namespace) -> None:
    """Train and score what the arguments ask for."""
    began = time.monotonic()
    out: Path = arguments.out
    device = accelerator.named(arguments.device)
    torch.set_float32_matmul_precision("high")
    out.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "large":
        if arguments.pixels is None:
            raise ValueError("--stage large begins from a pixel model of 128 pixels: name its file with --pixels.")
        print(f"{train_large(arguments.pixels, SCENES, out / 'large', arguments.steps)} written.")
        return
    if arguments.stage == "autoencoder":
        log = RunLog(out / "autoencoder_run.jsonl")
        train_autoencoder(SceneAutoencoderRecipe(), arguments.minutes, device, log).save(
            out / "autoencoder.safetensors"
        )
        PhraseWords.make().save(out / "words.safetensors")
        return
    autoencoder = TrainedAutoencoder.load(_own(out, scenes.AUTOENCODER_PATH)).to(device)
    words = PhraseWords.load(_own(out, scenes.WORDS_PATH))
    if arguments.stage in ("source", "all"):
        recipe = dataclasses.replace(SceneSourceRecipe(), batch=arguments.batch)
        start = scenes.SOURCE_PATH if scenes.SOURCE_PATH.exists() and not arguments.anew else None
        ahead = 1 if device.type == "cpu" else AHEAD
        identity = autoencoder.encoder_identity()
        training = SourceTraining(recipe, out, device, identity, start, ahead=ahead, compiled=arguments.compile)
        share = TRAINED_SHARE if arguments.transfer else 1.0
        training.train(autoencoder, words, share * arguments.minutes, arguments.finish)
    if arguments.stage in ("score", "all"):
        write_scores(_own(out, scenes.SOURCE_PATH), autoencoder, words, device, out, arguments.captions)
    if arguments.transfer:
        files = (_own(out, path) for path in (scenes.SOURCE_PATH, scenes.AUTOENCODER_PATH, scenes.WORDS_PATH))
        rest = arguments.minutes - (time.monotonic() - began) / 60
        world = scenes_of(*files)
        benchmark_transfer(out, compared_steps=arguments.transfer, groups=tuple(GROUPS), world=world, minutes=rest)
    if arguments.stage == "picture":
        write_picture(_own(out, scenes.SOURCE_PATH), autoencoder, words, device, out)


def write_picture(
    source: Path, autoencoder: TrainedAutoencoder, words: PhraseWords, device: torch.device, out: Path
) -> None:
    """Draw renderings of the first evaluation captions, their reconstructions and the source's images, a row each."""
    texts = captions.evaluation_captions(SHOWN)
    generator = torch.Generator().manual_seed(0)
    rendered = render(random_scenes(SHOWN, generator, [captions.parse(text) for text in texts]).to(device))
    with torch.no_grad():
        restored = autoencoder.decode(autoencoder.encode(rendered))
    made = source_images(
        load_source(source).to(device), autoencoder, words, SHOWN, SCORED_STEPS[0], SceneSourceRecipe.cfg
    )
    sheet = montage(torch.cat([rendered.cpu(), restored.cpu(), made]), SHOWN)
    picture(sheet).save(out / "scenes.png")
    print("\n".join(texts))


def write_scores(
    source: Path,
    autoencoder: TrainedAutoencoder,
    words: PhraseWords,
    device: torch.device,
    out: Path,
    count: int,
) -> None:
    """Score the averaged weights at each number of steps, with the standard error of the whole caption's score."""
    model = load_source(source).to(device)
    log = RunLog(out / "source_scores.jsonl")
    cfg = SceneSourceRecipe.cfg
    for steps in SCORED_STEPS:
        scores = score_source(model, autoencoder, words, count, steps, cfg)
        error = math.sqrt(scores["whole"] * (1 - scores["whole"]) / count)
        log.write(captions=count, sampling_steps=steps, cfg=cfg, **scores, whole_error=round(error, 4))


def _own(out: Path, bundled: Path) -> Path:
    """The folder's own file of that name, or else the package's."""
    own = out / bundled.name
    return own if own.exists() else bundled


def _above_zero(kind: type[int] | type[float]) -> Callable[[str], float]:
    """A number above 0, for argparse."""

    def read(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m comfyui_l2p.train.scenes", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of state, weights and logs")
    parser.add_argument("--stage", choices=("autoencoder", "source", "score", "picture", "large", "all"), default="all")
    parser.add_argument(
        "--minutes",
        type=_above_zero(float),
        default=9.0,
        help="by the clock, of training; with --transfer of everything",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or another of torch's")
    parser.add_argument(
        "--batch", type=_above_zero(int), default=SceneSourceRecipe.batch, help="images of a step of the source"
    )
    parser.add_argument("--captions", type=_above_zero(int), default=SCORED_CAPTIONS, help="that a score is of")
    parser.add_argument("--finish", action="store_true", help="let the learning rate fall to 0 by the end")
    parser.add_argument(
        "--transfer", type=_above_zero(int), metavar="STEPS", help="compare pixel models, each trained so long"
    )
    parser.add_argument("--compile", action="store_true", help="compile the step on a CPU; needs a C++ compiler")
    parser.add_argument("--pixels", type=Path, metavar="FILE", help="the pixel model that --stage large begins from")
    parser.add_argument("--steps", type=_above_zero(int), default=STEPS, help=f"of --stage large (default: {STEPS})")
    parser.add_argument("--anew", action="store_true", help="begin from random weights")
    return parser


if __name__ == "__main__":
    main()
