"""Reports on prompts, each a self-contained HTML page: lengths, classes, duplicates, and what was rejected and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..dataset.synthesis import FolderSettings
from ..run.chart import chart
from ..run.page import facts, page, spread, table, text
from . import checking, journal, reasons
from .journal import JournalEntry
from .scheme import LONGEST, SHORTEST, SUB_CLASSES, Slot

BIN = 10  # characters of a point in the chart of lengths
EXAMPLES = 3  # of texts for each reason
SHOWN = 30  # pairs of near-duplicates, and prompts
_CUT = 500  # characters of a text that are shown


def of_work(name: str, slots: Sequence[Slot], entries: Sequence[JournalEntry], settings: FolderSettings) -> bytes:
    """The report of `work.write`: the page's content.

    Args:
        name: of the folder.
        slots: that were to be filled.
        entries: of the journal.
        settings: of the work.
    """
    by_slot = journal.kept(entries)
    prompts = [by_slot[slot.key] for slot in slots if slot.key in by_slot]
    rejected = [entry for entry in entries if entry.reason]
    status = f"{len(prompts)} of {len(slots)} prompts; {len(rejected)} of {len(entries)} texts were rejected"
    parts = [f"<h1>{text(name)}</h1>", f"<p><strong>{text(status)}</strong></p>"]
    parts += [facts((key, str(value)) for key, value in settings.items())]
    parts += _lengths([entry.text for entry in prompts])
    if any(slot.kind for slot in slots):
        parts += _classes(slots, prompts, rejected)
    parts += _rejected([(entry.reason, entry.text) for entry in rejected], len(entries), "texts")
    parts += _pairs([(entry.text, entry.like) for entry in rejected if entry.reason == reasons.NEAR])
    parts += _some(prompts)
    return page(name, parts)


def of_check(name: str, found: Sequence[checking.Checked]) -> bytes:
    """The report of a list that was checked: the page's content."""
    good = sum(not one.reasons for one in found)
    parts = [
        f"<h1>{text(name)}</h1>",
        f"<p><strong>{good} of {len(found)} prompts are without a problem</strong></p>",
        *_lengths([one.text for one in found]),
        *_rejected([(reason, one.text) for one in found for reason in one.reasons], len(found), "prompts"),
        *_pairs([(one.text, one.like) for one in found if reasons.NEAR in one.reasons]),
    ]
    return page(name, parts)


def _lengths(texts: Sequence[str]) -> Iterable[str]:
    if not texts:
        return
    lengths = sorted(len(one) for one in texts)
    yield "<h2>Lengths</h2>"
    yield facts(
        [
            ("Shortest", f"{lengths[0]} characters"),
            ("Median", f"{lengths[len(lengths) // 2]} characters"),
            ("Longest", f"{lengths[-1]} characters"),
            (f"Within {SHORTEST} to {LONGEST}", str(sum(SHORTEST <= length <= LONGEST for length in lengths))),
        ]
    )
    first, last = lengths[0] // BIN, min(lengths[-1], 4 * LONGEST) // BIN
    counts = Counter(min(length // BIN, last) for length in lengths)
    bins = range(max(0, first - 1), last + 2)  # with an empty one on both sides, so that the scale begins at zero
    yield chart("Prompts by characters", [one * BIN for one in bins], {"prompts": [float(counts[one]) for one in bins]})


def _classes(slots: Sequence[Slot], prompts: Sequence[JournalEntry], rejected: Sequence[JournalEntry]) -> Iterable[str]:
    wanted = Counter((slot.kind.of, slot.kind.name) for slot in slots if slot.kind)
    there = Counter((entry.of, entry.kind) for entry in prompts)
    bad = Counter((entry.of, entry.kind) for entry in rejected)
    yield "<h2>Classes</h2>"
    rows = [[*key, str(there[key]), str(wanted[key]), str(bad[key])] for key in ((k.of, k.name) for k in SUB_CLASSES)]
    yield table(["class", "sub-class", "prompts", "wanted", "rejected texts"], rows, numbers=(2, 3, 4))


def _rejected(texts: Sequence[tuple[str, str]], total: int, what: str) -> Iterable[str]:
    """How many for each reason, with examples."""
    counts = Counter(reason for reason, _ in texts)
    if not counts:
        return
    yield "<h2>Rejected</h2>" if what == "texts" else "<h2>Problems</h2>"
    rows = []
    for reason, count in counts.most_common():
        examples = [one for its, one in texts if its == reason and one][:EXAMPLES]
        rows.append(
            [reasons.TEXTS[reason], " | ".join(_cut(one) for one in examples), str(count), f"{count / total:.1%}"]
        )
    yield table(["reason", "for example", what, "share"], rows, numbers=(2, 3))


def _pairs(pairs: Sequence[tuple[str, str]]) -> Iterable[str]:
    if pairs:
        yield f"<h2>Near-duplicates</h2><p>The first {min(len(pairs), SHOWN)} of {len(pairs)}.</p>"
        yield table(["text", "is nearly"], [[_cut(one), _cut(other)] for one, other in pairs[:SHOWN]])


def _some(prompts: Sequence[JournalEntry]) -> Iterable[str]:
    """Some prompts, evenly spaced."""
    if prompts:
        some = (prompts[i] for i in spread(len(prompts), SHOWN))
        yield "<h2>Some of the prompts</h2>"
        yield table(["of", "prompt"], [[entry.kind or entry.short, entry.text] for entry in some])


def _cut(long: str) -> str:
    return long if len(long) <= _CUT else long[:_CUT] + "..."
