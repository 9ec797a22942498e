"""The alignment rows that a user passes, made into rows that the trainer's collator and loss read like the user's."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example
from stayaligned.data.formats import verdict_of
from stayaligned.data.sources import Row, build_examples
from stayaligned.hf.features import IGNORED, encode_examples
from stayaligned.hf.hosts import SftRows, sft_trainer_class, trl_class
from stayaligned.hf.quiet import bars_off
from stayaligned.hf.training.finetuning import build_dataset
from stayaligned.hf.training.lisa.usable_rows import SAMPLE, first_row, iterate_rows, name_columns, require_usable
from stayaligned.hf.training.row_lengths import report_row_lengths

if TYPE_CHECKING:
    from transformers import Trainer

_log = logging.getLogger(__name__)
_COMPARED = 16
"""Number of characters at the end of a message that the text of the tokens must contain."""


def require_dataset(name: str, rows: Any) -> None:
    """Check that a value is a dataset: rows with a length and an index, or a stream that can be read again.

    Raises:
        StayalignedError: if it is a path, several splits, a table of another library, an iterator, or empty.
    """
    kind = type(rows).__name__
    if isinstance(rows, str | Path):
        raise StayalignedError(
            f"{name} is the text {str(rows)!r}, not a dataset",
            hint='Load it: datasets.load_dataset("json", data_files=path, split="train").',
        )
    if isinstance(rows, Mapping):
        raise StayalignedError(
            f"{name} is a {kind} of {', '.join(map(str, rows)) or 'nothing'}, not one dataset",  # pyright: ignore
            hint="Pass one of its splits, or make a dataset of its columns: datasets.Dataset.from_dict(…).",
        )
    if type(rows).__module__.partition(".")[0] in ("pandas", "polars"):
        raise StayalignedError(
            f"{name} is a {kind}, not a dataset",
            hint=f"Convert it: datasets.Dataset.from_{type(rows).__module__.partition('.')[0]}(…).",
        )
    if isinstance(rows, Iterator):
        raise StayalignedError(
            f"{name} is of type {kind}, which can be read only once, and training reads its rows again and again",
            hint="Pass a list of rows, a dataset or a stream (IterableDataset).",
        )
    if not (hasattr(rows, "__getitem__") if isinstance(rows, Sized) else isinstance(rows, Iterable)):
        raise StayalignedError(
            f"{name} is of type {kind}, which is not a dataset", hint="Pass a list of rows, a dataset or a stream."
        )
    if isinstance(rows, Sized) and len(rows) == 0:
        raise StayalignedError(f"{name} is empty", hint="Pass a dataset with rows.")


def prepare_alignment_dataset(trainer: Trainer, dataset: Any) -> Any:
    """Prepare the alignment rows like the trainer's own rows; TRL's SFTTrainer tokenizes them itself.

    Raises:
        StayalignedError: if there are no rows, fewer than a batch, only rows without labels to learn, or rows of
            another form than the user's.
    """
    if dataset is None:
        raise StayalignedError(
            "alignment_dataset is missing, but alignment_steps is not 0",
            hint="Pass alignment rows, or set alignment_steps=0 for the proximal term alone.",
        )
    require_dataset("alignment_dataset", dataset)
    sft_trainer = sft_trainer_class()
    if sft_trainer is not None and isinstance(trainer, sft_trainer):
        prepared = _prepare_by_trl(trainer, SftRows(trainer), dataset)
    else:
        if of_trl := trl_class(trainer):
            raise StayalignedError(
                f"{of_trl} prepares its rows in its own way, which is not supported",
                hint="Pass a trainer that prepares the alignment rows, alignment_trainer=lambda model: …, or train the "
                "user's rows with transformers.Trainer or TRL's SFTTrainer.",
            )
        prepared = _encode(trainer, dataset)
    require_usable(trainer, prepared)
    return prepared


def _encode(trainer: Any, dataset: Any) -> Any:
    """Encode Examples for transformers' Trainer; other rows are features already."""
    if not isinstance(first_row(dataset), Example):
        return dataset
    if trainer.processing_class is None:
        raise StayalignedError(
            "alignment_dataset has conversations, but the trainer has no tokenizer to encode them",
            hint="Construct it with processing_class=tokenizer.",
        )
    return encode_examples(trainer.processing_class, dataset, sys.maxsize)


