"""Writing prompts until every slot has one: the loop, for the command line and the node alike."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..dataset.synthesis import FolderSettings
from ..files.atomic import write_bytes
from ..files.lock import LOCK, held
from . import checks, instructions, journal, outputs, reasons, report
from .journal import Journal, JournalEntry
from .near_duplicates import Seen
from .scheme import Slot
from .writer import Request, Writer

ATTEMPTS = 12
"""Texts that a slot gets in one run; a slot that has no prompt then stays open until the next run."""
HOPELESS = 60
"""Rejected texts in a row after which the model is considered unable."""
PUBLISHED_EVERY = 60.0  # seconds between updates of table and report


@dataclass(frozen=True)
class PromptsProgress:
    """How far the work is.

    Attributes:
        done: prompts that exist, of the wanted ones.
        wanted: prompts to be written.
        rejected: texts rejected so far, those of earlier runs included.
        seconds_left: until the last prompt, at this run's speed; None before the first.
    """

    done: int
    wanted: int
    rejected: int
    seconds_left: float | None


@dataclass(frozen=True)
class PromptsResult:
    """What a run left.

    Attributes:
        prompts: in the order of the slots.
        wanted: slots in all.
        now: prompts written by this run.
        rejected: reasons of the texts rejected so far, with their number, the most frequent first.
        stopped: whether it was told to stop.
    """

    prompts: list[str]
    wanted: int
    now: int
    rejected: dict[str, int]
    stopped: bool

    def summary(self) -> str:
        """One to three sentences for the user."""
        many = f"{len(self.prompts)} of {self.wanted} prompts, {self.now} of them written now."
        if self.rejected:
            named = ", ".join(f"{reasons.TEXTS[reason]}: {number}" for reason, number in self.rejected.items())
            count = sum(self.rejected.values())
            many += f" {count} {'text was' if count == 1 else 'texts were'} rejected ({named})."
        if len(self.prompts) < self.wanted:
            many += " Run it again for the rest."
        return many


def write(
    folder: Path,
    slots: Sequence[Slot],
    writer: Writer,
    settings: FolderSettings,
    *,
    seed: int,
    note: Callable[[str], object],
    copy: Path | None = None,
    progress: Callable[[PromptsProgress], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> PromptsResult:
    """Have prompts written for the slots that have none yet.

    Args:
        folder: of the work, created if missing. Work with the same settings in it is continued.
        slots: of `scheme.slots` or `rewriting.slots`; more or fewer of them than last time are fine.
        writer: the language model.
        settings: what else the texts depend on; the seed and the writer's name are added.
        seed: of the texts.
        note: called with a sentence for the user if the folder cannot be kept from other processes.
        copy: a second file for the table, written when the work ends or is stopped.
        progress: called at the start and after every text.
        stopped: called before every text; true ends the work there. An exception of `progress` ends it as well.

    Raises:
        ValueError: if datasketch is missing, the folder cannot be used or was written with other settings, the disk is
            full, or the model cannot answer or writes nothing that is a prompt. What was written stays.
    """
    with held(folder, LOCK, "writes prompts", note):
        seen = Seen()
        own = {
            "task": "rewrite" if slots and slots[0].short else "write",
            "seed": seed,
            "model": writer.name,
            **settings,
        }
        work = _Writing(folder, slots, Journal(folder, own), seen, seed)
        try:
            work.keep_what_fits()
            progress(work.progress())
            while work.waiting and not stopped():
                work.take(_written(work, writer))
                progress(work.progress())
            return work.result(stopped=bool(work.waiting))
        finally:
            work.publish(own)
            if copy and (folder / outputs.TABLE).is_file():
                write_bytes(copy, (folder / outputs.TABLE).read_bytes())


def _written(work: _Writing, writer: Writer) -> list[str]:
    try:
        return writer.write([work.request(slot) for slot in islice(work.waiting, writer.at_once)])
    except ValueError as error:
        many = work.progress()
        raise ValueError(
            f"{error} {many.done} of {many.wanted} prompts are written; run it again for the rest."
        ) from error


class _Writing:
    """One run of the work. Everything but its clock follows from the journal."""

    def __init__(self, folder: Path, slots: Sequence[Slot], record: Journal, seen: Seen, seed: int):
        self.folder, self.slots, self.seed = folder, list(slots), seed
        self._record, self._seen = record, seen
        self._last = {entry.slot: entry for entry in record.entries}
        self._kept = journal.kept(record.entries)
        for entry in self._kept.values():
            seen.add(entry.text)
        self.waiting = deque(slot for slot in slots if slot.key not in self._kept)
        self._tries: Counter[str] = Counter()
        self._now = self._settled = self._in_vain = 0
        self._begun = time.monotonic()
        self._published = self._begun

    def keep_what_fits(self) -> None:
        """Keep prompts to rewrite that are in the wanted style already."""
        for slot in self.waiting:
            text = checks.cleaned(slot.short)
            if slot.short and slot.key not in self._last and not checks.problem(text) and not self._seen.check(text):
                self._note(slot, JournalEntry(slot.key, 0, text, "", short=slot.short))
        self.waiting = deque(slot for slot in self.waiting if slot.key not in self._kept)

    def request(self, slot: Slot) -> Request:
        """The request to the model for a slot: a new text, or the last one with its length corrected."""
        last = self._last.get(slot.key)
        correct = (last.text, last.reason) if last and self._is_correctable(last) else None
        return instructions.request(slot, self.seed, last.attempt + 1 if last else 0, correct)

    def take(self, answers: Sequence[str]) -> None:
        """Judge and record the answers for the first of the waiting slots."""
        slots = [self.waiting.popleft() for _ in answers]
        again = []
        for slot, answer in zip(slots, answers, strict=True):
            last = self._last.get(slot.key)
            entry = self._judged(slot, answer, last)
            self._note(slot, entry)
            self._tries[slot.key] += 1
            self._in_vain = self._in_vain + 1 if entry.reason else 0
            if entry.reason and self._tries[slot.key] < ATTEMPTS:
                again.append(slot)
            else:
                self._settled += 1
        self.waiting.extendleft(reversed(again))
        if self._in_vain >= HOPELESS or not (self.waiting or self._kept):
            self._give_up()
        if time.monotonic() - self._published >= PUBLISHED_EVERY:
            outputs.write_table(self.folder, self._prompts())
            self._published = time.monotonic()

    def progress(self) -> PromptsProgress:
        """How far it is."""
        done = sum(slot.key in self._kept for slot in self.slots)
        took = time.monotonic() - self._begun
        left = took / self._settled * len(self.waiting) if self._settled else None
        return PromptsProgress(done, len(self.slots), sum(bool(entry.reason) for entry in self._record.entries), left)

    def result(self, stopped: bool) -> PromptsResult:
        """What there is now."""
        counts = Counter(entry.reason for entry in self._record.entries if entry.reason)
        texts = [entry.text for entry in self._prompts()]
        return PromptsResult(texts, len(self.slots), self._now, dict(counts.most_common()), stopped)

    def publish(self, settings: FolderSettings) -> None:
        """Write table and report."""
        outputs.write_table(self.folder, self._prompts())
        page = report.of_work(self.folder.resolve().name, self.slots, self._record.entries, settings)
        write_bytes(self.folder / outputs.REPORT, page)

    def _prompts(self) -> list[JournalEntry]:
        return [self._kept[slot.key] for slot in self.slots if slot.key in self._kept]

    def _judged(self, slot: Slot, answer: str, last: JournalEntry | None) -> JournalEntry:
        text = checks.cleaned(answer)
        reason, like = checks.problem(text, short=slot.short), ""
        if not reason and (found := self._seen.check(text)):
            reason, like = found
        return JournalEntry(
            slot=slot.key,
            attempt=last.attempt + 1 if last else 0,
            text=text,
            reason=reason or "",
            of=slot.kind.of if slot.kind else "",
            kind=slot.kind.name if slot.kind else "",
            short=slot.short,
            corrects=bool(last and self._is_correctable(last)),
            like=like,
        )

    def _is_correctable(self, last: JournalEntry) -> bool:
        return last.reason in instructions.CORRECTIONS and not last.corrects

    def _note(self, slot: Slot, entry: JournalEntry) -> None:
        self._record.add(entry)
        self._last[slot.key] = entry
        if not entry.reason:
            self._kept[slot.key] = entry
            self._seen.add(entry.text)
            self._now += 1

    def _give_up(self) -> None:
        count = min(self._in_vain, HOPELESS)
        recent = Counter(entry.reason for entry in self._record.entries[-count:])
        named = ", ".join(f"{reasons.TEXTS[reason]}: {number}" for reason, number in recent.most_common(3))
        known = recent[reasons.SAME] + recent[reasons.NEAR]
        temperature = "higher" if known > count / 2 else "lower"  # a low one gives the same text again
        raise ValueError(
            f"None of the model's last {count} texts is a prompt ({named}): take a larger model that follows "
            f"instructions, such as Qwen3-4B, or a {temperature} temperature; the journal has the texts."
        )
