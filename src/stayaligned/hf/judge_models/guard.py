"""Guard models: causal language models that answer a fixed prompt about a request and a completion."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Message
from stayaligned.core.settings import Generation
from stayaligned.hf.generation.batching import split_by_size
from stayaligned.hf.generation.generate import generate_from_ids
from stayaligned.hf.judge_models.inputs import Fitted, escape_control_tokens, fill_template, fit_input, token_ends
from stayaligned.hf.models import context_length, load_guard
from stayaligned.hf.rendering import is_shown, render_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class GuardReply:
    """What a guard model wrote about one completion."""

    text: str | None
    """Text of the reply; None if the request alone fills the guard's context."""
    was_cut: bool
    """Whether the guard did not read the end of the completion."""


@dataclass(frozen=True)
class GuardModel:
    """A causal language model that judges, with its tokenizer, on the device where it runs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    """Largest number of tokens of prompt and reply together."""

    @classmethod
    def load(cls, ref: str | Path) -> GuardModel:
        """Load the guard model of a checkpoint directory or a hub id.

        Raises:
            StayalignedError: if there is none that can be loaded safely.
        """
        model, tokenizer = load_guard(ref)
        return cls(model, tokenizer, context_length(model.config, tokenizer))

    def ask(
        self,
        completions: Sequence[Completion],
        template: str,
        *,
        add_special_tokens: bool,
        reply_tokens: int,
        batch_size: int,
        answer_tokens: int | None = None,
    ) -> Generator[tuple[int, GuardReply]]:
        """Yield each completion's index and the reply to a fixed prompt, batch by batch.

        Control tokens that a completion spells out are read as text.

        Args:
            completions: the completions, none of them empty.
            template: the prompt, with `{request}` (the last turn) and `{answer}`.
            add_special_tokens: whether the tokenizer adds its own first token.
            reply_tokens: largest number of tokens of a reply.
            batch_size: number of prompts in a batch.
            answer_tokens: number of tokens after which every completion is cut.
        """

        def encode(request: str, text: str) -> list[int]:
            prompt = fill_template(template, request, text)
            return self.tokenizer(prompt, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]

        def fitted(completion: Completion) -> Fitted | None:
            request = escape_control_tokens(self.tokenizer, completion.prompt[-1].content)
            text = escape_control_tokens(self.tokenizer, completion.text)
            head = self._first_tokens(text, answer_tokens)
            found = self._fit(lambda text: encode(request, text), head, reply_tokens)
            return found and Fitted(found.inputs, was_cut=found.was_cut or head != text)

        return self._replies([fitted(c) for c in completions], reply_tokens, batch_size)

    def ask_in_its_template(
        self, completions: Sequence[Completion], *, reply_tokens: int, batch_size: int
    ) -> Generator[tuple[int, GuardReply]]:
        """Yield each completion's index and the reply to the guard's own chat template, batch by batch.

        The template receives every turn except the system's, and the completion as the last turn.

        Raises:
            StayalignedError: if there is no template, or it leaves out the request or the completion.
        """

        def fitted(completion: Completion) -> Fitted | None:
            turns = [
                Message(role=m.role, content=escape_control_tokens(self.tokenizer, m.content))
                for m in completion.prompt
                if m.role != "system"
            ]
            text = escape_control_tokens(self.tokenizer, completion.text)
            return self._fit(lambda text: self._encode_turns(turns, text), text, reply_tokens)

        return self._replies([fitted(c) for c in completions], reply_tokens, batch_size)

    def _first_tokens(self, text: str, tokens: int | None) -> str:
        ends = token_ends(self.tokenizer, text) if tokens is not None else []
        return text[: ends[tokens - 1]] if tokens is not None and len(ends) > tokens else text

    def _fit(self, encode: Callable[[str], list[int]], text: str, reply_tokens: int) -> Fitted | None:
        return fit_input(self.tokenizer, lambda text: {"input_ids": encode(text)}, text, self.max_tokens - reply_tokens)

    def _replies(
        self, prompts: Sequence[Fitted | None], reply_tokens: int, batch_size: int
    ) -> Generator[tuple[int, GuardReply]]:
        yield from ((row, GuardReply(None, was_cut=True)) for row, found in enumerate(prompts) if found is None)
        fitted = {row: found for row, found in enumerate(prompts) if found is not None}
        lengths = [0 if found is None else len(found.inputs["input_ids"]) for found in prompts]
        settings = Generation(max_new_tokens=reply_tokens)
        for rows in split_by_size(lengths, [*fitted], batch_size):
            ids = [fitted[row].inputs["input_ids"] for row in rows]
            for row, found in zip(rows, generate_from_ids(self.model, self.tokenizer, ids, settings), strict=True):
                yield row, GuardReply(found.text, fitted[row].was_cut)

    def _encode_turns(self, turns: Sequence[Message], completion: str) -> list[int]:
        text = render_whole(self.tokenizer, [*turns, Message(role="assistant", content=completion)])
        for content, what in ((turns[-1].content, "request"), (completion, "completion")):
            if not is_shown(content, text):
                raise StayalignedError(
                    f"{self.tokenizer.name_or_path}: the chat template changes or leaves out a part of the {what} that "
                    f"begins with {content.strip()[:60]!r}",
                    hint="Use a judge whose template shows it whole.",
                )
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]
