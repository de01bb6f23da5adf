"""What ComfyUI imports to learn that there is an NPU: torch itself has loaded the simulated one by its entry point."""

import torch

torch.version.cuda = None  # a torch for NPUs is built without CUDA
