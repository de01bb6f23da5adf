"""L2P Prompts with the host's text encoders: how a CLIP is asked, and what becomes of its answers."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import folder_paths
import pytest
import torch
from check_captions import clip
from fake_writers import prompt

from comfyui_l2p.l2p_core.dataset import prompts as lists
from comfyui_l2p.l2p_core.files.lock import LOCK, held
from comfyui_l2p.l2p_core.prompts import outputs
from comfyui_l2p.l2p_core.prompts.instructions import seed_of
from comfyui_l2p.l2p_core.prompts.scheme import slots
from comfyui_l2p.l2p_core.prompts.writer import Request, Turn, chatml
from comfyui_l2p.nodes import clip_writer
from comfyui_l2p.nodes.clip_writer import ClipWriter
from comfyui_l2p.nodes.folders import datasets, prompt_files
from comfyui_l2p.nodes.model.demo import load_demo
from comfyui_l2p.nodes.prompts_node import L2PPrompts

TURNS = (Turn("system", "Be {brief}."), Turn("user", "A fox."))


class Author:
    """A CLIP whose answers are prompts; all else is a real one's."""

    def __init__(self, real: Any, stops_at: int = 0, before: str = ""):
        self._real, self.stops_at, self.before = real, stops_at, before
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def tokenize(self, text: str, **options: Any) -> Any:
        if options:  # encoded otherwise
            self.asked.append(text)
        return self._real.tokenize(text, **options)

    def generate(self, tokens: Any, *, seed: int, **settings: Any) -> int:
        if len(self.asked) == self.stops_at:
            comfy.model_management.interrupt_current_processing()
        return seed

    def decode(self, answer: int) -> str:
        return f"<think>\n\n</think>\n\n{self.before}{prompt(answer)}"


@pytest.fixture(scope="module")
def encoder() -> Any:
    return clip()


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """datasketch, from the environment of the tests where the host has none."""
    folder = os.environ.get("DATASKETCH")
    if importlib.util.find_spec("datasketch"):
        return
    if not folder:
        pytest.skip("datasketch is not installed")
    spec = importlib.util.spec_from_file_location(
        "datasketch", Path(folder) / "__init__.py", submodule_search_locations=[folder]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["datasketch"] = module
    spec.loader.exec_module(module)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The host's folders, empty, and the node as the host sets it up."""
    before = folder_paths.get_input_directory(), folder_paths.get_output_directory()
    (tmp_path / "input").mkdir()
    folder_paths.set_input_directory(str(tmp_path / "input"))
    folder_paths.set_output_directory(str(tmp_path / "output"))
    monkeypatch.setattr(L2PPrompts, "hidden", SimpleNamespace(unique_id=None), raising=False)
    yield tmp_path
    folder_paths.set_input_directory(before[0])
    folder_paths.set_output_directory(before[1])


def run(author: Any, **inputs: Any) -> Any:
    settings = {"name": "mine", "count": 6, "seed": 3, "temperature": 0.9, "rewrite": "", "rewrite_file": "none"}
    with torch.inference_mode():
        return L2PPrompts.execute(clip=author, **(settings | inputs)).result


def check_a_text_encoder_writes_by_its_seed(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_writer, "MAX_TOKENS", 8)
    writer = ClipWriter(encoder, 0.9)
    with torch.inference_mode():
        one, other, again = (writer.write([Request(TURNS, seed)])[0] for seed in (1, 2, 1))
    assert one == again != other and "Be {brief}" not in one
    assert writer.name.startswith("ComfyUI ZImageTEModel")


def check_it_is_asked_not_to_think(encoder: Any) -> None:
    """Braces of a text are no placeholders, and the tokens are those of the whole conversation."""
    (tokens,) = encoder.tokenize(chatml(TURNS), llama_template="{}").values()
    text = encoder.tokenizer.qwen3_4b.tokenizer.decode([token for token, *_ in tokens[0]])
    assert text == chatml(TURNS) and text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def check_the_node_writes_a_list_that_synthesis_takes(encoder: Any, places: Path) -> None:
    author = Author(encoder)
    text, file, count = run(author)
    expected = [prompt(seed_of(3, slot, 0)) for slot in slots(6)]
    assert (text.split("\n"), file, count) == (expected, "mine.csv", 6)
    assert lists.read(places / "input" / file) == expected and lists.from_text(text) == expected
    assert prompt_files.report("mine") == places / "output" / "l2p_prompts" / "mine" / outputs.REPORT
    assert prompt_files.report("mine").is_file()
    assert datasets.input_files((".csv",)) == [file]
    again = Author(encoder)
    assert run(again)[0] == text and not again.asked


def check_it_is_interrupted_and_goes_on(encoder: Any, places: Path) -> None:
    author = Author(encoder, stops_at=5)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(author, count=8)
    written = lists.read(places / "input" / "mine.csv")
    assert len(written) == 5
    assert run(Author(encoder), count=8)[0].split("\n")[:5] == written


def check_short_prompts_are_rewritten(encoder: Any, places: Path) -> None:
    (places / "input" / "short.txt").write_text("a quiet lantern\n", encoding="utf-8")
    author = Author(encoder, before="A fox and a quiet lantern, ")
    text, _, count = run(author, rewrite="a fox", rewrite_file="short.txt", count=50)
    assert count == 2 and all(line.startswith("A fox") for line in text.split("\n"))
    assert "a fox" in author.asked[0] and "a quiet lantern" in author.asked[1]


def check_what_cannot_write_is_refused(encoder: Any, places: Path) -> None:
    _, demo = load_demo()
    with pytest.raises(ValueError, match="This CLIP cannot write prompts: connect Qwen3-4B"):
        run(demo)
    with pytest.raises(ValueError, match="The CLIP is empty"):
        run(None)
    with pytest.raises(ValueError, match="cannot generate text: update ComfyUI"):
        run(SimpleNamespace(cond_stage_model=None))


def check_another_list_is_not_replaced(encoder: Any, places: Path) -> None:
    (places / "input" / "mine.csv").write_text("prompt\na fox of mine\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has a file 'mine.csv' with prompts that were not written here"):
        run(Author(encoder))
    assert "of mine" in (places / "input" / "mine.csv").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="were written with seed 3, not 4") as refused:
        run(Author(encoder), name="other")
        run(Author(encoder), name="other", seed=4)
    assert "output/l2p_prompts" in str(refused.value) and str(places) not in str(refused.value)


def check_a_list_that_another_process_writes_is_left_alone(encoder: Any, places: Path) -> None:
    author = Author(encoder)
    run(author, count=2)
    before = (places / "input" / "mine.csv").read_bytes()
    work = prompt_files.work_folder("mine")
    with (
        held(work, LOCK, "writes prompts", print),
        pytest.raises(ValueError, match="mine is in use: .* writes prompts"),
    ):
        (work / outputs.TABLE).write_bytes(b"of the other process")
        run(author, count=6)
    assert (places / "input" / "mine.csv").read_bytes() == before


@pytest.mark.parametrize("name", ["", " ", "..", "a/b", "../a", ".csv"])
def check_names_stay_in_the_input_folder(places: Path, name: str) -> None:
    assert L2PPrompts.validate_inputs(name=name) is not True
    assert L2PPrompts.validate_inputs(name="mine") is True
    assert prompt_files.work_folder(" mine.csv ") == places / "output" / "l2p_prompts" / "mine"


def check_the_missing_library_is_named(encoder: Any, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ValueError, match="needs the library datasketch"):
        run(Author(encoder))
    assert not list((places / "input").iterdir())
