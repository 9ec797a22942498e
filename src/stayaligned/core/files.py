"""Read text and JSON, write files and directories completely or not at all, and fingerprint their content."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.text import one_line

_CHUNK = 1 << 20
_SAMPLED_ABOVE = 64 * _CHUNK
_LARGEST_COPY = 1 << 30
"""Size in bytes above which no tokenizer, template or model card is: such a file is not copied."""
_TORCH_WRITER = ("inline_container", "iostream", "PytorchStreamWriter")
"""Words in the RuntimeErrors that `torch.save` raises when the disk is full."""


@contextlib.contextmanager
def replace_file(path: Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; on success it is synced to disk and renamed to `path`.

    If the body raises or the process dies, `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        temporary.chmod(mode)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: Path, *, hint: str) -> str:
    """Return the text of a file that the user named.

    Raises:
        StayalignedError: if the file can't be read, or is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise StayalignedError(f"{path}: {reason}", hint=hint) from None


def parse_json(text: str | bytes, where: str, *, hint: str | None = None) -> Any:
    """Return the value of a JSON text.

    Every reader of a user's JSON uses this: Python's parser has errors of three types, and takes the last value of a
    key that is given twice.

    Args:
        text: the JSON text.
        where: the name of its place, for messages.
        hint: what to do about an error.

    Raises:
        StayalignedError: if the text is invalid, is nested too deeply, or has a number with too many digits or a key
            twice in one object.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise StayalignedError(f"{where}: {_json_problem(error)}", hint=hint) from None


def parse_json_values(text: str, where: str, *, hint: str | None = None) -> Iterator[tuple[int, Any]]:
    """Yield the first line number (from 1) and the value of each JSON value in a text, such as JSON lines.

    Raises:
        StayalignedError: as `parse_json`, naming the line where the value begins.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    line, counted, position = 1, 0, _skip_space(text, 0)
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise StayalignedError(f"{where}, line {line}: {_json_problem(error)}", hint=hint) from None
        yield line, value
        position = _skip_space(text, end)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice in one object")
    return found


