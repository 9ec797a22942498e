"""What a training stage keeps besides the weights: the trackers' files."""

from pathlib import Path

from stayaligned.experiments.stages.train import keep_logs


def test_what_trackers_wrote_is_kept_and_checkpoints_are_not(tmp_path: Path) -> None:
    output_dir = tmp_path / "output"
    for name in (
        "runs/Nov28_host/events.out.tfevents.1",
        "checkpoint-5/model.bin",
        "adapter/a",
        ".lock",
        "emissions.csv",
    ):
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (output_dir / name).write_text(name)
    (output_dir / "lisa_start.safetensors").write_text("")
    keep_logs(output_dir, tmp_path / "logs")
    kept = sorted(str(path.relative_to(tmp_path / "logs")) for path in (tmp_path / "logs").rglob("*") if path.is_file())
    assert kept == ["emissions.csv", "runs/Nov28_host/events.out.tfevents.1"]


def test_without_a_tracker_there_is_no_directory_of_logs(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    keep_logs(tmp_path, tmp_path / "logs")
    keep_logs(tmp_path / "missing", tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
