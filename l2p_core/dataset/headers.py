"""The sizes of a data set's images and what else their headers say, read once and cached in an index file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from ..deep_images.common import ImageInfo
from ..files.atomic import write_bytes
from ..files.safetensors_header import parse_json
from . import images
from .problems import Problem
from .readers import Sample

_VERSION = 1
_BEGINNING = re.compile(rb'\{"version":\d+,"images":')
"""How `_save` of every version begins its file."""
_START = 64  # bytes
_THREADS = 8  # opening files on a network is mostly waiting

Known = dict[str, list[int]]
"""Image name -> bytes and modification time (ns) of its file, and its `ImageInfo` without what has the default at its
end."""


def look(
    samples: Sequence[Sample], index: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> tuple[dict[str, ImageInfo], list[Problem], list[str]]:
    """Each image's header by its name, a problem for each sample whose image cannot be read, and names of images whose
    files have changed since the index was written.

    A file has changed if it has another number of bytes: copying a data set changes the times of its files.

    Args:
        samples: images may occur in several.
        index: the file that caches sizes, created with its folder if missing; a damaged one, or one of another version,
            is rewritten, and a file of something else is left alone, see `is_foreign`.
        progress: called with (images looked at, images in all).
    """
    paths = {sample.name: sample.path for sample in samples}
    known = _load(index) if index else {}
    found: Known = {}
    faults: dict[str, str] = {}
    with closing(_looked_at(paths, known)) as results:
        for done, (name, result) in enumerate(results, start=1):
            if isinstance(result, str):
                faults[name] = result
            else:
                found[name] = result
            if progress:
                progress(done, len(paths))
    if index and found != known and not is_foreign(index):
        _save(index, found)
    broken = [Problem(sample.name, faults[sample.name]) for sample in samples if sample.name in faults]
    changed = [name for name, entry in found.items() if name in known and known[name][0] != entry[0]]
    return {name: ImageInfo(*entry[2:]) for name, entry in found.items()}, broken, changed


def is_foreign(index: Path) -> bool:
    """Whether something else than an index, whole or damaged, is at its place, so that it may not be replaced."""
    try:
        with index.open("rb") as file:
            start = file.read(_START)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    # A power failure leaves nothing or zeros.
    return bool(start.strip(b"\0")) and not _BEGINNING.match(start)


def _looked_at(paths: Mapping[str, Path], known: Known) -> Generator[tuple[str, list[int] | str], None, None]:
    """Each name with what `_look` returns, from several threads; if closed early, no further file is opened."""
    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(_look, paths.values(), map(known.get, paths))
        try:
            yield from zip(paths, results, strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def _look(path: Path, entry: list[int] | None) -> list[int] | str:
    """The image's entry, from the index if its file has not changed; or the problem with it."""
    try:
        stat = path.stat()
        if entry and entry[:2] == [stat.st_size, stat.st_mtime_ns]:
            return entry
        header = images.look(path)
        # As earlier versions wrote and read it where that is all there is to say.
        said = header if header.rounded else header[:3] if header.frames > 1 else header[:2]
        return [stat.st_size, stat.st_mtime_ns, *said]
    except images.BrokenImage as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"


def _load(index: Path) -> Known:
    """The index, or an empty one: it is only a cache."""
    try:
        content = parse_json(index.read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            return {}
        return {name: entry for name, entry in content["images"].items() if _is_entry(entry)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _is_entry(entry: Any) -> bool:
    numbers = isinstance(entry, list) and all(type(number) is int for number in entry)
    return numbers and len(entry) in (4, 5, 6) and min(entry[2:]) > 0


def _save(index: Path, known: Known) -> None:
    index.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(index, json.dumps({"version": _VERSION, "images": known}, separators=(",", ":")).encode())
