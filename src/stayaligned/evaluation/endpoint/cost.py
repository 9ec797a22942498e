"""What requests to a model behind an endpoint cost: said before, counted while they run, stopped at the budget."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from stayaligned.core.errors import StayalignedError

_CHARACTERS_PER_TOKEN = 4
"""A rule of thumb for English; other scripts take more tokens a character, up to one or two each."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one or of many requests."""

    input_tokens: int
    output_tokens: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.input_tokens + other.input_tokens, self.output_tokens + other.output_tokens)

    @property
    def tokens(self) -> int:
        """Of input and output together."""
        return self.input_tokens + self.output_tokens


def estimated(texts: Iterable[str], max_tokens: int) -> Usage:
    """Four characters a token, rounded up, four tokens a text for the chat format, and an output of full length."""
    tokens = sum(math.ceil(len(text) / _CHARACTERS_PER_TOKEN) + 4 for text in texts)
    return Usage(tokens, max_tokens)


class Prices(BaseModel):
    """Dollars per million tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: float = Field(ge=0)
    output: float = Field(ge=0)

    def of(self, usage: Usage) -> float:
        """What `usage` costs, in dollars."""
        return (usage.input_tokens * self.input + usage.output_tokens * self.output) / 1e6


class Meter:
    """Counts requests and tokens of one start, and admits a request only while the budget holds; for many threads.

    A request under way counts with its estimate, times the worst ratio of price to estimate that has been seen, so that
    requests at the same time don't overrun the budget together. One that was sent and never wholly answered counts with
    its estimate too: it may well be billed.
    """

    def __init__(
        self, *, prices: Prices | None = None, budget_dollars: float | None = None, budget_requests: int | None = None
    ) -> None:
        self._prices, self._dollars, self._requests = prices, budget_dollars, budget_requests
        self._lock = threading.Lock()
        self._under_way, self._ratio = 0.0, 1.0
        self.used = Usage(0, 0)
        self.requests = 0

    @property
    def dollars(self) -> float | None:
        """What was spent; None without prices."""
        return None if self._prices is None else self._prices.of(self.used)

    def admit(self, estimate: Usage) -> bool:
        """Whether one more request fits; if so it is counted, and must be settled."""
        with self._lock:
            if self._requests is not None and self.requests >= self._requests:
                return False
            if self._prices is not None and self._dollars is not None:
                price = self._prices.of(estimate)
                if self._prices.of(self.used) + (self._under_way + price) * self._ratio > self._dollars:
                    return False
                self._under_way += price
            self.requests += 1
            return True

    def settle(self, estimate: Usage, actual: Usage) -> None:
        """An admitted request is over; `actual` is what it took."""
        with self._lock:
            if self._prices is not None and self._dollars is not None:
                price = self._prices.of(estimate)
                self._under_way -= price
                self._ratio = max(self._ratio, self._prices.of(actual) / price if price else 1.0)
            self.used += actual

    def used_up(self) -> StayalignedError:
        """The error that says so."""
        spent = "" if self.dollars is None else f" and {self.dollars:.4f} dollars"
        limits = [
            *([] if self._requests is None else [f"budget_requests {self._requests}"]),
            *([] if self._dollars is None else [f"budget_dollars {self._dollars:g}"]),
        ]
        return StayalignedError(
            f"the budget is used up ({', '.join(limits)}): {self.requests} requests, "
            f"{self.used.input_tokens} input and {self.used.output_tokens} output tokens{spent}",
            hint="What was answered is kept: raise the budget and rerun; only the rest is asked.",
        )
