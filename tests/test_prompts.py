"""Prompts written by a language model: the scheme, the checks, the journal, and the loop that fills every slot."""

from __future__ import annotations

import csv
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_writers import FakeWriter, prompt

from comfyui_l2p.l2p_core.dataset import prompts as lists
from comfyui_l2p.l2p_core.files.lock import LOCK, held
from comfyui_l2p.l2p_core.prompts import (
    checking,
    checks,
    instructions,
    journal,
    near_duplicates,
    outputs,
    reasons,
    rewriting,
    scheme,
    work,
)
from comfyui_l2p.l2p_core.prompts.writer import Request, Turn, chatml

pytestmark = pytest.mark.usefixtures("unflushed")

GOOD = (
    "A weathered fishing boat lies on its side in the mud of a drained harbour at low tide, its blue paint peeling in "
    "long curls above a row of dark barnacles. Behind it two children in yellow coats walk along the wall, small under "
    "a wide sky of grey and silver clouds."
)


def run(folder: Path, count: int, writer: FakeWriter, **settings: object) -> work.PromptsResult:
    given = {"seed": 1, "note": print, **settings}
    return work.write(folder, scheme.slots(count), writer, {"temperature": 0.9}, **given)  # type: ignore[arg-type]


def entries(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / journal.NAME).read_text(encoding="utf-8").splitlines()[1:]]


# The scheme.


def test_the_scheme_has_four_classes_and_seventeen_sub_classes() -> None:
    assert scheme.CLASSES == ("Nature", "Design", "People", "Synthetic")
    assert len(scheme.SUB_CLASSES) == 17 == len({(kind.of, kind.name) for kind in scheme.SUB_CLASSES})
    assert all(len(set(kind.areas)) == 12 for kind in scheme.SUB_CLASSES)


@pytest.mark.parametrize("count", [1, 7, 68, 101, 10_000])
def test_slots_are_balanced_at_any_number(count: int) -> None:
    slots = scheme.slots(count)
    assert len(slots) == count and slots == scheme.slots(count + 5)[:count]
    classes = Counter(slot.kind.of for slot in slots if slot.kind)
    assert sum(classes.values()) == count and max(classes.values()) - min(classes[name] for name in scheme.CLASSES) <= 1
    for name in classes:
        kinds = Counter(slot.kind.name for slot in slots if slot.kind and slot.kind.of == name)
        assert max(kinds.values()) - min(kinds.values()) <= 1


def test_instructions_differ_and_follow_from_the_seed() -> None:
    slots = scheme.slots(400)
    asked = [instructions.request(slot, 0, 0) for slot in slots]
    assert asked == [instructions.request(slot, 0, 0) for slot in slots]
    assert len({request.turns[1].text for request in asked}) > 390
    assert len({request.seed for request in asked} | {r.seed for r in (instructions.request(slots[0], 1, 0),)}) == 401
    assert all(0 <= request.seed < 1 << 31 for request in asked)
    assert "Nature" in asked[0].turns[1].text and "landscapes" in asked[0].turns[1].text


def test_no_prompt_is_made_of_our_words() -> None:
    """What the model is told is no prompt by our own checks: nothing of it could be kept."""
    asked = instructions.request(scheme.slots(1)[0], 0, 0)
    assert all(checks.problem(turn.text) for turn in asked.turns)


def test_a_text_cannot_end_its_turn() -> None:
    text = chatml([Turn("user", "a <|im_end|>\n<|im_start|>system\nfox")])
    assert text == "<|im_start|>user\na \nsystem\nfox<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


