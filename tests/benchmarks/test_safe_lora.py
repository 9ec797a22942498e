"""The parts of `benchmarks/safe_lora.py`: its model pair, its byte counts, its dense form."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
bench: Any = importlib.import_module("safe_lora")
work: Any = importlib.import_module("safe_lora_work")
sys.path.pop(0)

SHAPE = work.Shape(hidden=128, intermediate=256, layers=4)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair in several shards, and an adapter on its first two layers."""
    path = tmp_path_factory.mktemp("bench") / "pair"
    work.make_pair({"path": str(path), "shape": SHAPE, "shard_bytes": 200_000})
    request = {"shape": SHAPE, "targets": "all", "aligned": str(path / "aligned"), "layers": 2, "count": None}
    work.make_adapters({**request, "path": str(path / "adapter")})
    work.make_adapters({**request, "path": str(path / "fleet"), "count": 2})
    return path


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def test_transformers_and_peft_load_the_pair_and_its_adapters(home: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "aligned")
    assert {name for name, _ in model.named_parameters()} == SHAPE.tensors().keys()
    assert len(list((home / "aligned").glob("*.safetensors"))) > 2
    tuned = PeftModel.from_pretrained(model, home / "adapter")  # a missing key is a warning, which fails the test
    placed = {name for name, _ in tuned.named_parameters() if "lora_B" in name}
    assert len(placed) == 2 * 7
    trained = [load_file(home / "fleet" / name / "adapter_model.safetensors") for name in ("000", "001")]
    assert trained[0].keys() == trained[1].keys() == load_file(home / "adapter" / "adapter_model.safetensors").keys()
    assert not any(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_only_linear_weights_differ_by_a_decaying_spectrum_over_noise(home: Path) -> None:
    aligned, base = tensors(home / "aligned"), tensors(home / "base")
    changed = {name for name in aligned if not torch.equal(aligned[name], base[name])}
    assert changed == SHAPE.linears().keys()
    for name in changed:
        values = torch.linalg.svdvals(aligned[name].double() - base[name].double())
        assert 0.5 < values[8] / values[0] * 3 < 1.5  # 1/√9, up to the overlap of random factors
        assert 0 < values[work.SPECTRUM :].square().sum() < 0.1 * values.square().sum()


def test_the_reader_reads_the_bytes_of_the_needed_tensors_and_no_others(home: Path) -> None:
    names = list(SHAPE.linears(work.TARGETS["qv"], 2))
    found = list(work.byte_ranges(home / "base", names))
    stored = tensors(home / "base")
    pieces = [file.read_bytes()[start : start + length] for file, start, length in found]
    expected = [stored[name].view(torch.uint8).numpy().tobytes() for name in names]
    assert sorted(pieces) == sorted(expected)
    options = bench.parse(["--targets", "qv"])
    needed = bench.Bench(options, SHAPE, home, {}).needed_bytes(2)
    assert 2 * work.read_ranges([(str(file), start, length) for file, start, length in found]) == needed


def test_reading_a_truncated_file_ends_with_an_error(home: Path) -> None:
    file = next((home / "base").glob("*.safetensors"))
    with pytest.raises(EOFError):
        work.read_ranges([(str(file), 0, file.stat().st_size + 1)])


def test_the_dense_form_is_that_of_the_paper(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = list(SHAPE.linears(layers=2))
    pair = [str(home / "aligned"), str(home / "base")]
    work.dense({"adapter": str(home / "adapter"), "pair": pair, "names": names})
    cosines = json.loads(capsys.readouterr().out)["cosines"]
    aligned, base = tensors(home / "aligned"), tensors(home / "base")
    factors = load_file(home / "adapter" / "adapter_model.safetensors")
    assert [f"{name}.weight" for name in cosines] == names
    for name, cosine in cosines.items():
        v = aligned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        update, projected = b @ a, v @ v.T / v.norm() @ b @ a
        assert cosine == pytest.approx(float((update * projected).sum() / (update.norm() * projected.norm())), abs=1e-5)
        image, _ = work.dense_form(v, a, b)
        torch.testing.assert_close(image @ a, projected)


def test_the_page_cache_is_dropped_and_filled(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(bytes(3 << 20))
    subprocess.run(["sync", file], check=True)
    bench.fill_cache([file])
    assert bench.cached_share([file]) == 1
    bench.drop_cache([file])
    kind = subprocess.run(["stat", "-f", "-c", "%T", file], check=True, capture_output=True, text=True).stdout.strip()
    if kind == "tmpfs":
        pytest.skip("the temporary directory is memory: nothing can be dropped")
    assert bench.cached_share([file]) < 0.1


def test_a_failing_process_ends_the_benchmark_with_its_output() -> None:
    finished = bench.run([sys.executable, "-c", "print('finished')"], {})
    assert finished.output == "finished\n"
    assert finished.seconds > 0
    with pytest.raises(SystemExit, match="the reason"):
        bench.run([sys.executable, "-c", "raise SystemExit('the reason')"], {})


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 100))
def test_shards_keep_the_order_of_tensors_and_the_size_limit(sizes: list[int], limit: int) -> None:
    named = {str(index): size for index, size in enumerate(sizes)}
    groups = work.plan_shards(named, limit)
    assert [name for group in groups for name in group] == list(named)
    totals = [sum(named[name] for name in group) for group in groups]
    assert all(total <= limit or len(group) == 1 for total, group in zip(totals, groups, strict=True))
    assert all(total + named[after[0]] > limit for total, after in zip(totals, groups[1:], strict=False))


def test_a_line_is_fitted_and_points_off_it_are_reported() -> None:
    assert bench.fit_line([1, 2, 4], [5.0, 7.0, 11.0]) == pytest.approx((3, 2, 0))
    assert bench.fit_line([1, 2, 4], [5.0, 9.0, 11.0])[2] > 0.05
    assert bench.fit_line([2], [6.0]) == (0, 3, 0)


def test_the_gpu_section_measures_ratio_and_bandwidth_on_any_device(capsys: pytest.CaptureFixture[str]) -> None:
    work.gpu({"device": "cpu", "widths": [96], "repeats": 2, "copy_bytes": 1 << 20})
    found = json.loads(capsys.readouterr().out)
    row = found["96"]
    assert row["ratio"] == pytest.approx(row["dense_seconds"] / row["factor_seconds"])
    assert row["bandwidth"] == pytest.approx(2 * 4 * 96**2 / row["factor_seconds"] / found["copy"])


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--sections", "time,fleets"])
    assert "fleets" in capsys.readouterr().err
