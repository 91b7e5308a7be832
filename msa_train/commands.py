"""The commands that need a run's folder and no config: encode a corpus, ask it, look after a bank or checkpoints,
compare and export runs.

What the model is, and how it reads text, stands in the folder. What a document or an answer says goes to the terminal
as text alone: control characters in it are shown, not obeyed.
"""

from __future__ import annotations

import json
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from msa_train.bench import MEASURES, Bench, Load
from msa_train.config import MSAConfig
from msa_train.errors import UserError
from msa_train.export import DType, Part, export_run
from msa_train.folder_files import read_facts
from msa_train.folders import FACTS, check_sizes, checkpoints_of, discard, leftovers, step_of
from msa_train.folders import verify as verify_folder
from msa_train.generation import Answer, Answerer, AskConfig, Retrieved, Written, check_question
from msa_train.kernels.maxsim import Precision
from msa_train.memory import BankFolder, Encoder, MemoryBank, Passage, Size, Tiers
from msa_train.memory.room import check_room, gib
from msa_train.printable import printable
from msa_train.runs import Run, open_run
from msa_train.saving import Mode, best_steps, read_scores, superfluous
from msa_train.search import LOW
from msa_train.trust import check_config

# by name: the library does not import them
PASSAGES = "datamodules.passages:open_passages"
COMPARISON = "callbacks.comparison:compare_runs"
Device = Literal["auto", "cpu", "cuda"]
Measure = Literal["step", "lengths", "queries", "routers"]


def encode(
    model: str,
    corpus: str,
    out: str,
    keys: Precision = "bfloat16",
    estimate: bool = False,
    batch_tokens: int | None = None,
    device: Device = "auto",
    backbone: str | None = None,
) -> None:
    """Encode a corpus into a memory bank, once; an encoding that is broken off goes on.

    Args:
        model: Folder of a trained run, or a checkpoint in one.
        corpus: What to encode: a folder with a corpus.jsonl, or whatever else data.corpus takes.
        out: Folder of the bank.
        keys: Precision of the routing keys, which every question reads all of.
        estimate: Say what the bank will take, and encode nothing.
        batch_tokens: Tokens encoded at a time; by default 65,536, and on a CPU each document alone, which makes a
            changed bank bitwise the one that is encoded anew.
        device: Where to encode.
        backbone: Where the backbone is, if the model is routers alone and it is not where they say.
    """
    if batch_tokens is not None and batch_tokens < 1:
        raise UserError(f"--batch_tokens is {batch_tokens}: give at least 1")
    folder = BankFolder(out)
    if folder.exists() and not estimate:
        raise UserError(f"{out} holds a bank already: `msa-train bank {out} --add {corpus}` adds to it")
    run = open_run(model, backbone)
    encoder = Encoder(run.model.to(_device(device)), run.protocol, keys, batch_tokens)
    with _counting("Counting") as count:
        size = encoder.size(count(_passages(corpus, run)))
    _print_size(encoder, size)
    if estimate:
        return
    check_room(Path(out), size.bytes - folder.written(encoder.shape))
    with _bar("Encoding", size.tokens) as advance:
        encoder.advance = advance
        folder.encode(encoder, _passages(corpus, run), run=str(Path(model).resolve()), corpus=corpus)
    _say(f"bank        {out}")


def ask(
    model: str,
    bank: str,
    question: str | None,
    config: AskConfig,
    device: Device = "auto",
    backbone: str | None = None,
) -> None:
    """Ask a memory bank: the answer as it is written, then the documents that it comes from.

    Args:
        model: Folder of the run that encoded the bank, or a checkpoint in one.
        bank: Folder of the bank.
        question: What to ask; without one, questions are read from the terminal until an empty line.
        config: How to answer.
        device: Where to answer.
        backbone: Where the backbone is, if the model is routers alone and it is not where they say.
    """
    if question is not None:
        check_question(question)  # before anything is opened
    run, place, opened = open_run(model, backbone), _device(device), BankFolder(bank).open()
    Encoder(run.model, run.protocol).check(opened)
    opened = opened.to(place, Tiers(values="disk"))
    # a few questions are not worth compiling for
    run.model.use(replace(run.model.kernels, elementwise="plain"))
    answerer = Answerer(run.model.to(place), run.protocol, opened, run.layer_weights, config)
    if question is not None:
        _answer(answerer, question)
        return
    if sys.stdin.isatty():
        _say(f"{len(opened):,} documents, {opened.tokens:,} tokens. Ask; an empty line ends.")
    for line in _questions():
        try:
            _answer(answerer, line)
        except UserError as error:
            _say(f"\nmsa-train: error: {printable(str(error))}")
        except KeyboardInterrupt:
            _say("\n(broken off)")


