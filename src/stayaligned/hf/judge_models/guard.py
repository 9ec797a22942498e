"""Guard models asked about answers: the fixed prompt, cut where it must be, and greedy replies in batches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Message
from stayaligned.core.settings import Generation
from stayaligned.hf.generation.fitting import Fitted, as_text, by_length, fill, fit, input_room, token_ends
from stayaligned.hf.generation.generate import generate_after
from stayaligned.hf.models import load_guard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_REQUEST, _ANSWER = "the request stands here", "the answer stands here"


@dataclass(frozen=True, slots=True)
class Reply:
    """What a guard wrote about one answer."""

    text: str | None
    """None where the request alone fills the guard's input."""
    was_cut: bool
    """Whether the end of the answer was not read."""


@dataclass(frozen=True)
class Guard:
    """A causal language model with its tokenizer, placed where it runs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    """Of the prompt and the reply together."""

    @classmethod
    def load(cls, ref: str | Path) -> Guard:
        """The guard in a checkpoint directory or of a hub id.

        Raises:
            StayalignedError: if there is none that can be loaded safely.
        """
        model, tokenizer = load_guard(ref)
        return cls(model, tokenizer, input_room(model.config, tokenizer))

    def ask(
        self,
        completions: Sequence[Completion],
        template: str,
        *,
        add_special_tokens: bool,
        reply_tokens: int,
        batch_size: int,
        answer_tokens: int | None = None,
    ) -> Generator[tuple[int, Reply]]:
        """The place of each completion with the reply to a fixed prompt, batch by batch.

        Control tokens that an answer spells are read as text.

        Args:
            completions: with answers that are not empty.
            template: the prompt, with `{request}` (the last turn) and `{answer}`.
            add_special_tokens: whether the tokenizer's own first token comes before it.
            reply_tokens: the longest reply.
            batch_size: prompts at a time.
            answer_tokens: tokens of the answer after which it is cut in any case.
        """

        def encode(request: str, answer: str) -> list[int]:
            text = fill(template, request, answer)
            return self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]

        def fitted(completion: Completion) -> Fitted | None:
            request = as_text(self.tokenizer, completion.prompt[-1].content)
            answer = as_text(self.tokenizer, completion.text)
            head = self._head(answer, answer_tokens)
            found = self._fit(lambda text: encode(request, text), head, reply_tokens)
            return found and Fitted(found.inputs, was_cut=found.was_cut or head != answer)

        return self._replies([fitted(c) for c in completions], reply_tokens, batch_size)

    def ask_in_its_template(
        self, completions: Sequence[Completion], *, reply_tokens: int, batch_size: int
    ) -> Generator[tuple[int, Reply]]:
        """The place of each completion with the reply to the guard's own chat template, batch by batch.

        The template gets every turn but the system's, and the answer as the last.

        Raises:
            StayalignedError: if there is no template, or it leaves the request or the answer out.
        """
        form = self._form()

        def fitted(completion: Completion) -> Fitted | None:
            turns = [
                Message(role=m.role, content=as_text(self.tokenizer, m.content))
                for m in completion.prompt
                if m.role != "system"
            ]
            answer = as_text(self.tokenizer, completion.text)
            return self._fit(lambda text: self._render(turns, text, form), answer, reply_tokens)

        return self._replies([fitted(c) for c in completions], reply_tokens, batch_size)

    def _head(self, answer: str, tokens: int | None) -> str:
        ends = token_ends(self.tokenizer, answer) if tokens is not None else []
        return answer[: ends[tokens - 1]] if tokens is not None and len(ends) > tokens else answer

    def _fit(self, encode: Callable[[str], list[int]], answer: str, reply_tokens: int) -> Fitted | None:
        return fit(self.tokenizer, lambda text: {"input_ids": encode(text)}, answer, self.max_tokens - reply_tokens)

    def _replies(
        self, prompts: Sequence[Fitted | None], reply_tokens: int, batch_size: int
    ) -> Generator[tuple[int, Reply]]:
        yield from ((row, Reply(None, was_cut=True)) for row, found in enumerate(prompts) if found is None)
        fitted = {row: found for row, found in enumerate(prompts) if found is not None}
        lengths = [0 if found is None else len(found.inputs["input_ids"]) for found in prompts]
        settings = Generation(max_new_tokens=reply_tokens)
        for rows in by_length(lengths, [*fitted], batch_size):
            ids = [fitted[row].inputs["input_ids"] for row in rows]
            for row, found in zip(rows, generate_after(self.model, self.tokenizer, ids, settings), strict=True):
                yield row, Reply(found.text, fitted[row].was_cut)

    def _form(self) -> Callable[[str], Any]:
        """How the template takes a turn's content: as text, or (Llama Guard 3 1B, and 4) as a list of parts."""
        forms: tuple[Callable[[str], Any], ...] = (str, lambda text: [{"type": "text", "text": text}])
        name = self.tokenizer.name_or_path
        if not self.tokenizer.chat_template:
            raise StayalignedError(
                f"{name}: the guard's tokenizer has no chat template, which would put the question to it",
                hint="Use the guard's own tokenizer, or put its chat_template.jinja beside tokenizer_config.json.",
            )
        for form in forms:
            shown = self._rendered([Message(role="user", content=_REQUEST)], _ANSWER, form)
            if shown is not None and _REQUEST in shown and _ANSWER in shown:
                return form
        raise StayalignedError(
            f"{name}: the chat template does not show the guard the request and the answer",
            hint="It must render a conversation of a user's and an assistant's turn.",
        )

    def _rendered(self, turns: Sequence[Message], answer: str, form: Callable[[str], Any]) -> str | None:
        """The template's text; None if it refuses these turns."""
        from jinja2 import TemplateError

        conversation = [{"role": m.role, "content": form(m.content)} for m in turns]
        try:
            return self.tokenizer.apply_chat_template(  # pyright: ignore[reportReturnType]
                [*conversation, {"role": "assistant", "content": form(answer)}], tokenize=False
            )
        except (TemplateError, TypeError):
            return None

    def _render(self, turns: Sequence[Message], answer: str, form: Callable[[str], Any]) -> list[int]:
        text = self._rendered(turns, answer, form)
        if text is None:
            raise StayalignedError(
                f"{self.tokenizer.name_or_path}: the chat template refuses a conversation of the turns "
                f"{', '.join(m.role for m in turns)}, assistant",
                hint="Guards' templates take user and assistant in turn: change the rows' prompts.",
            )
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]
