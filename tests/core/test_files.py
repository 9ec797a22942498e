"""Files and directories are written completely or not at all."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import (
    fingerprint,
    refuse_existing,
    refuse_inside,
    refuse_unwritable_hub_cache,
    replace_directory,
    replace_file,
    write_text,
)


def test_a_failed_write_leaves_the_old_file_and_no_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_text(target, "old")
    with pytest.raises(RuntimeError), replace_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_directory_never_appears(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replace_directory(tmp_path / "d") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_never_overwritten(tmp_path: Path) -> None:
    with replace_directory(tmp_path / "d") as temporary:
        (temporary / "x").write_text("first")
    with pytest.raises(FileExistsError), replace_directory(tmp_path / "d") as temporary:
        (temporary / "x").write_text("second")
    assert (tmp_path / "d" / "x").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_files_and_directories_get_the_users_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "f", "")
        with replace_directory(tmp_path / "d"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o750


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from stayaligned.core.files import replace_directory
        with replace_directory(Path({str(tmp_path)!r}) / "d") as temporary:
            (temporary / "x").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    ended = subprocess.run([sys.executable, "-c", program], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "d").exists()


def test_the_fingerprint_depends_on_content_and_names_not_on_place_or_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.bin").write_bytes(b"abc")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    (tmp_path / "two" / "w.bin").write_bytes(b"abd")
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "two")
    (tmp_path / "two" / "w.bin").rename(tmp_path / "two" / "v.bin")
    (tmp_path / "two" / "v.bin").write_bytes(b"abc")
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "two")


def test_the_fingerprint_of_a_large_file_depends_on_its_size_and_both_ends(tmp_path: Path) -> None:
    prints: set[str] = set()
    size = 65 << 20
    for place in (0, size - 1, None):
        with (tmp_path / "shard").open("wb") as stream:
            stream.truncate(size if place is not None else size + 1)
            if place is not None:
                stream.seek(place)
                stream.write(b"x")
        prints.add(fingerprint(tmp_path / "shard"))
    assert len(prints) == 3


def test_an_output_inside_an_input_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    for inside in (source / "out", source / "a" / "b", tmp_path / "link" / "out", source / ".." / "adapter" / "out"):
        with pytest.raises(StayalignedError, match="is inside the input"):
            refuse_inside(inside, source)
    for outside in (tmp_path / "out", tmp_path / "adapter-2", source / ".." / "out"):
        refuse_inside(outside, source, tmp_path / "absent")


def test_an_output_that_is_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "absent")
    with pytest.raises(StayalignedError, match=r"out is a link to .*absent, which does not exist"):
        refuse_existing(tmp_path / "out")


def test_a_hub_cache_that_cannot_be_written_names_the_variable_and_other_errors_are_left_alone() -> None:
    from huggingface_hub.constants import HF_HOME

    for place in (Path(HF_HOME) / "hub" / "zorb", Path(HF_HOME).parent):
        with pytest.raises(StayalignedError, match="can't be written: Permission denied") as caught:
            refuse_unwritable_hub_cache(PermissionError(errno.EACCES, "Permission denied", str(place)))
        assert "export HF_HOME=DIR" in str(caught.value)
    for error in (
        PermissionError(errno.EACCES, "Permission denied", "zorb/train.jsonl"),
        FileNotFoundError(errno.ENOENT, "No such file", str(Path(HF_HOME) / "zorb")),
        PermissionError("no file"),
        ValueError("zorb"),
    ):
        refuse_unwritable_hub_cache(error)
