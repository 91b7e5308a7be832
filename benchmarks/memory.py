"""What a memory bank costs and keeps: search memory, precision of routing keys, layer weights, answers.

    python benchmarks/memory.py --model checkpoints/quickstart
    python benchmarks/memory.py --draw               # tables from the JSON alone

The memory is the whole documentation of the Python installation, the questions are the quick start's held-out ones by
name. Seconds hold on the named machine only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from routed import Questions, recall_of, routed

from datamodules.opening import open_corpus
from datamodules.passages import open_passages
from msa_train.generation import Answerer, AskConfig
from msa_train.kernels.maxsim import RoutingKeys
from msa_train.memory import BankFolder, Encoder, MemoryBank, Passage
from msa_train.runs import Run, open_run
from msa_train.search import Found, Tile, search

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "memory.json"
CORPUS = "python-docs"
SPLIT = "by_name"
EVERY = 4  # of the held-out questions: 400
TILE = 4_096  # chunks, as on a CPU


def measure(model: str) -> dict[str, Any]:
    """Everything."""
    run = open_run(model)
    questions = held_out()
    result: dict[str, Any] = {
        "machine": {
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "growth": [grown(documents) for documents in track((1000, 10_000, 100_000), "searching")],
    }
    passages = list(open_passages(CORPUS, run.protocol, run.max_document_tokens))
    result["bank"], exact = encoded(run, passages)
    result["questions"] = len(questions)
    wanted = ranked(run, exact, questions, run.layer_weights)
    result["precision"] = [precision(run, exact, questions, wanted, keys) for keys in ("float32", "bfloat16", "int8")]
    result["weights"] = {
        "layers": run.layer_weights,
        **{name: recall(run, exact, questions, weights) for name, weights in layer_choices(run).items()},
    }
    result["answers"] = answered(run, exact, questions)
    return result


def held_out() -> Questions:
    """Questions by name, with the documents that answer them."""
    queries = open_corpus(CORPUS).queries()
    return [(query.text, set(query.relevant[SPLIT])) for query in queries if SPLIT in query.relevant][::EVERY]


def grown(documents: int) -> dict[str, Any]:
    """One layer's search over synthetic keys of 1,024 numbers in bfloat16: seconds and memory beside the keys."""
    generator = torch.Generator().manual_seed(documents)
    counts = torch.randint(1, 9, (documents,), generator=generator)
    owner = torch.repeat_interleave(torch.arange(documents), counts)
    keys = RoutingKeys(torch.empty(len(owner), 1024, dtype=torch.bfloat16))
    for first in range(0, len(owner), TILE):
        part = keys.vector_CR[first : first + TILE]
        part.copy_(torch.randn(part.shape, generator=generator) / 11.3)  # unit vectors of 128, nearly
    query = torch.randn(64, 1024, generator=generator)
    ends = counts.cumsum(0)

    def tiles() -> Iterator[Tile]:
        first = 0
        while first < documents:
            start = int(ends[first - 1]) if first else 0
            last = max(int(torch.searchsorted(ends, start + TILE, right=True)), first + 1)
            stop = int(ends[last - 1])
            yield Tile(keys.rows(start, stop), owner[start:stop] - first, torch.arange(first + 1, last + 1))
            first = last

    def once() -> None:
        search(tiles(), query, torch.tensor([0, 64]), heads=32, k=16)

    with peak_memory() as peak:
        once()
    seconds = [timed(once) for _ in range(3)]
    return {
        "documents": documents,
        "chunks": len(owner),
        "key_bytes": keys.vector_CR.nbytes,
        "seconds": seconds,
        "memory_bytes": peak[0],
    }


def encoded(run: Run, passages: list[Passage]) -> tuple[dict[str, Any], MemoryBank]:
    """Encoding, saving, opening."""
    encoder = Encoder(run.model, run.protocol, "float32")
    size = encoder.size(passages)
    started = time.perf_counter()
    bank = encoder.bank(passages)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        saving = timed(lambda: BankFolder(folder).save(bank))
        opening = timed(lambda: BankFolder(folder).open())
    told = {"documents": size.documents, "tokens": size.tokens, "chunks": size.chunks, "bytes": size.bytes}
    return {**told, "encode_s": seconds, "save_s": saving, "open_s": opening}, bank


def precision(run: Run, exact: MemoryBank, questions: Questions, wanted: Found, keys: Any) -> dict[str, Any]:
    """Recall with routing keys of this precision, the queries being the same."""
    bank = exact if keys == "float32" else rounded(exact, keys)
    best = wanted if keys == "float32" else ranked(run, bank, questions, run.layer_weights)
    return {
        "keys": keys,
        "key_bytes": bank.shape.key_bytes(bank.chunks),
        **recall_of(best, bank, questions),
        "same_first": float((best.number_QK[:, 0] == wanted.number_QK[:, 0]).float().mean()),
        "score_error": float((best.score_QK[:, 0] - wanted.score_QK[:, 0]).abs().max()),
    }


