"""The task AG News: topics of news articles."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stayaligned.data.tasks._labels import LabelTask


class AGNews(LabelTask):
    """AG News: assign one of four topics to a news article.

    Lisa, section 5.1 and its code: the same instruction, the first 1000 test rows, exact match. Differs from the
    paper's code: the chat template instead of Alpaca's headings; case is ignored; "sci/tech" counts as well as "sci".
    """

    name: ClassVar[str] = "ag_news"
    paper: ClassVar[str] = "arXiv 2405.18641, section 5.1"
    instruction: ClassVar[str] = (
        "Categorize the news article given in the input into one of the 4 categories:\n\n"
        "World\nSports\nBusiness\nSci/Tech"
    )
    text_column: ClassVar[str] = "text"
    labels: ClassVar[tuple[str, ...]] = ("World", "Sports", "Business", "Sci/Tech")
    alternatives: ClassVar[dict[str, tuple[str, ...]]] = {"Sci/Tech": ("sci",)}

    train: str = "hf://fancyzhx/ag_news?split=train"
    test: str = "hf://fancyzhx/ag_news?split=test"
    test_examples: int | None = Field(default=1000, ge=1)
