"""Write result directories like those of `evaluate`, with completions chosen by the test."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stayaligned.core.records import Outcome
from stayaligned.evaluation.results import (
    Evidence,
    JudgeIdentity,
    JudgeReading,
    Provenance,
    Result,
    StoredResult,
    evidence_text,
    write_result,
)
from stayaligned.gate.reading import ComparedSide

H, R, S = Outcome.HARM, Outcome.REFUSE, Outcome.SAFE


def prompt_hash(text: str) -> str:
    """Return 16 hex digits, like the real hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def evidence(
    harmful: Mapping[str, Sequence[Outcome | None]],
    benign: Mapping[str, Sequence[Outcome | None]] | None = None,
    task: Sequence[float | None] = (),
    degenerate: Sequence[bool | None] = (),
    world: str = "",
) -> list[Evidence]:
    """Return evidence rows by judge; the prompts are those of `world`."""
    rows: list[Evidence] = []
    for prompt_set, judged in (("harmful", harmful), ("benign", benign or {})):
        n = max(map(len, judged.values()), default=0)
        for index in range(n):
            outcomes = {name: found[index] for name, found in judged.items()}
            flag = degenerate[index] if prompt_set == "harmful" and index < len(degenerate) else None
            rows.append(_row(prompt_set, index, world, outcomes=outcomes, degenerate=flag))
    rows += [_row("task", index, world, score=score) for index, score in enumerate(task)]
    return rows


def _row(prompt_set: Any, index: int, world: str, **fields: Any) -> Evidence:
    place = f"{prompt_set}-{index}"
    return Evidence(prompt_set=prompt_set, id=place, prompt=prompt_hash(f"{world} how to flarn zorb {place}"), **fields)


def write_run(directory: Path, rows: Sequence[Evidence], **changes: Any) -> Path:
    """Write a result directory; `changes` as for `make_result`."""
    write_result(directory, make_result(rows, **changes), evidence_text(rows))
    return directory


def make_result(rows: Sequence[Evidence], *, seed: int = 0, arm: str = "tuned", **changes: Any) -> Result:
    """Return a result with this evidence; `changes` are fields of the result or of its experiment."""
    judges = list(dict.fromkeys(name for row in rows for name in row.outcomes)) or ["keyword"]
    settings = {
        "model": "m",
        "adapter": None,
        "judges": [{"name": name} for name in judges],
        "generation": {"max_new_tokens": 8, "memory_mib": 64},
        "task": {"name": "jsonl", "train": "train.jsonl", "metric": "exact"},
        "seed": seed,
    }
    settings |= changes.pop("experiment", {})
    provenance = changes.pop("provenance", {})
    identities = [identity(index, spec, provenance.get("inputs", {})) for index, spec in enumerate(settings["judges"])]
    fields = {
        "id": f"{arm}-{seed}",
        "arm": arm,
        "seed": seed,
        "experiment": settings,
        "judges": tuple(
            JudgeReading(judge=name, metrics=(), identity=one) for name, one in zip(judges, identities, strict=True)
        ),
        "scores": (),
        "evidence_sha256": hashlib.sha256(evidence_text(rows).encode()).hexdigest(),
        "provenance": Provenance(versions={"stayaligned": "0.1.0"}, template_hash="t", **provenance),
    }
    return Result(**{**fields, **changes})


@dataclass(frozen=True)
class ResultInMemory(StoredResult):
    """A result whose evidence is in memory."""

    given: tuple[Evidence, ...] = ()

    @cached_property
    def evidence(self) -> tuple[Evidence, ...]:
        return self.given


def side_in_memory(role: str, rows: Sequence[Evidence]) -> ComparedSide:
    """Return one side of a gate with one result, without writing files."""
    nowhere = Path(role)
    return ComparedSide(role, (nowhere,), (ResultInMemory(nowhere, nowhere, make_result(rows), tuple(rows)),))


def identity(index: int, spec: Mapping[str, Any], inputs: Mapping[str, str]) -> JudgeIdentity:
    """The identity that a run would store: the settings, with each file replaced by its hash."""
    settings = {key: inputs.get(f"judges.{index}.{key}", value) for key, value in spec.items() if key != "name"}
    return JudgeIdentity(name=spec["name"], version=1, settings=settings, source="sha256:source")


def outcomes(n: int, harmful: int, start: int = 0) -> list[Outcome | None]:
    """Return `n` outcomes: refusals, except `harmful` cases of harm from `start` on."""
    return [H if start <= index < start + harmful else R for index in range(n)]
