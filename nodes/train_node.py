"""Train L2P: a data set and a model in, a delta out."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..l2p_core.run.find import bundled
from .folders import datasets, files, kinds, results
from .limited import within_limits
from .messages.errors import plain_errors
from .options import POLICIES
from .training_choices import AS_RECIPE, AUTO, MEMORY, Choices

RESUME, ANEW = "go on where it stopped", "begin anew"
_RECIPES = [AUTO, *bundled()]


def _number(id: str, tooltip: str, largest: int = 1_000_000, **more: Any) -> io.Int.Input:
    """A whole number; 0 leaves it to the recipe."""
    return io.Int.Input(id, default=0, min=0, max=largest, tooltip=f"{tooltip} 0: as the recipe.", **more)


class TrainL2P(io.ComfyNode):
    """Shallow training in the graph."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PTrain",
            display_name="Train L2P",
            category="L2P/train",
            description="Trains an L2P model on a folder of captioned images and leaves a delta for L2P Loader. "
            "Interrupt saves the run; queue it again to resume. Its folder in output/l2p_runs holds "
            "report.html, montages and the state.",
            search_aliases=[
                "train",
                "finetune",
                "fine-tune",
                "l2p training",
                "pixel training",
                "lora training",
                "训练",
            ],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "dataset",
                    options=datasets.choices() or [datasets.NONE_YET],
                    tooltip="A folder of captioned images in ComfyUI's datasets folder.",
                ),
                io.Combo.Input(
                    "model",
                    options=kinds.models(),
                    default=files.TINY,
                    tooltip="From models/diffusion_models: a latent source, which becomes a pixel model first, "
                    "or an L2P model to train on. The tiny source needs no download.",
                ),
                io.Clip.Input(
                    "clip", tooltip="The model's text encoder; encodes the captions once and is then unloaded."
                ),
                io.Combo.Input(
                    "recipe",
                    options=_RECIPES,
                    default=AUTO,
                    tooltip="The recipe for settings left at 0 or 'as the recipe'; auto selects the one for the model.",
                ),
                io.String.Input(
                    "run_name", default="my_l2p", tooltip="The run's folder in output/l2p_runs; folders are allowed."
                ),
                io.Combo.Input(
                    "start",
                    options=[RESUME, ANEW],
                    default=RESUME,
                    tooltip="What to do with an existing run of that name: resume from its last save, or begin anew, "
                    "which moves it into a subfolder.",
                ),
                _number("steps", "Optimiser steps of the whole run; may be increased when the run resumes."),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    tooltip="Learning rate of the optimiser. 0: as the recipe.",
                ),
                _number("image_size", "Images are resized to the area of a square of this side.", 16384),
                _number("batch_size", "Images per micro-batch.", 4096),
                _number("accumulate", "Micro-batches per step.", 4096),
                io.Combo.Input(
                    "policy",
                    options=[AS_RECIPE, *POLICIES],
                    default=AS_RECIPE,
                    tooltip="shallow trains embedders, head, first and last blocks; lora adds small adapters to all "
                    "other blocks; all trains everything.",
                ),
                io.Int.Input(
                    "blocks",
                    default=-1,
                    min=-1,
                    max=1000,
                    tooltip="Blocks trained in full at each end, with shallow and lora. -1: as the recipe.",
                ),
                io.Combo.Input(
                    "precision",
                    options=[AS_RECIPE, "bf16", "fp32"],
                    default=AS_RECIPE,
                    tooltip="The dtype of computation; trained weights are float32 in any case.",
                ),
                io.Combo.Input(
                    "memory",
                    options=list(MEMORY),
                    default=AS_RECIPE,
                    tooltip="Where weights are stored, for GPUs from large to small: all on the GPU; frozen weights in "
                    "fp8; frozen weights in RAM, together with the trained ones and their optimiser.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Seed of everything random in the run: new weights, order, noise.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    placeholder="montage prompts, one per line; empty: the recipe's",
                    tooltip="Captions of the montages, one per line; empty uses the recipe's.",
                ),
                io.String.Input(
                    "filename",
                    default="",
                    tooltip="The delta's name in models/diffusion_models; by default the run's name.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Whether another file of that name may be replaced; off refuses, before training.",
                ),
                _number("save_every", "Steps between saves; interrupting also saves.", advanced=True),
                _number("montage_every", "Steps between montages.", advanced=True),
                io.String.Input(
                    "changes",
                    default="",
                    multiline=True,
                    advanced=True,
                    placeholder='[training]\nwarmup_steps = 100\ndecay = "cosine"',
                    tooltip="Any other keys of the recipe, as TOML; they override the inputs above.",
                ),
            ],
            outputs=[
                io.Combo.Output(
                    display_name="delta", options=files.choices(), tooltip="The delta's name, for L2P Loader."
                ),
                io.LossMap.Output(display_name="loss", tooltip="For Plot Loss Graph."),
                io.Image.Output(
                    display_name="montage",
                    tooltip="The last montage; nodes behind it are skipped if the recipe draws none.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, dataset: str | None = None) -> bool | str:
        # The host repeats the sentence for every input named here, so the others are asked about when the node runs.
        try:
            if dataset is not None:
                datasets.existing(dataset)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, dataset: str | None = None, model: str | None = None, **settings: Any) -> Any:
        inputs = datasets.fingerprint(dataset), files.fingerprint(model)
        return inputs, results.fingerprint(cls, settings.get("run_name")), sorted(settings.items(), key=str)

    @classmethod
    @plain_errors()
    @within_limits
    def execute(cls, clip: Any, start: str, **settings: Any) -> io.NodeOutput:
        from .training import train

        done = train(Choices(anew=start == ANEW, **settings), clip, str(cls.hidden.unique_id))
        results.remember(cls, settings["run_name"], *done.files)
        # What takes a montage that there is not is skipped.
        montage = ExecutionBlocker(None) if done.montage is None else done.montage
        return io.NodeOutput(done.delta, {"loss": done.losses}, montage, ui={"l2p_training": [done.state]})
