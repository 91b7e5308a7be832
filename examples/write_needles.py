"""Writes corpora to learn RULER's needle tasks from, in words and prose that their evaluation never uses.

    python examples/write_needles.py FOLDER

makes FOLDER/prose (needles in addresses to Congress, some in one line over and over; asked by one key, by four, or for
four values), FOLDER/words and FOLDER/uuids (every line a needle and asked for, by a pair of words or by a UUID).
Documents have several lengths, up to about 512 tokens. Keys are two nouns where RULER's are an adjective and a noun,
and addresses are those that datamodules.NeedleTask leaves alone: no key, no value and no passage of evaluation occurs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from random import Random

from datamodules.tasks.haystacks import shipped_prose
from datamodules.tasks.ruler import NOISE, SETTINGS, Drawn, Name, draw, listed

PROSE: dict[Name, float] = {  # share of the questions
    "niah_single_1": 0.05,
    "niah_single_2": 0.25,
    "niah_single_3": 0.3,
    "niah_multivalue": 0.2,
    "niah_multiquery": 0.2,
}
WORDS = (60, 120, 240, 400)  # of a document of prose; 400 are about 512 tokens
NOISES = (2, 4, 9, 18)  # lines of a document of noise
LINES: dict[Name, tuple[int, ...]] = {"niah_multikey_2": (3, 6, 12, 23), "niah_multikey_3": (1, 2, 4, 6)}  # needles


@dataclass
class Corpus:
    """A BEIR folder in the making."""

    documents: list[str] = field(default_factory=list)
    questions: list[tuple[Drawn, list[int]]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Writes it, questions in the words in which `NeedleTask` asks them."""
        (folder / "qrels").mkdir(parents=True)
        with (folder / "corpus.jsonl").open("w") as file:
            for number, text in enumerate(self.documents):
                file.write(json.dumps({"_id": f"d{number}", "text": text}) + "\n")
        with (folder / "queries.jsonl").open("w") as file, (folder / "qrels" / "train.tsv").open("w") as relation:
            relation.write("query-id\tcorpus-id\tscore\n")
            for number, (drawn, holders) in enumerate(self.questions):
                question = f"{drawn.preamble}\n{drawn.question}"
                file.write(json.dumps({"_id": f"q{number}", "text": question, "answers": [answer(drawn)]}) + "\n")
                relation.writelines(f"q{number}\td{holder}\t1\n" for holder in sorted(set(holders)))
        print(f"{folder}: {len(self.documents):,} documents, {len(self.questions):,} questions")


def answer(drawn: Drawn) -> str:
    """How a question is answered: RULER's words and the values, each behind its key where there are several keys.

    Several values of one key come in the order in which their documents are read; any other could only be guessed.
    """
    values: Sequence[str] = [one for needle in drawn.needles for one in drawn.answers if needle.endswith(f" {one}.")]
    if len(drawn.keys) > 1:
        values = [f"{key}: {value}" for key, value in zip(drawn.keys, drawn.answers, strict=True)]
    return f"{drawn.lead} {listed(values)}."


def prose(questions: int, random: Random) -> Corpus:
    """Needles in prose and in noise, two to a document on average."""
    asked = [(name, round(share * questions)) for name, share in PROSE.items()]
    needles = {name: number * SETTINGS[name].keys * SETTINGS[name].values for name, number in asked}
    noise = needles["niah_single_1"]
    stretches = _stretches(random)
    texts = [[NOISE] * random.choice(NOISES) for _ in range(noise)]
    texts += [next(stretches) for _ in range((sum(needles.values()) - noise) // 2)]
    corpus = Corpus()
    for name, number in asked:
        places = range(noise) if SETTINGS[name].haystack == "noise" else range(noise, len(texts))
        for _ in range(number):
            drawn = draw(SETTINGS[name], random, "training")
            holders = sorted(random.sample(places, len(drawn.needles)))
            for holder, needle in zip(holders, drawn.needles, strict=True):
                texts[holder].insert(random.randrange(len(texts[holder]) + 1), needle)
            wanted = [holder for holder, answers in zip(holders, drawn.wanted, strict=True) if answers]
            corpus.questions.append((drawn, wanted))
    corpus.documents = [("\n" if number < noise else " ").join(text) for number, text in enumerate(texts)]
    return corpus


def needles_alone(name: Name, questions: int, random: Random) -> Corpus:
    """Documents whose every line is a needle, and a question for every line."""
    corpus = Corpus()
    while len(corpus.questions) < questions:
        drawn = [draw(SETTINGS[name], random, "training") for _ in range(random.choice(LINES[name]))]
        corpus.questions += [(one, [len(corpus.documents)]) for one in drawn]
        corpus.documents.append("\n".join(needle for one in drawn for needle in one.needles))
    return corpus


def write(folder: Path, questions: int, seed: int = 0) -> None:
    """Writes all three corpora, with as many questions each."""
    random = Random(seed)
    prose(questions, random).write(folder / "prose")
    needles_alone("niah_multikey_2", questions, random).write(folder / "words")
    needles_alone("niah_multikey_3", questions, random).write(folder / "uuids")


def _stretches(random: Random) -> Iterator[list[str]]:
    """Stretches of whole sentences of several lengths, over and over, another cut every time."""
    wanted, held = random.choice(WORDS), list[str]()
    for sentence in cycle(shipped_prose("training").sentences):
        held.append(sentence)
        if sum(len(one.split()) for one in held) >= wanted:
            yield held
            wanted, held = random.choice(WORDS), []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=16_000, help="of each corpus")
    given = parser.parse_args()
    write(given.folder, given.questions)
