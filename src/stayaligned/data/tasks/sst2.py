"""The task SST-2: sentiment of film reviews."""

from __future__ import annotations

from typing import ClassVar

from stayaligned.data.tasks._labels import LabelTask


class SST2(LabelTask):
    """SST-2: decide whether a sentence of a film review is positive or negative.

    Lisa, section 5.1 and its code: the same instruction, all 872 validation rows, exact match. Differs from the paper's
    code: the chat template instead of Alpaca's headings; case is ignored (the code lists two spellings of each label).
    """

    name: ClassVar[str] = "sst2"
    paper: ClassVar[str] = "arXiv 2405.18641, section 5.1"
    instruction: ClassVar[str] = "Analyze the sentiment of the input, and respond only positive or negative"
    text_column: ClassVar[str] = "sentence"
    labels: ClassVar[tuple[str, ...]] = ("negative", "positive")

    train: str = "hf://stanfordnlp/sst2?split=train"
    test: str = "hf://stanfordnlp/sst2?split=validation"
