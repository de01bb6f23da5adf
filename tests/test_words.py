"""What nodes show while they run, in Chinese: every sentence of the server's has its words in web/words.js."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from comfyui_l2p.l2p_core.run import pace
from comfyui_l2p.l2p_core.run.live import sentence
from comfyui_l2p.l2p_core.run.metrics import RunMetrics

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = (ROOT / "web" / "words.js").read_text(encoding="utf-8")
NAMES = re.compile(
    r"\b(L2P|KSampler|LATENT|VAE|GB|CPU|GPU|TensorBoard|NVIDIA H100|other|cfg|euler|simple|sigma|x|\dk|10k|large_model|"
    r"report\.html|\w+\.safetensors)\b"
)
"""Latin words that stay in a Chinese sentence."""

NUMBERS = re.compile(r"\d+(?:\.\d+)?(?:e\+\d+)?")


def string(literal: str) -> str:
    """A JavaScript string; a template's only place is for NUMBER."""
    if literal.startswith("`"):
        literal = '"' + literal[1:-1] + '"'
    text: str = json.loads(literal)
    return text


def table() -> list[tuple[re.Pattern[str], str]]:
    number = string(re.search(r"const NUMBER = (\".*\");", SCRIPT).group(1))  # type: ignore[union-attr]
    rows = SCRIPT[SCRIPT.index("const CHINESE") : SCRIPT.index("].map(")]
    rows = re.sub(r"^ *//.*$", "", rows, flags=re.MULTILINE)
    strings = [string(literal) for literal in re.findall(r'"(?:[^"\\]|\\.)*"|`[^`]*`', rows)]
    assert len(strings) % 2 == 0 and strings
    return [
        (re.compile(english.replace("${NUMBER}", number)), re.sub(r"\$(\d)", r"\\g<\1>", chinese))
        for english, chinese in zip(strings[::2], strings[1::2], strict=True)
    ]


def in_chinese(text: str) -> str:
    for english, chinese in table():
        text = english.sub(chinese, text)
    return text


def metrics(seconds_left: float, images_per_second: float) -> RunMetrics:
    step = {"step": 59, "loss": 1.0, "high_sigma_loss": 1.0, "lr": 1e-4, "grad_norm": 1.0, "images": 8, "seconds": 1.0}
    run = {"steps": 400, "seconds_left": seconds_left, "images_per_second": images_per_second, "memory_bytes": 1 << 30}
    return RunMetrics(**(step | run))  # type: ignore[arg-type]


def of_scripts() -> list[str]:
    """What the scripts themselves give to `say`."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "web").glob("*.js")]
    said = [found for text in texts for found in re.findall(r'say\("([^"]+)"\)', text)]
    return said + [found for text in texts for found in re.findall(r'sentence: "([^"]+)"', text)]


RUNNING = [sentence(metrics(seconds, speed)) for seconds in (30, 3000, 90000) for speed in (3, 1e5)]
FIXED = [
    "Preparing",
    "Encoding captions: 20%",
    "Looking at images: 100%",
    "Converting: 5%",
    "Loading: 5%",
    "Images of the source: 5%",
    "Montage: 40%",
    "Montage of step 50",
    "Finished after 400 steps: l2p_tiny.safetensors",
    "Stopped after 60 of 400 steps; all is saved.",
    "Stopped after 60 of 400 steps; the last save is of step 50.",
    "Stopped after 60 of 400 steps; run it again to resume from the last save.",
    "Stopped; run it again to resume from the last save.",
    "Tiny L2P model, 64 x 64 pixels. In KSampler: 30 steps, cfg 2, euler, simple.",
    "L2P 4k model, 4096 x 4096 pixels. In KSampler: 50 steps, cfg 4, euler, simple.",
    "This is a pixel initialisation that has not been trained: it generates noise. Train it with Train L2P first.",
    "Needs about 0.1 GB of memory: frozen weights 0.0053, trained weights 0.011, optimiser 0.021, averages 0.011, "
    "gradients 0.004, activations 0.084. Nothing is checkpointed. Needs about 0.1 GB of disk space: "
    "initialisation 0.008, state 0.043, the state before it, until a save succeeds 0.043, delta 0.011, its "
    "published copy 0.011, montages 0.1, metrics and report 0.0035, images to train on 0.1, of which 0.008 exist "
    "already.",
    "Needs about 9.1 GB of GPU memory: streamed weights 0.0053, gathered blocks 0.011, the GPU's driver 0.021; and "
    "2.1 GB of RAM: trained weights 1.2. 3 of 30 blocks keep their activations and are not recomputed.",
    "Resuming after step 40 of 100.",
    "TensorBoard is not installed, so no event files are written; see report.html.",
    pace.sentence(None, 100, Path("run")),
    *(
        pace.sentence(pace.Pace(seconds, 5, device, Path(folder)), 100, Path("run"))
        for seconds in (0.2, 20, 2000)
        for device, folder in (("CPU with 2 threads", "run"), ("NVIDIA H100", "other"))
    ),
    "Encoding prompts: 1 of 256",
    "the source: image 1 of 4",
    "the pixel model: image 2 of 4",
    "4 pairs",
    "1 pair",
    "1 image, 1 of them made now",
    "Finished after 1 step: l2p_tiny.safetensors",
    "Stopped with 1 of 5 prompts; run it again for the rest.",
    "3 of 20 prompts, 2 texts rejected, about 40 seconds left",
    "20 prompts, 17 of them written now",
    "Plan: latents 64 x 64, noise 1.00 to 0.50, 20 steps; pixels 96 x 64, noise 0.50 to 0.00, 1 step. 41 evaluations "
    "in all.",
    "Done: pixels 1024 x 1024, noise 1.00 to 0.00, 30 steps. 60 evaluations in all.",
    "Done: pixels 150 x 150, noise 0.4132 to 0.00, 3 steps. 6 evaluations in all. 150 x 150 is much larger than the "
    "64 x 64 pixels that this model was trained at: the image may come out wrong. Connect a model for larger images as "
    "large_model.",
    "Growing to 2048 x 2048 at noise level 0.31: below 0.53 the image may lack fine detail.",
    "39% of the latent model's weights are shared.",
    "Values from -0.0210 to 1.0021; 0.52% lie beyond black (0) and white (1).",
    "3 of 20 images, about 40 seconds left",
    "Stopped with 3 of 20 images; run it again to make the rest.",
    "Failed with 3 of 20 images; run it again to make the rest.",
    "20 images, 17 of them made now",
    "1024 x 1024 is much larger than the 64 x 64 pixels that this model was trained at: the image may come out wrong. "
    "Width and height 0 take the model's own size.",
]


@pytest.mark.parametrize("text", [*RUNNING, *FIXED, *of_scripts()])
def test_no_english_is_left(text: str) -> None:
    chinese = in_chinese(text)
    assert not re.search("[A-Za-z]", NUMBERS.sub("", NAMES.sub("", chinese))), chinese
    assert not re.search(r"[\u4e00-\u9fff][,;:.]", chinese), chinese
    assert NUMBERS.findall(text) == NUMBERS.findall(chinese)


def test_sentences_that_have_no_words_stay_as_they_are() -> None:
    text = "1 image(s) of 64x64 need about 12.5 GiB for one step, but there are 3.5 GiB: choose a smaller size, or 2."
    assert in_chinese(text) == text
