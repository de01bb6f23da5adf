"""Caption features on disk: computed once, shared, whole or absent."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from comfyui_l2p.l2p_core import tiny
from comfyui_l2p.l2p_core.dataset.caption_cache import CaptionCache, TextEncoder
from comfyui_l2p.l2p_core.files.tensor_file import save
from comfyui_l2p.l2p_core.tiny.word_encoder import WordEncoder

pytestmark = pytest.mark.usefixtures("unflushed")

MAX_TOKENS = 300


class Letters:
    """A caption's letters as numbers; counts what it is asked."""

    def __init__(self, identity: str = "letters", dtype: torch.dtype = torch.bfloat16):
        self.identity, self.dtype = identity, dtype
        self.asked: list[list[str]] = []

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        self.asked.append(list(captions))
        return [torch.tensor([[1.0, 0.5], *([ord(c) % 8, 2] for c in text)], dtype=self.dtype) for text in captions]

    def lengths(self, captions: Sequence[str]) -> list[int]:
        return [1 + len(text) for text in captions]


def never() -> TextEncoder:
    raise AssertionError("the encoder must not be loaded")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_captions_are_encoded_once_with_the_empty_one(tmp_path: Path) -> None:
    encoder, cache = Letters(), CaptionCache(tmp_path, "letters", MAX_TOKENS)
    captions = ["fox", "hare", "fox"]
    assert cache.missing(captions) == ["", "fox", "hare"]
    assert cache.fill(captions, lambda: encoder) == 3
    assert sorted(text for batch in encoder.asked for text in batch) == ["", "fox", "hare"]
    assert cache.fill(captions, never) == 0
    found = cache.read("fox")
    assert found.dtype == torch.float32
    assert torch.equal(found, encoder.encode(["fox"])[0].float())
    assert cache.read("").shape == (1, 2)


def test_runs_share_what_is_there(tmp_path: Path) -> None:
    CaptionCache(tmp_path, "letters", MAX_TOKENS).fill(["fox", "hare"], Letters)
    encoder = Letters()
    assert CaptionCache(tmp_path, "letters", MAX_TOKENS).fill(["hare", "owl"], lambda: encoder) == 1
    assert encoder.asked == [["owl"]]


def test_encoders_stay_apart(tmp_path: Path) -> None:
    one, other = CaptionCache(tmp_path, "one", MAX_TOKENS), CaptionCache(tmp_path, "other", MAX_TOKENS)
    one.fill(["fox"], lambda: Letters("one"))
    assert other.missing(["fox"]) == ["", "fox"]
    with pytest.raises(ValueError, match="is for captions of other, not of one"):
        other.fill(["fox"], lambda: Letters("one"))
    assert other.missing(["fox"]) == ["", "fox"]


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    captions = [f"{'x' * i}" for i in range(1, 20)]
    cache, seen = CaptionCache(tmp_path, "letters", MAX_TOKENS), []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fill(captions, Letters, batch_size=4, progress=stop)
    assert seen == [(4, 20), (8, 20)]
    encoder = Letters()
    assert cache.fill(captions, lambda: encoder, batch_size=4) == 12
    assert not cache.missing(captions)


def test_the_longest_come_first(tmp_path: Path) -> None:
    encoder = Letters()
    CaptionCache(tmp_path, "letters", MAX_TOKENS).fill(["a", "long one", "mid"], lambda: encoder, batch_size=2)
    assert encoder.asked == [["long one", "mid"], ["a", ""]]


def test_a_file_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    cache = CaptionCache(tmp_path, "letters", MAX_TOKENS)
    cache.fill(["fox"], Letters)
    path = cache.path("fox")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=path.name):
        cache.read("fox")
    assert cache.missing(["fox"]) == ["fox"]
    cache.fill(["fox"], Letters)
    assert cache.read("fox").shape == (4, 2)


def test_a_file_of_another_caption_is_not_believed(tmp_path: Path) -> None:
    cache = CaptionCache(tmp_path, "letters", MAX_TOKENS)
    cache.fill(["fox", "owl"], Letters)
    cache.path("fox").write_bytes(cache.path("owl").read_bytes())
    with pytest.raises(ValueError, match="is not the file of the caption 'fox': delete it"):
        cache.read("fox")
    save({"x": torch.zeros(1)}, cache.path("fox"), overwrite=True)
    assert cache.missing(["fox"]) == ["fox"]


def test_a_caption_that_was_never_encoded_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"caption 'x+\.\.\.' has no features .*: encode the captions first"):
        CaptionCache(tmp_path, "letters", MAX_TOKENS).read("x" * 500)


@pytest.mark.parametrize("caption", ["Ünïcode 狐", "a/../b\\c", "line\nline", "\x00", "x" * 5000, "CON"])
def test_any_text_is_a_caption(tmp_path: Path, caption: str) -> None:
    cache = CaptionCache(tmp_path, "letters", MAX_TOKENS)
    cache.fill([caption], Letters)
    assert len(cache.read(caption)) == min(len(caption) + 1, MAX_TOKENS)
    assert all(path.is_relative_to(tmp_path) for path in files(tmp_path))