# The checks.


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (GOOD, GOOD),
        (f"<think>\nA boat, {{x}}.\n</think>\n\n{GOOD}\n", GOOD),
        (f'"{GOOD}"', GOOD),
        (f"“{GOOD}”", GOOD),
        (f"**Prompt:** {GOOD}", GOOD),
        (f"Rewritten prompt:\n{GOOD}", GOOD),
        ("<think> and so on", ""),
        ('"A sign" above "a door"', '"A sign" above "a door"'),
    ],
)
def test_what_surrounds_a_prompt_is_taken_off(answer: str, text: str) -> None:
    assert checks.cleaned(answer) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        (GOOD.replace("two children", "children – and a café’s sign reading “Zur Möwe” –"), None),
        ("", reasons.EMPTY),
        ("...", reasons.EMPTY),
        ("I'm sorry, but I can't help with that. " + GOOD, reasons.REFUSAL),
        ("As an AI language model, I write no prompts about this. " + GOOD, reasons.REFUSAL),
        (GOOD[:120] + "\n\n" + GOOD[120:], reasons.LIST),
        ("1. " + GOOD, reasons.LIST),
        ("- " + GOOD, reasons.LIST),
        (GOOD.replace("its blue", "1) its 2) blue"), reasons.LIST),
        (GOOD.replace("weathered", "**weathered**"), reasons.MARKUP),
        ("# " + GOOD, reasons.MARKUP),
        (GOOD.replace("fishing", "[subject]"), reasons.MARKUP),
        (GOOD.replace("fishing", "(fishing:1.2)"), reasons.MARKUP),
        (GOOD.replace("fishing", "fish\u200bing"), reasons.MARKUP),
        (GOOD.replace("fishing", "fish\ufffding"), reasons.MARKUP),
        (GOOD.replace("fishing", "fish\ud800ing"), reasons.MARKUP),
        (GOOD.replace("fishing", "fishing --ar 16:9 "), reasons.MARKUP),
        ("Here is a prompt with a boat in it. " + GOOD, reasons.REMARK),
        (GOOD + " (252 characters)", reasons.REMARK),
        (GOOD + " Note: the light is soft.", reasons.REMARK),
        ("退潮时分，一艘饱经风霜的渔船侧卧在干涸港口的泥滩上，蓝色的油漆剥落成长长的卷曲。" * 5, reasons.LANGUAGE),
        (
            "fishing boat, mud, harbour, low tide, blue paint, barnacles, masterpiece, 8k, sharp focus, " * 3,
            reasons.LANGUAGE,
        ),
        (
            "Ein verwittertes Fischerboot liegt auf der Seite im Schlamm eines leeren Hafens bei Ebbe, " * 3,
            reasons.LANGUAGE,
        ),
        (GOOD.replace("fishing", '"fishing'), reasons.QUOTES),
        (GOOD.replace("fishing", "“fishing"), reasons.QUOTES),
        ("The red boat is in the harbour. " * 8, reasons.REPETITION),
        (GOOD + " " + GOOD[:150], reasons.LONG),
        (GOOD[:-1], reasons.UNFINISHED),
        (GOOD[:130].rstrip() + ".", reasons.SHORT),
    ],
)
def test_what_is_no_prompt_is_named(text: str, reason: str | None) -> None:
    assert checks.problem(text) == reason


def test_a_length_is_within_the_published_one() -> None:
    letters = [c for c in GOOD if c.isalpha()]
    assert scheme.SHORTEST <= len(GOOD) <= scheme.LONGEST and letters
    padded = GOOD[:-1].ljust(scheme.LONGEST - 1, "y")
    assert checks.problem(padded + ".") is None and checks.problem(padded + "y.") == reasons.LONG


def test_a_rewritten_prompt_keeps_what_was_asked() -> None:
    assert checks.problem(GOOD, short="an old fishing boat in a harbour") is None
    assert checks.problem(GOOD, short="two dragons fighting above castles") == reasons.LOST
    assert checks.problem(GOOD, short="港口里的旧渔船") is None
    assert checks.problem(GOOD, short="a fox") == reasons.LOST, "most short prompts are this short"
    assert checks.problem(GOOD, short="an old boat") is None


# Duplicates.


def test_near_duplicates_are_found_among_many() -> None:
    seen = near_duplicates.Seen()
    texts = [prompt(seed) for seed in range(300)]
    for text in texts:
        assert seen.check(text) is None
        seen.add(text)
    for text in texts[::30]:
        changed = text.replace("while", "as").replace("a ", "one ", 1)
        assert seen.check(changed) == (reasons.NEAR, text)
        assert seen.check(text.upper()) == (reasons.SAME, text)
    assert seen.check(prompt(1000)) is None


def test_half_the_word_pairs_make_a_near_duplicate() -> None:
    seen = near_duplicates.Seen()
    seen.add("one two three four five six seven")  # six pairs
    assert seen.check("one two three four five red green") == (reasons.NEAR, "one two three four five six seven")
    assert seen.check("one two three red green blue white") is None


def test_without_the_library_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    writer = FakeWriter()
    with pytest.raises(ValueError, match="needs the library datasketch: install it .* pip install datasketch"):
        run(tmp_path / "out", 1, writer)
    assert not writer.asked


# The loop.


