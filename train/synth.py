"""`l2p synth`: turns prompts into a folder of training images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..l2p_core.config import VARIANTS
from ..l2p_core.dataset import prompts
from ..l2p_core.dataset.kept_pairs import KeptPairs, pair_earlier_images
from ..l2p_core.dataset.pictures import picture
from ..l2p_core.dataset.synthesis import GENERATES, FolderSettings, PlannedImage, SynthesisFolder, items
from ..l2p_core.files.lock import LOCK, held
from ..l2p_core.files.units import counted
from ..l2p_core.patch_pairs import PatchPairs
from ..l2p_core.tiny.autoencoder import LATENT_CHANNELS
from ..l2p_core.tiny.bundled import NAME, TinySource
from ..l2p_core.tiny.generate import CFG, STEPS
from ..l2p_core.tiny.shapes import IMAGE_SIZE, all_captions
from .console import bar, note
from .fleet import Fleet
from .host_client import HostClient
from .interrupt import Interrupt, deferred_interrupt
from .workflow import Workflow

BATCH = 32


def synth_command(args: argparse.Namespace) -> None:
    """Generate the missing images.

    Raises:
        ValueError: for unusable prompts, workflow or hosts, or a folder with other images or in use by another
            process.
        KeyboardInterrupt: after Ctrl-C or a signal that ends the process; finished images are complete.
    """
    tiny = str(args.source) == NAME
    _check(args, tiny)
    if args.prompts and args.prompts.is_file() and (skipped := prompts.skipped(args.prompts)):
        print(skipped, file=sys.stderr)
    wanted = items(prompts.read(args.prompts) if args.prompts else all_captions(), args.seeds, args.first)
    with held(args.output, LOCK, GENERATES, note):
        if tiny:
            _from_tiny(args.output, wanted, args.steps or STEPS, CFG if args.cfg is None else args.cfg)
        else:
            _from_hosts(args.output, wanted, Workflow.load(args.source), args.host, args.patience)


def _check(args: argparse.Namespace, tiny: bool) -> None:
    if tiny and args.host:
        raise ValueError("The bundled source needs no host: remove --host, or give a workflow in place of tiny.")
    if not tiny and not args.host:
        raise ValueError(f"{args.source} needs a running ComfyUI: give its address with --host 127.0.0.1:8188.")
    if not tiny and not args.prompts:
        raise ValueError("Give the prompts with --prompts FILE.")
    if not tiny and (args.steps or args.cfg is not None):
        raise ValueError("--steps and --cfg are for the bundled source: the workflow has its own.")


def _from_tiny(folder: Path, wanted: Sequence[PlannedImage], steps: int, cfg: float) -> None:
    source = TinySource()
    for prompt in dict.fromkeys(item.prompt for item in wanted):
        source.words.encode(prompt)  # unknown words are reported before anything is generated
    settings: FolderSettings = {
        "steps": steps,
        "cfg": cfg,
        "sampler": "euler",
        "scheduler": "simple",
        "shift": 3.0,
        "width": IMAGE_SIZE,
        "height": IMAGE_SIZE,
        "model": source.name(steps, cfg).split("-steps")[0],
    }
    made = SynthesisFolder(folder, wanted, settings)
    todo = made.todo
    with deferred_interrupt() as interrupt:
        _pair_earlier_images(made, source, interrupt)
        with _shown(made) as progress, KeptPairs(folder, _no_pairs()) as pairs:
            for start in range(0, len(todo), BATCH):
                batch = todo[start : start + BATCH]
                pixels = source.images([item.prompt for item in batch], [item.seed for item in batch], steps, cfg)
                pairs.add(pixels, source.autoencoder.encode(pixels))
                for item, image in zip(batch, pixels, strict=True):
                    made.write(item, picture(image))
                    progress.update()
                if interrupt.requested:
                    raise KeyboardInterrupt
    _report(made, len(todo))


def _pair_earlier_images(made: SynthesisFolder, source: TinySource, interrupt: Interrupt) -> None:
    with bar("pairs of earlier images", unit="image") as shown:

        def progress(done: int, total: int) -> None:
            if interrupt.requested:
                raise KeyboardInterrupt
            shown.total = total
            shown.update(done - shown.n)

        pair_earlier_images(made, _no_pairs(), source.autoencoder.encode, BATCH, progress)


def _no_pairs() -> PatchPairs:
    return PatchPairs(VARIANTS["1k"].patch_size, LATENT_CHANNELS)


def _from_hosts(
    folder: Path, wanted: Sequence[PlannedImage], workflow: Workflow, addresses: Sequence[str], patience: float
) -> None:
    hosts = [HostClient(address) for address in dict.fromkeys(addresses)]
    made = SynthesisFolder(folder, wanted, workflow.settings())
    todo = made.todo
    with deferred_interrupt() as interrupt, _shown(made) as progress:
        fleet = Fleet(hosts, workflow, patience, note)
        for _ in fleet.make(made, lambda: interrupt.requested):
            progress.update()
    _report(made, len(todo))


def _shown(made: SynthesisFolder) -> tqdm:
    """A bar over all images, with the time left."""
    return bar("images", unit="image", total=len(made.wanted), initial=len(made.done))


def _report(made: SynthesisFolder, now: int) -> None:
    print(f"{made.folder}: {counted(len(made.done), 'image')}, {now} of them made now.")
