"""L2P Prompts on a running server, as far as it gets without a language model; `inside/check_prompts.py` has one."""

from __future__ import annotations

import urllib.error
from typing import Any

import graphs
import pytest
from host_server import Refused, Server


def prompts(**inputs: Any) -> graphs.Json:
    settings = {
        "clip": ["1", 1],
        "name": "mine",
        "count": 3,
        "seed": 0,
        "temperature": 0.9,
        "rewrite": "",
        "rewrite_file": "none",
    }
    return {
        "1": {"class_type": "L2PDemo", "inputs": {}},
        "2": {"class_type": "L2PPrompts", "inputs": settings | inputs},
    }


def test_a_text_encoder_that_cannot_write_is_named(server: Server) -> None:
    run = server.run(prompts())
    assert (
        run.error is not None and "This CLIP cannot write prompts: connect Qwen3-4B" in run.error["exception_message"]
    )
    assert not (server.base / "input" / "mine.csv").exists()


@pytest.mark.parametrize("name", ["", "a/b", "../a"])
def test_a_list_is_in_the_input_folder(server: Server, name: str) -> None:
    with pytest.raises(Refused) as refused:
        server.run(prompts(name=name))
    assert "name of the list is empty" in refused.value.sentences() or "contains a folder" in refused.value.sentences()


def test_its_outputs_fit_synthesis(server: Server) -> None:
    """The wire of the text, and that of the file's name, which the server lets into a list of choices."""
    for output, input in ((0, "prompts"), (1, "prompt_file")):
        graph = prompts()
        made = graphs.synthesize(**{input: ["2", output]})
        graph |= {"3": made["1"], "4": made["2"]}
        graph["4"]["inputs"] |= {"model": ["3", 0], "clip": ["3", 1], "vae": ["3", 2]}
        run = server.run(graph)
        assert run.error is not None and run.error["node_id"] == "2"


def test_a_report_is_a_page(server: Server) -> None:
    folder = server.base / "output" / "l2p_prompts" / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text("<!doctype html>", encoding="utf-8")
    assert server.get("/l2p/prompts?name=mine") == b"<!doctype html>"
    for name in ("other", "../mine", ""):
        with pytest.raises(urllib.error.HTTPError):
            server.get(f"/l2p/prompts?name={name}")