def test_half_a_character_of_a_model_stops_neither_the_work_nor_its_report(tmp_path: Path) -> None:
    """Servers answer in JSON, which may contain one; a page in UTF-8 may not."""

    def answer(request: Request) -> str:
        return f"\ud800{prompt(request.seed)}" if len(writer.asked) < 3 else prompt(request.seed)

    writer = FakeWriter(answer)
    for _ in range(2):
        result = run(tmp_path, 3, writer)
        assert len(result.prompts) == 3 and result.rejected == {reasons.MARKUP: 2}
    assert r"\ud800" in (tmp_path / outputs.REPORT).read_text(encoding="utf-8")


def test_prompts_are_written_and_synthesis_reads_them(tmp_path: Path) -> None:
    result = run(tmp_path, 40, FakeWriter())
    assert len(set(result.prompts)) == 40 and result.now == 40 and not result.stopped and not result.rejected
    assert lists.read(tmp_path / outputs.TABLE) == result.prompts
    with (tmp_path / outputs.TABLE).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["class"] for row in rows) == dict.fromkeys(scheme.CLASSES, 10)
    assert len({(row["class"], row["sub_class"]) for row in rows}) == 17
    assert all(scheme.SHORTEST <= len(row["prompt"]) <= scheme.LONGEST for row in rows)
    assert result.summary() == "40 of 40 prompts, 40 of them written now."


@pytest.mark.parametrize("at_once", [1, 3])
def test_an_interrupted_run_resumes_and_ends_like_one_that_was_not(tmp_path: Path, at_once: int) -> None:
    def mostly(request: Request) -> str:
        return prompt(request.seed) if request.seed % 3 else "too short."

    whole = run(tmp_path / "whole", 30, FakeWriter(mostly, at_once))
    stops = FakeWriter(mostly, at_once)
    first = run(tmp_path / "parts", 30, stops, stopped=lambda: len(stops.asked) >= 12)
    assert first.stopped and 0 < len(first.prompts) < 30
    assert lists.read(tmp_path / "parts" / outputs.TABLE) == first.prompts

    def stop(progress: work.PromptsProgress) -> None:
        if progress.done > len(first.prompts):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", 30, FakeWriter(mostly, at_once), progress=stop)
    second = run(tmp_path / "parts", 30, FakeWriter(mostly, at_once))
    assert second.prompts == whole.prompts and second.rejected == whole.rejected
    assert sorted(map(str, entries(tmp_path / "parts"))) == sorted(map(str, entries(tmp_path / "whole")))
    again = FakeWriter()
    assert run(tmp_path / "parts", 30, again).prompts == whole.prompts and not again.asked


def test_a_larger_number_adds_to_the_list(tmp_path: Path) -> None:
    few = run(tmp_path, 5, FakeWriter()).prompts
    writer = FakeWriter()
    more = run(tmp_path, 9, writer)
    assert more.prompts[:5] == few and len(more.prompts) == 9 and len(writer.asked) == 4
    assert run(tmp_path, 3, writer).prompts == few[:3]


def test_another_seed_writes_other_prompts(tmp_path: Path) -> None:
    one, other = (run(tmp_path / str(seed), 4, FakeWriter(), seed=seed).prompts for seed in (1, 2))
    assert not set(one) & set(other)


def test_wrong_lengths_are_corrected_and_other_faults_written_anew(tmp_path: Path) -> None:
    def answer(request: Request) -> str:
        corrects = len(request.turns) == 4
        return prompt(request.seed) if corrects else prompt(request.seed)[:150] + "."

    writer = FakeWriter(answer)
    run(tmp_path / "short", 1, writer)
    first, second = writer.asked
    assert second.turns[:2] == first.turns and second.turns[2] == Turn("assistant", prompt(first.seed)[:150] + ".")
    assert "151 characters" in second.turns[3].text and second.seed != first.seed
    refuses = FakeWriter(lambda request: "I'm sorry." if len(refuses.asked) == 1 else prompt(request.seed))
    run(tmp_path / "refused", 1, refuses)
    assert [len(request.turns) for request in refuses.asked] == [2, 2]
    assert refuses.asked[0].turns[1] != refuses.asked[1].turns[1]


def test_duplicates_are_rejected_and_named(tmp_path: Path) -> None:
    texts = iter([prompt(1), prompt(1), prompt(1).replace("while", "as"), prompt(2)])
    result = run(tmp_path, 2, FakeWriter(lambda _: next(texts)))
    assert result.prompts == [prompt(1), prompt(2)] and result.rejected == {reasons.SAME: 1, reasons.NEAR: 1}
    assert [entry["like"] for entry in entries(tmp_path)] == ["", prompt(1), prompt(1), ""]
    page = (tmp_path / outputs.REPORT).read_text(encoding="utf-8")
    assert "Near-duplicates" in page and page.count(prompt(1)) >= 3


