"""Selections through a subspace file: the same as with the complete V, or refused."""

from pathlib import Path

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import LayerReport
from stayaligned.defenses import DEFENSES, ModelPair
from stayaligned.defenses.patching.directories import patch_directory, read_projection
from stayaligned.defenses.patching.subspace import build_subspace
from stayaligned.report.scan import threshold_outcomes
from stayaligned.weights.adapters import read_adapter
from support.checkpoints import write_family


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_family(tmp_path_factory.mktemp("world"), target_modules="all-linear")
    for rank in (2, 16, 24):
        build_subspace(root / "chat", root / "base", root / f"k{rank}", rank=rank)
    return root


def chosen(layers: list[LayerReport]) -> set[str]:
    return {layer.module for layer in layers if layer.selected}


@pytest.mark.parametrize("source", ["adapter", "tuned"])
@pytest.mark.parametrize("rank", [2, 16, 24])
def test_a_selection_through_a_file_equals_the_exact_one_or_is_refused(
    world: Path, tmp_path: Path, source: str, rank: int
) -> None:
    exact = ModelPair(world / "chat", world / "base")
    file = ModelPair(world / "chat", None, world / f"k{rank}")
    allowed = ModelPair(world / "chat", None, world / f"k{rank}", allow_undecided=True)
    every = patch_directory(
        world / source, tmp_path / "every", DEFENSES.parse({"name": "safe_lora", "all_layers": True}), exact
    )
    ordered = sorted(layer.similarity for layer in every)
    rules = [{"threshold": (ordered[3] + ordered[4]) / 2}, {"threshold": 0.05}, {"threshold": 1.1}]
    refused = 0
    for number, rule in enumerate([*rules, {"lowest": 4}, {"lowest": 0}]):
        patch = DEFENSES.parse({"name": "safe_lora", **rule})
        expected = chosen(patch_directory(world / source, tmp_path / f"exact{number}", patch, exact))
        out = tmp_path / f"file{number}"
        try:
            found = patch_directory(world / source, out, patch, file)
        except StayalignedError as error:
            refused += 1
            assert f"{world / f'k{rank}'} holds too little of V" in error.message
            assert "--allow-undecided" in str(error.hint)
            assert not out.exists()
            found = patch_directory(world / source, out, patch, allowed)
            doubtful = {layer.module for layer in found if layer.undecided}
            assert f"{len(doubtful)} of 14 are undecided" in error.message
            assert chosen(found) ^ expected <= doubtful
            assert any("leaves open whether" in note for note in read_projection(out / "projection.json").notes)
        else:
            assert chosen(found) == expected
            assert not any(layer.undecided for layer in found)
        bounds = {layer.module: layer.similarity_bounds for layer in found}
        for layer in every:
            low, high = bounds[layer.module] or (2, 2)
            assert low <= layer.similarity <= high
    assert refused in {2: (2, 3), 16: (0, 1, 2), 24: (0, 1, 2)}[rank]


def test_a_scan_counts_the_undecided_layers_of_each_threshold(world: Path) -> None:
    defense = DEFENSES.parse({"name": "safe_lora", "all_layers": True})
    for models, most in ((ModelPair(world / "chat", world / "base"), 0), (ModelPair(None, None, world / "k2"), 14)):
        layers = defense.patch(read_adapter(world / "adapter"), models).layers
        undecided = [row.undecided for row in threshold_outcomes(layers)]
        assert undecided[0] == undecided[-1] == 0
        assert (max(undecided) > 0) == (most > 0)
        for row in threshold_outcomes(layers):
            bounds = [layer.similarity_bounds for layer in layers]
            assert row.undecided == sum(b is not None and b[0] < row.threshold <= b[1] for b in bounds)
