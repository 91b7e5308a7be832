"""The report: an estimate as a table on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from msa_train.estimate.advice import SPARE, advice, fits, longest, recomputing, room, ways
from msa_train.estimate.peak import peak
from msa_train.estimate.reading import Read
from msa_train.estimate.seconds import step_time
from msa_train.estimate.sizes import GIB, Card

WORDS = {
    "products": "matrix products",
    "passes": "element-wise",
    "kept": "activations kept",
    "temporary": "temporaries",
}


def print_estimate(run: Read, name: str, card: Card, console: Console) -> bool:
    """Prints a table and says whether the run fits.

    Args:
        run: The run.
        name: What the card is called.
        card: The card.
        console: Where to.
    """
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(overflow="fold")
    before = ""
    for topic, what, value, words in _rows(run, name, card):
        if before and topic != before:
            table.add_row()
        table.add_row(topic if topic != before else "", escape(what), escape(value), escape(words))
        before = topic
    console.print(table)
    inside = fits(run.model, run.packed(run.tokens), run.setup, card)
    console.print("\n[bold green]fits[/bold green]" if inside else "\n[bold red]does not fit[/bold red]")
    return inside


def _rows(run: Read, name: str, card: Card) -> Iterator[tuple[str, str, str, str]]:
    model, setup, pack = run.model, run.setup, run.packed(run.tokens)
    shared = f"ZeRO {setup.stage}" if setup.strategy == "zero" else setup.strategy
    yield "run", "model", f"{model.weights / 1e6:,.1f}M", f"weights, {model.routers / 1e6:,.1f}M of them routers'"
    kept = f", kept_layers {setup.kept_layers}" if setup.kept_layers else ""
    words = f"{setup.ranks} x {name}, {shared}, {setup.precision}, recompute {setup.recompute}{kept}"
    yield "run", "GPUs", f"{setup.ranks}", words + ("" if setup.trains_backbone else ", routers alone")
    words = f"document tokens in about {pack.documents:,} documents; {pack.sizes.contexts:,} tokens of "
    yield "run", "pack", f"{run.tokens:,}", words + f"{pack.queries:,} contexts on a GPU"
    for note in run.notes:
        yield "run", "note", "", note

    most = peak(model, pack, setup)
    for part, value in most.parts.items():
        if value:
            yield "memory", WORDS.get(part, part), f"{value / GIB:,.2f} GiB", ""
    usable = f"of {card.gib:g} GiB, {room(card) / GIB:,.1f} usable beside CUDA and gaps ({SPARE:.0%})"
    yield "memory", "peak", f"{most.total / GIB:,.2f} GiB", f"{usable}; at the {most.moment}"
    if setup.strategy == "zero" and (setup.offload_optimizer or setup.offload_parameters):
        trained = model.trained(setup.trains_backbone)
        held = (12 + setup.gradient_bytes) * setup.offload_optimizer * trained
        held += 2 * setup.offload_parameters * model.weights
        yield "memory", "in the host's", f"{held / GIB / setup.ranks:,.2f} GiB", "a GPU, not counted above"

    spent = step_time(model, pack, setup, card)
    for part, value in spent.parts.items():
        if value:
            yield "time", WORDS.get(part, part), f"{value:,.3f} s", f"{value / spent.total:.0%}"
    packs = setup.ranks * setup.accumulated
    yield "time", "step", f"{spent.total:,.2f} s", f"{packs} x a GPU's part of a pack"
    tokens = (pack.sizes.documents + pack.sizes.contexts) * packs / spent.total
    yield "time", "tokens", f"{tokens:,.0f} /s", "on all GPUs"

    possible = ways(setup) if setup.trains_backbone else (setup.recompute,)
    for way in possible:
        tokens = longest(model, run.packed, recomputing(setup, way), card)
        yield "longest", f"recompute {way}", f"{tokens:,}", "document tokens of a pack" if way == possible[0] else ""

    for words in advice(model, run.packed, run.tokens, setup, card):
        yield "change", "", "", words