@pytest.mark.parametrize(
    "wrong", [torch.tensor([[1.0, float("nan")]]), torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64)]
)
def test_features_that_are_none_are_not_kept(tmp_path: Path, wrong: Tensor) -> None:
    class Broken(Letters):
        def encode(self, captions: Sequence[str]) -> list[Tensor]:
            return [wrong for _ in captions]

    cache = CaptionCache(tmp_path, "letters", MAX_TOKENS)
    with pytest.raises(ValueError, match="caption 'fox' are not a matrix of finite numbers"):
        cache.fill(["fox"], Broken)
    assert not files(tmp_path)


def test_the_encoder_is_let_go_of(tmp_path: Path) -> None:
    import weakref

    alive: list[weakref.ref[Letters]] = []

    def make() -> Letters:
        encoder = Letters()
        alive.append(weakref.ref(encoder))
        return encoder

    CaptionCache(tmp_path, "letters", MAX_TOKENS).fill(["fox"], make)
    assert alive[0]() is None


def test_several_at_once_leave_whole_files(tmp_path: Path) -> None:
    captions = [f"caption {i}" for i in range(30)]
    errors: list[BaseException] = []

    def fill() -> None:
        try:
            CaptionCache(tmp_path, "letters", MAX_TOKENS).fill(captions, Letters, batch_size=3)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(files(tmp_path)) == 31
    cache = CaptionCache(tmp_path, "letters", MAX_TOKENS)
    assert all(len(cache.read(caption)) == len(caption) + 1 for caption in captions)


def test_a_killed_process_leaves_whole_files_or_none(tmp_path: Path) -> None:
    program = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from test_dataset_captions import Letters, CaptionCache
def kill(done, total):
    if done == 6: os._exit(9)
cache = CaptionCache({str(tmp_path)!r}, "letters", {MAX_TOKENS})
cache.fill(["x" * i for i in range(20)], Letters, batch_size=2, progress=kill)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    cache = CaptionCache(tmp_path, "letters", MAX_TOKENS)
    captions = ["x" * i for i in range(20)]
    assert len(cache.missing(captions)) == 14
    assert cache.fill(captions, Letters) == 14


def test_words_are_the_same_from_the_cache(tmp_path: Path) -> None:
    words = tiny.load_words()
    encoder: TextEncoder = WordEncoder(words)
    cache = CaptionCache(tmp_path, encoder.identity, MAX_TOKENS)
    caption = "a small red circle"
    known = " ".join(word for word in caption.split() if word in words.vocabulary)
    assert known
    cache.fill([known], lambda: encoder)
    assert torch.equal(cache.read(known), words.encode(known))
    assert torch.equal(cache.read(""), words.encode(""))
    assert WordEncoder(tiny.load_words()).identity == encoder.identity
    assert WordEncoder(type(words)(words.vocabulary, words.table + 1)).identity != encoder.identity


def test_long_captions_are_cut_and_counted(tmp_path: Path) -> None:
    """The same for an encoder that cuts by itself and one that does not, now and at the next start."""
    cache, long, full = CaptionCache(tmp_path, "letters", MAX_TOKENS), "x" * MAX_TOKENS, "y" * (MAX_TOKENS - 1)
    cache.fill([long, full, "fox"], Letters)
    for found in (cache, CaptionCache(tmp_path, "letters", MAX_TOKENS)):
        found.fill([long, full, "fox"], never if found is not cache else Letters)
        assert found.cut([full, long, "fox", ""]) == {long: MAX_TOKENS + 1}
        assert found.read(long).shape == (MAX_TOKENS, 2) == found.read(full).shape


def test_captions_are_counted_where_the_tokenizer_does_not_split_them(tmp_path: Path) -> None:
    class Whole(Letters):
        def lengths(self, captions: Sequence[str]) -> list[int]:
            return [1] * len(captions)

    long = "x" * (MAX_TOKENS + 9)
    CaptionCache(tmp_path, "letters", MAX_TOKENS).fill([long, "fox"], Whole)
    found = CaptionCache(tmp_path, "letters", MAX_TOKENS)
    found.fill([long, "fox"], never)
    assert found.cut([long, "fox"]) == {long: MAX_TOKENS + 10}


def test_longer_features_of_version_0_1_are_cut_too(tmp_path: Path) -> None:
    cache = CaptionCache(tmp_path, "letters", MAX_TOKENS)
    said = {"l2p.kind": "caption", "l2p.encoder": "letters", "l2p.caption": "fox"}
    path = cache.path("fox")
    path.parent.mkdir(parents=True)
    save({"features": torch.zeros(700, 2)}, path, said)
    cache.fill(["fox"], Letters)
    assert cache.read("fox").shape == (MAX_TOKENS, 2) and cache.cut(["fox"]) == {"fox": 700}