def _json_problem(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "invalid JSON: nested too deeply"
    # Without Python's advice to change a limit of the interpreter.
    return f"invalid JSON: {str(error).split('; use sys.')[0]}"


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`; a reader sees either the old file or the complete new one."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replace_directory(path: Path) -> Generator[Path]:
    """Yield an empty directory beside `path`; on success it is renamed to `path`, which must not exist yet.

    Raises:
        FileExistsError: if `path` exists at the end of the body; nothing is overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    try:
        yield temporary
        mask = _umask()
        for file in temporary.rglob("*"):
            if file.is_symlink():
                continue
            # Some libraries (safetensors) write through temporary files that only their owner can read.
            file.chmod((0o777 if file.is_dir() else 0o666 | file.stat().st_mode & 0o111) & ~mask)
            if file.is_file():
                _sync(file)
        temporary.chmod(0o777 & ~mask)
        try:
            temporary.rename(path)
        except OSError as error:
            if path.exists():
                raise FileExistsError(f"{path} exists already") from error
            raise
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raise StayalignedError if `path` exists: a user's files are never overwritten."""
    if path.is_symlink() and not path.exists():
        raise StayalignedError(
            f"{path} is a link to {path.readlink()}, which does not exist",
            hint="Choose another path, or remove the link.",
        )
    if path.exists():
        raise StayalignedError(f"{path} exists already", hint="Choose another path, or remove it yourself.")


def refuse_inside(path: Path, *inputs: str | Path | None) -> None:
    """Raise StayalignedError if the output `path` is inside an input directory: inputs are only read.

    Only local directories count: an input may also be a hub id, a file or None.
    """
    place = path.resolve()
    for directory in inputs:
        if directory is not None and Path(directory).is_dir() and place.is_relative_to(Path(directory).resolve()):
            raise StayalignedError(f"{path} is inside the input {directory}", hint="Choose a path outside the input.")


def copyable_files(directory: Path, wanted: Callable[[str], bool]) -> tuple[list[Path], list[str]]:
    """Return the wanted files of a foreign directory that may be copied into an output, and notes about the others.

    A link could put a private file into an output that is then published. So a link is followed only within the
    directory, and from a snapshot of the hub's cache into that cache's `blobs`, where huggingface_hub stores the files.

    Args:
        directory: the directory; its subdirectories are left out.
        wanted: tells by its name whether a file is to be copied.
    """
    home = directory.resolve()
    allowed = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    files: list[Path] = []
    notes: list[str] = []
    for file in sorted(file for file in directory.iterdir() if wanted(file.name)):
        try:
            target = file.resolve(strict=True)
            inside = any(target.is_relative_to(place) for place in allowed)
            kind, size = target.stat().st_mode, target.stat().st_size
        except (OSError, RuntimeError):  # a link to nothing, or to itself
            notes.append(f"not copied: {file.name} (a link to nothing)")
            continue
        if file.is_symlink() and not inside:
            notes.append(f"not copied: {file.name} (a link out of {directory})")
        elif stat.S_ISREG(kind) and size > _LARGEST_COPY:
            notes.append(f"not copied: {file.name} ({size >> 20} MiB)")
        elif stat.S_ISREG(kind):
            files.append(file)
        elif not stat.S_ISDIR(kind):
            notes.append(f"not copied: {file.name} (not a regular file)")
    return files, [one_line(note, 400) for note in notes]


@contextlib.contextmanager
def new_directory(path: Path) -> Generator[Path]:
    """Create a user's output directory; an existing path or a full disk is a StayalignedError."""
    refuse_existing(path)
    with writable(path):
        try:
            with replace_directory(path) as temporary:
                yield temporary
        except FileExistsError:
            refuse_existing(path)
            raise


@contextlib.contextmanager
def new_file(path: Path) -> Generator[Path]:
    """Create a user's output file; an existing path or a full disk is a StayalignedError."""
    refuse_existing(path)
    with writable(path), replace_file(path) as temporary:
        yield temporary
        refuse_existing(path)


@contextlib.contextmanager
def writable(path: Path) -> Generator[None]:
    """Turn the errors of a full disk or a forbidden place, from any library, into a StayalignedError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_WRITER):
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise StayalignedError(
            f"{path} can't be written: {reason}", hint="Free some space, or choose another path."
        ) from error


def fingerprint(path: Path) -> str:
    """Return a SHA-256 that identifies the content of a file or directory.

    A file is hashed completely, except a weight shard above 64 MiB: of it, the size, the first and last MiB and 62
    evenly spaced MiB. Reading a 140 GB checkpoint only to identify it would take minutes, and training changes every
    part of it.
    """
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(os.fsencode(file.relative_to(path).as_posix()) if path.is_dir() else b"")
        for chunk in _chunks(file):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    yield size.to_bytes(8, "little")
    with file.open("rb") as stream:
        if size <= _SAMPLED_ABOVE or file.suffix != ".safetensors":
            while chunk := stream.read(_CHUNK):
                yield chunk
            return
        for index in range(64):
            stream.seek((size - _CHUNK) * index // 63)
            yield stream.read(_CHUNK)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def refuse_unwritable_hub_cache(error: BaseException) -> None:
    """Raise an error that names the variable to set, if `error` is that the hub's cache can't be written.

    Raises:
        StayalignedError: if it is.
    """
    from huggingface_hub.constants import HF_HOME

    named = getattr(error, "filename", None)
    if not isinstance(error, OSError) or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not named:
        return
    place, cache = Path(os.fsdecode(named)), Path(HF_HOME)
    if place.is_relative_to(cache) or cache.is_relative_to(place):
        raise StayalignedError(
            f"{place}: the cache of the hub can't be written: {error.strerror}",
            hint="Name a directory that you can write: export HF_HOME=DIR",
            page="howto/install",
        ) from None
