"""The directory of a labelling: `design.json`, and `labels.jsonl`, to which labels are only appended."""

from __future__ import annotations

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from filelock import FileLock
from pydantic import ValidationError

from stayaligned.core.errors import StayalignedError, first_problem
from stayaligned.core.files import read_text, writable, write_text
from stayaligned.core.records import Outcome
from stayaligned.evaluation.labelling.values import (
    DESIGN_VERSION,
    Choice,
    CompletionKey,
    Design,
    DrawnItem,
    Label,
    LabelledItem,
    LabelSet,
)

DESIGN_FILE = "design.json"
LABELS_FILE = "labels.jsonl"
_LOCK_FILE = ".lock"
_BUSY_SECONDS = 30.0
_EDITED = "It was edited or damaged; restore it from a copy, or label into another --out."

Latest = Mapping[CompletionKey, Mapping[str, Label]]
"""The label that counts, by completion and labeller."""


@dataclass(frozen=True)
class LabelProgress:
    """How far a labelling is."""

    wanted: int
    """Number of items to label: the number asked for, or all."""
    labelled: int
    """Number of the wanted items that have a label of anyone for each completion."""
    by_labeller: Mapping[str, int]
    """Number of the wanted items that each labeller has labelled."""


class LabelStore:
    """The labels of one design in one directory.

    Several processes may append at once. A label is on the disk when `append` returns, and a killed process leaves at
    most a part of a last line, which was never acknowledged: it is not read, and the next append removes it.
    """

    def __init__(self, directory: Path, design: Design) -> None:
        self.directory = directory
        self.design = design

    @classmethod
    def create(cls, directory: Path, design: Design) -> LabelStore:
        """Write a design into an empty or new directory.

        Raises:
            StayalignedError: if the directory holds something else, or can't be written.
        """
        if directory.exists() and not directory.is_dir():
            raise StayalignedError(f"{directory}: is a file", hint="Give the labels a directory: --out DIR.")
        with writable(directory):
            directory.mkdir(parents=True, exist_ok=True)
            if any(not path.name.startswith(".") for path in directory.iterdir()):  # a killed command leaves such files
                raise StayalignedError(
                    f"{directory}: is not empty, and not a directory of labels", hint="Choose another --out."
                )
        return cls(directory, _write_design(directory, design))

    @classmethod
    def open(cls, directory: Path) -> LabelStore:
        """Open the labels in a directory.

        Raises:
            StayalignedError: if there is no design, or it was edited or written by another version.
        """
        path = directory / DESIGN_FILE
        text = read_text(path, hint="Give a directory that `stayaligned label` wrote.")
        try:
            design = Design.model_validate_json(text)
        except ValidationError as error:
            raise StayalignedError(f"{path}: not a design: {first_problem(error, 'file')}", hint=_EDITED) from None
        if design.format_version != DESIGN_VERSION:
            raise StayalignedError(
                f"{path}: format version {design.format_version}, expected {DESIGN_VERSION}",
                hint="Another version of stayaligned wrote it; use that version, or label into another --out.",
            )
        if design.computed_sha256() != design.content_sha256:
            raise StayalignedError(f"{path}: not the design that was drawn", hint=_EDITED)
        return cls(directory, design)

    @cached_property
    def items(self) -> Mapping[str, DrawnItem]:
        """The items by id, in the order of the draw."""
        return {item.id: item for item in self.design.items}

    @property
    def path(self) -> Path:
        """The file with the labels."""
        return self.directory / LABELS_FILE

    # ---- labels ------------------------------------------------------------------------------------------------------

    def label(self, item: str, completion: str, outcome: Choice, labeller: str, time: datetime | None = None) -> Label:
        """Return a label of a completion of an item, given now unless a time is given; `append` stores it.

        Raises:
            StayalignedError: if the design has no such completion, or for an invalid outcome or name of a labeller.
        """
        drawn = self.items.get(item)
        shown = () if drawn is None else drawn.completions
        policy = next((one.policy for one in shown if one.completion == completion), None)
        if policy is None:
            raise StayalignedError(f"completion {completion!r} of item {item!r} is not in {DESIGN_FILE}")
        try:
            return Label(
                item=item,
                completion=completion,
                outcome=outcome,
                labeller=labeller,
                time=time or datetime.now(UTC).replace(microsecond=0),
                judge=self.design.judge_hash,
                policy=policy,
            )
        except ValidationError as error:
            raise StayalignedError(f"label of {item!r}: {first_problem(error)}") from None

    def append(self, labels: Sequence[Label]) -> int:
        """Store labels: all of them or, if they can't be written, none. A label that already counts is not repeated.

        Returns:
            The number of labels that were new.

        Raises:
            StayalignedError: if a label does not belong to the design, if the stored labels are damaged, or if the
                labels can't be written, for lack of space for example; the file is then as it was.
        """
        for label in labels:
            self._refuse_foreign(label, f"label of {label.item!r}")
        with writable(self.path), self._locked():
            counting = {key: dict(found) for key, found in latest_labels(self.items, self.read()).items()}
            new: list[Label] = []
            for label in labels:
                found = counting.setdefault(self._key(label), {})
                before = found.get(label.labeller)
                if before is None or before.outcome != label.outcome:
                    found[label.labeller] = label
                    new.append(label)
            self._write("".join(label.model_dump_json() + "\n" for label in new).encode())
        return len(new)

    def read(self) -> list[Label]:
        """Return all labels, in the order in which they were stored.

        Raises:
            StayalignedError: if a line was edited, or is not a label of this design; names the line.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StayalignedError(f"{self.path}: {error.strerror}", hint="Check this path.") from None
        labels: list[Label] = []
        path = str(self.path)
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            where = f"{path}, line {number}"
            try:
                label = Label.model_validate_json(line)
            except ValidationError as error:
                raise StayalignedError(f"{where}: not a label: {first_problem(error, 'line')}", hint=_EDITED) from None
            self._refuse_foreign(label, where)
            labels.append(label)
        return labels

    def find_next(self, labeller: str) -> DrawnItem | None:
        """Return the first item, in the order of the draw, of which this labeller has not labelled each completion."""
        latest = latest_labels(self.items, self.read())
        for item in self.design.items:
            if any(labeller not in latest.get(key, {}) for key in item.questions()):
                return item
        return None

    def resize(self, wanted: int) -> None:
        """Change the number of items to label; the order of the draw stays.

        Raises:
            StayalignedError: if the design can't be written.
        """
        with self._locked():
            self.design = _write_design(self.directory, self.design.model_copy(update={"wanted": wanted}))

    def progress(self, wanted: int | None = None) -> LabelProgress:
        """Count the labelled items among the first `wanted` ones (by default the number that the design was for)."""
        items = self.design.items[: self.design.wanted if wanted is None else wanted]
        latest = latest_labels(self.items, self.read())
        labellers = [[{*latest.get(key, {})} for key in item.questions()] for item in items]
        counts = Counter(name for found in labellers for name in set[str].intersection(*found))
        return LabelProgress(len(items), sum(all(found) for found in labellers), dict(sorted(counts.items())))

    def label_set(self) -> LabelSet:
        """Return the labels as estimators read them: the majority of the labellers for each completion."""
        labels = self.read()
        latest = latest_labels(self.items, labels)
        open_strata: set[str] = set()
        items: list[LabelledItem] = []
        for item in self.design.items:
            found = {key: latest.get(key, {}) for key in item.questions()}
            labelled = all(found.values())
            if not labelled:
                open_strata.add(item.stratum)
            items.append(
                LabelledItem(
                    id=item.id,
                    seed=item.seed,
                    prompt_set=item.prompt_set,
                    prompt=item.prompt,
                    stratum=item.stratum,
                    policies=frozenset(one.policy for one in item.completions),
                    completions={key[2]: majority(own.values()) for key, own in found.items()},
                    labelled=labelled,
                    complete=labelled and item.stratum not in open_strata,
                )
            )
        design = self.design
        names = tuple(dict.fromkeys(label.labeller for label in labels))
        return LabelSet(design.frame_hash, design.judge, design.strata, tuple(items), names)

    # ---- the file ----------------------------------------------------------------------------------------------------

    def _key(self, label: Label) -> CompletionKey:
        item = self.items[label.item]
        return item.prompt_set, item.prompt, label.completion

    def _refuse_foreign(self, label: Label, where: str) -> None:
        """Refuse a label of another completion, policy or judge than those of the design."""
        item = self.items.get(label.item)
        shown = [] if item is None else [one for one in item.completions if one.completion == label.completion]
        if not shown:
            what = f"item {label.item!r}" if item is None else f"completion {label.completion!r} of {label.item!r}"
        elif label.policy not in {one.policy for one in shown}:
            what = f"policy {label.policy!r}"
        elif label.judge != self.design.judge_hash:
            what = f"judge {label.judge!r}"
        else:
            return
        raise StayalignedError(
            f"{where}: {what} is not in {DESIGN_FILE}", hint="It is a label of another design, or was edited."
        )

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        with FileLock(self.directory / _LOCK_FILE, timeout=_BUSY_SECONDS):
            yield

    def _write(self, content: bytes) -> None:
        """Append bytes after the last complete line, and sync them; on an error, restore the file."""
        if not self.path.exists():
            write_text(self.path, "")  # also syncs the directory
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            end = self._end(descriptor)
            try:
                os.ftruncate(descriptor, end)
                os.lseek(descriptor, end, os.SEEK_SET)
                written = 0
                while written < len(content):
                    written += os.write(descriptor, content[written:])
                os.fsync(descriptor)
            except BaseException:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)

    def _end(self, descriptor: int) -> int:
        """Return the offset after the last complete line."""
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).rfind(b"\n") + 1


def _write_design(directory: Path, design: Design) -> Design:
    """Write a design with the hash of its content, and return it."""
    design = design.model_copy(update={"content_sha256": design.computed_sha256()})
    with writable(directory):
        write_text(directory / DESIGN_FILE, design.model_dump_json(indent=1) + "\n")
    return design


def read_labels(directory: Path | str) -> LabelSet:
    """Read the labels in a directory that `stayaligned label` wrote.

    Raises:
        StayalignedError: if there are none, or a file was edited or damaged.
    """
    return LabelStore.open(Path(directory)).label_set()


def latest_labels(items: Mapping[str, DrawnItem], labels: Iterable[Label]) -> Latest:
    """Return the label that counts for each completion and labeller: the last one."""
    found: defaultdict[CompletionKey, dict[str, Label]] = defaultdict(dict)
    for label in labels:
        item = items[label.item]
        found[item.prompt_set, item.prompt, label.completion][label.labeller] = label
    return found


def majority(labels: Iterable[Label]) -> Outcome | None:
    """Return the most frequent outcome of labels; None for none, a tie, or if every labeller is unsure."""
    counts = Counter(label.outcome for label in labels if label.outcome != "unsure").most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return None
    return Outcome(counts[0][0])
