"""The cost of requests to a server: estimated in advance, counted, and limited by a budget."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Record

_CHARACTERS_PER_TOKEN = 4
"""An approximation for English; other scripts take more tokens per character, up to two."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one or more requests."""

    input_tokens: int
    """Number of tokens sent."""
    output_tokens: int
    """Number of tokens received."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.input_tokens + other.input_tokens, self.output_tokens + other.output_tokens)

    @property
    def tokens(self) -> int:
        """Number of input and output tokens."""
        return self.input_tokens + self.output_tokens


def estimate_usage(texts: Iterable[str], max_tokens: int) -> Usage:
    """Estimate the tokens of a request: 4 characters per token, 4 tokens per text, and output of full length."""
    tokens = sum(math.ceil(len(text) / _CHARACTERS_PER_TOKEN) + 4 for text in texts)
    return Usage(tokens, max_tokens)


class Prices(Record):
    """Prices in dollars per million tokens."""

    input: float = Field(ge=0)
    """Dollars per million input tokens."""
    output: float = Field(ge=0)
    """Dollars per million output tokens."""

    def cost(self, usage: Usage) -> float:
        """Return the cost of `usage` in dollars."""
        return (usage.input_tokens * self.input + usage.output_tokens * self.output) / 1e6


class Meter:
    """A thread-safe counter of the requests and tokens of one command, which admits requests within a budget.

    A running request counts with its estimate, multiplied by the highest ratio of cost to estimate so far, so that
    concurrent requests do not exceed the budget together. A request without a complete reply also counts with its
    estimate, since it may be billed.
    """

    def __init__(
        self, *, prices: Prices | None = None, budget_dollars: float | None = None, budget_requests: int | None = None
    ) -> None:
        self._prices, self._dollars, self._requests = prices, budget_dollars, budget_requests
        self._lock = threading.Lock()
        self._running_cost, self._ratio = 0.0, 1.0
        self.used = Usage(0, 0)
        self.requests = 0

    @property
    def dollars(self) -> float | None:
        """Cost so far in dollars; None without prices."""
        return None if self._prices is None else self._prices.cost(self.used)

    def admit(self, estimate: Usage) -> bool:
        """Return whether the budget allows one more request; if so, count it. Call `settle` when it is done."""
        with self._lock:
            if self._requests is not None and self.requests >= self._requests:
                return False
            if self._prices is not None and self._dollars is not None:
                price = self._prices.cost(estimate)
                if self._prices.cost(self.used) + (self._running_cost + price) * self._ratio > self._dollars:
                    return False
                self._running_cost += price
            self.requests += 1
            return True

    def settle(self, estimate: Usage, actual: Usage) -> None:
        """Record the actual usage of an admitted request that is done."""
        with self._lock:
            if self._prices is not None and self._dollars is not None:
                price = self._prices.cost(estimate)
                self._running_cost -= price
                self._ratio = max(self._ratio, self._prices.cost(actual) / price if price else 1.0)
            self.used += actual

    def budget_error(self) -> StayalignedError:
        """Return the error for a budget that is used up."""
        spent = "" if self.dollars is None else f" and {self.dollars:.4f} dollars"
        limits = [
            *([] if self._requests is None else [f"budget_requests {self._requests}"]),
            *([] if self._dollars is None else [f"budget_dollars {self._dollars:g}"]),
        ]
        return StayalignedError(
            f"the budget is used up ({', '.join(limits)}): {self.requests} requests, "
            f"{self.used.input_tokens} input and {self.used.output_tokens} output tokens{spent}",
            hint="Received replies are stored. Raise the budget and rerun; only the remaining requests are sent.",
        )
