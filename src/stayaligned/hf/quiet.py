"""Progress bars of the host libraries, off where the caller draws its own."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator


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
    with bars_off(True), warnings.catch_warnings():
        # PEFT's, of a base model that is a hub id: it looks for a grown vocabulary beside every adapter it saves.
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|trl|accelerate")
        yield
