"""What `msa-train pack` prints of a store: counts, lengths, what was left out.

Names in it are the corpus' own: control characters in them are shown, not obeyed.
"""

from __future__ import annotations

from rich import get_console
from rich.markup import escape
from rich.table import Table

from datamodules.store import Store
from msa_train.printable import printable

WIDTH = 32


def print_store(store: Store) -> None:
    """The report of one store, whose numbers are in its manifest.json."""
    manifest, console = store.manifest, get_console()
    table = Table(title=escape(printable(f"Corpus '{store.name}'")), show_header=False, title_justify="left", box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, value in (
        ("documents", manifest["documents"]),
        ("of sources", manifest["sources"]),
        ("split at sentences", manifest["split"]),
        ("tokens", manifest["tokens"]),
        ("imitating the protocol", manifest["neutralised"]),
        *((f"queries in '{split}'", number) for split, number in manifest["queries"].items()),
        *((f"left out: {reason}", number) for reason, number in manifest["dropped"].items()),
    ):
        table.add_row(escape(printable(name)), f"{value:,}")
    console.print(table)
    most = max(manifest["lengths"].values(), default=1)
    histogram = Table(show_header=False, box=None)
    for column in ("right", "right", "left"):
        histogram.add_column(justify=column, no_wrap=True)
    for power, number in manifest["lengths"].items():
        low, high = 2 ** (int(power) - 1) if int(power) else 0, 2 ** int(power) - 1
        histogram.add_row(f"{low:,}-{high:,} tokens", f"{number:,}", "█" * max(1, round(WIDTH * number / most)))
    console.print(histogram)
    console.print(printable(f"{'store':<12}{store.folder}"), soft_wrap=True, highlight=False, markup=False)
