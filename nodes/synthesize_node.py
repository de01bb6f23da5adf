"""The node that makes a data set: prompts in, images of the source model on disk."""

from __future__ import annotations

import logging
from typing import Any

import comfy.samplers
from comfy_api.latest import io, ui

from .folders import datasets, results
from .folders.files import NO_FILE
from .limited import within_limits
from .messages.errors import plain_errors
from .messages.progress import say_at
from .options import MAX_SIDE, PROMPT_SUFFIXES


class SynthesizeDataset(io.ComfyNode):
    """Images of many prompts, made by a source model, as a folder to train on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PSynthesizeDataset",
            display_name="Synthesize L2P Dataset",
            category="L2P/train",
            description="Makes the images that an L2P model is trained on: the latent model's own, of your prompts. "
            "They go to a folder under datasets, as PNG files with a metadata.csv. Stopped at any time, it goes on "
            "with what is missing.",
            search_aliases=[
                "make dataset",
                "generate training images",
                "batch prompts",
                "training data",
                "synth",
                "生成数据集",
                "训练数据",
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The latent model that the L2P model is to be made of; any MODEL."),
                io.Clip.Input("clip", tooltip="Its text encoder. Every prompt is encoded once."),
                io.Vae.Input("vae", optional=True, tooltip="Its VAE. An L2P model needs none."),
                io.String.Input(
                    "dataset", default="l2p", tooltip="Name of the folder under datasets; folders in it are allowed."
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    dynamic_prompts=False,
                    placeholder="one prompt a line",
                    tooltip="What the images are to show, one prompt a line.",
                ),
                io.Combo.Input(
                    "prompt_file",
                    options=[NO_FILE, *datasets.input_files(PROMPT_SUFFIXES)],
                    default=NO_FILE,
                    tooltip="More prompts, from the input folder: a text file with one a line (lines that begin with # "
                    "are comments), or a table (csv, tsv, jsonl) with a column prompt, text or caption.",
                ),
                io.Int.Input("images_per_prompt", default=2, min=1, max=10000, tooltip="How many images of a prompt."),
                io.Int.Input(
                    "first_image",
                    default=0,
                    min=0,
                    max=1 << 32,
                    tooltip="The number that a prompt's images are counted from. Each image's seed is drawn from its "
                    "prompt and number, so that no two share their noise.",
                ),
                io.Int.Input("width", default=1024, min=16, max=MAX_SIDE, tooltip="Width in pixels."),
                io.Int.Input("height", default=1024, min=16, max=MAX_SIDE, tooltip="Height in pixels."),
                io.Int.Input("steps", default=30, min=1, max=10000, tooltip="Sampling steps, as the model needs them."),
                io.Float.Input(
                    "cfg",
                    default=4.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance; 1 is none, and twice as fast. Distilled models such as Z-Image-Turbo take 1.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.SAMPLER_NAMES,
                    default="euler",
                    tooltip="How a step is taken. With samplers that add noise, images depend on batch_size too.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="simple",
                    tooltip="How the steps are spread over the noise levels.",
                ),
                io.String.Input(
                    "negative",
                    default="",
                    dynamic_prompts=False,
                    tooltip="A prompt to guide all images away from; not used when cfg is 1.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="How many images of the same prompt to make at once: faster, and takes more memory.",
                ),
            ],
            outputs=[
                io.Combo.Output(
                    display_name="dataset", options=datasets.choices(), tooltip="The data set's name, for Train L2P."
                ),
                io.Int.Output(display_name="count", tooltip="How many images there are."),
                io.Image.Output(display_name="examples", tooltip="The first few of them."),
            ],
        )

    @classmethod
    def validate_inputs(cls, dataset: str | None = None) -> bool | str:
        try:
            if dataset is not None:
                datasets.folder(dataset)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, dataset: str | None = None, prompt_file: str | None = None, **settings: Any) -> Any:
        prompts = datasets.input_fingerprint(None if prompt_file == NO_FILE else prompt_file)
        return prompts, results.fingerprint(cls, dataset), sorted(settings.items())

    @classmethod
    @plain_errors()
    @within_limits
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        dataset: str,
        prompts: str,
        prompt_file: str,
        images_per_prompt: int,
        first_image: int,
        width: int,
        height: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        negative: str,
        batch_size: int,
        vae: io.Vae.Type | None = None,
    ) -> io.NodeOutput:
        from ..l2p_core.dataset.synthesis import items
        from .synthesis import Source, examples, synthesize

        folder = datasets.folder(dataset)
        wanted = items(_prompts(prompts, prompt_file), images_per_prompt, first_image)
        source = Source(model, clip, vae, width, height, steps, cfg, sampler_name, scheduler, negative, batch_size)
        made = synthesize(folder, wanted, source, say_at(cls.hidden.unique_id))
        shown = examples(made)
        results.remember(cls, dataset, folder)
        return io.NodeOutput(datasets.name_of(folder), len(made.done), shown, ui=ui.PreviewImage(shown, cls=cls))


def _prompts(text: str, file: str) -> list[str]:
    """The prompts that are typed, then those of the file.

    Raises:
        ValueError: if there are none, or the file cannot be read.
    """
    from ..l2p_core.dataset import prompts

    found = prompts.from_text(text)
    if file != NO_FILE:
        path = datasets.input_file(file)
        found += prompts.read(path)
        if sentence := prompts.skipped(path):
            logging.info("L2P: %s", sentence)
    if not found:
        raise ValueError("There are no prompts: type some, one a line, or choose a file of the input folder.")
    return found
