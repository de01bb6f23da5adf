"""A source's row: the facts about one architecture that the rest of the package needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from ..backbone import Backbone
from ..config import VARIANTS, ModelConfig, Sampling
from .key_layout import KeyLayout
from .shape_reader import ShapeReader


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind, computed one after the other.

    Attributes:
        name: the prefix of their keys, "name.<number>.".
        count: the field of the configuration that says how many there are.
        linears: the layers of a block that may have low-rank adapters, and that may be stored in 8 bits.
        trunk: whether they are joint blocks, of which shallow training takes the first and the last (arXiv 2605.12013
            section 3.2); others always train.
    """

    name: str
    count: str
    linears: tuple[str, ...]
    trunk: bool = True


@dataclass(frozen=True)
class Latent:
    """The latent space that a source works in.

    Attributes:
        patch_size: side of a patch in latent cells.
        order: of the elements of a patch, in einops' letters: rows p, columns q, channels c.
        sign: of the network's output, +1 for noise - x0, -1 for x0 - noise.
    """

    patch_size: int = 2
    order: str = "p q c"
    sign: int = -1


@dataclass(frozen=True)
class PublishedEncoder:
    """The text encoder that a source was published with, and how captions become its features.

    Attributes:
        title: of the published model, in sentences.
        family: the name of its kind of model.
        model_type: that kind, as transformers calls it.
        max_tokens: of a caption, the template's included; later ones are cut.
        template: the text to encode, in which "{}" stands for the caption.
        plain_negative: whether negative captions, and the empty one, are encoded without the template.
        unseen: settings that the shapes of its files do not show, as transformers calls them.
        settings: values that override the files'.
        tokenizer_elsewhere: where else its tokenizer can be found, as the end of a sentence.
    """

    title: str
    family: str
    model_type: str
    max_tokens: int
    template: str
    plain_negative: bool = False
    unseen: tuple[tuple[str, float], ...] = ()
    settings: tuple[tuple[str, object], ...] = ()
    tokenizer_elsewhere: str = ""

    def text(self, caption: str, negative: bool = False) -> str:
        """The text to encode for a caption; the empty caption counts as negative."""
        return caption if self.plain_negative and (negative or not caption) else self.template.format(caption)


@dataclass(frozen=True, eq=False)  # a row is itself: hashable, whatever its fields hold
class Source:
    """One architecture.

    Attributes:
        name: in configurations and files.
        title: in sentences.
        config: the type of its configuration.
        sizes: reads the fields of the configuration beside width, patch and head from a file's shapes, given by ComfyUI
            keys.
        backbone: its network without input and output of the image.
        projection: the layer of the latent source from hidden states and timestep embedding to patches.
        marks: ComfyUI keys that every complete file of it has, pixel or latent, and no file of another source.
        landmarks: ComfyUI keys that show where a file's own prefix ends.
        layout: its keys in the ComfyUI and in the diffusers layout.
        embedder: the layer that reads patches.
        output: the name of `projection`.
        stacks: its blocks, in the order in which they are computed.
        trained: parts that always train, beside the blocks outside the trunk and the head.
        encoder: the text encoder that its captions come from; their width is `caption_dim` of `config`.
        sampling: {variant: published settings of its pixel models}.
        pads: learned tokens that not every batch uses.
        never_8_bit: layers of blocks that are never stored in 8 bits, by pieces of their names.
        token_multiple: captions and images are each padded to a multiple of this many tokens.
        latent: the space of the latent source.
        relatives: other kinds of files that share its keys: (piece of a key, what to call the file).
        unused: keys that its files may have although no network uses them.
        recipe: prefix of the names of its bundled training recipes; None if there are none.
    """

    name: str
    title: str
    config: type[ModelConfig]
    sizes: Callable[[ShapeReader], dict[str, Any]]
    backbone: type[Backbone]
    projection: Callable[[ModelConfig], nn.Module]
    marks: tuple[str, ...]
    landmarks: tuple[str, ...]
    layout: KeyLayout
    embedder: str
    output: str
    stacks: tuple[Stack, ...]
    trained: tuple[str, ...]
    encoder: PublishedEncoder
    sampling: Mapping[str, Sampling] = field(default_factory=lambda: VARIANTS)
    latent: Latent = Latent()
    pads: tuple[str, ...] = ()
    never_8_bit: tuple[str, ...] = ()
    token_multiple: int = 1
    relatives: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()
    recipe: str | None = None

    @property
    def embedder_weight(self) -> str:
        """The key of the patch embedder's weight."""
        return f"{self.embedder}.weight"

    def is_published(self, config: ModelConfig) -> bool:
        """Whether a latent or pixel model has the sizes of the published backbone."""
        published = self.config()
        sizes = {size.name for size in fields(published)} - {"patch_size", "in_channels"}
        return all(getattr(config, size) == getattr(published, size) for size in sizes)

    def base_title(self, config: ModelConfig) -> str:
        """What a model was made from, in sentences; other sizes than the published are another model's."""
        if self.is_published(config):
            return self.title
        blocks = len(self.blocks(config, trunk=True))
        return f"a model of {self.title}'s architecture with {blocks} blocks of width {config.dim}"

    def block_of(self, key: str) -> str:
        """The block that a key is in, such as "layers.3"; "" outside the blocks."""
        for stack in self.stacks:
            if key.startswith(f"{stack.name}."):
                number = key[len(stack.name) + 1 :].partition(".")[0]
                return f"{stack.name}.{number}"
        return ""

    def blocks(self, config: ModelConfig, trunk: bool = False) -> dict[str, Stack]:
        """Every block in computing order, or those of the trunk alone, with the stack that it is in."""
        return {
            f"{stack.name}.{number}": stack
            for stack in self.stacks
            if stack.trunk or not trunk
            for number in range(getattr(config, stack.count))
        }

    def is_never_8_bit(self, name: str) -> bool:
        """Whether a layer of a block is never stored in 8 bits."""
        return any(piece in name for piece in self.never_8_bit)

    def may_be_8_bit(self, key: str) -> bool:
        """Whether a key is the weight of a layer that may be stored in 8 bits."""
        return self.is_block_linear(key) and not self.is_never_8_bit(key)

    def is_block_linear(self, key: str) -> bool:
        """Whether a key is the weight of a layer among its stack's `linears`."""
        block = self.block_of(key)
        linears = (linear for stack in self.stacks if block.startswith(f"{stack.name}.") for linear in stack.linears)
        return any(key == f"{block}.{linear}.weight" for linear in linears)