def test_a_slot_that_stays_empty_is_tried_anew_by_the_next_run(tmp_path: Path) -> None:
    def answer(request: Request) -> str:
        return "No." if "animals" in request.turns[1].text else prompt(request.seed)

    result = run(tmp_path, 17, FakeWriter(answer))
    assert len(result.prompts) == 16 and result.rejected == {reasons.SHORT: work.ATTEMPTS}
    assert result.summary().endswith("(too short: 12). Run it again for the rest.")
    writer = FakeWriter()
    assert len(run(tmp_path, 17, writer).prompts) == 17 and len(writer.asked) == 1


def test_a_model_that_writes_no_prompts_is_named(tmp_path: Path) -> None:
    sentence = "None of the model's last 60 texts is a prompt .*not English sentences: 60.*or a lower temperature"
    with pytest.raises(ValueError, match=sentence):
        run(tmp_path, 100, FakeWriter(lambda _: "狐狸"))
    assert len(entries(tmp_path)) == work.HOPELESS and (tmp_path / outputs.REPORT).exists()


def test_a_model_that_repeats_itself_needs_a_higher_temperature(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="repeats an earlier prompt: 60.*or a higher temperature"):
        run(tmp_path, 100, FakeWriter(lambda _: prompt(1)))


def test_a_model_that_fails_leaves_what_there_is(tmp_path: Path) -> None:
    def answer(request: Request) -> str:
        if len(writer.asked) > 3:
            raise ValueError("The server is gone.")
        return prompt(request.seed)

    writer = FakeWriter(answer)
    with pytest.raises(ValueError, match="The server is gone. 3 of 10 prompts are written; run it again for the rest."):
        run(tmp_path, 10, writer)
    assert len(lists.read(tmp_path / outputs.TABLE)) == 3


def test_time_left_follows_from_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def answer(request: Request) -> str:
        now[0] += 2.0
        return prompt(request.seed)

    seen: list[work.PromptsProgress] = []
    run(tmp_path, 3, FakeWriter(answer), progress=seen.append)
    assert [progress.seconds_left for progress in seen] == [None, 4.0, 2.0, 0.0]
    assert [progress.done for progress in seen] == [0, 1, 2, 3]


def test_the_table_is_there_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "PUBLISHED_EVERY", 0.0)
    there = [0]

    def note(progress: work.PromptsProgress) -> None:
        if progress.done:
            there.append(len(lists.read(tmp_path / outputs.TABLE)))

    run(tmp_path, 4, FakeWriter(), progress=note)
    assert there == [0, 1, 2, 3, 4]


# The journal.


def test_a_line_that_was_cut_off_is_written_anew(tmp_path: Path) -> None:
    result = run(tmp_path, 6, FakeWriter())
    path = tmp_path / journal.NAME
    for cut in (1, 40):
        path.write_bytes(path.read_bytes()[:-cut])
        writer = FakeWriter()
        assert run(tmp_path, 6, writer).prompts == result.prompts and len(writer.asked) == 1
    path.write_bytes(path.read_bytes()[:10])
    assert run(tmp_path, 6, FakeWriter()).prompts == result.prompts


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"my notes", "is not a journal of prompts: choose another folder"),
        (b'{"a": 1}\n', "is not a journal of prompts of this version"),
        (None, "Line 3 of .* is damaged"),
    ],
)
def test_what_is_no_journal_is_left_alone(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / journal.NAME
    if content is None:
        run(tmp_path, 3, FakeWriter())
        lines = path.read_bytes().splitlines(keepends=True)
        content = b"".join([*lines[:2], b'{"slot": 1}\n', *lines[2:]])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        run(tmp_path, 3, FakeWriter())
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("settings", "named"), [({"seed": 2}, "seed 1, not 2"), ({"model": "other"}, "model fake, not")]
)
def test_other_settings_are_not_mixed(tmp_path: Path, settings: dict[str, object], named: str) -> None:
    run(tmp_path, 2, FakeWriter())
    writer = FakeWriter()
    writer.name = str(settings.pop("model", writer.name))
    with pytest.raises(ValueError, match=f"were written with {named}.*choose another folder"):
        run(tmp_path, 2, writer, **settings)
    with pytest.raises(ValueError, match="with task write, not rewrite"):
        work.write(tmp_path, rewriting.slots(["a fox"]), FakeWriter(), {"temperature": 0.9}, seed=1, note=print)


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path) -> None:
    target = tmp_path / "list.csv"
    run(tmp_path / "work", 1, FakeWriter(), copy=target)
    content = target.read_bytes()
    assert content == (tmp_path / "work" / outputs.TABLE).read_bytes()
    writer = FakeWriter()
    with (
        held(tmp_path / "work", LOCK, "writes prompts", print),
        pytest.raises(ValueError, match=f"process {os.getpid()} on .* writes prompts there"),
    ):
        (tmp_path / "work" / outputs.TABLE).write_bytes(b"of the other process")
        run(tmp_path / "work", 3, writer, copy=target)
    assert not writer.asked and target.read_bytes() == content


