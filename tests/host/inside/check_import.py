"""What importing the pack costs the host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import asyncio, importlib.util, sys
sys.path.insert(0, sys.argv[1])
import utils.extra_config  # These are what main.py imports before it loads custom nodes.
from comfy.cli_args import args
args.cpu = True
import server, nodes, latent_preview, comfy_api.latest
import comfy_extras.nodes_custom_sampler
before = set(sys.modules)
root = sys.argv[2]
spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print("HEAVY", *[name for name in ("pack.l2p_core.trainer", "pack.nodes.training") if name in sys.modules])
print("RESULT", *sorted(new - {"pack"} - set(sys.stdlib_module_names)))
"""


def check_importing_brings_no_module_the_host_has_not_loaded() -> None:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, os.environ["COMFYUI_PATH"], str(root)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    results = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results, done.stderr[-2000:]
    assert results[0] == []
    assert "HEAVY\n" in done.stdout, "training is loaded with the pack, before anybody trains"
