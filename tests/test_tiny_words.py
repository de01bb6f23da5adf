"""The tiny model's caption encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from comfyui_l2p.l2p_core import tiny
from comfyui_l2p.l2p_core.tiny import shapes
from comfyui_l2p.l2p_core.tiny.words import CAPTION_DIM, Words


def test_every_caption_of_the_set_is_known() -> None:
    words = tiny.load_words()
    for text in shapes.all_captions():
        assert len(words.encode(text)) == 1 + len(text.split())


def test_words_are_orthogonal_and_of_unit_size() -> None:
    table = Words.make().table
    expected = CAPTION_DIM * torch.eye(len(table))
    assert torch.allclose(table @ table.T, expected, atol=1e-3)


def test_the_empty_caption_is_the_start_token() -> None:
    words = tiny.load_words()
    assert torch.equal(words.encode(""), words.table[:1])
    assert torch.equal(words.encode("Red,  CIRCLE!"), words.encode("red circle"))


def test_unknown_words_are_named() -> None:
    words = tiny.load_words()
    with pytest.raises(ValueError, match="'elephant'.*circle.*square"):
        words.encode("a red elephant")


def test_words_survive_a_file(tmp_path: Path) -> None:
    made = Words.make(seed=4)
    made.save(tmp_path / "words.safetensors")
    loaded = Words.load(tmp_path / "words.safetensors")
    assert loaded.vocabulary == made.vocabulary
    assert torch.equal(loaded.table, made.table)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a table of words"):
        Words.load(tiny.AUTOENCODER_PATH)
    with pytest.raises(ValueError, match="one row of 64"):
        Words(["red"], torch.zeros(1, 64))