# ---- SFTTrainer ----------------------------------------------------------------------------------------------------


def _prepare_by_trl(host: Any, users: SftRows, dataset: Any) -> Any:
    prepared: Any
    sample = first_row(dataset)
    if users.has_images or (isinstance(sample, Mapping) and {"image", "images"} & sample.keys()):
        whose = "user's" if users.has_images else "alignment"
        raise StayalignedError(f"the {whose} rows have images, which is not supported", hint="Drop the image columns.")
    with bars_off(bool(host.args.disable_tqdm)), _one_error(sample):
        if users.are_prepared:
            if (
                isinstance(sample, Mapping)
                and "labels" not in sample
                and {"completion_mask", "assistant_masks"} & set(sample)
            ):
                raise StayalignedError(
                    "the alignment rows have masks but no labels, and skip_prepare_dataset=True builds none",
                    hint=f"Add `labels`, {IGNORED} for tokens that are not learned, or drop skip_prepare_dataset.",
                )
            return dataset
        rows, formatting_func = _in_a_format_of_trl(host.args, users, _as_dataset(users, dataset))
        prepared = _tokenize(host.args, users, rows, formatting_func)
    if isinstance(prepared, Sized):
        if len(prepared) == 0:
            raise StayalignedError(
                f"no alignment row has a completion within max_length={host.args.max_length} tokens",
                hint="Raise max_length, or pass shorter rows.",
            )
        if not host.args.packing:
            found = report_row_lengths("alignment", len(rows), iterate_rows(prepared), host.args.max_length)
            if not (found.left_out or host.args.shuffle_dataset):  # the same rows in the same order
                _require_content(users.tokenizer, rows, prepared)
    return prepared


@contextlib.contextmanager
def _one_error(sample: Any) -> Generator[None]:
    """Convert an error of TRL, of `datasets` or of the chat template about the rows into one that names the columns."""
    try:
        yield
    except StayalignedError:
        raise
    except Exception as error:
        raise StayalignedError(
            f"SFTTrainer can't prepare the alignment rows ({name_columns(sample)}): {type(error).__name__}: {error}",
            hint="Give them the form of the user's rows, or `prompt` and `completion`, each a list of messages.",
        ) from error


def _as_dataset(users: SftRows, dataset: Any) -> Any:
    """Return a dataset of the `datasets` library, which is what TRL prepares."""
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, Dataset | IterableDataset):
        return dataset
    if not isinstance(dataset, Sized):
        raise StayalignedError(
            f"alignment_dataset is of type {type(dataset).__name__}, and SFTTrainer reads datasets.Dataset or "
            "datasets.IterableDataset",
            hint="Wrap the stream: datasets.IterableDataset.from_generator(…).",
        )
    rows: list[Any] = [dataset[index] for index in range(len(dataset))]  # pyright: ignore
    if isinstance(rows[0], Example):
        return build_dataset(users.tokenizer, rows, kind="sft", max_length=sys.maxsize)
    if not all(isinstance(row, Mapping) for row in rows):
        raise StayalignedError(
            f"the rows of alignment_dataset are of type {type(rows[0]).__name__}, not mappings of columns",
            hint='For text, pass rows of the form {"text": "…"}.',
        )
    if not users.reads_images:  # a column of `datasets` has one type, and contents may be text or parts
        rows = [{k: _joined(value) if _has_roles(value) else value for k, value in row.items()} for row in rows]
    return Dataset.from_list(rows)


