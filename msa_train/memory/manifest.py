"""The manifest of a bank's folder: who encoded it, which files hold it, and what was removed from them.

    {"format": 2, "shape": {...}, "documents": 3, "tokens": 40, "chunks": 9, "next_number": 5, "run": "...",
     "segments": [{"file": "segment-....safetensors", "bytes": 9000, "sha256": "...",
                   "documents": 3, "tokens": 40, "chunks": 9, "removed": [2]}]}

Counts are of what was not removed. An encoding that goes on has a manifest too, in a file of its own, where each
segment also has the digest of what was encoded (`input`). The invariant: whatever a file holds, what `read_manifest`
returns has the types above, no number out of range, and names no file outside its folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from msa_train.errors import UserError
from msa_train.kernels.maxsim import Precision
from msa_train.memory.segment import BankShape
from msa_train.search import LOW

FORMAT = 2
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
SEGMENT_FILE = re.compile(r"segment-[0-9a-f]{16}\.safetensors")
LARGEST = 2**63 - 1
COUNTED = ("documents", "tokens", "chunks")

Check = Callable[[Any], bool]


def _whole(value: Any, least: int = 0, most: int = LARGEST) -> bool:
    return type(value) is int and least <= value <= most


def _word(value: Any) -> bool:
    return isinstance(value, str)


def _wholes(value: Any, least: int = 0, most: int = LARGEST) -> bool:
    return isinstance(value, list) and all(_whole(number, least, most) for number in value)


SHAPE: dict[str, Check] = {
    "model": _word,
    "text": _word,
    "chunk_size": lambda value: _whole(value, 1),
    "layers": lambda value: _wholes(value) and len(value) > 0,
    "groups": lambda value: _whole(value, 1),
    "width": lambda value: _whole(value, 1),
    "dtype": lambda value: value in ("float32", "bfloat16", "float16"),
    "precision": lambda value: value in get_args(Precision),
}
SEGMENT: dict[str, Check] = {
    "file": lambda value: _word(value) and bool(SEGMENT_FILE.fullmatch(value)),
    "bytes": _whole,
    "sha256": _word,
    "removed": lambda value: _wholes(value, 1, LOW - 1),
    **dict.fromkeys(COUNTED, _whole),
}
WHOLE: dict[str, Check] = {
    "shape": lambda value: isinstance(value, dict),
    "segments": lambda value: isinstance(value, list),
    "next_number": lambda value: _whole(value, 1, LOW),
    **dict.fromkeys(COUNTED, _whole),
}
assert set(SHAPE) == {field.name for field in fields(BankShape)}


def read_manifest(file: Path) -> dict[str, Any]:
    """What a bank says of itself.

    Raises:
        UserError: The file cannot be read, is damaged, or of another format.
    """
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a readable manifest ({error}); encode the bank again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{file}: a bank of another format; encode it again with this version")
    _check(manifest, WHOLE, file)
    _check(manifest["shape"], SHAPE, file)
    for record in manifest["segments"]:
        _check(record, SEGMENT, file)
    for name in COUNTED:
        if manifest[name] != sum(record[name] for record in manifest["segments"]):
            raise UserError(f"{file}: damaged: '{name}' is not the sum over segments; encode the bank again")
    return manifest


def manifest_text(
    shape: BankShape, segments: Sequence[dict[str, Any]], next_number: int, told: dict[str, str] | None = None
) -> str:
    """A manifest as its file holds it.

    Args:
        shape: Who encoded the bank.
        segments: An entry of every file.
        next_number: The number of the next document.
        told: Further entries.
    """
    own: dict[str, Any] = {
        "format": FORMAT,
        "shape": asdict(shape),
        **{name: sum(record[name] for record in segments) for name in COUNTED},
        "next_number": next_number,
        "segments": list(segments),
    }
    assert not own.keys() & (told or {}).keys(), "told under a name of the manifest's own"
    return json.dumps({**(told or {}), **own}, indent=1) + "\n"


def shape_of(manifest: dict[str, Any]) -> BankShape:
    """Who encoded a bank, and in which sizes."""
    shape = manifest["shape"]
    return BankShape(**{**{name: shape[name] for name in SHAPE}, "layers": tuple(shape["layers"])})


def told_of(manifest: dict[str, Any]) -> dict[str, str]:
    """What else was told when the bank was encoded."""
    return {name: value for name, value in manifest.items() if isinstance(value, str)}


def version_of(manifest: dict[str, Any]) -> str:
    """Changes when the bank does."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check(content: Any, checks: dict[str, Check], file: Path) -> None:
    for name, sound in checks.items():
        if not isinstance(content, dict) or not sound(content.get(name)):
            raise UserError(f"{file}: damaged: '{name}' is missing, or not what it should be; encode the bank again")
