"""Write files and directories completely or not at all, and compute fingerprints of their content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

from stayaligned.core.errors import StayalignedError

_CHUNK = 1 << 20
_SAMPLED_ABOVE = 64 * _CHUNK
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
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        temporary.chmod(0o777 & ~_umask())
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
    if path.exists():
        raise StayalignedError(f"{path} exists already", hint="Choose another path, or remove it yourself.")


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
