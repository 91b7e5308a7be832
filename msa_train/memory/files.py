"""The files of a bank's folder, one at a time: written aside and renamed; mapped, and checked before anything is asked.

The invariant: a file has its name when all of it is on the disk, and not before; and what `read_segment` returns is
what its entry in the manifest says, up to the content of large tensors, which only a checksum can tell.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from msa_train.errors import UserError
from msa_train.memory.segment import BankShape, Segment
from msa_train.memory.tensors import from_tensors, to_tensors

ASIDE = ".writing-"  # begins the name of a folder in which a file is written


def write_segment(folder: Path, segment: Segment, shape: BankShape) -> dict[str, Any]:
    """Writes a segment.

    Args:
        folder: The bank's.
        segment: The segment.
        shape: The bank's.

    Returns:
        The file's entry in the manifest, without counts.

    Raises:
        UserError: It cannot be written.
    """
    with disk_errors(folder), _aside(folder) as file:
        file.touch()
        mode = file.stat().st_mode
        save_file(to_tensors(segment, shape.layers), file)
        file.chmod(mode)  # left to itself, safetensors lets nobody but the owner read what it writes
        digest, size = checksum(file), file.stat().st_size
        name = f"segment-{digest[:16]}.safetensors"
        _settle(file, folder / name)
    return {"file": name, "bytes": size, "sha256": digest}


def write_text(place: Path, text: str) -> None:
    """Writes a text file, or replaces it in one step.

    Raises:
        UserError: It cannot be written.
    """
    with disk_errors(place.parent), _aside(place.parent) as file:
        file.write_text(text, encoding="utf-8")
        _settle(file, place)


def read_segment(folder: Path, record: dict[str, Any], shape: BankShape) -> Segment:
    """Maps a segment.

    Args:
        folder: The bank's.
        record: The file's entry in the manifest.
        shape: The bank's.

    Raises:
        UserError: The file is missing, damaged or another one.
    """
    file = folder / record["file"]
    with _reading(file):
        size = file.stat().st_size
        if size != record["bytes"]:
            raise UserError(f"{file}: damaged: {size:,} bytes, the manifest says {record['bytes']:,}")
        with safe_open(file, "pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    segment = replace(from_tensors(tensors, shape, str(file)).without(record["removed"]), file=record["file"])
    if any(record[name] != value for name, value in counts_of(segment).items()):
        raise UserError(f"{file}: damaged: it holds other documents than the manifest says; encode the bank again")
    return segment


def counts_of(segment: Segment) -> dict[str, Any]:
    """What the manifest says of a segment's documents."""
    live_D = segment.live_D
    return {
        "documents": int(live_D.sum()),
        "tokens": int(segment.tokens_D[live_D].sum()),
        "chunks": int(segment.chunk_offsets_D.diff()[live_D].sum()),
        "removed": segment.number_D[~live_D].tolist(),
    }


def checksum(file: Path) -> str:
    """SHA-256 of a file.

    Raises:
        UserError: It is missing or cannot be read.
    """
    with _reading(file), file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns what a disk refuses into a `UserError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: cannot write the bank here ({reason}); what was there before is whole") from error


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: the bank is not whole; encode it again") from error
    except (SafetensorError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file}: damaged ({reason}); encode the bank again") from error


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """Where a file is written before it gets its name."""
    with TemporaryDirectory(prefix=ASIDE, dir=folder) as aside:
        yield Path(aside) / "file"


def _settle(file: Path, place: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    file.replace(place)
