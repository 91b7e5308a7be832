"""Findings: what an examination before training says, one line each, with the mend of what is wrong.

They may repeat words of a corpus: control characters in them are shown, not obeyed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from msa_train.errors import UserError
from msa_train.printable import printable

Level = Literal["ok", "warning", "error"]
MARKS = {"ok": "[green]ok[/green]", "warning": "[yellow]look[/yellow]", "error": "[bold red]WRONG[/bold red]"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        topic: What it belongs to: `model`, `data`, ...
        what: What was looked at.
        value: What was found.
        level: Whether it may stay so.
        mend: What to change, where it may not.
    """

    topic: str
    what: str
    value: str
    level: Level = "ok"
    mend: str = ""


def attempt(topic: str, what: str, look: Callable[[], Sequence[Finding]]) -> list[Finding]:
    """The findings of a look, or the user's mistake that ended it as one."""
    try:
        return list(look())
    except UserError as error:
        return [Finding(topic, what, str(error), "error")]


def print_findings(findings: Sequence[Finding], console: Console) -> bool:
    """Prints a table and says whether training may begin."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    topic = ""
    for finding in findings:
        if topic and finding.topic != topic:
            table.add_section()
            table.add_row()
        what, value, mend = (escape(printable(words)) for words in (finding.what, finding.value, finding.mend))
        text = value + (f"\n[italic]-> {mend}[/italic]" if mend else "")
        table.add_row(finding.topic if finding.topic != topic else "", MARKS[finding.level], what, text)
        topic = finding.topic
    console.print(table)
    wrong = sum(finding.level == "error" for finding in findings)
    look = sum(finding.level == "warning" for finding in findings)
    verdict = (
        f"[bold red]{wrong} to mend before training[/bold red]" if wrong else "[bold green]ready to train[/bold green]"
    )
    console.print(f"\n{verdict}" + (f", {look} to look at" if look else ""))
    return not wrong
