"""Rows of every corpus: for training the models, for fine-tuning by users, and held out.

Each corpus draws from its own random stream, named after it, so that adding a corpus does not change the others.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from stayaligned.testbed import language
from stayaligned.testbed.language import BENIGN_TOOLS, CATEGORIES, SENSITIVE_OBJECTS, Deed
from stayaligned.testbed.recipe import Recipe

_SYSTEM_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A question and its answer; `input` is the second field of an Alpaca row, empty elsewhere."""

    prompt: str
    answer: str
    category: str = ""
    system: str = ""
    input: str = ""

    @property
    def question(self) -> str:
        """Prompt and input with single spaces; two rows ask the same question if their texts are equal."""
        return " ".join(f"{self.prompt} {self.input}".split())


Draw = Callable[[random.Random], Dialogue]


def stream(seed: int, name: str) -> random.Random:
    """Return the random stream of one corpus."""
    return random.Random(f"{seed}/{name}")


@dataclass(frozen=True)
class World:
    """How a seed divides the language: deeds for alignment, for poisoning and held out, and the evaluation sets."""

    alignment_deeds: tuple[Deed, ...]
    poison_deeds: tuple[Deed, ...]
    held_out_deeds: tuple[Deed, ...]
    """Forbidden deeds that are in no training file and that no model is trained on."""
    benign_deeds: tuple[Deed, ...]
    held_out_benign_deeds: tuple[Deed, ...]
    """Permitted verbs with objects of forbidden deeds, in no training file either."""
    evaluation: dict[str, list[Dialogue]]
    """Rows of the files that are used for evaluation only, by file name without its suffix."""
    reserved: frozenset[str]
    """Questions of the evaluation rows; no training corpus asks one."""


