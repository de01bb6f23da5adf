"""The steps before a run's model is loaded: everything is checked, then the folder is begun, then files are created.

An existing run in the folder is not touched before recipe, base, memory, disk and data have been checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..config import PixelConfig
from ..dataset.image_folder import open_folder
from ..distributed.ranks import Ranks
from ..distributed.sharding import check_shards
from ..files.atomic import remove, write_bytes
from ..memory.checkpointing import kept_sentence
from ..memory.plan import gigabytes
from ..patch_pairs import in_folder
from ..sources import source_of
from ..tiny.bundled import is_tiny
from ..training.trainer import check_possible
from ..training_config import TrainingConfig
from . import base, data, disk, pace
from .caption_source import CaptionSource, of_words
from .data import Features, RunData
from .folder import RunFolder
from .hooks import Hooks
from .memory_plan import planned
from .recipe import Recipe

CheckDisk = Callable[[Path, int], None]
"""Called with a folder and how many bytes will be written there, to refuse them."""


@dataclass(frozen=True)
class PreparedRun:
    """The inputs of a run.

    Attributes:
        recipe: its training with "auto" and -1 decided.
        base: the L2P file that training starts from.
        data: the training data.
        pace: see `metrics.RunMetrics`.
    """

    recipe: Recipe
    base: Path
    data: RunData
    pace: str


def prepare(
    recipe: Recipe,
    folder: RunFolder,
    captions: CaptionSource | None,
    hooks: Hooks,
    ranks: Ranks,
    restart: bool = False,
    published: Path | None = None,
) -> PreparedRun:
    """Check and create everything that a run needs, in the order of the checks: nothing is moved or created before all
    have passed. Of several processes the first does so, then the others find the files.

    Arguments and errors are those of `loop.train`.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    ranks.part(recipe.training.accumulate, recipe.data.batch_size)
    check_possible(recipe.training, ranks)
    begin_anew = restart or (ranks.first and _began_otherwise(recipe, folder))
    fresh = ranks.first and (begin_anew or not folder.continues(recipe))
    config = _config(recipe, folder, fresh)
    memory, training = planned(recipe, config, ranks)
    needs = memory.sentence(ranks.device.type) + kept_sentence(config, training)
    pace_key = pace.key_of(config, recipe, ranks.device, ranks.count)
    check_disk: CheckDisk = _check_disk
    if ranks.first:
        disk_plan = disk.planned(recipe, config, training, folder, fresh, published)
        disk_plan.refuse_if_too_much(ranks.count)
        needs += f" {disk_plan.sentence()}"
        hooks.note(needs)
        hooks.forecast(pace.expected(recipe, folder, pace_key, fresh))
        check_disk = partial(_check_disk_beside, disk_plan, ranks.count, hooks)
    run_data = prepare_data(recipe, folder, config, captions, hooks, check_disk)
    if ranks.first:
        if not fresh:
            folder.check({"data": run_data.fingerprint})
        _begin(recipe, folder, begin_anew, hooks)
        write_bytes(folder.plan, f"{needs}\n".encode())
    start = _initialisation(recipe, folder, run_data, hooks, ranks)
    if ranks.first:
        # Captions and the initialisation are on disk now: the rest must suffice for the saves.
        disk.planned(recipe, config, training, folder, False, published).refuse_if_too_much(ranks.count)
    return PreparedRun(replace(recipe, training=training), start, run_data, pace_key)


def agreed(requested: TrainingConfig, own: TrainingConfig, ranks: Ranks) -> TrainingConfig:
    """The settings that suit all processes, given those that this process decided on; another may have less memory."""
    if ranks.any(own.parallel == "fsdp"):
        check_shards(requested, ranks.device)
        own = replace(own, parallel="fsdp")
    return replace(
        own,
        keep_activations=min(ranks.gather(own.keep_activations)),
        gradient_checkpointing=ranks.any(own.gradient_checkpointing),
    )


def _config(recipe: Recipe, folder: RunFolder, fresh: bool) -> PixelConfig:
    """The configuration of the model to train; also checks that its base is usable."""
    if fresh or not folder.init.exists():
        in_data = recipe.data.kind == "folder"
        base.check(recipe.model, partial(in_folder, data.pairs_place(recipe)) if in_data else None)
    return base.pixel_config(recipe.model, None if fresh else folder.init)


