"""`l2p evaluate geneval` and `dpg`: the images of a benchmark, by a model of this machine or by running hosts."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..l2p_core import tiny
from ..l2p_core.dataset.pictures import picture
from ..l2p_core.dataset.synthesis import GENERATES, FolderSettings
from ..l2p_core.files.lock import LOCK, held
from ..l2p_core.files.units import counted
from ..l2p_core.run.caption_source import CaptionSource
from ..l2p_core.sources import source_of
from ..l2p_core.tiny.bundled import TinySource, is_tiny
from ..l2p_core.tiny.generate import CFG, STEPS
from ..l2p_core.tiny.shapes import IMAGE_SIZE
from . import text_encoder
from .console import bar, count_progress, note
from .fleet import Fleet
from .host_client import HostClient
from .image_benchmarks import report as benchmark_report
from .image_benchmarks.benchmarks import BENCHMARKS, PER_PROMPT, Benchmark, Prompt, Shot, noise_rule, shots
from .image_benchmarks.layouts import FOLDERS, BenchmarkFolder, beside
from .interrupt import deferred_interrupt
from .sample_captions import encoder_device, encoder_files
from .sampler import Sampler
from .workflow import Workflow

TINY_SOURCE = "tiny-source"
_BATCH = 32
_OF_MODEL = ("delta", "side", "encoder", "tokenizer", "steps", "cfg", "shift", "tile", "device")
"""Options that a workflow replaces."""

IsStopped = Callable[[], bool]


def benchmark_command(args: argparse.Namespace, key: str) -> None:
    """Generate the missing images of a benchmark, and write the report beside them.

    Raises:
        ValueError: for unusable prompts, model, workflow or hosts, or a folder with other images or in use by another
            process.
        KeyboardInterrupt: after Ctrl-C or a signal that ends the process; finished images are complete.
    """
    benchmark = BENCHMARKS[key]
    _check(args)
    prompts = benchmark.read(args.prompts)
    with held(beside(args.output), LOCK, GENERATES, note):
        _make(args, benchmark, prompts)


def _make(args: argparse.Namespace, benchmark: Benchmark, prompts: Sequence[Prompt]) -> None:
    make = _hosts if args.workflow else _tiny_source if str(args.model) == TINY_SOURCE else _model
    made, images = make(args, benchmark, prompts)
    _note_count(benchmark, prompts)
    started, before = time.monotonic(), len(made.done)
    try:
        with (
            deferred_interrupt() as interrupt,
            bar("images", unit="image", total=len(made.wanted), initial=before) as progress,
        ):
            for _ in images(lambda: interrupt.requested) if made.todo else ():
                progress.update()
                if interrupt.requested:
                    raise KeyboardInterrupt
    finally:
        page = benchmark_report.write(made, len(made.done) - before, time.monotonic() - started)
    images_said = counted(len(made.done), "image")
    print(f"{made.folder}: {images_said}, {len(made.done) - before} of them made now. {page} describes them.")


def _check(args: argparse.Namespace) -> None:
    if (args.model is None) == (args.workflow is None):
        raise ValueError("Give either the model as --model FILE or a ComfyUI workflow as --workflow FILE.")
    if args.workflow and not args.host:
        raise ValueError(f"{args.workflow} needs a running ComfyUI: give its address with --host 127.0.0.1:8188.")
    if args.model and args.host:
        raise ValueError("--host goes with --workflow: remove it, or give a workflow in place of --model.")
    if args.workflow:
        for name in _OF_MODEL:
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} goes with --model: the workflow has its own settings, so set it there.")


def _note_count(benchmark: Benchmark, prompts: Sequence[Prompt]) -> None:
    if len(prompts) != benchmark.count:
        print(
            f"{benchmark.title} as published has {benchmark.count} prompts and this copy {len(prompts)}: the scores "
            "are not comparable with published ones.",
            file=sys.stderr,
        )


Images = Callable[[IsStopped], Iterator[object]]
"""Generates the missing images; yields after each, when it is written."""
Made = tuple[BenchmarkFolder, Images]


def _folder(
    args: argparse.Namespace, benchmark: Benchmark, prompts: Sequence[Prompt], settings: FolderSettings, own_seeds: bool
) -> BenchmarkFolder:
    wanted = shots(benchmark, prompts, args.seed, own_seeds)
    about = {**settings, "noise": noise_rule(args.seed, own_seeds)}
    return FOLDERS[benchmark.key](args.output, benchmark, wanted, about)


def _hosts(args: argparse.Namespace, benchmark: Benchmark, prompts: Sequence[Prompt]) -> Made:
    workflow = Workflow.load(args.workflow)
    hosts = [HostClient(address) for address in dict.fromkeys(args.host)]
    made = _folder(args, benchmark, prompts, workflow.settings(), own_seeds=True)

    def images(stopped: IsStopped) -> Iterator[object]:
        yield from Fleet(hosts, workflow, args.patience, note).make(made, stopped)

    return made, images


def _tiny_source(args: argparse.Namespace, benchmark: Benchmark, prompts: Sequence[Prompt]) -> Made:
    for name in ("delta", "side", "encoder", "tokenizer", "shift", "tile", "device"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} has no effect on the tiny source: remove it.")
    source = TinySource()
    for prompt in prompts:
        source.words.encode(prompt.text)  # unknown words are reported before anything is generated
    steps, cfg = args.steps or STEPS, CFG if args.cfg is None else args.cfg
    settings = {"model": source.name(steps, cfg), "steps": steps, "cfg": cfg, "side": IMAGE_SIZE}
    made = _folder(args, benchmark, prompts, settings, own_seeds=True)

    def images(_: IsStopped) -> Iterator[object]:
        todo = made.todo
        for start in range(0, len(todo), _BATCH):
            batch = todo[start : start + _BATCH]
            pixels = source.images([shot.prompt for shot in batch], [shot.seed for shot in batch], steps, cfg)
            for shot, image in zip(batch, pixels, strict=True):
                made.write(shot, picture(image))
                yield shot

    return made, images


def _model(args: argparse.Namespace, benchmark: Benchmark, prompts: Sequence[Prompt]) -> Made:
    sampler = Sampler(args)
    side = args.side or sampler.side
    captions = _captions(args, sampler, prompts)
    settings = {
        "model": sampler.identity,
        **{name: value for name, value in sampler.settings._asdict().items() if name != "denoise"},
        "side": side,
        "weights": args.weights,
    }
    made = _folder(args, benchmark, prompts, settings, own_seeds=False)

    def images(stopped: IsStopped) -> Iterator[object]:
        device = sampler.place(side, side)
        features = captions(device, made, stopped)
        sampler.load(source_of(sampler.config).encoder.max_tokens)
        negative = None if sampler.settings.cfg == 1 else features("")
        for prompt, missing in itertools.groupby(made.todo, key=lambda shot: shot.of):
            positive = features(prompt.text)
            for shot, noise in _with_noise(list(missing), side):
                made.write(shot, picture(sampler.image(positive, negative, noise, f"{prompt.name} {shot.number}")))
                yield shot

    return made, images


def _with_noise(missing: Sequence[Shot], side: int) -> Iterator[tuple[Shot, Tensor]]:
    """The missing images of a prompt with their noise: the generator's draw with the image's number."""
    wanted = {shot.number: shot for shot in missing}
    generator = torch.Generator().manual_seed(missing[0].seed)
    for number in range(PER_PROMPT):
        noise = torch.randn(1, 3, side, side, generator=generator)
        if number in wanted:
            yield wanted[number], noise


EncodeCaptions = Callable[[torch.device, BenchmarkFolder, IsStopped], Callable[[str], Tensor]]
"""Encodes all captions on a device, stores them beside the images, and returns the function that reads a caption's
features. Raises KeyboardInterrupt once it is stopped."""


def _captions(args: argparse.Namespace, sampler: Sampler, prompts: Sequence[Prompt]) -> EncodeCaptions:
    """How captions are encoded; all checks are done before it is called."""
    if is_tiny(sampler.config):
        for option in ("encoder", "tokenizer"):
            if getattr(args, option) is not None:
                raise ValueError(f"The tiny model has its own text encoder: remove --{option}.")
        words = tiny.load_words()
        for prompt in prompts:
            words.encode(prompt.text)
        return lambda device, made, stopped: words.encode
    files = encoder_files(args, sampler.base, sampler.config)

    def encoded(device: torch.device, made: BenchmarkFolder, stopped: IsStopped) -> Callable[[str], Tensor]:
        source = CaptionSource(
            made.beside / "captions",
            text_encoder.identity(files),
            lambda: text_encoder.TransformersEncoder(files, encoder_device(files, device)),
            max_tokens=files.published.max_tokens,
            itemsize=text_encoder.DTYPE.itemsize,
        )
        with count_progress("encoding captions", "caption") as show:

            def progress(done: int, total: int) -> None:
                if stopped():
                    raise KeyboardInterrupt
                show(done, total)

            return source.fill([prompt.text for prompt in prompts], progress).read

    return encoded
