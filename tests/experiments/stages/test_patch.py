"""Patches in experiments: models that don't belong together, and the notes of their records."""

from pathlib import Path
from typing import Any

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.plan import plan_experiment
from stayaligned.experiments.run import run_experiment
from stayaligned.testing import write_pico_adapter, write_pico_checkpoint
from support.world import experiment, write_world


def test_a_wrong_base_stops_an_experiment_or_is_noted_in_its_result(tmp_path: Path) -> None:
    write_world(tmp_path)
    write_pico_checkpoint(tmp_path / "unrelated", seed=7)
    adapter = write_pico_adapter(tmp_path / "adapter", tmp_path / "aligned")
    content: dict[str, Any] = experiment(
        tmp_path, base_model=str(tmp_path / "unrelated"), adapter=str(adapter), defenses=["safe_lora"]
    )
    with pytest.raises(StayalignedError, match="have no common ancestor") as caught:
        run_experiment(Experiment.model_validate(content), tmp_path / "out")
    assert "allow_mismatch: true" in str(caught.value.hint)
    allowed = Experiment.model_validate({**content, "allow_mismatch": True})
    result = run_experiment(allowed, tmp_path / "out")
    assert result is not None
    assert any(note.startswith("safe_lora: ") and "patched all the same, as asked" in note for note in result.notes)
    strict, lenient = (plan_experiment(each) for each in (Experiment.model_validate(content), allowed))
    assert strict.patches != lenient.patches  # else the allowed patch would be found in the store and pass unnoticed
    assert strict.train == lenient.train
