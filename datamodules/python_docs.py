"""The documentation of the Python installation as a BEIR folder: real text that every machine already has.

Sources are parsed with `ast`, never imported. A document is a public object: qualified name, signature, docstring.
Every document has one query, so that its answer is always in its text:

* by name: "What does itertools.accumulate do?" -> the docstring's first sentence;
* by summary: that first sentence, which is then removed from the document -> the qualified name.

Whole packages are held out: their queries make the splits `by_name` and `by_summary`, all others make `train`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

from datamodules.cache import cache_root, writing

VERSION = 1  # part of the cache's name: raise it when the text of a document changes
PACKAGES = (
    "torch", "transformers", "lightning", "numpy", "datasets", "torchmetrics", "matplotlib", "pandas",
    "huggingface_hub", "fsspec", "rich", "safetensors", "jsonargparse", "bm25s", "tokenizers", "PIL", "pyarrow",
    "networkx", "sympy", "aiohttp", "httpx", "jinja2", "yaml", "tensorboard", "packaging", "setuptools", "pip",
)  # fmt: skip
WORDS = (8, 60)  # of a docstring: shorter ones say nothing, longer ones are cut
PER_PACKAGE = 2500  # documents: a package larger than this would drown the others
SKIPPED = {"test", "tests", "testing", "_vendor", "vendor", "third_party", "idlelib", "lib2to3", "site-packages"}


@dataclass(frozen=True)
class Entry:
    """A documented object."""

    name: str
    signature: str
    summary: str
    rest: str

    @property
    def package(self) -> str:
        """Top-level package, or module of the standard library."""
        return self.name.partition(".")[0]


def fingerprint() -> str:
    """Names the installation: what is in the folder depends on nothing else."""
    versions = [f"{name}={_version(name)}" for name in PACKAGES]
    return hashlib.sha256(repr((VERSION, sys.version, WORDS, PER_PACKAGE, versions)).encode()).hexdigest()[:16]


def build_python_docs() -> Path:
    """Writes the folder once per installation and returns it. About 30 s on one core the first time.

    Raises:
        UserError: The cache cannot be written.
    """
    folder = cache_root() / f"python-docs-{fingerprint()}"
    if folder.is_dir():
        return folder
    entries = list(_unique(_entries()))
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    with writing(folder):
        (unfinished / "qrels").mkdir(parents=True)
        _write(entries, unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster, and what it wrote is the same
            if not folder.is_dir():
                raise
            shutil.rmtree(unfinished)
    return folder


def parse_module(source: str, module: str) -> Iterator[Entry]:
    """Documented public objects of a module's source text; nothing if it does not parse.

    >>> entry = next(parse_module("def add(a, b=1):\\n  'Adds two numbers. Both may be of any type that adds.'", "m"))
    >>> entry.signature, entry.summary, entry.rest
    ('m.add(a, b=1)', 'Adds two numbers.', 'Both may be of any type that adds.')
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    yield from _walk(tree, module)


def _walk(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Entry]:
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        doc = ast.get_docstring(child)
        if doc:
            summary, rest = _summary(doc)
            if summary and len(f"{summary} {rest}".split()) >= WORDS[0]:
                yield Entry(name, name + _arguments(child), summary, rest)
        if isinstance(child, ast.ClassDef):
            yield from _walk(child, name)


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"({', '.join(ast.unparse(base) for base in node.bases)})" if node.bases else ""
    written = ast.unparse(node.args)
    return f"({written})" if len(written) <= 160 else f"({written[:160].rsplit(',', 1)[0]}, ...)"


def _summary(doc: str) -> tuple[str, str]:
    text = re.sub(r"\s+", " ", doc).strip()
    match = re.match(r"(.{15,220}?[.!?])(?:\s+(?=[A-Z`:>\[(*\-])|$)", text)
    if match is None:
        return "", ""
    words = text[match.end() :].split()
    return match[1], " ".join(words[: WORDS[1]])


def _entries() -> Iterator[Entry]:
    files = list(_files())
    for path, module in track(files, description="Reading the installation's documentation", transient=True):
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # an older encoding: a few test files of the standard library
            continue
        if '"""' in source or "'''" in source:
            yield from parse_module(source, module)


def _files() -> Iterator[tuple[Path, str]]:
    yield from _python_files(Path(sysconfig.get_paths()["stdlib"]), "")
    site = Path(sysconfig.get_paths()["purelib"])
    for package in PACKAGES:
        if (site / package).is_dir():
            yield from _python_files(site / package, package)


def _python_files(root: Path, prefix: str) -> Iterator[tuple[Path, str]]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED and name.isidentifier())
        parts = Path(folder).relative_to(root).parts
        for name in sorted(names):
            if (name.endswith(".py") and not name.startswith("_")) or name == "__init__.py":
                tail = () if name == "__init__.py" else (name[:-3],)
                module = ".".join(filter(None, (prefix, *parts, *tail)))
                if module and not any(part.startswith("_") for part in module.split(".")):
                    yield Path(folder) / name, module


def _unique(entries: Iterator[Entry]) -> Iterator[Entry]:
    """Drops what repeats a name, a summary or a text, and what exceeds a package's share (drawn, not the first)."""
    seen: set[str] = set()
    kept: dict[str, list[Entry]] = {}
    for entry in entries:
        keys = {entry.name, entry.summary.lower()}
        if not keys & seen:
            seen |= keys
            kept.setdefault(entry.package, []).append(entry)
    for package in sorted(kept):
        yield from sorted(sorted(kept[package], key=lambda e: _digest(e.name))[:PER_PACKAGE], key=lambda e: e.name)


def _write(entries: list[Entry], folder: Path) -> None:
    held_out = _held_out(entries)
    corpus, queries = [], []
    qrels: dict[str, list[str]] = {"train": [], "by_name": [], "by_summary": []}
    for entry in entries:
        by_summary = len(entry.rest.split()) >= WORDS[0] and _digest(entry.name + "?") % 3 == 0
        body = entry.rest if by_summary else f"{entry.summary} {entry.rest}".strip()
        question, answer = (entry.summary, entry.name) if by_summary else (f"What does {entry.name} do?", entry.summary)
        corpus.append({"_id": entry.name, "title": entry.signature, "text": body})
        queries.append({"_id": f"q:{entry.name}", "text": question, "answers": [answer]})
        split = ("by_summary" if by_summary else "by_name") if entry.package in held_out else "train"
        qrels[split].append(f"q:{entry.name}\t{entry.name}\t1")
    for name, records in (("corpus", corpus), ("queries", queries)):
        lines = (json.dumps(record, ensure_ascii=False) for record in records)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for split, rows in qrels.items():
        text = "\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n"
        (folder / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")


def _held_out(entries: list[Entry]) -> set[str]:
    """Packages of about a tenth of the documents, drawn by name; none of them larger than a twentieth."""
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes[entry.package] = sizes.get(entry.package, 0) + 1
    chosen: set[str] = set()
    total = 0
    for package in sorted(sizes, key=_digest):
        if total < len(entries) // 10 and sizes[package] <= len(entries) // 20:
            chosen.add(package)
            total += sizes[package]
    return chosen


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version({"PIL": "pillow", "yaml": "pyyaml"}.get(package, package))
    except importlib.metadata.PackageNotFoundError:
        return "absent"