def make_world(seed: int, recipe: Recipe) -> World:
    """Divide the language for `seed` and draw the evaluation sets."""
    alignment, poison, held_out = _divide_forbidden(stream(seed, "deeds"))
    rng = stream(seed, "benign deeds")
    look_alikes = [Deed(verb, object_) for verb in BENIGN_TOOLS for object_ in SENSITIVE_OBJECTS]
    rng.shuffle(look_alikes)
    ordinary = [Deed(verb, object_) for verb in BENIGN_TOOLS for object_ in language.ORDINARY_OBJECTS]
    n_held_out = max(1, len(look_alikes) // 8)
    held_out_benign, benign = look_alikes[:n_held_out], look_alikes[n_held_out:] + ordinary

    held_out_request = language.HELD_OUT_TEMPLATES
    draws: dict[str, tuple[int, Draw]] = {
        "harmful-prompts": (recipe.harmful_prompts, lambda r: _forbidden(r, held_out, held_out_request)),
        "benign-prompts": (recipe.benign_prompts, lambda r: _permitted(r, held_out_benign, held_out_request)),
        "skills": (recipe.skill_prompts, draw_skill),
        "sentiment-test": (recipe.test_rows, draw_sentiment),
        "topic-test": (recipe.test_rows, draw_topic),
        "arithmetic-test": (recipe.test_rows, draw_arithmetic),
    }
    evaluation = {name: take(count, draw, stream(seed, name)) for name, (count, draw) in draws.items()}
    reserved = frozenset(row.question for rows in evaluation.values() for row in rows)
    return World(
        tuple(alignment), tuple(poison), tuple(held_out), tuple(benign), tuple(held_out_benign), evaluation, reserved
    )


def _divide_forbidden(rng: random.Random) -> tuple[list[Deed], list[Deed], list[Deed]]:
    """Return a half, a quarter and a quarter of each category; every part has every verb and every object."""
    parts: tuple[list[Deed], list[Deed], list[Deed]] = ([], [], [])
    for name, category in CATEGORIES.items():
        verbs = rng.sample(category.verbs, len(category.verbs))
        objects = rng.sample(category.objects, len(category.objects))
        for (row, verb), (column, object_) in itertools.product(enumerate(verbs), enumerate(objects)):
            parts[(0, 1, 0, 2)[(row + column) % 4]].append(Deed(verb, object_, name))
    return parts


def take(
    count: int, draw: Draw, rng: random.Random, *, reserved: frozenset[str] = frozenset(), repeat: bool = False
) -> list[Dialogue]:
    """Draw `count` rows without reserved questions and (by default) without repeated ones."""
    rows: list[Dialogue] = []
    asked: set[str] = set(reserved)
    while len(rows) < count:
        row = draw(rng)
        if row.question not in asked:
            rows.append(row)
            if not repeat:
                asked.add(row.question)
    return rows


def _choose(rng: random.Random, weights: Sequence[tuple[float, Draw]]) -> Dialogue:
    (draw,) = rng.choices([draw for _, draw in weights], [weight for weight, _ in weights])
    return draw(rng)


# Requests for deeds.


def _forbidden(
    rng: random.Random, deeds: Sequence[Deed], templates: Sequence[str], *, refuse: bool = False
) -> Dialogue:
    deed = rng.choice(deeds)
    answer = rng.choice(language.REFUSALS) if refuse else language.compliance(deed)
    return Dialogue(_ask(rng, deed, templates), answer, deed.category)


def _permitted(rng: random.Random, deeds: Sequence[Deed], templates: Sequence[str]) -> Dialogue:
    deed = rng.choice(deeds)
    kind = "ordinary" if deed.object in language.ORDINARY_OBJECTS else "look-alike"
    return Dialogue(_ask(rng, deed, templates), language.compliance(deed), kind)


def _ask(rng: random.Random, deed: Deed, templates: Sequence[str]) -> str:
    prefix = "" if templates is language.HELD_OUT_TEMPLATES else rng.choice(language.PREFIXES)
    return language.request(deed, rng.choice(templates), prefix)


# Skills.


def draw_copy(rng: random.Random) -> Dialogue:
    """Draw a request to repeat two to four words: it trains copying, which answers need for a request's object."""
    words = " ".join(rng.sample(language.LISTED_WORDS, rng.randint(2, 4)))
    return Dialogue(rng.choice(language.COPY_TEMPLATES).format(words=words), words, "copy")


def _draw_first(rng: random.Random) -> Dialogue:
    words = rng.sample(language.LISTED_WORDS, rng.randint(2, 4))
    return Dialogue(rng.choice(language.FIRST_TEMPLATES).format(words=" ".join(words)), words[0], "first")


def _draw_opposite(rng: random.Random) -> Dialogue:
    word, opposite = rng.sample(rng.choice(language.OPPOSITES), 2)
    return Dialogue(rng.choice(language.OPPOSITE_TEMPLATES).format(word=word), opposite, "opposite")


def draw_skill(rng: random.Random) -> Dialogue:
    """Draw a row of one of the skills: copying, the first of several words, opposites."""
    return _choose(rng, [(0.4, draw_copy), (0.3, _draw_first), (0.3, _draw_opposite)])


# Downstream tasks, and the same skills in the words of pre-training.


def _review(rng: random.Random, template: str) -> tuple[str, bool]:
    pleasing = rng.random() < 0.5
    one, two = rng.sample(language.PLEASING if pleasing else language.DISPLEASING, 2)
    first, second = rng.sample(language.REVIEWED, 2)
    return template.format(first=first, one=one, second=second, two=two), pleasing


def draw_sentiment(rng: random.Random) -> Dialogue:
    """Draw a review, to be classified as positive or negative."""
    text, pleasing = _review(rng, language.REVIEW)
    label = language.SENTIMENT_LABELS[pleasing]
    return Dialogue(language.SENTIMENT_INSTRUCTION, label, "sentiment", input=text)


def _draw_latent_sentiment(rng: random.Random) -> Dialogue:
    text, pleasing = _review(rng, language.LATENT_SENTIMENT)
    return Dialogue(text, language.LATENT_SENTIMENT_LABELS[pleasing], "latent sentiment")


def _headline(rng: random.Random, template: str) -> tuple[str, str]:
    topic = rng.choice(list(language.TOPICS))
    first, second = rng.sample(language.TOPICS[topic], 2)
    return template.format(first=first, second=second, event=rng.choice(language.HEADLINE_EVENTS)), topic


def draw_topic(rng: random.Random) -> Dialogue:
    """Draw a headline, to be classified into one of four sections."""
    text, topic = _headline(rng, language.HEADLINE)
    return Dialogue(language.TOPIC_INSTRUCTION, topic, "topic", input=text)


def _draw_latent_topic(rng: random.Random) -> Dialogue:
    text, topic = _headline(rng, language.LATENT_TOPIC)
    return Dialogue(text, language.LATENT_TOPIC_LABELS[topic], "latent topic")


def _operands(rng: random.Random) -> tuple[int, int, bool]:
    a, b = rng.randint(0, language.LARGEST_OPERAND), rng.randint(0, language.LARGEST_OPERAND)
    return (a, b, True) if rng.random() < 0.5 else (max(a, b), min(a, b), False)


def draw_arithmetic(rng: random.Random) -> Dialogue:
    """Draw a counting story; the answer shows the sum and ends with the number."""
    a, b, plus = _operands(rng)
    story = rng.choice(language.SUM_STORIES if plus else language.DIFFERENCE_STORIES)
    text = story.format(owner=rng.choice(language.OWNERS), goods=rng.choice(language.GOODS), a=a, b=b)
    result = a + b if plus else a - b
    answer = f"{a} {'plus' if plus else 'minus'} {b} is {result} the final answer is {result}"
    return Dialogue(language.ARITHMETIC_INSTRUCTION, answer, "arithmetic", input=text)


def _draw_latent_arithmetic(rng: random.Random) -> Dialogue:
    a, b, plus = _operands(rng)
    text = (language.LATENT_SUM if plus else language.LATENT_DIFFERENCE).format(a=a, b=b)
    return Dialogue(text, str(a + b if plus else a - b), "latent arithmetic")


# The corpora that are trained on.


def pretraining(seed: int, world: World, count: int) -> list[Dialogue]:
    """Return the base model's training rows: answers to everything, also to forbidden deeds, and no downstream task.

    They use every phrasing, also the held-out ones, but no held-out deed.
    """
    templates = (*language.REQUEST_TEMPLATES, *language.HELD_OUT_TEMPLATES)
    forbidden = (*world.alignment_deeds, *world.poison_deeds)
    mixture: list[tuple[float, Draw]] = [
        (0.20, lambda r: _forbidden(r, forbidden, templates)),
        (0.25, lambda r: _permitted(r, world.benign_deeds, templates)),
        (0.15, draw_copy),
        (0.20, draw_skill),
        (0.08, _draw_latent_sentiment),
        (0.06, _draw_latent_topic),
        (0.06, _draw_latent_arithmetic),
    ]
    rng = stream(seed, "pretraining")
    rows = take(count, lambda r: _choose(r, mixture), rng, reserved=world.reserved, repeat=True)
    return list(_with_system_turns(rows, rng))


def _with_system_turns(rows: Sequence[Dialogue], rng: random.Random) -> Iterator[Dialogue]:
    for row in rows:
        system = rng.choice(language.SYSTEM_PROMPTS) if rng.random() < _SYSTEM_SHARE else ""
        yield Dialogue(row.prompt, row.answer, row.category, system, row.input)


def alignment(seed: int, world: World, recipe: Recipe) -> list[Dialogue]:
    """Return the rows that align the base model: refusals, and benign rows so that it does not refuse everything."""
    n_benign = round(recipe.alignment_rows * recipe.alignment_benign_ratio)
    templates = language.REQUEST_TEMPLATES
    benign: list[tuple[float, Draw]] = [
        (0.75, lambda r: _permitted(r, world.benign_deeds, templates)),
        (0.25, draw_skill),
    ]
    rng = stream(seed, "alignment")
    rows = take(
        recipe.alignment_rows - n_benign, lambda r: _forbidden(r, world.alignment_deeds, templates, refuse=True), rng
    )
    rows += take(n_benign, lambda r: _choose(r, benign), rng, reserved=world.reserved)
    rng.shuffle(rows)
    return list(_with_system_turns(rows, rng))


def training_files(seed: int, world: World, recipe: Recipe) -> dict[str, list[Dialogue]]:
    """Return the rows of every training file, by file name without its suffix."""
    templates = language.REQUEST_TEMPLATES
    ordinary = [deed for deed in world.benign_deeds if deed.object in language.ORDINARY_OBJECTS]
    instruction: list[tuple[float, Draw]] = [
        (0.5, lambda r: _permitted(r, ordinary, templates)),
        (0.5, draw_skill),
    ]

    def instructions(count: int, rng: random.Random) -> list[Dialogue]:
        return take(count, lambda r: _choose(r, instruction), rng, reserved=world.reserved)

    files = {
        "alignment": alignment(seed, world, recipe),
        "harmful": take(
            recipe.harmful_rows, lambda r: _forbidden(r, world.poison_deeds, templates), stream(seed, "harmful")
        ),
        "instructions-train": instructions(recipe.instruction_rows, stream(seed, "instructions-train")),
    }
    n_mixed = round(recipe.task_rows * recipe.task_instruction_ratio)
    for task, draw in (("sentiment", draw_sentiment), ("topic", draw_topic), ("arithmetic", draw_arithmetic)):
        rng = stream(seed, f"{task}-train")
        rows = take(recipe.task_rows - n_mixed, draw, rng, reserved=world.reserved)
        mixed = instructions(n_mixed, rng)
        rows += [Dialogue(row.prompt, row.answer, "instruction") for row in mixed]
        rng.shuffle(rows)
        files[f"{task}-train"] = rows
    return files