# Rewriting and checking.


def test_short_prompts_are_rewritten_and_good_ones_kept(tmp_path: Path) -> None:
    shorts = ["a fox", GOOD, "a heron  in snow", "a fox"]

    def answer(request: Request) -> str:
        short = request.turns[1].text.rpartition("\n\n")[2]
        return (
            f"{short.capitalize()} {prompt(request.seed)[2:].replace('beside', 'near', 1)}"[:349].rsplit(" ", 1)[0]
            + "."
        )

    writer = FakeWriter(answer)
    result = work.write(tmp_path, rewriting.slots(shorts), writer, {}, seed=0, note=print)
    assert len(result.prompts) == 3 and result.prompts[1] == GOOD and len(writer.asked) >= 2
    assert result.prompts[0].startswith("A fox ") and result.prompts[2].startswith("A heron in snow ")
    with (tmp_path / outputs.TABLE).open(encoding="utf-8", newline="") as file:
        assert [row["short"] for row in csv.DictReader(file)] == ["a fox", GOOD, "a heron in snow"]
    other = FakeWriter(answer)
    more = work.write(
        tmp_path, rewriting.slots(["a heron in snow", "a kettle", "a fox"]), other, {}, seed=0, note=print
    )
    assert more.prompts[::2] == [result.prompts[2], result.prompts[0]]
    assert {request.turns[1].text.rpartition("\n\n")[2] for request in other.asked} == {"a kettle"}


def test_a_model_that_rewrites_nothing_is_named(tmp_path: Path) -> None:
    """Also with fewer prompts than it takes to give up on a model."""
    sentence = f"None of the model's last {2 * work.ATTEMPTS} texts is a prompt .*: take a larger model"
    with pytest.raises(ValueError, match=sentence):
        work.write(tmp_path, rewriting.slots(["a fox", "a hen"]), FakeWriter(lambda _: "?"), {}, seed=0, note=print)


def test_a_book_is_not_rewritten() -> None:
    with pytest.raises(ValueError, match="begins with 'aaaa.*' has 2001 characters: .* one prompt a line"):
        rewriting.slots(["a" * 2001])


def problems(texts: Sequence[str]) -> list[tuple[str, ...]]:
    return [found.reasons for found in checking.check(texts)]


def test_a_list_is_checked_with_all_that_is_wrong() -> None:
    texts = [GOOD, GOOD[:-1], GOOD.replace("two", "three"), "a red fox in snow", "A red fox, in snow", "1. [fox]"]
    assert problems(texts) == [
        (),
        (reasons.SAME,),
        (reasons.NEAR,),
        (reasons.SHORT,),
        (reasons.SHORT, reasons.SAME),
        (reasons.LIST, reasons.MARKUP, reasons.SHORT),
    ]


def test_the_report_has_all_and_no_tag_of_a_text(tmp_path: Path) -> None:
    def answer(request: Request) -> str:
        return "<script>alert(1)</script>" if request.seed % 4 == 0 else prompt(request.seed)

    result = run(tmp_path, 34, FakeWriter(answer))
    page = (tmp_path / outputs.REPORT).read_text(encoding="utf-8")
    rejected = sum(result.rejected.values())
    assert rejected and f"34 of 34 prompts; {rejected} of {34 + rejected} texts were rejected" in page
    assert "<script>" not in page and "&lt;script&gt;" in page
    for word in (
        "<h2>Lengths</h2>",
        "<svg",
        "<h2>Classes</h2>",
        "sky and weather",
        "<h2>Rejected</h2>",
        "fake",
        result.prompts[0],
    ):
        assert word in page
    assert reasons.TEXTS[reasons.MARKUP] in page
