"""The style, the types and the import contract, as part of the suite."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "types": ["mypy"],
    "imports": ["lint-imports"],
}


@pytest.mark.parametrize("name", TOOLS)
def test_tool_is_content(name: str) -> None:
    tool, *arguments = TOOLS[name]
    done = subprocess.run(
        [str(Path(sys.executable).with_name(tool)), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_runs_the_readmes_test_command() -> None:
    commands = re.findall(r"^\$ (.+)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(commands) >= 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text()
    assert "configs/quickstart.yaml" in commands[0] and "pytest" in commands[1]


def test_documents_name_only_results_that_exist() -> None:
    named = 0
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for path in re.findall(r"benchmarks/results/[\w.\-/]+\w", document.read_text()):
            assert (ROOT / path).exists(), f"{document.name} names {path}"
            named += 1
    assert named >= 2
