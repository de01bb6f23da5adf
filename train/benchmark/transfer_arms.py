"""What `l2p benchmark transfer` compares: every arm is a recipe that differs from the reference in one thing."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ...l2p_core.initialise import FITTED
from ...l2p_core.run import recipe as recipes
from ...l2p_core.run.find import find
from ...l2p_core.run.recipe import Recipe
from ...l2p_core.tiny.worlds import SHAPES, TinyWorld
from ..demo import fitted

FULL, STARTS, POLICIES, DATA, SHIFT = "full", "starts", "policies", "data", "shift"
GROUPS = {
    STARTS: "how the new layers start",
    POLICIES: "what trains",
    DATA: "what it trains on",
    SHIFT: "the noise levels' shift",
}
"""Groups of compared arms and what differs among them; a group's table begins with the reference."""
REFERENCE = "fitted"
SHIFTS = (1.0, 2.0, 4.5, 6.0)
"""The shifts compared, beside the reference's 3."""
PASSES = 10
"""How often an arm sees an image: longer arms have more images than the recipe."""
OF_WORLD: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "shapes": {},
    "scenes": {
        "tiny": {
            "model": {"init": FITTED},
            "data": {"steps": 20, "images": 2048, "batch_size": 16},
            "training": {"steps": 2400, "lr": 5e-4, "precision": "fp32"},
        },
        "demo": {"data": {"steps": 20, "cfg": 4.0, "images": 2048}},
    },
}
"""What the bundled recipes change for a world: sections by recipe by world."""


@dataclass(frozen=True)
class Arm:
    """One way of training, in tables and as a recipe of seed 0.

    Attributes:
        group: `FULL`, or a key of `GROUPS`.
        name: as shown; no other arm of the benchmark has it.
        from_scratch: whether even the source's layers start from random weights.
    """

    group: str
    name: str
    recipe: Recipe
    from_scratch: bool = False

    @property
    def steps(self) -> int:
        return self.recipe.training.steps

    @property
    def folder(self) -> str:
        """Its name in file names, with its steps, as arms of other lengths may lie beside it."""
        if self.group == FULL:
            return f"{FULL}-{self.steps}"  # as in version 0.1, whose finished runs are kept
        plain = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in self.name)
        return f"{plain}-{self.steps}"

    def seeded(self, seed: int) -> Recipe:
        """The recipe with this seed for its initialisation and its training."""
        return dataclasses.replace(
            self.recipe,
            model=dataclasses.replace(self.recipe.model, seed=seed),
            training=dataclasses.replace(self.recipe.training, seed=seed),
        )


def world_recipe(world: TinyWorld, name: str) -> Recipe:
    """A bundled recipe with the settings that a world's source needs, and with prompts that its words know.

    Args:
        world: whose source is transferred.
        name: "tiny" for the full run, "demo" for the compared arms.
    """
    recipe = recipes.load(find(name))
    watch = {} if world is SHAPES else {"prompts": world.captions(len(recipe.watch.prompts)), "cfg": world.cfg}
    return _changed(recipe, **OF_WORLD[world.name].get(name, {}), watch=watch)


def full_arm(recipe: Recipe, steps: int | None = None) -> Arm:
    """The long run with a recipe's own settings."""
    return Arm(FULL, "L2P, full run", _changed(recipe, training={"steps": steps or recipe.training.steps}))


def compared_arms(recipe: Recipe, groups: Collection[str] = tuple(GROUPS), steps: int | None = None) -> list[Arm]:
    """The arms of some groups, and the reference, which is the first of them.

    Arms that do not begin fitted have the recipe's own learning rate, which is best for them.

    Args:
        recipe: the reference but for its start.
        groups: keys of `GROUPS`.
        steps: of every arm; None takes the recipe's.
    """
    steps = steps or recipe.training.steps
    images = max(recipe.data.images, steps * recipe.data.batch_size // PASSES)
    plain = _changed(recipe, training={"steps": steps}, data={"images": images})
    reference = fitted(plain)

    def arm(group: str, name: str, scratch: bool = False, **changes: dict[str, Any]) -> Arm:
        start = reference if group != STARTS and not scratch else plain
        return Arm(group, name, _changed(start, **changes), scratch)

    found = [
        Arm(STARTS, REFERENCE, reference),
        arm(STARTS, "scaled", model={"init": "scaled"}),
        arm(STARTS, "random", model={"init": "random"}),
        arm(POLICIES, "1 + 1 blocks", training={"blocks": 1}),
        arm(POLICIES, "all blocks", training={"policy": "all"}),
        arm(POLICIES, "from scratch", True, model={"init": "random"}, training={"policy": "all"}),
        arm(DATA, "clean renderings", data={"kind": "renderings"}),
        *(arm(SHIFT, f"shift {shift:g}", training={"shift": shift}) for shift in SHIFTS),
    ]
    return [one for one in found if one.name == REFERENCE or one.group in groups]


def in_group(arms: Sequence[Arm], group: str) -> list[Arm]:
    """A group's arms after the reference."""
    return [arm for arm in arms if arm.name == REFERENCE or arm.group == group]


def _changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with some keys of some sections replaced."""
    new = {name: dataclasses.replace(getattr(recipe, name), **changes) for name, changes in sections.items()}
    return dataclasses.replace(recipe, **new)
