"""Small models, packs and corpora that the tests share. Sizes are pairwise distinct, so that swapped axes fail."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from msa_train.checkpoints import newest_checkpoint, read_checkpoint
from msa_train.config import MSAConfig
from msa_train.folder_files import FolderReader
from msa_train.model import MemorySparseModel, Recompute
from msa_train.pack import Context, Contexts, Documents, MemoryPack

FIXTURES = Path(os.environ.get("MSA_FIXTURES", Path(__file__).parent / "fixtures"))
HEAD = (1, 7, 9)
VOCABULARY = 61


def tiny_backbone(model_type: str = "qwen3", layers: int = 4, **changes: Any) -> PreTrainedModel:
    """A decoder of 24 wide states, 4 heads over 2 groups."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=True, sliding_window=None,
        attention_dropout=0.0,
    )  # fmt: skip
    if model_type == "qwen2":
        sizes.pop("head_dim")
        sizes.update(hidden_size=32)
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    backbone = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weight in backbone.parameters():  # norms away from 1 and biases away from 0
            weight.add_(0.1 * torch.randn_like(weight))
    return backbone.eval()


def tiny_model(model_type: str = "qwen3", recompute: Recompute = "none", **config: Any) -> MemorySparseModel:
    """Routers on the tiny backbone."""
    torch.manual_seed(1)
    return MemorySparseModel(
        tiny_backbone(model_type), MSAConfig(**{"chunk_size": 4, "top_k": 2, **config}), recompute=recompute
    )


def tokens(length: int, seed: int) -> list[int]:
    """Random token ids."""
    return torch.randint(10, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def tiny_context(question: int, answer: int, seed: int) -> Context:
    """A context of 2 + question + answer tokens whose question routes and whose answer is labelled."""
    ids = tokens(2 + question + answer, seed)
    return Context(ids, [False] * (2 + question) + [True] * answer, [(2, 2 + question)])


def tiny_pack(
    lengths: Sequence[int] = (11, 3, 8, 1, 13),
    contexts: Sequence[tuple[int, int]] = ((5, 4), (2, 6), (7, 1)),
    chunk_size: int = 4,
    seed: int = 0,
) -> MemoryPack:
    """Documents of these lengths, queries of these (question, answer) lengths; query q is answered by document q."""
    documents = Documents.build([tokens(n, seed + i) for i, n in enumerate(lengths)], chunk_size)
    built = Contexts.build(HEAD, [tiny_context(*sizes, seed + 100 + i) for i, sizes in enumerate(contexts)])
    positive = torch.zeros(len(contexts), len(lengths), dtype=torch.bool)
    for query in range(len(contexts)):
        positive[query, query % len(lengths)] = True
    return MemoryPack(
        documents=documents,
        contexts=built,
        positive_QD=positive,
        excluded_QD=torch.zeros_like(positive),
        document_ids=tuple(f"d{i}" for i in range(len(lengths))),
        query_ids=tuple(f"q{i}" for i in range(len(contexts))),
        asked=len(contexts),
        step_labels=len(built.label_target_N),
        step_queries=len(contexts),
    )


COLOURS = ("red", "green", "blue", "amber", "violet", "teal", "ochre", "ivory")
ANIMALS = ("fox", "heron", "otter", "lynx", "crane", "newt", "stoat", "finch", "moth", "hare")


def write_corpus(folder: Path, documents: int = 80) -> Path:
    """A BEIR folder: every animal of every colour lives somewhere; the last fifth of the queries is held out."""
    (folder / "qrels").mkdir(parents=True)
    names = [f"{colour} {animal}" for animal in ANIMALS for colour in COLOURS][:documents]
    with (folder / "corpus.jsonl").open("w") as corpus, (folder / "queries.jsonl").open("w") as queries:
        for number, name in enumerate(names):
            text = f"The {name} lives by the {COLOURS[number % 7]} river number {number}. " + "It is seen at dusk. " * (
                number % 3
            )
            corpus.write(json.dumps({"_id": f"d{number}", "title": name, "text": text}) + "\n")
            query = {"_id": f"q{number}", "text": f"Where does the {name} live?", "answers": [f"by river {number}"]}
            queries.write(json.dumps(query) + "\n")
    cut = documents * 4 // 5
    for split, numbers in (("train", range(cut)), ("test", range(cut, documents))):
        rows = [f"q{number}\td{number}\t1" for number in numbers]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a run sets in this process (DeepSpeed's ranks, among others) must not reach the next test's processes."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def newest(run: Path) -> dict[str, Any]:
    """A run's newest checkpoint: state_dict, msa_train, global_step; loops and callbacks; AdamW's state by name."""
    folder = newest_checkpoint(run)
    assert folder is not None
    reader = FolderReader(folder)
    kept = {name: reader.tensor(name) for name in reader.names() if "/" in name}
    return {**reader.trainer(), **read_checkpoint(folder), "moments": kept}


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The colours-and-animals corpus, once."""
    return write_corpus(tmp_path_factory.mktemp("data") / "animals")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Derived data stays in the tests' own folder; no hub is asked for anything."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["MSA_TRAIN_CACHE"] = str(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    return folder


TINY_BACKBONE = {
    "model_type": "qwen3", "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> Callable[..., list[str]]:
    """Arguments of a two-layer run on the animals; keyword arguments become flags."""
    backbone = tmp_path_factory.mktemp("backbone") / "config.json"
    backbone.write_text(json.dumps(TINY_BACKBONE))

    def arguments(runs: Path, steps: int = 20, **flags: Any) -> list[str]:
        phases = [{"name": "only", "steps": steps, "routing_weight": 1.0, "backbone_lr": 3e-3, "router_lr": 3e-3}]
        given = {
            "runs": runs, "name": "tiny", "model.backbone": backbone, "model.phases": json.dumps(phases),
            "model.msa.chunk_size": 8, "model.msa.top_k": 2, "data": "datamodules.PackedMemory",
            "data.corpus": corpus_folder, "data.vocab_size": 400, "data.document_tokens": 512,
            "data.queries_per_pack": 3, "data.val_packs": 2, "trainer.accelerator": "cpu", "trainer.devices": 1,
            "trainer.log_every_n_steps": 1, "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false", "trainer.num_sanity_val_steps": 0,
            "trainer.limit_val_batches": 0, "checkpoint.every_n_train_steps": 10,
            **{name.replace("__", "."): value for name, value in flags.items()},
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in given.items()]

    return arguments
