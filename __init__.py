"""ComfyUI-L2P: latent diffusion transformers turned into pixel generators (arXiv 2605.12013).

The repository root is at once the ComfyUI node pack (``custom_nodes/<folder>``) and the Python package
``comfyui_l2p``. Importing it needs neither ComfyUI nor torch: the host's nodes are imported only when the
host asks for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .l2p_core.version import __version__ as __version__

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ComfyExtension:
    """The host's door (V3 schema): called once by ComfyUI when it loads custom nodes."""
    from .nodes import L2PExtension

    return L2PExtension()
