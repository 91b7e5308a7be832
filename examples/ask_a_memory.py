"""Builds a memory of documents that no training saw, asks it, changes it, and asks it again.

    msa-train fit --config configs/quickstart.yaml           # four minutes, once
    python examples/ask_a_memory.py checkpoints/quickstart

A changed document is encoded anew under its number; no other one is touched, and the answer follows.
"""

from __future__ import annotations

import argparse

from msa_train.generation import Answerer, AskConfig
from msa_train.memory import Encoder, MemoryBank, Passage
from msa_train.runs import Run, open_run

AVIARY = {
    "aviary.feed": "aviary.feed(bird, grams=20) Returns the bird with its hunger lowered by the given weight. The "
    "weight is in grams and must be positive.",
    "aviary.ring": "aviary.ring(bird, number) Marks a bird with a ring of the given number. A bird that has a ring "
    "already keeps the old one.",
    "aviary.release": "aviary.release(bird, place=None) Opens the cage and removes the bird from the list. The place "
    "is written to the log file.",
    "aviary.census": "aviary.census(pattern='*') Yields all birds whose name matches the pattern. The order is that "
    "of their arrival.",
}
CHANGED = "aviary.census(pattern='*') Raises an error when the cage is empty. It was deprecated in version two."
QUESTION = "What does aviary.census do?"


def passages(run: Run, texts: dict[str, str]) -> list[Passage]:
    """Documents in the run's tokens."""
    return [Passage(name, text, run.protocol.text(f" {text}")) for name, text in texts.items()]


def ask(run: Run, bank: MemoryBank) -> None:
    """Asks, and shows where the answer comes from."""
    answerer = Answerer(run.model, run.protocol, bank, run.layer_weights, AskConfig(max_new_tokens=24))
    (answer,) = answerer.ask([QUESTION])
    print(f"  {QUESTION}\n  -> {answer.text}")
    for document in answer.documents:
        print(f"     from {document.id} (score {document.score:.3f})")


def main() -> None:
    """Build, ask, change, ask again."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="folder of a trained run, like checkpoints/quickstart")
    run = open_run(parser.parse_args().run)
    encoder = Encoder(run.model, run.protocol)

    bank = encoder.bank(passages(run, AVIARY))
    print(f"{len(bank)} documents, {bank.tokens} tokens, {bank.chunks} chunks")
    ask(run, bank)

    encoder.replace(bank, passages(run, {"aviary.census": CHANGED}))
    print("one document replaced")
    ask(run, bank)

    bank.remove(["aviary.census"])
    print("and removed")
    ask(run, bank)


if __name__ == "__main__":
    main()
