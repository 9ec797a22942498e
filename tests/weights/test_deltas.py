"""Streamed differences, compared with tensors that the safetensors library reads."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stayaligned.core.errors import StayalignedError
from stayaligned.weights import deltas
from stayaligned.weights.checkpoints import Block, Checkpoint, Weight, whole_tensor
from stayaligned.weights.deltas import BytesDone, Delta, WeightDifference, pair_weights, stream
from support.checkpoints import pair, weights, write


def same_names(names: Iterable[str]) -> dict[str, tuple[Weight, Weight]]:
    return {name: (whole_tensor(name), whole_tensor(name)) for name in names}


def iter_deltas(
    aligned: Checkpoint, base: Checkpoint, weights: Mapping[str, tuple[Weight, Weight]] | Sequence[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    pairs = weights if isinstance(weights, Mapping) else same_names(weights)
    return stream(pair_weights(aligned, base, pairs), lambda _, found: found[0].value.clone())


@pytest.mark.parametrize(("aligned_shards", "base_shards"), [(1, 1), (1, 2), (3, 2)])
def test_deltas_do_not_depend_on_the_sharding(tmp_path: Path, aligned_shards: int, base_shards: int) -> None:
    aligned, base = pair(tmp_path, aligned_shards, base_shards)
    assert sorted(aligned) == sorted(base) == sorted(weights(0))
    order = ["layers.3.weight", "layers.0.weight"]
    found = dict(iter_deltas(aligned, base, order))
    assert list(found) == order
    for name, value in found.items():
        assert torch.equal(value, weights(0)[name] - weights(1)[name])


def test_differences_are_fp32_for_every_storage_type(tmp_path: Path) -> None:
    low, high = weights(0, dtype=torch.bfloat16), weights(1)
    aligned, base = Checkpoint(write(tmp_path / "a", low)), Checkpoint(write(tmp_path / "b", high))
    for name, value in iter_deltas(aligned, base, list(low)):
        assert value.dtype == torch.float32
        assert torch.equal(value, low[name].float() - high[name])


def test_the_two_checkpoints_may_name_a_weight_differently(tmp_path: Path) -> None:
    aligned = Checkpoint(write(tmp_path / "a", {"model.x": torch.ones(2, 2)}))
    base = Checkpoint(write(tmp_path / "b", {"x": torch.zeros(2, 2)}))
    ((name, value),) = iter_deltas(aligned, base, {"q_proj": (whole_tensor("model.x"), whole_tensor("x"))})
    assert name == "q_proj"
    assert torch.equal(value, torch.ones(2, 2))


def test_one_error_lists_all_missing_and_misshapen_names(tmp_path: Path) -> None:
    aligned = Checkpoint(write(tmp_path / "a", {"x": torch.ones(2, 3), "y": torch.ones(2), "z": torch.ones(1, 1)}))
    base = Checkpoint(write(tmp_path / "b", {"x": torch.ones(2, 4), "z": torch.zeros(1, 1)}))
    with pytest.raises(StayalignedError) as caught:
        iter_deltas(aligned, base, ["x", "y", "w", "z"])
    for expected in ("x (2×3 against 2×4)", f"y (not in {base.directory})", f"w (not in {aligned.directory})"):
        assert expected in caught.value.message


def test_quantized_and_non_finite_weights_are_refused(tmp_path: Path) -> None:
    good = {"x": torch.ones(2, 2)}
    base = Checkpoint(write(tmp_path / "base", good))
    for name, bad, expected in (
        ("int8", torch.ones(2, 2, dtype=torch.int8), "stored as I8"),
        ("fp8", torch.ones(2, 2).to(torch.float8_e4m3fn), "stored as F8_E4M3"),
        ("nan", torch.full((2, 2), torch.nan), "NaN or infinity"),
    ):
        aligned = Checkpoint(write(tmp_path / name, {"x": bad}))
        with pytest.raises(StayalignedError, match=expected):
            list(iter_deltas(aligned, base, ["x"]))


blocks = st.lists(st.integers(1, 7), min_size=1, max_size=4)


@given(blocks, blocks, st.integers(1, 9), st.sampled_from([1, 3, 1 << 18]), st.integers(0, 99))
def test_differences_do_not_depend_on_how_a_matrix_is_split_into_blocks(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], others: list[int], columns: int, elements: int, seed: int
) -> None:
    rows = max(sum(cuts), sum(others))
    cuts[-1] += rows - sum(cuts)
    others[-1] += rows - sum(others)
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    root = tmp_path_factory.mktemp("cut")
    stacks = (
        {f"part{i}": part.contiguous() for i, part in enumerate(x.split(cuts))},
        {f"part{i}": part.contiguous() for i, part in enumerate(y.split(others))},
    )
    aligned, base = (Checkpoint(write(root / name, parts)) for name, parts in zip("ab", stacks, strict=True))
    weights = (tuple(Block(name) for name in stacks[0]), tuple(Block(name) for name in stacks[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deltas, "_BLOCK_ELEMENTS", elements)
        ((_, value),) = iter_deltas(aligned, base, {"whole": weights})
    assert torch.equal(value, x - y)


def test_an_expert_and_a_range_of_rows_are_read_from_their_place_in_the_file(tmp_path: Path) -> None:
    stack = torch.randn(3, 4, 5)
    fused = torch.randn(8, 5)
    checkpoint = Checkpoint(write(tmp_path / "a", {"experts": stack, "fused": fused}))
    items = {
        "one expert": (WeightDifference(checkpoint, (Block("experts", expert=1),), None, ()),),
        "rows": (WeightDifference(checkpoint, (Block("fused", first_row=2, rows=3),), None, ()),),
        "rows of an expert": (
            WeightDifference(checkpoint, (Block("experts", expert=2, first_row=3, rows=1),), None, ()),
        ),
    }
    found = dict(stream(items, lambda _, d: d[0].value.clone()))
    assert torch.equal(found["one expert"], stack[1])
    assert torch.equal(found["rows"], fused[2:5])
    assert torch.equal(found["rows of an expert"], stack[2, 3:])


def test_the_norm_is_computed_in_fp64(tmp_path: Path) -> None:
    aligned, base = pair(tmp_path)
    for name, norm in stream(pair_weights(aligned, base, same_names(aligned)), lambda _, found: found[0].norm):
        exact = (weights(0)[name] - weights(1)[name]).double().norm()
        assert norm == pytest.approx(float(exact), rel=1e-14)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_of_several_threads_come_in_order_and_the_number_of_torch_threads_is_restored(
    tmp_path: Path, threads: int
) -> None:
    aligned, base = pair(tmp_path, aligned_shards=2)
    before, seen, places = torch.get_num_threads(), list[BytesDone](), set[str]()

    def work(name: str, found: list[Delta]) -> str:
        places.add(threading.current_thread().name)
        return f"{name} {found[0].value.sum():.6f}"

    try:
        torch.set_num_threads(threads)
        results = list(stream(pair_weights(aligned, base, same_names(sorted(aligned))), work, progress=seen.append))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert [name for name, _ in results] == sorted(aligned)
    assert [r.split()[0] for _, r in results] == sorted(aligned)
    assert [state.done for state in seen] == [96 * (i + 1) for i in range(5)]
    assert {state.total for state in seen} == {5 * 2 * 3 * 4 * 4}
    assert len(places) <= threads


def test_an_error_in_the_work_ends_the_stream_and_all_threads(tmp_path: Path) -> None:
    aligned, base = pair(tmp_path)

    def work(name: str, _: list[Delta]) -> None:
        if name.startswith("layers.2"):
            raise RuntimeError("as asked")

    with pytest.raises(RuntimeError, match="as asked"):
        list(stream(pair_weights(aligned, base, same_names(sorted(aligned))), work))
    assert not [t for t in threading.enumerate() if t.name.startswith("stream")]


def test_a_worker_reuses_one_buffer_for_all_weights(tmp_path: Path) -> None:
    aligned, base = pair(tmp_path)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        found = list(
            stream(pair_weights(aligned, base, same_names(sorted(aligned))), lambda _, d: d[0].value.data_ptr())
        )
    finally:
        torch.set_num_threads(before)
    assert len({place for _, place in found}) == 1


def test_identical_directories_are_an_error(tmp_path: Path) -> None:
    aligned, _ = pair(tmp_path)
    with pytest.raises(StayalignedError, match="same directory"):
        pair_weights(aligned, aligned, same_names(weights(0)))