def _began_otherwise(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether a run that saved nothing left an initialisation of another source than the recipe's.

    Raises:
        ValueError: if a run that has saved began with another source.
    """
    source = _source(recipe, folder)
    if source is None:
        return False
    if folder.state.exists():
        folder.check({"source": source})
        return False
    return not folder.is_made_from(source)


def _source(recipe: Recipe, folder: RunFolder) -> str | None:
    """A fingerprint of what the folder's initialisation is made from by the recipe; None without that, or without the
    base."""
    if not folder.init.exists():
        return None
    pairs = data.pairs_place(recipe) if recipe.data.kind == "folder" else None
    return base.source_fingerprint(recipe.model, pairs)


def _begin(recipe: Recipe, folder: RunFolder, begin_anew: bool, hooks: Hooks) -> None:
    aside = folder.begin(recipe, begin_anew)
    if aside is None:
        return
    there = RunFolder(aside)
    if there.state.exists() or there.delta.exists():
        hooks.note(f"The previous run was moved to {aside}, complete: delete that folder when you no longer need it.")
    else:
        hooks.note(f"Files in {folder.path} with the names of a run's files were moved to {aside}.")


def _initialisation(recipe: Recipe, folder: RunFolder, found: RunData, hooks: Hooks, ranks: Ranks) -> Path:
    """The file that training starts from, created if missing and checked against the run's identity."""
    is_new = not folder.init.exists()
    converting = partial(hooks.working, "converting")
    start = base.initialisation(recipe.model, folder.init, converting, partial(data.pairs_of, recipe, found))
    if ranks.first:
        try:
            identity = {"base": base.fingerprint(start), "data": found.fingerprint}
            source = _source(recipe, folder)
            folder.identify(identity if source is None else identity | {"source": source})
        except ValueError:
            if is_new:
                remove(folder.init)
            raise
    return start


def _check_disk(folder: Path, size: int) -> None:
    """Check that a disk has room for caption features.

    Raises:
        ValueError: if it has not.
    """
    complaint = disk.captions_complaint(folder, size)
    if complaint:
        raise ValueError(complaint)


def _check_disk_beside(plan: disk.DiskPlan, processes: int, hooks: Hooks, folder: Path, size: int) -> None:
    """Like `_check_disk`, including everything that the run writes; reports the features' size if it matters."""
    whole = plan.with_captions(folder, size)
    whole.refuse_if_too_much(processes)
    if size * 100 >= whole.bytes:
        hooks.note(f"Caption features still to be encoded need about {gigabytes(size)} GB of disk space in addition.")


def prepare_data(
    recipe: Recipe,
    folder: RunFolder,
    config: PixelConfig,
    captions: CaptionSource | None,
    hooks: Hooks,
    check_disk: CheckDisk = _check_disk,
) -> RunData:
    """A run's data, its images opened or made and its captions without features encoded.

    Args:
        recipe: with absolute paths.
        folder: of the run.
        config: of the pixel model.
        captions: for data of the kind "folder"; None uses the tiny model's words.
        hooks: to watch and stop it.
        check_disk: called before captions are encoded, to check the disk space.

    Raises:
        ValueError: if the data cannot be read, or the captions do not fit the model.
    """
    if recipe.data.kind != "folder":
        found = RunData(data.tiny_images(recipe.data, folder.images, hooks.working))
        _check_width(found.features, config, f"Data of kind {recipe.data.kind!r} has the tiny model's captions")
        for prompt in recipe.watch.prompts:
            found.features(prompt)  # unknown words are reported now, not at the first montage
        return found
    if captions is None and is_tiny(config):
        captions = of_words(caption_folder(recipe, folder.path))
    if captions is None:
        raise ValueError(
            f"This model takes captions of {config.caption_dim} values per token: name their text encoder, "
            f"{source_of(config).encoder.title}, under [captions] encoder, as a folder or file."
        )
    images = open_folder(
        recipe.data.path,
        area=data.image_side(recipe, config) ** 2,
        multiple=config.size_multiple,
        max_bad_share=recipe.data.max_bad_share,
        index=folder.index,
        progress=partial(hooks.working, "looking at images"),
    )
    texts = [*images.captions, *recipe.watch.prompts]
    check_disk(captions.folder, captions.bytes_to_encode(texts, config.caption_dim))
    cache = captions.fill(texts, partial(hooks.working, "encoding captions"))
    _check_width(cache.read, config, f"The text encoder makes captions ({captions.identity})")
    for note in images.notes:
        hooks.note(note)
    if cut := cache.cut(texts):
        hooks.note(_of_cut(cut, len(set(texts)), cache.max_tokens))
    return RunData(images, cache.read)


def _of_cut(cut: Mapping[str, int], total: int, max_tokens: int) -> str:
    """A sentence on captions that are too long."""
    longest = max(cut, key=lambda caption: cut[caption])
    return (
        f"{len(cut)} of {total} captions are longer than the {max_tokens} tokens that the model takes and are cut "
        f"there; the longest, {longest[:60]!r}..., has {cut[longest]}."
    )


def _check_width(features: Features, config: PixelConfig, whose: str) -> None:
    width = features("").shape[-1]
    if width != config.caption_dim:
        raise ValueError(
            f"{whose}, {width} values per token, but the model takes {config.caption_dim}: use the text encoder that "
            "it was trained with."
        )


def caption_folder(recipe: Recipe, folder: Path) -> Path:
    """Default folder of the caption features of a run in `folder`."""
    return Path(recipe.captions.cache) if recipe.captions.cache else folder.resolve().parent / "captions"
