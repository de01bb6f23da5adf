"""The ranges of numbers: every option of the command line and every key of a recipe has one and keeps to it."""

from __future__ import annotations

import argparse
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from comfyui_l2p.l2p_core import flow
from comfyui_l2p.l2p_core.config import ModelConfig
from comfyui_l2p.l2p_core.convert import convert
from comfyui_l2p.l2p_core.files.paths import typed
from comfyui_l2p.l2p_core.ranges import Range
from comfyui_l2p.l2p_core.run import recipe as recipes
from comfyui_l2p.l2p_core.training_config import _CHOICES
from comfyui_l2p.train.arguments import Number
from comfyui_l2p.train.cli import build_parser, main
from comfyui_l2p.train.host_client import HostClient

TYPES_OF_TEXTS = (None, str, typed)
"""Paths are `typed`, never plain `Path`, so that `~` is the home folder wherever one may be given."""


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with each of its arguments."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from commands(below, (*words, name))
        else:
            yield words, action


ARGUMENTS = [(words, action) for words, action in commands(build_parser()) if action.nargs != 0]
NUMBERS = [(words, action) for words, action in ARGUMENTS if isinstance(action.type, Number)]


def keys() -> Iterator[tuple[str, str, type]]:
    """Every key of a recipe that takes a number of any size."""
    for section, kind in typing.get_type_hints(recipes.Recipe).items():
        for key, hint in typing.get_type_hints(kind).items():
            options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            number = next((option for option in options if option in (int, float)), None)
            if number and key not in _CHOICES:
                yield section, key, number


KEYS = list(keys())


def outside(allowed: Range) -> list[float]:
    """Values next to the ends of a range, and far off."""
    step = 1 if allowed.whole else 1e-9
    least = allowed.least if allowed.above else allowed.least - step * max(1, abs(allowed.least))
    most = allowed.most if allowed.below else allowed.most + step * max(1, abs(allowed.most))
    return [least, most, -(10**30), 10**30]


def inside(allowed: Range) -> list[float]:
    number = int if allowed.whole else float
    ends = (allowed.least, not allowed.above), (allowed.most, not allowed.below)
    return [number(end) for end, closed in ends if closed]


def name(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else getattr(value, "dest", None) or str(value)


@pytest.mark.parametrize(("words", "action"), ARGUMENTS, ids=name)
def test_every_argument_is_a_text_or_has_a_range(words: tuple[str, ...], action: argparse.Action) -> None:
    assert action.type is not Path, "give it type=typed, which expands ~"
    assert action.type in TYPES_OF_TEXTS or isinstance(action.type, Number), "give it type=Number(a range)"
    assert not isinstance(action.default, Path) or action.type is typed
    looks_like_a_number = isinstance(action.default, (int, float)) or (
        isinstance(action.default, list) and any(isinstance(item, (int, float)) for item in action.default)
    )
    assert not looks_like_a_number or isinstance(action.type, Number)


@pytest.mark.parametrize(("words", "action"), NUMBERS, ids=name)
def test_an_option_refuses_what_is_outside_its_range(
    words: tuple[str, ...], action: argparse.Action, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(action.type, Number)
    allowed = action.type.range
    odd = ["nan", "inf", "-inf", "1e400", "x", "", "9" * 5000, *(["1.5"] if allowed.whole else [])]
    for text in [*map(str, outside(allowed)), *odd]:
        with pytest.raises(SystemExit) as stopped:
            main([*words, f"{action.option_strings[0]}={text}"])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert f"argument {'/'.join(action.option_strings)}: must be " in said and said.count("\n") == 1
    for value in inside(allowed):
        assert action.type(str(value)) == value


@pytest.mark.parametrize(("section", "key", "kind"), KEYS, ids=str)
def test_a_key_of_a_recipe_refuses_what_is_outside_its_range(section: str, key: str, kind: type) -> None:
    assert key in recipes.RANGES[section], f"[{section}] {key} has no range: add it to the section's table"
    allowed = recipes.RANGES[section][key]
    assert allowed.whole == (kind is int)
    wrong = [*outside(allowed), math.nan, math.inf, -math.inf, 10**400, True, "3", [], {}]
    for value in wrong if kind is float else [*wrong, 1.5]:
        with pytest.raises(ValueError, match=rf"\[{section}\] {key} must be ") as error:
            parsed(section, key, value)
        assert "\n" not in str(error.value)
    for value in inside(allowed):
        assert getattr(getattr(parsed(section, key, value), section), key) == value


def parsed(section: str, key: str, value: object) -> recipes.Recipe:
    values: dict[str, dict[str, Any]] = {"model": {"base": "tiny"}}
    values.setdefault(section, {})[key] = value
    return recipes.parse(values)


def test_ranges_are_of_keys_that_there_are() -> None:
    assert {(section, key) for section, ranges in recipes.RANGES.items() for key in ranges} == {
        (section, key) for section, key, _ in KEYS
    }


@pytest.mark.parametrize(
    "text", ["lr = nan", "lr = inf", "steps = 1e3", "steps = true", 'steps = "10"', "seed = 0x1p3"]
)
def test_a_recipe_file_says_so_in_a_sentence(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'[model]\nbase = "tiny"\n[training]\n{text}\n', encoding="utf-8")
    assert main(["plan", str(path)]) == 2
    said = capsys.readouterr().err
    assert str(path) in said and said.count("\n") == 1


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "1e4", "81 88"])
def test_a_port_that_there_is_not_is_refused(port: str) -> None:
    with pytest.raises(ValueError, match="is not the address of a host"):
        HostClient(f"127.0.0.1:{port}")


def test_the_core_keeps_to_them_without_a_command_line(tmp_path: Path) -> None:
    for width in (0, 0.01, math.nan, math.inf):
        with pytest.raises(ValueError, match="head_width must be"):
            ModelConfig().with_head("1k", width)
        with pytest.raises(ValueError, match="head_width must be"):
            convert("tiny", tmp_path / "target.safetensors", head_width=width)
    with pytest.raises(ValueError, match="seed must be"):
        convert("tiny", tmp_path / "target.safetensors", seed=1 << 80)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="shift"):
            flow.sigmas(3, shift=wrong)
        with pytest.raises(ValueError, match="Denoise"):
            flow.sigmas(3, denoise=wrong)
        with pytest.raises(ValueError, match="Guidance"):
            flow.sample(lambda *_: torch.zeros(1), torch.zeros(1, 3, 2, 2), [], sigmas=flow.sigmas(1), cfg=wrong)
