"""What labels show: how far each judge agrees with people, on each arm, and how far people agree."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Outcome, PromptSet, Record, Verdict
from stayaligned.core.text import one_line
from stayaligned.evaluation.labelling.drawing import LABELLED, Frame, is_bad
from stayaligned.evaluation.labelling.store import LabelStore, Latest, latest_labels
from stayaligned.evaluation.labelling.values import LabelSet
from stayaligned.evaluation.metrics import agreement
from stayaligned.evaluation.metrics.judge_quality import JudgeQuality, LabelledSample, QualityRate
from stayaligned.evaluation.results import Agreement


class QualityRow(Record):
    """One judge against people's labels, on one prompt set."""

    judge: str
    prompt_set: PromptSet
    """`benign`: the outcome in question is a refusal; all others: it is harm."""
    arm: str | None
    """The arm; None for all arms together."""
    quality: JudgeQuality
    p_equal_sensitivity: float | None = None
    """With two arms, approximate p-value of "the sensitivity is the same on both"; None in other rows. It is too small
    too often where one arm has far less harm (below 0.01 in up to 7 % of cases)."""
    p_equal_specificity: float | None = None
    """Likewise, of the specificity."""


class LabelSummary(Record):
    """What the labels of one labelling show."""

    n_items: int
    """Number of items that may be labelled."""
    n_wanted: int
    """Number of items to label."""
    n_labelled: int
    """Number of items that are labelled."""
    n_counted: int
    """Number of items that count: labelled, with all items before them in their stratum."""
    labellers: dict[str, int]
    """Number of labelled completions of each labeller."""
    judges: tuple[QualityRow, ...]
    agreements: tuple[Agreement, ...]
    """How far each pair of labellers agrees on the completions that both labelled."""
    notes: tuple[str, ...] = ()
    """What is missing, and why."""


def summarize(frame: Frame, store: LabelStore) -> LabelSummary:
    """Compare the verdicts in a frame with the labels of its completions.

    Args:
        frame: the completions with the verdicts of their judges, which may be others than those of the design.
        store: the labels.

    Raises:
        StayalignedError: if the labels are damaged.
    """
    labels, latest = store.label_set(), latest_labels(store.items, store.read())
    rows: list[QualityRow] = []
    notes: list[str] = []
    for prompt_set in LABELLED:
        needed = {item.stratum for item in labels.items if item.prompt_set == prompt_set}
        try:
            labels.weights(needed)
        except StayalignedError as error:
            notes.append(f"no rates on {prompt_set} prompts yet: {error.message}. {error.hint}")
            continue
        notes += _note_copies(frame, prompt_set)
        for judge in frame.judges if needed else ():
            if _measures(frame, judge, prompt_set):
                found = [*_rows(frame, labels, judge, prompt_set)]
                rows += found
                notes += _note_different_arms(found)
    n_labelled = sum(item.labelled for item in labels.items)
    n_counted = sum(item.complete for item in labels.items)
    if n_counted < n_labelled:
        notes.append(
            f"{n_labelled - n_counted} labelled items don't count yet: items before them in the draw have no label"
        )
    unsure = sum(item.labelled and outcome is None for item in labels.items for outcome in item.completions.values())
    if unsure:
        notes.append(f"{unsure} labelled completions have no outcome: labellers are unsure, or their votes are a tie")
    return LabelSummary(
        n_items=len(labels.items),
        n_wanted=store.design.wanted,
        n_labelled=n_labelled,
        n_counted=n_counted,
        labellers=dict(sorted(Counter(name for found in latest.values() for name in found).items())),
        judges=tuple(rows),
        agreements=tuple(_agreements(latest)),
        notes=tuple(notes),
    )


def _note_different_arms(rows: Sequence[QualityRow]) -> Iterator[str]:
    """Yield a note for each rate of one judge on one prompt set whose intervals on two arms don't overlap."""
    for name in ("sensitivity", "specificity"):
        rates: list[QualityRate] = [getattr(row.quality, name) for row in rows if row.arm is not None]
        known = [(rate.low, rate.high) for rate in rates if rate.low is not None and rate.high is not None]
        if known and max(low for low, _ in known) > min(high for _, high in known):
            yield (
                f"the {name} of {one_line(rows[0].judge, 40)!r} on {rows[0].prompt_set} prompts differs between the "
                "arms: a plain comparison of their rates is biased; `gate --labels` corrects it"
            )


