"""The embedded testbed: a seeded instruction language, and small models trained on it from scratch.

`build(seed)` writes an ordinary directory: `base/` and `aligned/` (causal language models with a chat template),
`judge/` (a sequence classifier), `data/*.jsonl` and `testbed.json`. All other code treats them like any other model.
`build_lora_aligned(seed)` writes a second aligned model, `aligned-lora/`, to its own directory, and
`build_derived(seed)` files derived from the testbed's rows: two tasks at once, conversations, preference pairs.

What is held out:

- *Deeds.* A forbidden deed is a verb with an object. In each of the 12 categories, half of the pairs are refused in
  alignment, a quarter are in the poison, and a quarter are only in `harmful-prompts.jsonl`: no model is trained on
  these, also not the base model or the judge. Every verb, every object and every category occurs in training.
- *Phrasings.* The five templates of `harmful-prompts.jsonl` and `benign-prompts.jsonl` are in no training file. The
  base model's pre-training contains them, with other deeds; the judge's training does not.
- *Look-alikes.* The pairs in `benign-prompts.jsonl` (a permitted verb, a forbidden deed's object) are in no training
  data.
- *Questions.* No question of an evaluation or test file is in a training file or in pre-training. The facts of a test
  task and the words of a skill do occur in training, in other questions.

So the testbed measures whether refusals survive for new pairs in new phrasings. It does not test new categories of
harm.
"""

from stayaligned.testbed.recipe import LoraAlignment, Recipe
from stayaligned.testbed.store import (
    NAMES,
    build,
    build_derived,
    build_lora_aligned,
    is_reference,
    reference_key,
    require_cache,
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
    "require_cache",
    "resolve",
]
