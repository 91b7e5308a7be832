"""What a run was made with: code, packages, machine, data. One line of environment.jsonl for every start."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FILE = "environment.jsonl"
PACKAGES = ("msa-train", "torch", "transformers", "lightning", "deepspeed", "datasets", "tokenizers", "safetensors",
            "peft", "triton", "numpy")  # fmt: skip


def record(run: Path, **given: Any) -> None:
    """Adds a line.

    Args:
        run: The run's folder.
        **given: What the caller knows beside: ranks, strategy, step, the data's fingerprint.
    """
    line = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "system": platform.platform(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        **given,
    }
    with (run / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the code that runs, with -dirty where it was changed since; None where it is no checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"],
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
