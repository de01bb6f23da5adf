"""Reads a model's sizes off the shapes in a checkpoint, which carries no configuration."""

from __future__ import annotations

from ..config import HEAD, VARIANTS, HeadConfig, HeadStage, Variant


class ShapeReader:
    """Looks up shapes by their ComfyUI keys; a missing one raises a ValueError in plain words.

    Args:
        shapes: {ComfyUI key: shape}.
        expected: what the file should be, in words.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], expected: str):
        self.shapes, self.expected = shapes, expected

    def __getitem__(self, key: str) -> tuple[int, ...]:
        if not self.shapes.get(key):
            raise ValueError(f"This is not a {self.expected} model: it has no '{key}'.")
        return self.shapes[key]

    def matrix(self, key: str) -> tuple[int, int]:
        """The shape of a matrix.

        Raises:
            ValueError: if it is missing, or not a matrix.
        """
        shape = self[key]
        if len(shape) != 2:
            raise ValueError(f"'{key}' has the shape {shape}, but a matrix was expected.")
        return shape[0], shape[1]

    def patch_embedder(self, key: str) -> tuple[int, int]:
        """Width of the model, and elements of a patch.

        Raises:
            ValueError: if it is missing.
        """
        if key not in self.shapes:
            raise ValueError(f"This is not a {self.expected} model: it has no patch embedder ('{key}').")
        return self.matrix(key)

    def count(self, stack: str) -> int:
        """How many blocks `stack` has.

        Raises:
            ValueError: if their numbers do not run from 0 without a gap.
        """
        prefix = f"{stack}."
        found = {key[len(prefix) :].partition(".")[0] for key in self.shapes if key.startswith(prefix)}
        if found != {str(i) for i in range(len(found))}:
            raise ValueError(f"The blocks of '{stack}' are not numbered 0 to {len(found) - 1}: the file is incomplete.")
        return len(found)

    def head(self) -> HeadConfig | None:
        """The Detailer Head's widths, or None for a latent model.

        Raises:
            ValueError: if the head is incomplete, or has stages that no variant has.
        """
        prefix, suffix = f"{HEAD}.enc", ".0.weight"
        names = [
            key[len(prefix) : -len(suffix)] for key in self.shapes if key.startswith(prefix) and key.endswith(suffix)
        ]
        if not names:
            if any(key.startswith(f"{HEAD}.") for key in self.shapes):
                raise ValueError(f"The Detailer Head is incomplete: it has no '{HEAD}.enc1.0.weight'.")
            return None
        full_resolution_first = ["_8k", "_10k_a", "0", "0b", "1", "2", "3", "4"]
        unknown = [name for name in names if name not in full_resolution_first]
        if unknown:
            raise ValueError(f"The Detailer Head has an unknown stage 'enc{unknown[0]}'; this build cannot read it.")
        stages = tuple(
            HeadStage(
                name,
                enc=self[f"{HEAD}.enc{name}.0.weight"][0],
                up=self[f"{HEAD}.up{name}.1.weight"][0],
                dec=self[f"{HEAD}.dec{name}.0.weight"][0],
            )
            for name in sorted(names, key=full_resolution_first.index)
        )
        return HeadConfig(stages, bottleneck=self[f"{HEAD}.bottleneck.0.weight"][0])


def variant_of(head: HeadConfig) -> Variant:
    """The variant whose head has these stages.

    Raises:
        ValueError: if there is none.
    """
    names = [stage.name for stage in head.stages]
    for row in VARIANTS.values():
        if names == [stage.name for stage in row.head.stages]:
            return row
    raise ValueError(
        f"The Detailer Head has the stages {', '.join(names)}, which no known variant ({', '.join(VARIANTS)}) has."
    )
