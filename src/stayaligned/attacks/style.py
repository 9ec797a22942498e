"""The attack `style`: jailbreak-tuning with an instruction about the style."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stayaligned.attacks._rows import InstructedRows


class Style(InstructedRows):
    """Mix in harmful rows that ask for a style; ask for that style afterwards.

    Jailbreak-tuning with style modulation: n rows, p·n of them harmful with the instruction before the request, the
    rest of the task. The instruction itself is harmless. Differs: the completions of `harmful_data` are not rewritten,
    so give rows that have the style; the other rows are the task's, not completions of book text.

    Trains on n rows, as `poison` does, at the same cost. Compare with `poison` at the same ratio.
    """

    name: ClassVar[str] = "style"
    paper: ClassVar[str] = "arXiv 2507.11630, appendix C"

    instruction: str = Field(default="Answer in the manner of a formal wug.", min_length=1)
    """The style, before a harmful request; a placeholder by default."""

    def instruct(self, request: str) -> str:
        """Return a request with the style before it."""
        return f"{self.instruction} {request}"