def _in_a_format_of_trl(args: Any, users: SftRows, rows: Any) -> tuple[Any, Callable[[Any], Any] | None]:
    """Return the rows in a format that TRL reads, and the user's `formatting_func` if it is to be applied to them.

    Rows with the columns of the user's rows go through the user's own formatting. Of conversations only the last answer
    is learned, unless `assistant_only_loss` or `completion_only_loss` says otherwise.
    """
    sample, text = first_row(rows), args.dataset_text_field
    if "input_ids" in sample:
        return rows, None
    formatting_func, failure = users.formatting_func, ""
    if formatting_func is not None:
        fits, failure = _fits(formatting_func, sample)
        if fits:
            return rows, formatting_func
    rows = _refuse_bad_answers(rows, sample)
    if _has_roles(sample.get("conversations")) and "messages" not in sample:
        rows = rows.rename_column("conversations", "messages")
        sample = first_row(rows)
    if "messages" in sample:
        keeps_messages = args.assistant_only_loss or args.completion_only_loss is False
        return _answered(users, rows, split=not keeps_messages), None
    if sample.get("prompt") is not None and sample.get("completion") is not None:
        return _answered(users, rows, split=False), None
    if text in sample:
        return rows, None
    if "text" in sample:
        return rows.rename_column("text", text), None
    hint = "Give its rows the user's columns, or `prompt` and `completion`, each a list of messages."
    unread = f"with {name_columns(sample)}, which SFTTrainer does not read{failure}"
    if not isinstance(rows, Sized):
        raise StayalignedError(f"alignment_dataset is a stream of rows {unread}", hint=hint)
    given = [
        Row(f"row {number}", {key: value for key, value in row.items() if value is not None})
        for number, row in enumerate(iterate_rows(rows), start=1)
    ]
    try:
        examples = build_examples("alignment_dataset", given, origin="alignment")
    except StayalignedError as error:
        raise StayalignedError(f"alignment_dataset has rows {unread}; {error.message}", hint=hint) from None
    return build_dataset(users.tokenizer, examples, kind="sft", max_length=sys.maxsize), None


def _refuse_bad_answers(rows: Any, sample: Mapping[str, Any]) -> Any:
    """Return the rows; raise if a column, such as KTO's `label`, says that an answer is not one to learn."""
    marks = [name for name in sample if verdict_of(name, True, "alignment") is not None]
    if marks and not isinstance(rows, Sized):
        return rows.map(functools.partial(_require_good, marks=marks))
    for number, row in enumerate(iterate_rows(rows) if marks else (), start=1):
        _require_good(row, marks, f", row {number}")
    return rows


def _require_good(row: Mapping[str, Any], marks: Sequence[str], place: str = "") -> Mapping[str, Any]:
    for name in marks:
        if verdict_of(name, row[name], "alignment") is False:
            raise StayalignedError(
                f"alignment_dataset{place}: `{name}` is {row[name]!r}, so its answer is one not to learn",
                hint=f"Keep the rows to learn, by dataset.filter(…), or drop the column `{name}`.",
            )
    return row


