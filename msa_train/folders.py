"""Checkpoint folders: written aside, sealed by a manifest of sizes and checksums, and only then given their name.

    weights.safetensors        the weights, complete, in the precision of training
    msa_train.json             what they do not tell: chunk size, steps, who saved them
    optimizer-*.safetensors    AdamW's moments by the weight's name; under ZeRO the float32 weights too
    trainer.pt                 loops, callbacks, counters: plain data and tensors
    manifest.json              size and SHA-256 of every file above, and of itself

The invariant: a folder named step=N.ckpt was whole when it got that name, and what has become of it since is found by
the name of the file. Nothing in it is ever changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from msa_train.errors import UserError

WEIGHTS, FACTS, TRAINER, MANIFEST = "weights.safetensors", "msa_train.json", "trainer.pt", "manifest.json"
OPTIMIZER = "optimizer-*.safetensors"
LINK = "last.ckpt"  # for people: it points to the newest
ASIDE, DOOMED = ".writing", ".deleting"  # end the names of folders that are none yet, or none any more


def folder_of(run: Path, step: int) -> Path:
    """Where a run's checkpoint of a step lives."""
    return run / f"step={step}.ckpt"


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint's name says; None for other names.

    >>> step_of(Path("run/step=60.ckpt")), step_of(Path("run/last.ckpt"))
    (60, None)
    """
    found = re.fullmatch(r"step=(\d+)\.ckpt", folder.name)
    return int(found[1]) if found else None


def checkpoints_of(run: Path) -> list[Path]:
    """A run's checkpoints, the newest first, whole or not."""
    found = [folder for folder in run.glob("step=*.ckpt") if step_of(folder) is not None and folder.is_dir()]
    return sorted(found, key=lambda folder: step_of(folder) or 0, reverse=True)


def leftovers(run: Path) -> list[Path]:
    """What savings and deletions that were broken off left behind."""
    return [path for ending in (ASIDE, DOOMED) for path in run.glob(f"*.ckpt{ending}")]


# --- writing ------------------------------------------------------------------------------------------------------


def start_aside(folder: Path) -> Path:
    """An empty folder to write a checkpoint into."""
    aside = folder.with_name(folder.name + ASIDE)
    remove(aside)
    aside.mkdir(parents=True)
    return aside


def digests_of(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What the manifest says of files, which are on the disk when this returns."""
    found = {}
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        found[file.name] = {"bytes": file.stat().st_size, "sha256": digest}
    return found


def settle(aside: Path, folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Seals a folder and gives it its name; one that has the name already goes.

    Args:
        aside: The folder, with all its files.
        folder: The checkpoint.
        files: What `digests_of` says of them.
    """
    body = {"files": dict(sorted(files.items()))}
    manifest = aside / MANIFEST
    manifest.write_text(json.dumps({**body, "sha256": _digest(body)}, indent=1) + "\n", encoding="utf-8")
    digests_of([manifest])
    doomed = folder.with_name(folder.name + DOOMED)
    if folder.exists():
        remove(doomed)
        folder.rename(doomed)
    aside.rename(folder)
    remove(doomed)


def point_to(folder: Path) -> None:
    """Lets the run's last.ckpt point to a checkpoint."""
    link, aside = folder.parent / LINK, folder.parent / (LINK + ASIDE)
    remove(aside)
    if link.is_dir() and not link.is_symlink():  # a copy of the run that followed the link
        discard(link)
    aside.symlink_to(folder.name)
    aside.replace(link)


def discard(folder: Path) -> None:
    """Deletes a checkpoint, which must not be taken for one while it is half deleted."""
    doomed = folder.with_name(folder.name + DOOMED)
    remove(doomed)
    folder.rename(doomed)
    remove(doomed)


def remove(path: Path) -> None:
    """Deletes a file, a link or a folder, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- trusting -----------------------------------------------------------------------------------------------------


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The files that a checkpoint consists of.

    Raises:
        UserError: There is no manifest, or it is damaged.
    """
    file = folder / MANIFEST
    try:
        text = json.loads(file.read_text(encoding="utf-8"))
        body = {"files": text["files"]}
        known = text["sha256"] == _digest(body) and all(
            Path(name).name == name and type(one["bytes"]) is int for name, one in body["files"].items()
        )
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: the checkpoint is not whole; resume from another one") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: damaged; resume from another checkpoint") from error
    if not known:
        raise UserError(f"{file}: damaged; resume from another checkpoint")
    return body["files"]


def check_sizes(folder: Path) -> None:
    """Holds the sizes of a checkpoint's files against its manifest.

    Raises:
        UserError: A file is missing or has another size; it is named.
    """
    for name, one in manifest_of(folder).items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            raise UserError(f"{file} is missing: the checkpoint is not whole; resume from another one")
        if size != one["bytes"]:
            raise UserError(f"{file}: damaged ({size:,} bytes, of {one['bytes']:,}); resume from another checkpoint")


def verify(folder: Path, names: Collection[str] | None = None) -> Iterator[tuple[str, int]]:
    """Reads a checkpoint's files and compares checksums; yields name and bytes of each when it is done.

    Args:
        folder: The checkpoint.
        names: Files to read; None for all.

    Raises:
        UserError: A file is missing or damaged; it is named.
    """
    check_sizes(folder)
    for name, one in manifest_of(folder).items():
        if names is not None and name not in names:
            continue
        with (folder / name).open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if digest != one["sha256"]:
            raise UserError(f"{folder / name}: damaged (its checksum differs); resume from another checkpoint")
        yield name, one["bytes"]


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint has all its files, at their sizes."""
    try:
        check_sizes(folder)
    except UserError:
        return False
    return True


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
