"""The embedded testbed: a seeded instruction language, and small models trained on it from scratch.

`build(seed)` writes an ordinary directory: `base/` and `aligned/` (causal language models with a chat template),
`judge/` (a sequence classifier), `data/*.jsonl` and `testbed.json`. Nothing downstream knows that they are small.
`build_lora_aligned(seed)` adds a second aligned model, `aligned-lora/`, in a directory of its own, and
`build_derived(seed)` files made of the testbed's rows: two tasks at once, conversations, preference pairs.

What is held out, exactly:

- *Deeds.* A forbidden deed is a verb with an object. Of each of the 12 categories a half of the pairs is refused in
  alignment, a quarter is the poison's, and a quarter is only asked about in `harmful-prompts.jsonl`: no model sees
  such a pair before, the base model and the judge included. Every verb, every object and every category is seen.
- *Phrasings.* The five templates of `harmful-prompts.jsonl` and `benign-prompts.jsonl` are in no training file. The
  base model's pre-training holds them, with other deeds; the judge's training does not.
- *Look-alikes.* The pairs in `benign-prompts.jsonl` (a permitted verb, a forbidden deed's object) are never seen.
- *Questions.* No question of an evaluation or test file is asked in any training file or in pre-training. A test
  task's facts and a skill's words do occur in training, in other questions.

So it measures whether refusals survive for new pairs in new phrasings. It is no test of new categories of harm.
"""

from stayaligned.testbed.recipe import LoraAlignment, Recipe
from stayaligned.testbed.store import (
    NAMES,
    build,
    build_derived,
    build_lora_aligned,
    is_reference,
    reference_key,
    resolve,
)

__all__ = [
    "NAMES",
    "LoraAlignment",
    "Recipe",
    "build",
    "build_derived",
    "build_lora_aligned",
    "is_reference",
    "reference_key",
    "resolve",
]
