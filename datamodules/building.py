"""Building a store: read, drop duplicates, split, tokenise, resolve relations, in one pass over a stream.

This process reads and numbers; shards of documents go to worker processes, which split, tokenise and write them. No
text is held longer than its shard takes, so memory grows by a few hundred bytes a document (its id and digest),
whatever its length. A build that was broken off goes on: a shard on disk whose input is the same is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from rich import get_console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from datamodules.answers import holds_answer
from datamodules.cache import writing
from datamodules.records import CorpusReader, Query, encodable
from datamodules.shards import Written, text_digest, tokenise_documents, tokenise_queries
from datamodules.store import DOCUMENTS, FORMAT, MANIFEST, Store, open_table
from msa_train.errors import UserError
from msa_train.protocol import Protocol

# Records and characters per file: seconds of work each, so that little is done twice after an interruption, and some
# hundred MB in the process that does it, whether documents are paragraphs or books.
SHARD = 8192
SHARD_CHARACTERS = 8_000_000


def build_store(
    reader: CorpusReader, protocol: Protocol, root: Path, max_document_tokens: int, workers: int = 0
) -> Store:
    """The store of a corpus, built unless it is there already.

    Args:
        reader: Where records come from.
        protocol: Tokenises.
        root: Folder of all stores.
        max_document_tokens: Longer documents are split at the ends of sentences.
        workers: Processes that tokenise; 0 for this one.

    Raises:
        UserError: A record is malformed, nothing is left to store, or the store cannot be written.
    """
    key = hashlib.sha256(
        repr((FORMAT, reader.fingerprint(), protocol.fingerprint(), max_document_tokens)).encode()
    ).hexdigest()[:16]
    folder = root / f"{reader.name}-{key}"
    if not (folder / MANIFEST).is_file():
        with writing(root):
            _build_once(reader, protocol, folder, max_document_tokens, workers)
    store = Store(folder)
    check_tokenizer(store, protocol)
    return store


def check_tokenizer(store: Store, protocol: Protocol) -> None:
    """Refuses a store that another tokenizer made.

    Raises:
        UserError: The tokenizers differ.
    """
    if store.manifest["tokenizer"] != protocol.fingerprint():
        raise UserError(
            f"{store.folder}: made with another tokenizer; give the corpus itself instead of its store, "
            "or the tokenizer that it was packed with"
        )


def _build_once(reader: CorpusReader, protocol: Protocol, folder: Path, limit: int, workers: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # ranks and runs that want the same store wait for the one that builds it
        if (folder / MANIFEST).is_file():
            return
        unfinished = folder.with_name(f"{folder.name}.building")
        unfinished.mkdir(exist_ok=True)
        with _pool(protocol, workers) as pool, _progress(reader.name) as progress:
            _Build(reader, protocol, unfinished, limit, pool, 2 * workers, progress).run()
        unfinished.rename(folder)


class _Build:
    def __init__(
        self,
        reader: CorpusReader,
        protocol: Protocol,
        folder: Path,
        limit: int,
        pool: Executor | None,
        ahead: int,
        progress: _Counter,
    ) -> None:
        self.reader, self.protocol, self.folder, self.limit = reader, protocol, folder, limit
        self.pool, self.ahead, self.progress = pool, ahead, progress
        self.dropped: Counter[str] = Counter()
        self.number: dict[str, int] = {}  # a document's id -> its place among the kept ones
        self.first_row = np.zeros(0, np.int64)  # of every kept document; one more entry at the end

    def run(self) -> None:
        started = time.perf_counter()
        results = list(self._documents())
        parts = np.concatenate([result.parts for result in results] or [np.zeros(0, np.int64)])
        self.first_row = np.concatenate([[0], np.cumsum(parts)])
        splits: Counter[str] = Counter()
        for found in self._write(self._queries(), "queries", tokenise_queries):
            splits.update(found.counts)
        if not splits:
            raise UserError(f"corpus '{self.reader.name}': no query has a known document; check ids and column names")
        self.dropped.update(self.reader.dropped.counts)
        lengths: Counter[int] = Counter()
        for result in results:
            lengths.update(result.lengths)
        manifest = {
            "format": FORMAT,
            "name": self.reader.name,
            "tokenizer": self.protocol.fingerprint(),
            "max_document_tokens": self.limit,
            "content": hashlib.sha256("".join(result.input for result in results).encode()).hexdigest(),
            "documents": int(self.first_row[-1]),
            "sources": len(parts),
            "split": int((parts > 1).sum()),
            "tokens": sum(result.tokens for result in results),
            "neutralised": sum(result.neutralised for result in results),
            "lengths": {str(power): lengths[power] for power in sorted(lengths)},
            "queries": dict(sorted(splits.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "seconds": round(time.perf_counter() - started, 1),
        }
        _write_aside(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())

    def _documents(self) -> Iterator[Written]:
        return self._write(self._unique(), "documents", tokenise_documents)

    def _unique(self) -> Iterator[dict[str, Any]]:
        seen: dict[bytes, int] = {}
        for document in self.reader.documents():
            encodable(document.id, document.id)
            digest = text_digest(encodable(document.text, document.id))
            known = self.number.get(document.id)
            place = seen.get(digest)
            if known is not None:
                if known != place:
                    raise UserError(f"corpus '{self.reader.name}': document '{document.id}' occurs with two texts")
                continue
            if place is not None:
                self.dropped["documents with the same text as another (relations follow)"] += 1
                self.number[document.id] = place
                continue
            self.number[document.id] = seen[digest] = len(seen)
            self.progress.advance("documents")
            yield {"id": document.id, "text": document.text}

    def _queries(self) -> Iterator[dict[str, Any]]:
        opened = open_table(self.folder, "documents", DOCUMENTS)
        for query in self.reader.queries():
            self.progress.advance("queries")
            encodable("".join((query.id, query.text, *query.answers)), query.id)
            # what one split says of a question must not be trained on in another: a row for each
            alike = len({frozenset(names) for names in query.relevant.values()}) == 1
            for splits in [tuple(query.relevant)] if alike else [(split,) for split in query.relevant]:
                resolved = self._resolve(query, splits, opened)
                if resolved is None:
                    self.dropped["queries without a known document"] += 1
                else:
                    yield resolved

    def _resolve(self, query: Query, splits: tuple[str, ...], documents: pa.Table) -> dict[str, Any] | None:
        wanted = list(query.relevant[splits[0]])
        elsewhere = [name for names in query.relevant.values() for name in names if name not in wanted]
        steps: list[list[int]] = []
        taken: set[int] = set()
        related: set[int] = set()
        for names in query.steps or (tuple(wanted),):
            step: list[int] = []
            for name in names:
                rows, others = self._rows(query, name, documents)
                step.extend(row for row in rows if row not in taken)
                taken.update(rows)
                related.update(others)
            if step:
                steps.append(step)
        for name in (*elsewhere, *(wanted if query.steps else ())):  # relevant, but not asked for here
            related.update(row for part in self._rows(query, name, documents) for row in part)
        if not steps and not query.instruction:
            return None
        return {
            "id": query.id,
            "text": query.text,
            "answers": list(query.answers),
            "positives": [row for step in steps for row in step],
            "step_sizes": [len(step) for step in steps],
            "related": sorted(related - taken),
            "splits": list(splits),
            "instruction": query.instruction,
        }

    def _rows(self, query: Query, name: str, documents: pa.Table) -> tuple[list[int], list[int]]:
        """Rows of a relevant document: those to find, and its other parts."""
        number = self.number.get(name)
        if number is None:
            self.reader.unknown(query.id, name)
            self.dropped["relations to documents that are not there"] += 1
            return [], []
        rows = list(range(int(self.first_row[number]), int(self.first_row[number + 1])))
        if len(rows) == 1 or not query.answers:
            return rows, []
        texts = documents.column("text")
        found = [row for row in rows if holds_answer(texts[row].as_py(), query.answers)]
        return (found, [row for row in rows if row not in found]) if found else (rows, [])

    def _write(self, records: Iterator[dict[str, Any]], name: str, work: Any) -> Iterator[Written]:
        """Hands shards out and yields what became of them, in order, with few of them in flight."""
        pending: deque[Future[Written] | Written] = deque()
        number = -1
        for number, shard in enumerate(_batches(records)):
            task = (self.folder / f"{name}-{number:05d}.arrow", shard, self.limit)
            pending.append(work(self.protocol, *task) if self.pool is None else self.pool.submit(_there, work, *task))
            while len(pending) > self.ahead:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())
        for stale in sorted(self.folder.glob(f"{name}-*.arrow"))[number + 1 :]:
            stale.unlink()  # of a build that was broken off when the source was longer


_worker_protocol: Protocol | None = None


def _there(work: Any, *task: Any) -> Written:
    assert _worker_protocol is not None
    return work(_worker_protocol, *task)


def _start_worker(protocol: Protocol) -> None:
    global _worker_protocol
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_protocol = protocol


@contextmanager
def _pool(protocol: Protocol, workers: int) -> Iterator[Executor | None]:
    if workers == 0:
        yield None
        return
    # spawned: the tokenizer's threads do not survive a fork
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(protocol,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _result(pending: Future[Written] | Written) -> Written:
    return pending.result() if isinstance(pending, Future) else pending


def _batches(records: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record["text"])
        if len(batch) == SHARD or characters >= SHARD_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_aside(file: Path, content: bytes) -> None:
    aside = file.with_suffix(".writing")
    aside.write_bytes(content)
    aside.replace(file)


class _Counter:
    """Counts on the terminal."""

    def __init__(self, progress: Progress, name: str) -> None:
        self.progress = progress
        self.task = progress.add_task(escape(name), documents=0, queries=0)
        self.counts: dict[str, Any] = {"documents": 0, "queries": 0}

    def advance(self, what: str) -> None:
        self.counts[what] += 1
        if self.counts[what] % 256 == 0:
            self.progress.update(self.task, **self.counts)


@contextmanager
def _progress(name: str) -> Iterator[_Counter]:
    columns = (
        SpinnerColumn(),
        TextColumn(
            "Tokenising {task.description}: {task.fields[documents]:,} documents, {task.fields[queries]:,} queries"
        ),
        TimeElapsedColumn(),
    )
    with Progress(*columns, transient=True, disable=not get_console().is_terminal) as progress:
        yield _Counter(progress, name)
