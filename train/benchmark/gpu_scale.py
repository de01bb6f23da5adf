"""The sizes that `l2p benchmark gpu` uses: in full, and for a quick check of the same code."""

from __future__ import annotations

from dataclasses import dataclass

from ...l2p_core.config import VARIANTS, ModelConfig, PixelConfig


@dataclass(frozen=True)
class Scale:
    """Sizes.

    Attributes:
        source: the backbone, with any head.
        head_width: factor on the head's channels.
        sides: of each variant's image, in pixels.
        tiles: sides of the head's fixed tiles by name, in pixels.
        caption: tokens.
        training_side: of the training images.
        blocks: trained at each end of the backbone.
        golden: whether the published code's outputs are compared, whose head has the full width.
        rounds: maximum rounds of a measurement, after a warm-up round.
        seconds: after which a measurement ends with fewer rounds.
        together: sampling steps that are queued one behind the other in a round, as in sampling.
        copied: bytes of the copies for measuring bandwidth.
        matmul: side of the square matrices.
        backend: of torch.compile.
    """

    source: ModelConfig
    head_width: float
    sides: dict[str, int]
    tiles: dict[str, int]
    caption: int
    training_side: int
    blocks: int
    golden: bool
    rounds: int
    seconds: float
    together: int
    copied: int
    matmul: int
    backend: str

    def config(self, variant: str) -> PixelConfig:
        """The pixel model of a variant."""
        return self.source.with_head(variant, self.head_width)


FULL = Scale(
    ModelConfig(),
    head_width=1.0,
    sides={name: row.pixels for name, row in VARIANTS.items()},
    tiles={"large": 2048, "small": 1024},
    caption=128,
    training_side=1024,
    blocks=5,
    golden=True,
    rounds=3,
    seconds=2.5,
    together=4,
    copied=1 << 30,
    matmul=8192,
    backend="inductor",
)
QUICK = Scale(
    ModelConfig(
        dim=32, head_dim=16, n_layers=3, n_refiner_layers=1, ffn_dim=48, caption_dim=32, t_freq_dim=32, t_hidden_dim=32,
        t_dim=32,
    ),
    head_width=1 / 32,
    sides={"1k": 64, "4k": 128, "8k": 128, "10k": 320},
    tiles={"large": 192, "small": 128},
    caption=40,
    training_side=64,
    blocks=1,
    golden=False,
    rounds=1,
    seconds=0.1,
    together=1,
    copied=1 << 16,
    matmul=64,
    backend="eager",
)  # fmt: skip
