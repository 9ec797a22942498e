"""Suppression of the host libraries' progress bars and repeated notes about kernels that are not installed."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Generator

_FALLBACK = re.compile(r"falling back to its reference \w+ implementation because `([\w-]+)` is not installed")
_logged: dict[str, str] = {}
"""For each package that is not installed, the first message about it."""


@contextlib.contextmanager
def bars_off(off: bool) -> Generator[None]:
    """Within the block, turn off the progress bars of `datasets` and transformers if `off`; restore them afterwards."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    with contextlib.ExitStack() as stack:
        if off and not are_progress_bars_disabled():
            disable_progress_bars()
            stack.callback(enable_progress_bars)
        if off and logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            stack.callback(logging.enable_progress_bar)
        yield


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Within the block, suppress the host libraries' progress bars and notes that users can do nothing about."""
    with bars_off(True), _fallbacks_once(), warnings.catch_warnings():
        # PEFT's, for a base model that is a hub id: it checks the vocabulary size whenever it saves an adapter.
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|trl|accelerate")
        yield


@contextlib.contextmanager
def _fallbacks_once() -> Generator[None]:
    """Within the block, let transformers log one note per package that is not installed.

    By default it logs one for each function of the package, four or five lines for a Mamba.
    """
    from transformers.utils.logging import get_logger

    def once(record: logging.LogRecord) -> bool:
        package = _FALLBACK.search(record.getMessage())
        if package is None:
            return True
        return _logged.setdefault(package[1], record.getMessage()) == record.getMessage()

    handlers = get_logger().handlers  # of the root logger: its modules' records pass no other filter
    for handler in handlers:
        handler.addFilter(once)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(once)
