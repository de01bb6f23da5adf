"""Errors as a user of ComfyUI should read them: a sentence, without paths of this machine and names of classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management

_OURS = __package__.rpartition(".")[0] if __package__ else ""


@contextmanager
def plain_errors() -> Iterator[None]:
    """Within the block, or the function it decorates, an error's text names files as the host's folders do.

    The host shows the class of an error by its module, which for ours is the path of this pack: the sentence goes on as
    a ValueError. Memory that ran out, interruptions and programmers' mistakes go on as they are.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, comfy.model_management.OOM_EXCEPTION) or not _for_users(error):
            raise
        # Not above: nodes are decorated when the host starts.
        from .sentences import by_folders

        text = by_folders(str(error))
        if type(error) is ValueError and text == str(error):
            raise
        raise ValueError(text) from error


def _for_users(error: Exception) -> bool:
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith(_OURS)
