"""Errors for users of ComfyUI: sentences without paths of this machine and names of classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management

_OURS = (__package__ or "").removesuffix(".nodes.messages")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Within the block, or the function it decorates, errors name files by the host's folders.

    The host shows an error's class with its module, which for ours is the path of this pack, so the sentence is raised
    as a ValueError. Out-of-memory errors, interruptions and programming errors pass unchanged.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, comfy.model_management.OOM_EXCEPTION) or not _for_users(error):
            raise
        # Imported here because nodes are decorated when the host starts.
        from .sentences import by_folders

        text = by_folders(str(error))
        if type(error) is ValueError and text == str(error):
            raise
        raise ValueError(text) from error


def _for_users(error: Exception) -> bool:
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith(_OURS)