def bank(
    bank: str,
    add: str | None = None,
    remove: list[str] | None = None,
    verify: bool = False,
    model: str | None = None,
    device: Device = "auto",
    backbone: str | None = None,
) -> None:
    """Look into a memory bank, change it, or verify its files. Without an option: what is in it.

    Args:
        bank: Folder of the bank.
        add: Corpus to encode into it. A document whose name is there already takes the other's place if its words
            differ, and is left alone if they do not. Adding that is broken off goes on when it is given again.
        remove: Names of documents to take out; all parts of one that was split.
        verify: Read all files and compare their checksums.
        model: The run or checkpoint that encoded the bank, if it is no longer where it was.
        device: Where to encode.
        backbone: Where the backbone is, if the model is routers alone and it is not where they say.
    """
    folder = BankFolder(bank)
    if add is not None:
        folder.manifest()
        with folder.writing():
            _add(folder, add, model, device, backbone)
    if remove:
        folder.manifest()
        with folder.writing():
            opened = folder.open()
            gone = dict.fromkeys(name for wanted in remove for name in _parts(opened, wanted))
            opened.remove(gone)
            folder.save(opened)
        _say(f"{len(gone):,} removed")
    if verify:
        total = sum(record["bytes"] for record in folder.manifest()["segments"])
        with _bar("Verifying", total) as advance:
            for _, size in folder.verify():
                advance(size)
        _say(f"whole: {gib(total)} read, every checksum as written")
    _print_bank(folder)


def checkpoint(
    action: Literal["list", "verify", "prune"],
    run: str,
    keep_last: int = 2,
    keep_every: int = 0,
    keep_best: int = 1,
    mode: Mode = "max",
    dry_run: bool = False,
) -> None:
    """List a run's checkpoints, verify their files, or prune them.

    Args:
        action: `list`: steps, sizes, who saved them. `verify`: read all files and compare their checksums; exit code 2
            where one is damaged. `prune`: delete all but a few, and what savings that were broken off left behind.
        run: Folder of a run; to verify, a checkpoint as well.
        keep_last: How many of the newest whole ones pruning leaves.
        keep_every: Pruning leaves those of every so many steps; 0 for none.
        keep_best: How many of the best pruning leaves, where the run monitors a value.
        mode: Whether that value's largest or smallest is the best.
        dry_run: Say what pruning would delete, and delete nothing.
    """
    folder = Path(run)
    if keep_last < 1 or keep_every < 0 or keep_best < 0:
        raise UserError(
            f"--keep_last {keep_last} must be at least 1, --keep_every {keep_every} and --keep_best {keep_best} 0"
        )
    single = action == "verify" and (folder / FACTS).is_file()
    found = [folder] if single else checkpoints_of(folder)
    if not found:
        raise UserError(f"{run}: no checkpoint (step=N.ckpt) here; give the folder of a run that has saved one")
    if action == "list":
        scores = read_scores(folder)
        for one in reversed(found):
            _say(_checkpoint_line(one, scores.get(step_of(one) or 0)))
    elif action == "verify":
        _verify(found)
    else:
        best = best_steps(folder, keep_best, mode)
        for one in (*superfluous(folder, keep_last, keep_every, best), *leftovers(folder)):
            _say(f"{'would go' if dry_run else 'deleted '}    {one.name}, {gib(_bytes(one))}")
            if not dry_run:
                discard(one)


