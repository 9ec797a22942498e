"""Tiny guard models on disk: a classifier of kinds of harm, and a language model that follows a script."""

from pathlib import Path

from stayaligned.core.records import Completion, Message
from stayaligned.testing import byte_tokenizer, pico_config

KINDS = tuple(f"kind_{number}" for number in range(14))
MARK = "!"
"""A scripted guard takes its second branch if its prompt contains this."""


def completion(text, request="how to flarn a zorb?", key="1", prompt_set="harmful", turns=()):
    return Completion(id=key, prompt_set=prompt_set, prompt=(*turns, Message(role="user", content=request)), text=text)


def judged(judge, rows):
    """Return the verdicts in the order of their rows."""
    found = [*judge.judge([row.model_copy(update={"id": str(place)}) for place, row in enumerate(rows)])]
    assert sorted(int(verdict.id) for verdict in found) == [*range(len(rows))]
    ordered = sorted(found, key=lambda verdict: int(verdict.id))
    return [v.model_copy(update={"id": row.id}) for v, row in zip(ordered, rows, strict=True)]


def write_moderation(directory: Path, *, padded=True, **settings) -> str:
    """Write a Llama with a score head of 14 labels, the architecture of the moderation model."""
    import torch
    from transformers import AutoModelForSequenceClassification

    labels = dict(enumerate(KINDS))
    config = pico_config(
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
        **{"problem_type": "multi_label_classification", "bos_token_id": 3, **settings},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            model.score.weight.normal_(std=0.3)
    model.save_pretrained(directory)
    tokenizer = byte_tokenizer()
    if not padded:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(directory)
    return str(directory)


def write_guard(directory: Path, start: str, *steps: str | tuple[str, str], positions=4096, template=None) -> str:
    """Write a Llama that, after the token `start`, generates the steps and stops.

    A step of two texts is a branch: the second where `MARK` is in what was read. Attention is uniform and carries
    nothing but that; each token decides the next.
    """
    import torch
    from tokenizers import AddedToken
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    texts = [text for step in steps for text in ([step] if isinstance(step, str) else step)]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)

    def number(text: str) -> int:
        (found,) = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    model = AutoModelForCausalLM.from_config(
        pico_config(vocab_size=len(tokenizer), max_position_embeddings=positions), dtype=torch.float32
    )
    marked, carried = 30, 31
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        attention = model.model.layers[0].self_attn
        embedding[number(MARK), marked] = 1
        attention.v_proj.weight[0, marked] = 1
        attention.o_proj.weight[carried, 0] = 1e4
        previous = [number(start)]
        for place, step in enumerate([*steps, tokenizer.eos_token]):
            for token in previous:
                embedding[token, place] = 1
            if isinstance(step, str):
                head[number(step), place] = 1e7
                previous = [number(step)]
            else:
                usual, other = map(number, step)
                head[usual, place], head[other, carried] = 1e-3, 1
                previous = [usual, other]
    model.save_pretrained(directory)
    return str(directory)
