"""What the host libraries say on their own: progress bars, and notes about kernels that are not installed."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Generator

_FALLBACK = re.compile(r"falling back to its reference \w+ implementation because `([\w-]+)` is not installed")
_said: dict[str, str] = {}
"""{package that is not installed: the first message about it}."""


@contextlib.contextmanager
def bars_off(off: bool) -> Generator[None]:
    """Within the block, no bars of `datasets` and transformers if `off`; afterwards as before."""
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
    """Within the block, the host libraries without bars, and without notes that no user can answer."""
    with bars_off(True), _fallbacks_once(), warnings.catch_warnings():
        # PEFT's, of a base model that is a hub id: it looks for a grown vocabulary beside every adapter it saves.
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|trl|accelerate")
        yield


@contextlib.contextmanager
def _fallbacks_once() -> Generator[None]:
    """Within the block, transformers says once of each package that is not installed that it would be faster with it.

    By itself it says so of each function of the package, four or five lines for a Mamba.
    """
    from transformers.utils.logging import get_logger

    def once(record: logging.LogRecord) -> bool:
        package = _FALLBACK.search(record.getMessage())
        if package is None:
            return True
        return _said.setdefault(package[1], record.getMessage()) == record.getMessage()

    handlers = get_logger().handlers  # those of its root: what its modules log comes by no other filter
    for handler in handlers:
        handler.addFilter(once)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(once)
