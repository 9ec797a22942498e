"""The influence of a row: against autograd's gradient of the hand-written loss, by all weights."""

from pathlib import Path

import torch

from stayaligned.core.settings import ChatTemplate
from stayaligned.data.sources import read_examples
from stayaligned.hf.features import encode_example
from stayaligned.hf.models import load_model, load_tokenizer
from stayaligned.hf.training.influence import row_influences


def test_an_influence_is_the_squared_norm_of_the_gradient_by_all_weights(world: Path) -> None:
    rows = read_examples(str(world / "train.jsonl"), origin="task")[:3]
    found = row_influences(world / "aligned", ChatTemplate(), rows, max_length=64)
    model, tokenizer = load_model(world / "aligned"), load_tokenizer(world / "aligned")
    for row, each in zip(rows, found, strict=True):
        encoded = encode_example(tokenizer, row, 64)
        learned = [at for at, label in enumerate(encoded["labels"]) if label != -100]
        logits = model(torch.tensor([encoded["input_ids"]])).logits[0].log_softmax(dim=-1)
        model.zero_grad()
        (-sum(logits[at - 1, encoded["input_ids"][at]] for at in learned) / len(learned)).backward()
        norms = [weight.grad.double().norm() ** 2 for weight in model.parameters() if weight.grad is not None]
        assert each.squared_norm == torch.stack(norms).sum().item() or torch.isclose(
            torch.tensor(each.squared_norm, dtype=torch.float64), torch.stack(norms).sum(), rtol=1e-4
        )
        assert each.answer_tokens == len(learned)
        assert each.answer_tokens > 1
