"""The keys of an experiment's stages: what each stage depends on, as hashes. Writes nothing and imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stayaligned.data.prompts import Prompts
from stayaligned.data.shaping import SHAPE_VERSION
from stayaligned.evaluation.degeneration import Degeneration
from stayaligned.evaluation.results import JudgeIdentity
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.stages.keys import identify_judge, stage_key

_GENERATION_VERSION = 2
"""Version of the content of `completions.jsonl`; raise it when a text means something else than before."""


@dataclass(frozen=True)
class Plan:
    """The key of every stage of an experiment. Equal keys mean equal content, so that stages can be shared.

    The key of a judge's stage also depends on the completions (`stages.keys.judge_key`); the plan holds the judges'
    identities.
    """

    data: str
    """Key of the training rows."""
    train: str
    """Key of the weights before any patch."""
    patches: tuple[str, ...]
    """One key per patch; each depends on the key before it."""
    generate: str
    """Key of the completions."""
    degeneration: str
    """Key of the check for degenerate completions."""
    judges: tuple[JudgeIdentity, ...]
    """Identities of the experiment's judges, in its order."""
    lm_eval: dict[str, str]
    """Key of each lm-eval task by its name."""
    id: str
    """Identity of the whole experiment."""
    product: Literal["adapter", "model"]
    """Name of the directory that training and patches write: a LoRA's adapter, or the whole model."""


def plan_experiment(experiment: Experiment) -> Plan:
    """Compute the keys of an experiment's stages from its settings and the content of its input files."""
    e = experiment
    data = _data_key(e)
    train = _train_key(e, data)
    patches = _patch_keys(e, train)
    weights = patches[-1] if patches else train
    generate = _generate_key(e, weights)
    degeneration = _degeneration_key(e, generate)
    judges = tuple(identify_judge(judge, e.seed) for judge in e.judges)
    lm_eval = _lm_eval_keys(e, weights)
    optional = [*([[*lm_eval.values()]] if lm_eval else []), *([] if e.degeneration is None else [degeneration])]
    # As text: what is hashed in an identity already must not be hashed again.
    identities = [identity.model_dump_json() for identity in judges]
    return Plan(
        data=data,
        train=train,
        patches=patches,
        generate=generate,
        degeneration=degeneration,
        judges=judges,
        lm_eval=lm_eval,
        id=_key(e, "result", generate, identities, e.seed, *optional)[:20],
        product="model" if e.lora is None and e.adapter is None else "adapter",
    )


def _key(experiment: Experiment, *parts: object) -> str:
    return stage_key(parts, experiment.seed)


def _model(e: Experiment) -> dict[str, object]:
    """Return what a conversation with the model depends on."""
    return {"model": e.model, "chat_template": e.chat_template.identity()}


def _data_key(e: Experiment) -> str:
    influence = [{**_model(e), "max_length": e.max_length}] if e.attack is not None and e.attack.needs_influence else []
    task = e.task and e.task.training_identity()
    return _key(e, "data", task, e.attack and e.attack.identity(), e.seed, *influence)


def _train_key(e: Experiment, data: str) -> str:
    if not e.trains:
        return _key(e, "untrained", {"model": e.model, "adapter": e.adapter})
    defense = e.training_defense
    alignment = e.alignment_data if defense.needs_alignment_data else None
    base = {"base_model": e.base_model} if defense.needs_base else {}
    return _key(
        e,
        "train",
        data,
        {"model": e.model, "alignment_data": alignment, **base},
        defense.identity(),
        e.lora,
        e.trainer,
        e.training,
        e.max_length,
        e.seed,
        {"chat_template": e.chat_template.identity()},
        *([] if e.watch is None else [e.watch.model_dump(mode="json")]),
    )


def _patch_keys(e: Experiment, train: str) -> tuple[str, ...]:
    keys: list[str] = []
    for patch in e.patches:
        models: dict[str, object] = {"model": e.model, "base_model": e.base_model if patch.needs_base else None}
        models |= {"allow_mismatch": True} if e.allow_mismatch else {}
        if patch.needs_alignment_data:
            models |= {"alignment_data": e.alignment_data, "chat_template": e.chat_template.identity()}
        keys.append(_key(e, "patch", keys[-1] if keys else train, patch.identity(), models))
    return tuple(keys)


def _generate_key(e: Experiment, weights: str) -> str:
    named = {"harmful_prompts": e.harmful_prompts, "benign_prompts": e.benign_prompts}
    prompts = {key: p.identity() if isinstance(p, Prompts) else p for key, p in named.items()} | {"limit": e.limit}
    tasks = [t and t.identity() for t in (e.task, e.skills)]
    more: list[object] = []
    if "triggered" in e.harm_sets:
        more.append({"attack": e.attack and e.attack.identity()})
    if "shaped" in e.harm_sets:
        more.append({"shaped": [SHAPE_VERSION, e.task and e.task.training_identity(), e.seed]})
    return _key(e, "generate", _GENERATION_VERSION, weights, _model(e), prompts, tasks, e.generation.identity(), *more)


def _degeneration_key(e: Experiment, generate: str) -> str:
    settings = e.degeneration or Degeneration()
    model = {} if settings.perplexity is None else _model(e)
    return _key(e, "degeneration", generate, settings.model_dump(mode="json"), model)


def _lm_eval_keys(e: Experiment, weights: str) -> dict[str, str]:
    if e.lm_eval is None:
        return {}
    parts = (weights, _model(e) if e.lm_eval.apply_chat_template else {"model": e.model}, e.seed)
    return {name: _key(e, "lm_eval", _GENERATION_VERSION, *parts, e.lm_eval.identity(name)) for name in e.lm_eval.tasks}
