"""Draw the pictures of the help pages on both spaces: `python docs/draw_hybrid.py` writes web/docs/images/*.jpg.

All are made by the bundled models, in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from comfyui_l2p.l2p_core import delta, flow, hybrid
from comfyui_l2p.l2p_core.growth import grow
from comfyui_l2p.l2p_core.model import L2PModel
from comfyui_l2p.l2p_core.tiny import bundled

FOLDER = Path(__file__).resolve().parents[1] / "web" / "docs" / "images"
CAPTION = "a purple cross at the top left on a grey background"
SEED, STEPS, CFG = 4, 12, 2.0
SIDE, GAP, LINE = 176, 12, 44  # pixels of a tile, between tiles, and of the words below it
Tile = tuple[str, Tensor]


class Models:
    """The bundled pair with the features of one caption."""

    def __init__(self) -> None:
        self.source = bundled.TinySource()
        self.pixels: L2PModel = delta.load_model(bundled.DELTA, bundled.SOURCE, dtype=torch.float32).eval()
        words = self.source.words
        self.caption, self.negative = [words.encode(CAPTION)], [words.encode("")]

    def go(self, x: Tensor, start: float, end: float, *, latent: bool = False) -> tuple[Tensor, Tensor]:
        """From one noise level to another: the noisy image, and the model's estimate of the clean one."""
        model = self.source.model if latent else self.pixels
        sigmas = flow.sigmas_between(start, end, max(2, round(STEPS * (start - end))))
        with torch.no_grad():
            x, velocity = flow.integrate(model, x, self.caption, sigmas=sigmas, cfg=CFG, negative=self.negative)
        return x, x - end * velocity


def noise(number: int, *shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(SEED + number))


def switch(models: Models) -> list[list[Tile]]:
    """What the latents leave at three switches, and what the pixel model makes of it."""
    rows: list[list[Tile]] = [[], []]
    for level in (0.9, 0.65, 0.3):
        left, latents = to_pixels(models, level)
        rows[0].append((f"latents' image\nat switch {level:g}", latents))
        rows[1].append(("pixels finished", models.go(left, level, 0.0)[0]))
    return rows


def to_pixels(models: Models, level: float) -> tuple[Tensor, Tensor]:
    """Noisy pixels handed over by the latents, and the decoded estimate they come from."""
    codec = models.source.autoencoder
    _, clean = models.go(noise(0, 16, 8, 8), 1.0, level, latent=True)
    with torch.no_grad():
        return hybrid.latents_to_pixels(clean, level, noise(1, 3, 64, 64), codec), codec.decode(clean)


def latent_to_pixels(models: Models) -> list[list[Tile]]:
    """The three images of a hand-over to pixels."""
    noisy, decoded = to_pixels(models, 0.5)
    finished, _ = models.go(noisy, 0.5, 0.0)
    return [
        [
            ("latents' image at 0.5,\ndecoded", decoded),
            ("pixels out, with noise", noisy),
            ("sampled to the end", finished),
        ]
    ]


def pixels_to_latent(models: Models) -> list[list[Tile]]:
    """The three images of a hand-over to latents; noisy latents are shown decoded."""
    codec = models.source.autoencoder
    _, clean = models.go(noise(0, 3, 64, 64), 1.0, 0.5)
    with torch.no_grad():
        noisy = hybrid.pixels_to_latents(clean, 0.5, noise(1, 16, 8, 8), codec)
        finished = codec.decode(models.go(noisy, 0.5, 0.0, latent=True)[0])
        shown = codec.decode(noisy)
    return [
        [
            ("pixels' image at 0.5", clean),
            ("latents out, with noise\n(decoded)", shown),
            ("sampled to the end", finished),
        ]
    ]


def grow_pixels(models: Models) -> list[list[Tile]]:
    """A half-finished image before and after growth, and its end beside one of that size from the start."""
    small, _ = models.go(noise(0, 3, 64, 64), 1.0, 0.35)
    grown, level = grow(small, 0.35, noise(1, 3, 128, 128))
    finished, _ = models.go(grown, level, 0.0)
    alone, _ = models.go(noise(0, 3, 128, 128), 1.0, 0.0)
    return [
        [
            ("64 x 64 at 0.35", small),
            (f"grown to 128 x 128,\nnow at {level:.2f}", grown),
            ("sampled to the end", finished),
            ("without growth:\n128 x 128 throughout", alone),
        ]
    ]


def draw(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Tiles with their words below."""
    width = len(rows[0]) * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (SIDE + GAP + LINE) + GAP), (24, 26, 31))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, tiles in enumerate(rows):
        for column, (words, image) in enumerate(tiles):
            x, y = GAP + column * (SIDE + GAP), GAP + row * (SIDE + GAP + LINE)
            levels = image[0].clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(levels).resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y))
            pen.multiline_text((x, y + SIDE + 4), words, font=font, fill=(236, 236, 236))
    return sheet


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    models = Models()
    for name, made in {
        "hybrid-switch": switch,
        "latent-to-pixels": latent_to_pixels,
        "pixels-to-latent": pixels_to_latent,
        "grow-pixels": grow_pixels,
    }.items():
        draw(made(models)).save(FOLDER / f"{name}.jpg", quality=82, optimize=True)


if __name__ == "__main__":
    main()
