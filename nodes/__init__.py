"""The ComfyUI nodes: each a schema and a call. `model/` is L2P as the host's own MODEL.

Files with nodes import only what schemas need; a node imports its implementation when it first runs. The host therefore
starts as fast as without the pack; a test lists the modules that must not be imported earlier.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .compare_node import CompareL2P
from .convert_nodes import ConvertToL2P, MergeDelta, SaveDelta
from .dual_node import DualLoader
from .evaluate_node import EvaluateL2P
from .hybrid_nodes import HybridSampler
from .hybrid_part_nodes import GrowPixels, LatentToPixels, PartSigmas, PixelsToLatent
from .load_image_node import LoadDeepImage
from .load_nodes import Demo, DemoSource, L2PLoader
from .messages import routes
from .model import stock
from .pixel_nodes import EmptyPixels, ImageToPixels, PixelsToImage
from .prompts_node import L2PPrompts
from .quantise_node import SaveQuantised
from .sampler_node import PixelSampler
from .save_nodes import SaveTIFF
from .synthesize_node import SynthesizeDataset
from .train_node import TrainL2P


class L2PExtension(ComfyExtension):
    """The host's entry point to the pack's nodes."""

    async def on_load(self) -> None:
        """Make L2P files known to the host's own loaders, and our routes to its server."""
        stock.register()
        routes.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes in menu order."""
        return [
            L2PLoader,
            DualLoader,
            PixelSampler,
            HybridSampler,
            EmptyPixels,
            ImageToPixels,
            PixelsToImage,
            LatentToPixels,
            PixelsToLatent,
            GrowPixels,
            PartSigmas,
            LoadDeepImage,
            SaveTIFF,
            ConvertToL2P,
            SaveDelta,
            MergeDelta,
            L2PPrompts,
            SaveQuantised,
            SynthesizeDataset,
            TrainL2P,
            CompareL2P,
            EvaluateL2P,
            Demo,
            DemoSource,
        ]