def report(runs: list[str], out: str = "comparison") -> None:
    """Compare the evaluations of runs, in one table and one figure.

    Args:
        runs: Folders of runs that callbacks.ExtrapolationEvaluation has evaluated.
        out: Where to write, without an ending: OUT.md and OUT.png.
    """
    pkgutil.resolve_name(COMPARISON)([Path(run) for run in runs], Path(out))


def export(
    run: str, out: str, dtype: DType | None = None, only: Part | None = None, backbone: str | None = None
) -> None:
    """Export a run as a Hugging Face folder: a plain decoder to transformers, a run or the start of one here.

    Args:
        run: Folder of a trained run, or a checkpoint in one.
        out: Folder to write; it must not exist, or be empty.
        dtype: Precision of the weights; that of the run by default.
        only: `routers` for these alone, and adapters where it has them, of a run that trained nothing else: small, and
            opened with their backbone.
        backbone: Where that backbone is, if not where it was in training; the folder then names it so.
    """
    folder = export_run(run, out, dtype, only, backbone)
    files = [file for file in folder.iterdir() if file.is_file()]
    _say(f"exported    {out}, {len(files)} files, {gib(sum(file.stat().st_size for file in files))}")
    _say(f"to open it  {Path(out) / 'README.md'}")


def bench(
    backbone: str,
    out: str = "bench.json",
    measure: list[Measure] | None = None,
    tokens: int = 65_536,
    gib: float | None = None,
    msa: MSAConfig = MSAConfig(),
) -> None:
    """Measure forward and backward on this machine's GPU: random weights, random packs, ratios from one run.

    Args:
        backbone: A config.json (configs/backbones/), or the folder or name of a model: its shape alone is taken.
        out: JSON file to write.
        measure: `step`: all that is fast against none of it, and where the time goes. `lengths`: 16K to 256K tokens
            beside dense attention. `queries`: 1 to 64 of them on one memory. `routers`: routers alone trained, at 8K
            and 64K. By default all.
        tokens: Document tokens of a pack, where they are not what is varied.
        gib: Memory of the card to stand for, where this one has more.
        msa: The memory's sizes.
    """
    if tokens < 1 or (gib is not None and gib <= 0):
        raise UserError(f"bench: --tokens {tokens} and --gib {gib} must be above 0")
    if not Path(out).name or Path(out).is_dir() or not Path(out).absolute().parent.is_dir():
        raise UserError(f"bench: --out '{out}': give a JSON file in a folder that is there")
    bench = Bench(backbone, msa, gib)
    result: dict[str, Any] = {"backbone": Path(backbone).name, "environment": bench.environment()}
    _say("; ".join(f"{name} {value}" for name, value in result["environment"].items()))
    for name in measure or get_args(Measure):
        _say(f"\n{name}")
        result[name] = MEASURES[name](bench, Load(document_tokens=tokens), _say)
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
    _say(f"numbers     {out}")


def _checkpoint_line(folder: Path, score: float | None) -> str:
    try:
        check_sizes(folder)
        facts = read_facts(folder)
    except UserError as error:
        return printable(f"{folder.name:<18} NOT WHOLE   {error}")
    by = f"{facts.get('strategy', '?')} on {facts.get('ranks', '?')} ranks, {facts['packs_per_step']} packs a step"
    told = "" if score is None else f", score {score:.4f}"
    return printable(f"{folder.name:<18} {gib(_bytes(folder)):>10}   {by}{told}")


