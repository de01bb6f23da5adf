"""The commands that create one model file from others: convert, quantise, delta and merge."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..l2p_core import convert, delta, quantise
from ..l2p_core.files.about import STATED, stated
from ..l2p_core.files.metadata import broken_text
from ..l2p_core.files.model_file import check_name
from ..l2p_core.files.units import bytes_text
from ..l2p_core.initialise import FITTED
from ..l2p_core.patch_pairs import in_folder
from ..l2p_core.run import card
from ..l2p_core.tiny.bundled import resolve
from .console import byte_progress

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def convert_command(args: argparse.Namespace) -> None:
    """`l2p convert`: write the pixel initialisation and report the fate of every key."""
    if args.pairs and args.init != FITTED:
        raise ValueError("--pairs are what --init fitted fits to: add --init fitted, or leave --pairs out.")
    check_name(args.target)
    with byte_progress("converting") as progress:
        report = convert.convert(
            resolve(args.source),
            args.target,
            variant=args.variant,
            seed=args.seed,
            dtype=DTYPES[args.dtype] if args.dtype else None,
            init=args.init,
            head_width=args.head_width,
            layout=args.layout,
            pairs=in_folder(args.pairs) if args.pairs else None,
            about=_about(args),
            overwrite=args.overwrite,
            progress=progress,
        )
    print(report.summary())
    if args.keys:
        for entry in report.fates:
            print(f"  {entry.fate:<12}{entry.key}  ({entry.how})")


def quantise_command(args: argparse.Namespace) -> None:
    """`l2p quantise`: write a model in fewer bits and report what became of its parts."""
    check_name(args.target)
    with byte_progress("quantising") as progress:
        report = quantise.quantise(
            resolve(args.source),
            args.target,
            args.format,
            base=resolve(args.base) if args.base else None,
            unchecked_base=args.unchecked_base,
            about=_about(args),
            overwrite=args.overwrite,
            progress=progress,
        )
    print(report.summary())


def delta_command(args: argparse.Namespace) -> None:
    """`l2p delta`: write the weights that training changed."""
    check_name(args.target)
    with byte_progress("comparing") as progress:
        delta.extract(
            args.trained,
            resolve(args.base),
            args.target,
            dtype=DTYPES[args.dtype] if args.dtype else None,
            about=_about(args),
            overwrite=args.overwrite,
            progress=progress,
        )
    _written(args.target)
    described = card.write(args.target)
    print(f"{described} written." if described else f"{card.path_of(args.target)} is your own model card and was kept.")


def merge_command(args: argparse.Namespace) -> None:
    """`l2p merge`: write the trained model from its delta and base."""
    check_name(args.target)
    with byte_progress("merging") as progress:
        report = delta.merge(
            args.delta,
            resolve(args.base),
            args.target,
            unchecked_base=args.unchecked_base,
            about=_about(args),
            overwrite=args.overwrite,
            progress=progress,
        )
    _written(args.target)
    if report.broken:
        print(broken_text(report.broken))


def _about(args: argparse.Namespace) -> dict[str, str]:
    return stated(**{name: getattr(args, name) for name in STATED})


def _written(path: Path) -> None:
    print(f"{path} written ({bytes_text(path.stat().st_size)}).")
