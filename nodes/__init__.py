"""The ComfyUI nodes: each a schema and a call. `host.py` and the files beside it are all that touches ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import doctor as doctor
from . import stock
from .convert_nodes import ConvertToL2P, MergeDelta, SaveDelta
from .host import L2PModelConfig
from .load_nodes import Demo, DemoSource, Loader
from .pixel_nodes import EmptyPixels, ImageToPixels, PixelsToImage
from .sampler_node import PixelSampler
from .synthesize_node import SynthesizeDataset
from .train_node import TrainL2P


class L2PExtension(ComfyExtension):
    """What the host asks for the pack's nodes."""

    async def on_load(self) -> None:
        """Let the host's own loaders know L2P files."""
        stock.register(L2PModelConfig)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes, in the order of the menu."""
        return [
            Loader,
            PixelSampler,
            EmptyPixels,
            ImageToPixels,
            PixelsToImage,
            ConvertToL2P,
            SaveDelta,
            MergeDelta,
            SynthesizeDataset,
            TrainL2P,
            Demo,
            DemoSource,
        ]
