"""A hub: how far up a document of the prompt's own words comes, for questions that it has nothing to do with.

    python benchmarks/hub.py --corpus CORPUS --backbone BACKBONE --default RUN --published RUN
    python benchmarks/hub.py --draw                  # table and figure from the JSON alone

BACKBONE is a pretrained decoder whose routers are not trained yet (aligned start); the runs start from it and differ in
one setting, `model.routing_words`: `question` (the default) and `prompt` (as published). The memory is the whole corpus
and one document more, the words that stand around every question; the questions are the corpus' held-out ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from routed import Questions, recall_of, routed

from datamodules.opening import open_corpus
from datamodules.passages import open_passages
from datamodules.tokenizer import open_tokenizer
from msa_train.backbone import fit_vocabulary, open_backbone
from msa_train.memory import Encoder, Passage
from msa_train.model import MemorySparseModel
from msa_train.protocol import ASK, RETURN, Protocol
from msa_train.runs import open_run

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "hub.json"
FIGURE = ROOT / "docs" / "memory_hub.png"
HUB = f"{ASK.strip()} {RETURN.strip()}"
SPLIT = "test"
COLOURS = {"question": "#08519c", "prompt": "#e6550d"}


def measure(corpus: str, backbone: str, default: str, published: str) -> dict[str, Any]:
    """Untrained and trained routers, with the question's words routing and with the prompt's."""
    queries = [query for query in open_corpus(corpus).queries() if SPLIT in query.relevant]
    questions = [(query.text, set(query.relevant[SPLIT])) for query in queries]
    tokenizer = open_tokenizer(backbone)
    torch.manual_seed(0)
    decoder = open_backbone(backbone, torch.float32)
    fit_vocabulary(decoder, len(tokenizer))
    trained = open_run(default)
    untrained = MemorySparseModel(decoder, trained.model.config).eval()
    alike = [1.0] * len(untrained.routed_layers)
    rows = []
    for name, model, weights, words in (
        ("untrained", untrained, alike, "question"),
        ("untrained", untrained, alike, "prompt"),
        ("trained so", trained.model, trained.layer_weights, "question"),
        ("trained so", None, None, "prompt"),
    ):
        if model is None or weights is None:
            other = open_run(published)
            model, weights = other.model, other.layer_weights
        protocol = Protocol(tokenizer, words)  # type: ignore[arg-type]
        rows.append({"name": name, "words": words, **hub(model, protocol, corpus, questions, weights)})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"corpus": Path(corpus).stem, "questions": len(questions), "device": device, "rows": rows}


def hub(
    model: MemorySparseModel, protocol: Protocol, corpus: str, questions: Questions, weights: Any
) -> dict[str, Any]:
    """Ranks and selections of the hub among all documents."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = Encoder(model.to(device), protocol, "float32", batch_tokens=16_384)
    trap = Passage("hub", HUB, protocol.text(f" {HUB}"))
    bank = encoder.bank([*open_passages(corpus, protocol, 1024), trap])
    number, top_k = bank.number("hub"), model.config.top_k
    layers, best = routed(model, protocol, bank, questions, weights, len(bank))
    found_LQ = torch.stack([(found.number_QK == number).any(1) for found in layers])
    ranks = ((best.number_QK == number).int().argmax(1) + 1).tolist()
    return {
        "top_k": top_k,
        "documents": len(bank),
        "tokens": bank.tokens,
        "selected_by_layer": found_LQ.float().mean(1).tolist(),
        "first_k": statistics.mean(rank <= top_k for rank in ranks),
        "ranks": ranks,
        **recall_of(best, bank, questions),
    }


def draw(result: dict[str, Any]) -> None:
    """The table for docs/memory.md, and the figure."""
    print("| routers | words that route | a layer selects the hub | hub in the first k | median rank | recall@1 |")
    print("|---|---|---|---|---|---|")
    for row in result["rows"]:
        print(
            f"| {row['name']} | {row['words']} | {statistics.mean(row['selected_by_layer']):.1%} of the time | "
            f"{row['first_k']:.1%} of the questions | {statistics.median(row['ranks']):,.0f} of {row['documents']:,} | "
            f"{row['recall@1']:.3f} |"
        )
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for row in result["rows"]:
        ranks = np.sort(row["ranks"])
        who = "the question's words route (default)" if row["words"] == "question" else "the prompt's too (published)"
        style = "--" if row["name"] == "untrained" else "-"
        share = np.arange(1, len(ranks) + 1) / len(ranks)
        axes.step(ranks, share, style, where="post", color=COLOURS[row["words"]], label=f"{row['name']}: {who}")
    top_k, documents = result["rows"][0]["top_k"], result["rows"][0]["documents"]
    axes.axvline(top_k, color="#969696", linestyle=":", linewidth=1)
    axes.text(top_k * 1.1, 0.03, "top-k", color="#636363")
    axes.set_xscale("log")
    axes.set(
        xlabel=f"rank of a document of the prompt's own words, of {documents:,}",
        ylabel="share of questions that rank it so high",
        title="A hub, for questions that it has nothing to do with",
        ylim=(0, 1.02),
        xlim=(0.9, documents),
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    figure.savefig(FIGURE, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corpus", help="a corpus with held-out questions")
    parser.add_argument("--backbone", help="a pretrained decoder's folder")
    parser.add_argument("--default", help="a run in which the question's words route")
    parser.add_argument("--published", help="a run in which the prompt's words route")
    parser.add_argument("--out", type=Path, default=RESULT, help="where to write the JSON")
    parser.add_argument("--draw", action="store_true", help="no measuring: table and figure from the JSON")
    given = parser.parse_args()
    if not given.draw:
        if not (given.corpus and given.backbone and given.default and given.published):
            parser.error("give --corpus, --backbone, --default and --published, or --draw")
        measured = measure(given.corpus, given.backbone, given.default, given.published)
        given.out.write_text(json.dumps(measured, indent=1) + "\n")
    draw(json.loads(given.out.read_text()))