def rounded(bank: MemoryBank, keys: Any) -> MemoryBank:
    """The same bank with its routing keys rounded."""
    segments = [
        replace(
            segment,
            layers=tuple(replace(layer, keys=RoutingKeys.of(layer.keys.floats(), keys)) for layer in segment.layers),
        )
        for segment in bank.segments
    ]
    return MemoryBank(replace(bank.shape, precision=keys), segments)


def layer_choices(run: Run) -> dict[str, list[float]]:
    """Ways to weigh layers."""
    layers = len(run.layer_weights)
    single = {f"layer {place} alone": [float(other == place) for other in range(layers)] for place in range(layers)}
    return {"by validation recall": list(run.layer_weights), "alike": [1.0] * layers, **single}


def ranked(run: Run, bank: MemoryBank, questions: Questions, weights: Any) -> Found:
    """The eight best documents of every question over all layers."""
    return routed(run.model, run.protocol, bank, questions, weights, 8)[1]


def recall(run: Run, bank: MemoryBank, questions: Questions, weights: Any) -> dict[str, float]:
    """Recall over the whole bank with these layer weights."""
    return recall_of(ranked(run, bank, questions, weights), bank, questions)


def answered(run: Run, bank: MemoryBank, questions: Questions) -> list[dict[str, Any]]:
    """Questions answered in both modes: how often the right document's text is there, and how long it takes."""
    rows = []
    sample = questions[:: max(1, len(questions) // 60)]
    for mode in ("router", "generative"):
        config = AskConfig(mode=mode, max_new_tokens=32)  # type: ignore[arg-type]
        answerer = Answerer(run.model, run.protocol, bank, run.layer_weights, config)
        started = time.perf_counter()
        answers = answerer.ask([text for text, _ in sample], batch=1)
        seconds = time.perf_counter() - started
        found = [
            any(document.id.partition("#")[0] in gold for document in answer.documents)
            for answer, (_, gold) in zip(answers, sample, strict=True)
        ]
        rows.append(
            {
                "mode": mode,
                "questions": len(sample),
                "document_found": statistics.mean(found),
                "steps": statistics.mean(max((d.step for d in answer.documents), default=0) for answer in answers),
                "no_document": statistics.mean(not answer.documents for answer in answers),
                "seconds_a_question": seconds / len(sample),
                "tokens_a_question": statistics.mean(answer.tokens for answer in answers),
            }
        )
    return rows


def timed(work: Any) -> float:
    """Wall-clock seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Bytes of memory that the process held beyond what it held before, at most, sampled every millisecond."""

    def held() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])

    ctypes.CDLL(None).malloc_trim(0)  # what earlier work left with the allocator would hide what this one takes
    before, peak, done = held(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], held() - before)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def draw(result: dict[str, Any]) -> None:
    """The tables for docs/memory.md."""
    print("| documents | chunks | keys, MiB | search, s | memory beside the keys, MiB |\n|---|---|---|---|---|")
    for row in result["growth"]:
        print(
            f"| {row['documents']:,} | {row['chunks']:,} | {row['key_bytes'] / 2**20:,.0f} | "
            f"{statistics.median(row['seconds']):.2f} | {row['memory_bytes'] / 2**20:.0f} |"
        )
    print("\n| routing keys | MiB | recall@1 | recall@8 | same first document | largest error of a score |")
    print("|---|---|---|---|---|---|")
    for row in result["precision"]:
        print(
            f"| {row['keys']} | {row['key_bytes'] / 2**20:.1f} | {row['recall@1']:.3f} | {row['recall@8']:.3f} | "
            f"{row['same_first']:.3f} | {row['score_error']:.5f} |"
        )
    print("\n| layers weigh | recall@1 | recall@8 |\n|---|---|---|")
    for name, row in result["weights"].items():
        if name != "layers":
            print(f"| {name} | {row['recall@1']:.3f} | {row['recall@8']:.3f} |")
    print(
        "\n| mode | questions | right document in the context | steps | seconds | tokens |\n|---|---|---|---|---|---|"
    )
    for row in result["answers"]:
        print(
            f"| {row['mode']} | {row['questions']} | {row['document_found']:.3f} | {row['steps']:.2f} | "
            f"{row['seconds_a_question']:.2f} | {row['tokens_a_question']:.1f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a run of the quick start")
    parser.add_argument("--draw", action="store_true", help="no measuring: tables from the JSON")
    given = parser.parse_args()
    if not given.draw:
        if not given.model:
            parser.error("give --model, or --draw")
        RESULT.write_text(json.dumps(measure(given.model), indent=1) + "\n")
    draw(json.loads(RESULT.read_text()))