def _verify(folders: list[Path]) -> None:
    total = sum(_bytes(folder) for folder in folders)
    damaged = []
    with _bar("Verifying", total) as advance:
        for folder in folders:
            try:
                for _, size in verify_folder(folder):
                    advance(size)
            except UserError as error:
                damaged.append(str(error))
    if damaged:
        for text in damaged:
            _say(printable(text))
        raise UserError(
            f"{len(damaged)} of {len(folders)} checkpoints are damaged; `--ckpt_path last` passes over them"
        )
    _say(f"whole: {len(folders)} checkpoints, {gib(total)} read, every checksum as written")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _add(folder: BankFolder, corpus: str, model: str | None, device: Device, backbone: str | None) -> None:
    manifest = folder.manifest()
    where = model or manifest.get("run")
    if not where:
        raise UserError(f"{folder.path}: its manifest names no run; give it: --model RUN")
    if model is None and not Path(where).is_dir():
        raise UserError(f"{folder.path}: the run that encoded it is no longer at '{where}'; give it: --model RUN")
    run, opened = open_run(where, backbone), folder.open()
    encoder = Encoder(run.model.to(_device(device)), run.protocol, opened.shape.precision)
    encoder.check(opened)
    new: list[Passage] = []
    changed: list[Passage] = []
    alike = 0
    seen: set[str] = set()
    sources: set[str] = set()
    with _counting("Comparing") as count:
        for passage in count(_passages(corpus, run)):
            seen.add(passage.id)
            source = passage.source or passage.id
            sources.add(source)
            number = opened.number(passage.id) if opened.has(passage.id) else None
            if number is None:
                new.append(passage)
            elif (other := opened.source(number)) != source:
                raise UserError(
                    f"document '{passage.id}' is of '{other}' in the bank and of '{source}' in '{corpus}': "
                    "give one of them another name"
                )
            elif opened.text(number) != passage.text:
                changed.append(passage)
            else:
                alike += 1
    # parts of documents that have fewer of them now
    stale = [name for name in opened.names() if name not in seen and opened.source(opened.number(name)) in sources]
    check_room(folder.path, encoder.size([*new, *changed]).bytes)
    with _bar("Encoding", sum(len(passage.tokens) for passage in (*new, *changed))) as advance:
        encoder.advance = advance
        folder.change(encoder, new, changed, stale)
    _say(f"{len(new):,} added, {len(changed):,} replaced, {len(stale):,} removed, {alike:,} as they were")


def _parts(bank: MemoryBank, name: str) -> list[str]:
    """A document's name, or those of its parts where it was split."""
    parts = [] if bank.has(name) else [bank.id(number) for number in bank.numbers() if bank.source(number) == name]
    return parts or [name]


def _answer(answerer: Answerer, question: str) -> None:
    for _, event in answerer.stream([question]):
        if isinstance(event, Written):
            sys.stdout.write(printable(event.text))
            sys.stdout.flush()
        elif isinstance(event, Answer):
            _say("\n" if event.text else "(no word)\n")
            for document in sorted(event.documents, key=lambda one: (one.step, -one.score)):
                _say(_line(document))
            for note in event.notes:
                _say(f"note: {note}")


def _line(document: Retrieved) -> str:
    words = " ".join(document.text.split())
    shown = words if len(words) <= 60 else f"{words[:57]}..."
    return printable(f"[{document.number}] {document.id}  {document.score:.3f}  step {document.step}  {shown}")


