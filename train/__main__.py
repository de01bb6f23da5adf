"""`python -m comfyui_l2p.train` is the command `l2p`, for launchers such as torchrun that start modules."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
