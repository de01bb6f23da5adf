"""`l2p benchmark formats`: what rounding a model to fewer bits costs, by the golden vectors and the bundled model.

Weights are rounded as `l2p quantise` does and computed with in float32, so that nothing else differs.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch

from ...l2p_core import tiny
from ...l2p_core.checkpoint import load_model, save
from ...l2p_core.config import VARIANTS
from ...l2p_core.model import L2PModel
from ...l2p_core.quantise import BF16, FORMATS, quantise
from ...l2p_core.tiny import bundled
from ..console import table
from ..scores import evaluate, score_table
from .gpu_golden import GOLDEN, Case, own, published
from .gpu_measure import relative_error


def benchmark_formats(images: int = 96) -> None:
    """Print both tables as Markdown.

    Args:
        images: of the bundled model, one for each caption.
    """
    formats = (BF16, *(name for name in FORMATS if name != BF16))
    with tempfile.TemporaryDirectory(prefix="l2p-benchmark-") as name:
        work = Path(name)
        print(table(["golden vectors", *formats], [_golden_row(variant, formats, work) for variant in VARIANTS]))
        scores = {}
        for format in formats:
            target = work / f"{format}.safetensors"
            quantise(bundled.DELTA, target, format, base=bundled.SOURCE)
            sampler = partial(bundled.pixel_images, load_model(target, torch.float32).eval(), tiny.load_words())
            scores[format] = evaluate(format, sampler, images).scores
        print(score_table(scores, BF16))


def _golden_row(variant: str, formats: tuple[str, ...], work: Path) -> list[str]:
    """The relative error of the velocity of a variant's golden model in each format: the largest of its cases."""
    path = GOLDEN / f"dit_{VARIANTS[variant].patch_size}.safetensors"
    model, cases, _ = published(path) if path.exists() else own(variant)
    source, target = work / "golden.safetensors", work / "rounded.safetensors"
    save(model.state_dict(), source, overwrite=True)
    row = [variant]
    for format in formats:
        quantise(source, target, format, overwrite=True)
        rounded = load_model(target, torch.float32).eval()
        row.append(f"{max(_error(rounded, case) for case in cases):.4f}")
    return row


@torch.no_grad()
def _error(model: L2PModel, case: Case) -> float:
    velocity = model(case.pixels[None], torch.tensor([case.sigma]), [case.caption])[0]
    return relative_error(velocity[:, :: case.stride, :: case.stride], case.velocity)