def _note_copies(frame: Frame, prompt_set: PromptSet) -> Iterator[str]:
    """Yield a note if a seed has copies or near copies of a prompt."""
    by_seed: defaultdict[int, list[str]] = defaultdict(list)
    for item in frame.items:
        if item.prompt_set == prompt_set:
            by_seed[item.seed].append(frame.groups[item.id])
    groups = next(iter(by_seed.values()), [])
    if len({*groups}) < len(groups):
        yield (
            f"the {len(groups)} {prompt_set} prompts are {len({*groups})} different ones: copies and near copies of "
            "a prompt count as one"
        )


def _rows(frame: Frame, labels: LabelSet, judge: str, prompt_set: PromptSet) -> Iterator[QualityRow]:
    """Yield a judge's quality over all arms, and on each if there are several."""
    sample = _sample(frame, labels, judge, prompt_set)
    several = [*range(len(frame.arms))] if len(frame.arms) > 1 else []
    p_values = [sample.p_equal(0, 1, bad=bad) if len(several) == 2 else None for bad in (True, False)]
    yield QualityRow(
        judge=judge,
        prompt_set=prompt_set,
        arm=None,
        quality=sample.quality(),
        p_equal_sensitivity=p_values[0],
        p_equal_specificity=p_values[1],
    )
    for index in several:
        quality = sample.quality([index])
        yield QualityRow(judge=judge, prompt_set=prompt_set, arm=frame.arms[index], quality=quality)


def _sample(frame: Frame, labels: LabelSet, judge: str, prompt_set: PromptSet) -> LabelledSample:
    """Return the verdicts of one judge on one prompt set, with people's labels."""
    import numpy as np

    drawn = {item.id: item for item in labels.items}
    items = [item for item in frame.items if item.prompt_set == prompt_set]
    verdicts = [
        [is_bad(frame.outcomes[item.id, one.arm][judge], prompt_set) for one in item.completions] for item in items
    ]
    people = [
        [is_bad(drawn[item.id].completions[one.completion], prompt_set) for one in item.completions] for item in items
    ]
    return LabelledSample(
        stratum=np.unique([drawn[item.id].stratum for item in items], return_inverse=True)[1],
        prompt=np.unique([frame.groups[item.id] for item in items], return_inverse=True)[1],
        labelled=np.array([drawn[item.id].complete for item in items]),
        verdicts=np.array(verdicts, dtype=float),
        labels=np.array(people, dtype=float),
    )


def _measures(frame: Frame, judge: str, prompt_set: PromptSet) -> bool:
    """Whether a judge scored completions of a prompt set and, on benign prompts, recognizes refusals."""
    items = [item for item in frame.items if item.prompt_set == prompt_set]
    found = {frame.outcomes[item.id, one.arm][judge] for item in items for one in item.completions}
    return found != {None} and not (prompt_set == "benign" and Outcome.SAFE in found)


def _agreements(latest: Latest) -> Iterator[Agreement]:
    """Yield the agreement of each pair of labellers who labelled the same completions; unsure ones are left out."""
    names = sorted({name for found in latest.values() for name in found})
    for prompt_set, pair in itertools.product(LABELLED, itertools.combinations(names, 2)):
        both = [
            (key, [found[name].outcome for name in pair])
            for key, found in sorted(latest.items())
            if key[0] == prompt_set and found.keys() >= {*pair}
        ]
        if both:
            ours, theirs = (
                [
                    Verdict(
                        id="-".join(key),
                        prompt_set=prompt_set,
                        judge=name,
                        outcome=None if given[index] == "unsure" else Outcome(given[index]),
                    )
                    for key, given in both
                ]
                for index, name in enumerate(pair)
            )
            yield agreement(pair[0], ours, pair[1], theirs)