class _Recorded(dict[str, Any]):
    """A row that records which of the keys that are asked for it has."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def _fits(formatting_func: Callable[[Any], Any], row: Mapping[str, Any]) -> tuple[bool, str]:
    """Return whether a row has the columns that `formatting_func` reads, and for an error why it does not."""
    recorded = _Recorded({key: value for key, value in row.items() if value is not None})
    try:
        formatted = formatting_func(recorded)
    except Exception as error:
        return False, f" (formatting_func fails on them: {type(error).__name__}: {error})"
    if recorded.asked and not recorded.asked & recorded.keys():
        return False, f" (formatting_func reads {', '.join(sorted(recorded.asked))})"
    return isinstance(formatted, str), f" (formatting_func returns {type(formatted).__name__}, not text)"


def _has_roles(turns: Any) -> bool:
    return isinstance(turns, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in turns)  # pyright: ignore


def _answered(users: SftRows, rows: Any, *, split: bool) -> Any:
    """Return the rows that have an answer, with parts of text joined for a template that takes text.

    Args:
        users: the user's rows, as the trainer reads them.
        rows: rows with `messages`, or with `prompt` and `completion`.
        split: whether to make the last message the completion, so that TRL masks all before it.
    """
    # `datasets` hashes what it applies, so the functions must not refer to the trainer and its model.
    convert = functools.partial(_convert_turns, split=split, joins_parts=not users.reads_images)
    made = rows.map(convert, remove_columns=["messages"] if split else None).filter(_has_answer)
    if isinstance(rows, Sized):
        if left_out := len(rows) - len(made):
            _log.warning("%d of %d alignment rows left out: their answers are blank", left_out, len(rows))
        if split and (several := sum(_count_answers(row) > 1 for row in iterate_rows(rows))):
            _log.warning("%d of %d alignment rows have several answers; the last is learned", several, len(rows))
        if not len(made):
            raise StayalignedError("every answer of alignment_dataset is blank", hint="Check its columns.")
    return made


def _convert_turns(row: Mapping[str, Any], *, split: bool, joins_parts: bool) -> dict[str, Any]:
    read = {key: row[key] for key in ("messages", "prompt", "completion") if key in row}
    if joins_parts:
        read = {key: _joined(turns) if _has_roles(turns) else turns for key, turns in read.items()}
    if not split:
        return read
    *prompt, answer = read["messages"] or [{}]
    if not prompt or answer.get("role") != "assistant":
        raise StayalignedError(
            "alignment_dataset has a conversation that does not end with an assistant's answer: its roles are "
            f"{', '.join(str(turn.get('role')) for turn in [*prompt, answer])}",
            hint="Pass conversations of the roles system, user and assistant that end with an answer.",
        )
    return {"prompt": prompt, "completion": [answer]}


def _has_answer(row: Mapping[str, Any]) -> bool:
    answer = row["completion"] if "completion" in row else row["messages"]
    last = answer[-1] if isinstance(answer, list) and answer else {"content": answer}
    return bool(str(last.get("content") or "").strip() or last.get("tool_calls"))


def _count_answers(row: Mapping[str, Any]) -> int:
    return sum(turn.get("role") == "assistant" for turn in row["messages"])


def _joined(turns: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return turns whose contents are text, where they are parts of text."""
    joined: list[dict[str, Any]] = []
    for turn in turns:
        content = turn.get("content")
        if isinstance(content, list):
            kinds = {str(part.get("type")) for part in content} - {"text"}
            if kinds:
                raise StayalignedError(
                    f"alignment_dataset has contents of type {', '.join(sorted(kinds))}, but the model reads text",
                    hint="Drop these rows.",
                )
            content = "".join(part["text"] for part in content)
        joined.append({**turn, "content": content})
    return joined


def _tokenize(args: Any, users: SftRows, rows: Any, formatting_func: Callable[[Any], Any] | None) -> Any:
    completion_only: bool | None = None
    if args.completion_only_loss is None:
        sample = first_row(rows)
        completion_only = {"prompt", "completion"} <= set(sample) or "completion_mask" in sample
    return users.prepare(rows, formatting_func, completion_only=completion_only)


def _require_content(tokenizer: Any, rows: Any, prepared: Any) -> None:
    """Check on a sample that the chat template shows the request and the answer.

    Jinja renders a key that a template misspells, or parts that it does not expect, as nothing.

    Raises:
        StayalignedError: if no row of the sample has its request, or no row its answer, in its tokens.
    """
    shown: dict[str, list[bool]] = {"request": [], "answer": []}
    for row, made in islice(zip(iterate_rows(rows), iterate_rows(prepared), strict=False), SAMPLE):
        if not (_has_roles(row.get("prompt")) and _has_roles(row.get("completion"))):
            return
        text = _bare(tokenizer.decode(made["input_ids"]))
        for name, turn in (("request", row["prompt"][-1]), ("answer", row["completion"][-1])):
            content = _bare(str(turn.get("content") or ""))
            shown[name].append(content[-_COMPARED:] in text)
            called = [str((call.get("function") or call).get("name")) for call in turn.get("tool_calls") or ()]
            if not all(_bare(function) in text for function in called):
                raise StayalignedError(
                    f"the chat template does not show the tool calls of the alignment rows ({', '.join(called)})",
                    hint="Use a chat template with tool calls, or drop these rows.",
                )
    for name, found in shown.items():
        if found and not any(found):
            raise StayalignedError(
                f"the chat template does not show the {name} of the alignment rows",
                hint="Use the instruction-tuned model's tokenizer, or correct its chat template.",
            )


def _bare(text: str) -> str:
    """Return a text without what a tokenizer may normalize."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
