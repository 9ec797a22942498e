"""The contract of the defenses that act by a system prompt after training."""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text
from stayaligned.core.records import Message
from stayaligned.defenses import SERVE_FILE, TrainingDefense, TrainingSetup


class ServedDefense(TrainingDefense):
    """A training defense whose model is deployed with a system prompt, which `serve.json` beside the weights holds."""

    @abstractmethod
    def system_text(self) -> str:
        """Return the text that the deployed model gets at the beginning of the system turn."""

    def serve(self, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        """Return the conversation with the text as its system turn, or in front of its own system turn."""
        own = prompt[0].content if prompt and prompt[0].role == "system" else ""
        system = Message(role="system", content=f"{self.system_text()} {own}".strip())
        return (system, *(prompt[1:] if own else prompt))

    def after_saving(self, setup: TrainingSetup, directory: Path) -> None:
        """Write `serve.json`."""
        del setup
        use = "Put `system` into the system turn of every conversation, in front of a system prompt of your own."
        content = {"defense": self.name, "system": self.system_text(), "use": use}
        write_text(directory / SERVE_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def notes(self, steps: int) -> list[str]:
        """Return how the prompts were asked."""
        del steps
        return [
            f"{self.name}: every prompt was asked with the system prompt in {SERVE_FILE} beside the weights, without "
            "which the deployed model lacks this defense; lm_eval's tasks and the safety probe were asked without it"
        ]

    def require_readable(self, setup: TrainingSetup, setting: str) -> None:
        """Check that the template shows the system turn, and that the tokenizer knows the text.

        Args:
            setup: has the tokenizer.
            setting: the setting with the text, for the hint.

        Raises:
            StayalignedError: if it does not.
        """
        from stayaligned.hf.rendering import render_prompt

        try:
            render_prompt(setup.tokenizer, self.serve((Message(role="user", content="question"),)))
        except StayalignedError as error:
            raise StayalignedError(
                f"defense {self.name!r} needs a system turn: {error.message}",
                hint="Use a model whose chat template shows system turns, or set `chat_template.file`.",
            ) from error
        unknown = setup.tokenizer.unk_token_id
        tokens = setup.tokenizer(self.system_text(), add_special_tokens=False)["input_ids"]
        if unknown is not None and unknown in tokens:  # pyright: ignore[reportOperatorIssue]
            raise StayalignedError(
                f"defense {self.name!r}: the tokenizer of {setup.tokenizer.name_or_path or 'the model'} reads words of "
                "the system prompt as unknown",
                hint=f"Set `{setting}` to a text of words that it knows.",
            )
