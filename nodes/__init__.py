"""The ComfyUI nodes: each a schema and a call. `model/` is L2P as the host's own MODEL.

The files with nodes import no more than schemas take; a node imports what does its work when it first runs. So the
host starts as fast as without the pack, and a test names what may not be imported before.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .convert_nodes import ConvertToL2P, MergeDelta, SaveDelta
from .load_nodes import Demo, DemoSource, Loader
from .messages import routes as routes  # which must be there when the server starts
from .model import stock
from .pixel_nodes import EmptyPixels, ImageToPixels, PixelsToImage
from .sampler_node import PixelSampler
from .synthesize_node import SynthesizeDataset
from .train_node import TrainL2P


class L2PExtension(ComfyExtension):
    """What the host asks for the pack's nodes."""

    async def on_load(self) -> None:
        """Let the host's own loaders know L2P files."""
        stock.register()

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
