"""Language models for tests: they answer at once, with sentences put together from their seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from comfyui_l2p.l2p_core.prompts.writer import Request

_WORDS = """
fox lamp bridge kettle harbour violin cactus lantern windmill anvil heron staircase glacier teapot orchard barge statue
loom comet telescope quilt tractor beacon fountain sparrow ladder compass drum sail hedge
rusty slender crimson hollow woven marble frosted crooked gilded mossy speckled copper velvet narrow pale striped dusty
amber tangled silent polished broad brittle ochre curved faded ivory sunken braided humble
leans glows waits rests towers drifts gleams stands curls spreads hangs settles rises sinks turns hovers crumbles sways
sparkles looms stretches slopes shivers shines tilts dangles blooms lingers melts folds
chapel flat garden riverbed atrium market ridge quay cellar meadow arcade lighthouse ravine barn plaza tunnel terrace
shipyard marsh theatre dune workshop avenue island cloister canal pass grove vault square
""".split()  # noqa: SIM905 (a list of them would fill a page)
_THINGS, _KINDS, _DOES, _PLACES = (_WORDS[start : start + 30] for start in range(0, 120, 30))


def prompt(seed: int) -> str:
    """A text that passes every check; texts of different seeds are not alike."""
    chance = random.Random(seed)

    def clause() -> str:
        one, other = chance.sample(_THINGS, 2)
        return (
            f"a {chance.choice(_KINDS)} {one} {chance.choice(_DOES)} beside the {chance.choice(_KINDS)} {other} "
            f"of a {chance.choice(_PLACES)}"
        )

    parts = [clause() for _ in range(4)]
    return f"{parts[0].capitalize()}, while {parts[1]}. {parts[2].capitalize()}, and {parts[3]}."


class FakeWriter:
    """A `Writer` that answers by a function of the request; `asked` has all requests."""

    name = "fake"

    def __init__(self, answer: Callable[[Request], str] = lambda request: prompt(request.seed), at_once: int = 1):
        self.at_once = at_once
        self.asked: list[Request] = []
        self._answer = answer

    def write(self, requests: Sequence[Request]) -> list[str]:
        self.asked += requests
        return [self._answer(request) for request in requests]