def _questions() -> Iterator[str]:
    while True:
        try:
            line = input("\n? " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError as error:
            raise UserError(f"a question is not UTF-8 text (byte {error.start}): write it as UTF-8") from error
        if not line.strip():
            return
        yield line


def _passages(corpus: str, run: Run) -> Iterator[Passage]:
    limit = min(run.max_document_tokens, run.model.positions - run.protocol.wrapping(LOW - 1))
    return pkgutil.resolve_name(PASSAGES)(corpus, run.protocol, limit)


def _device(name: Device) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; give --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _print_size(encoder: Encoder, size: Size) -> None:
    _say(f"documents   {size.documents:,}, {size.tokens:,} tokens, {size.chunks:,} chunks")
    _say(f"routing     {gib(size.key_bytes)} in {encoder.shape.precision}, on the device that searches")
    _say(f"attention   {gib(size.value_bytes)} in {encoder.shape.dtype}, in host memory or on disk")
    _say(f"on disk     {gib(size.bytes)}, the texts included")


def _print_bank(folder: BankFolder) -> None:
    manifest = folder.manifest()
    shape = manifest["shape"]
    removed = sum(len(record["removed"]) for record in manifest["segments"])
    _say(f"bank        {folder.path}")
    _say(f"documents   {manifest['documents']:,}, {manifest['tokens']:,} tokens, {manifest['chunks']:,} chunks")
    _say(f"files       {len(manifest['segments'])}, {gib(sum(record['bytes'] for record in manifest['segments']))}")
    _say(
        f"layers      {', '.join(map(str, shape['layers']))}; routing keys {shape['precision']}, rest {shape['dtype']}"
    )
    if removed:
        _say(f"removed     {removed:,}, still in their files")
    if "run" in manifest:
        _say(printable(f"encoded by  {manifest['run']}"))


def _say(text: str) -> None:
    get_console().print(text, soft_wrap=True, highlight=False, markup=False, emoji=False)


@contextmanager
def _counting(what: str) -> Iterator[Callable[[Iterable[Passage]], Iterator[Passage]]]:
    """Shows how many documents went by."""
    columns = (TextColumn("{task.description}: {task.completed:,} documents"), TimeElapsedColumn())
    with Progress(*columns, transient=True, disable=not get_console().is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def counted(passages: Iterable[Passage]) -> Iterator[Passage]:
            for passage in passages:
                progress.advance(task)
                yield passage

        yield counted


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over tokens or bytes."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not get_console().is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda amount: progress.advance(task, amount)


# --- on the command line ------------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[..., None]] = {
    "encode": encode,
    "ask": ask,
    "bank": bank,
    "report": report,
    "export": export,
    "bench": bench,
    "checkpoint": checkpoint,
}


def add_arguments(parser: Any, name: str) -> None:
    """Declares a command's arguments; their help is the function's docstring."""
    by_hand: dict[str, dict[str, Any]] = {}
    if name == "encode":
        by_hand = {"--estimate": {"action": "store_true", "help": "Say what the bank will take, and encode nothing."}}
    elif name == "ask":
        by_hand = {"question": {"nargs": "?", "default": None, "help": "What to ask; without it, questions are read."}}
        parser.add_class_arguments(AskConfig)
    elif name == "bank":
        by_hand = {
            "bank": {"type": str, "help": "Folder of the bank."},
            "--remove": {
                "nargs": "+",
                "metavar": "ID",
                "help": "Names of documents to take out; all parts of one that was split.",
            },
            "--verify": {"action": "store_true", "help": "Read all files and compare their checksums."},
        }
    elif name == "report":
        words = "Folders of runs that callbacks.ExtrapolationEvaluation has evaluated."
        by_hand = {"runs": {"nargs": "+", "metavar": "RUN", "help": words}}
    elif name == "export":
        by_hand = {"run": {"type": str, "metavar": "RUN", "help": "Folder of a trained run, or a checkpoint in one."}}
    elif name == "checkpoint":
        words = "list: steps, sizes, who saved them. verify: compare checksums. prune: delete all but a few."
        by_hand = {
            "action": {"choices": ["list", "verify", "prune"], "help": words},
            "run": {"type": str, "metavar": "RUN", "help": "Folder of a run; to verify, a checkpoint as well."},
            "--dry_run": {"action": "store_true", "help": "Say what pruning would delete, and delete nothing."},
        }
    for argument, options in by_hand.items():
        parser.add_argument(argument, **options)
    if name == "bench":
        parser.add_class_arguments(MSAConfig, "msa")
    skip = {argument.lstrip("-") for argument in by_hand} | {"config", "msa"}
    parser.add_function_arguments(COMMANDS[name], skip=skip, as_group=False)


def run_command(name: str, config: Any) -> None:
    """Runs a command with its parsed arguments."""
    check_config(config, ())
    given = dict(config.as_dict())
    if name == "ask":
        given["config"] = AskConfig(**{field.name: given.pop(field.name) for field in fields(AskConfig)})
    elif name == "bench":
        given["msa"] = MSAConfig(**given["msa"])
    COMMANDS[name](**given)
