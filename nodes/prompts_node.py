"""The node that has the text encoder write the prompts of a data set."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from .folders import datasets, prompt_files, results
from .folders.files import NO_FILE
from .limited import within_limits
from .messages.errors import plain_errors
from .messages.progress import say_at
from .options import PROMPT_SUFFIXES

if TYPE_CHECKING:
    from ..l2p_core.prompts.scheme import Slot


class L2PPrompts(io.ComfyNode):
    """Prompts in the published style, written by the CLIP's own language model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PPrompts",
            display_name="L2P Prompts",
            category="L2P/train",
            description="Writes prompts for training images with Z-Image's text encoder, Qwen3-4B: four classes, 17 "
            "sub-classes, 200 to 350 characters, without near-duplicates; or rewrites short prompts in that style. If "
            "it is stopped, the next run writes the missing prompts.",
            search_aliases=[
                "write prompts",
                "prompt list",
                "captions",
                "rewrite prompts",
                "LLM",
                "写提示词",
                "改写提示词",
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="Qwen3-4B, the text encoder of Z-Image: qwen_3_4b.safetensors with the type lumina2.",
                ),
                io.String.Input(
                    "name",
                    default="l2p_prompts",
                    tooltip="Name of the list: a csv file in the input folder. The work on it, with a report, is in "
                    "output/l2p_prompts.",
                ),
                io.Int.Input(
                    "count",
                    default=1000,
                    min=1,
                    max=1_000_000,
                    tooltip="Number of prompts. The published run had 10000, which take hours; a larger number later "
                    "adds to the list.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    # Another seed would be another list, which a second run would refuse to continue.
                    control_after_generate=False,
                    tooltip="The seed of the texts.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.9,
                    min=0.01,
                    max=5.0,
                    step=0.05,
                    round=0.01,
                    tooltip="How freely the model writes; lower values make its texts more alike.",
                ),
                io.String.Input(
                    "rewrite",
                    default="",
                    multiline=True,
                    dynamic_prompts=False,
                    placeholder="short prompts to rewrite, one per line; empty: write new ones",
                    tooltip="Short prompts to rewrite, one per line. With some, here or in rewrite_file, no new ones "
                    "are written and count has no effect.",
                ),
                io.Combo.Input(
                    "rewrite_file",
                    options=[NO_FILE, *datasets.input_files(PROMPT_SUFFIXES)],
                    default=NO_FILE,
                    tooltip="More prompts to rewrite, from the input folder: a text file with one per line, or a table "
                    "(csv, tsv, jsonl) with a column prompt, text or caption.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="prompts",
                    tooltip="All prompts, one per line, for the prompts of Synthesize L2P Dataset.",
                ),
                io.Combo.Output(
                    display_name="prompt_file",
                    options=datasets.input_files(PROMPT_SUFFIXES),
                    tooltip="The list's name, for the prompt_file of Synthesize L2P Dataset.",
                ),
                io.Int.Output(display_name="count", tooltip="Number of prompts."),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        try:
            if name is not None:
                prompt_files.work_folder(name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None, rewrite_file: str | None = None, **settings: Any) -> Any:
        rewritten = datasets.input_fingerprint(None if rewrite_file == NO_FILE else rewrite_file)
        return rewritten, results.fingerprint(cls, name), sorted(settings.items())

    @classmethod
    @plain_errors()
    @within_limits
    def execute(
        cls,
        clip: io.Clip.Type,
        name: str,
        count: int,
        seed: int,
        temperature: float,
        rewrite: str,
        rewrite_file: str,
    ) -> io.NodeOutput:
        from .clip_writer import write_prompts

        folder, target = prompt_files.work_folder(name), prompt_files.list_file(name)
        slots = _slots(count, rewrite, rewrite_file)
        done = write_prompts(folder, target, slots, clip, temperature, seed, say_at(cls.hidden.unique_id))
        results.remember(cls, name, target)
        text = "\n".join(done.prompts)
        shown = {"text": (done.summary(),), "l2p_page": [folder.name]}
        return io.NodeOutput(text, target.name, len(done.prompts), ui=shown)


def _slots(count: int, text: str, file: str) -> list[Slot]:
    """New prompts, or those of a text and a file to be rewritten.

    Raises:
        ValueError: if there is no such file, or it cannot be read.
    """
    from ..l2p_core.dataset import prompts
    from ..l2p_core.prompts import rewriting, scheme

    short = prompts.from_text(text)
    if file != NO_FILE:
        path = datasets.input_file(file)
        short += prompts.read(path)
        if sentence := prompts.skipped(path):
            logging.info("L2P: %s", sentence)
    return rewriting.slots(short) if short else scheme.slots(count)
