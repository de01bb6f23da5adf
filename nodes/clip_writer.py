"""The host's CLIP as the language model that writes prompts: Z-Image's text encoder is a whole Qwen3-4B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management

from ..l2p_core.files.units import counted
from ..l2p_core.prompts import journal, work
from ..l2p_core.prompts.scheme import Slot
from ..l2p_core.prompts.writer import CHATML_MARK, MAX_TOKENS, TOP_K, TOP_P, Request, chatml
from ..l2p_core.run.metrics import duration
from .clip_captions import identity_of, unload
from .folders.prompt_files import check_list
from .messages.progress import warn_where_running


class ClipWriter:
    """A CLIP as a `Writer` of l2p_core.prompts.

    Raises:
        ValueError: if the CLIP, or this version of the host, generates no text.
    """

    at_once = 1

    def __init__(self, clip: Any, temperature: float):
        _check(clip)
        unload(clip)  # its weights on the device may carry patches of other models
        self.name = identity_of(clip)
        self._clip, self._temperature = clip, temperature

    def write(self, requests: Sequence[Request]) -> list[str]:
        """The model's answers; see `Writer`. The host may interrupt within one."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> str:
        # The template with an empty thought, which Generate Text has no input for.
        tokens = self._clip.tokenize(chatml(request.turns), llama_template="{}")
        answer = self._clip.generate(
            tokens,
            do_sample=True,
            max_length=MAX_TOKENS,
            temperature=self._temperature,
            top_k=TOP_K,
            top_p=TOP_P,
            min_p=0.0,
            repetition_penalty=1.0,
            seed=request.seed,
        )
        return str(self._clip.decode(answer))


def write_prompts(
    folder: Path,
    target: Path,
    slots: Sequence[Slot],
    clip: Any,
    temperature: float,
    seed: int,
    say: Callable[[str], None],
) -> work.PromptsResult:
    """Write the missing prompts, and the list of all of them.

    Args:
        folder: of the work.
        target: file of the list; written at the end and on interruption.
        slots: the prompts to write.
        clip: writes them.
        say: shows the progress, with the time left.

    Raises:
        ValueError: as for `ClipWriter` and `work.write`, and if the target is another list.
        InterruptProcessingException: the host's, when the user stops it; what is written stays.
    """
    check_list(target, journal.written(folder))
    writer = ClipWriter(clip, temperature)
    far = work.PromptsProgress(0, len(slots), 0, None)

    def show(progress: work.PromptsProgress) -> None:
        nonlocal far
        far = progress
        comfy.model_management.throw_exception_if_processing_interrupted()
        say(_sentence(progress))

    try:
        result = work.write(
            folder,
            slots,
            writer,
            {"temperature": temperature},
            seed=seed,
            note=warn_where_running,
            copy=target,
            progress=show,
        )
    except comfy.model_management.InterruptProcessingException:
        say(f"Stopped with {far.done} of {far.wanted} prompts; run it again for the rest.")
        raise
    say(f"{counted(len(result.prompts), 'prompt')}, {result.now} of them written now")
    return result


def _sentence(progress: work.PromptsProgress) -> str:
    parts = [f"{progress.done} of {progress.wanted} prompts"]
    if progress.rejected:
        parts.append(f"{counted(progress.rejected, 'text')} rejected")
    if progress.seconds_left is not None:
        parts.append(f"about {duration(progress.seconds_left)} left")
    return ", ".join(parts)


def _check(clip: Any) -> None:
    if clip is None:
        raise ValueError(
            "The CLIP is empty: connect Qwen3-4B, the text encoder of Z-Image; a checkpoint may have none."
        )
    if not hasattr(clip, "generate"):
        raise ValueError("This version of ComfyUI cannot generate text: update ComfyUI.")
    model = clip.cond_stage_model
    encoder = getattr(model, getattr(model, "clip", ""), None)
    network = getattr(encoder, "transformer", None)
    if CHATML_MARK not in getattr(clip.tokenizer, "llama_template", "") or not hasattr(network, "generate"):
        raise ValueError(
            "This CLIP cannot write prompts: connect Qwen3-4B, the text encoder of Z-Image, with Load CLIP, "
            "qwen_3_4b.safetensors and the type lumina2."
        )
