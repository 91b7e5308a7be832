"""A tokenizer that knows the words of needle tasks, and what a reader needs of a trial to check it."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

from datamodules.tasks.haystacks import addresses
from datamodules.tasks.ruler import NOISE, SETTINGS, draw
from datamodules.tokenizer import train_tokenizer
from msa_train.evaluation.task import Memory, Task, Trial
from msa_train.protocol import Protocol

NEEDLE = re.compile(r"One of the special magic (?:numbers|uuids) for (.+?) is: ([0-9a-f-]+)\.")


def needle_protocol(folder: Path) -> Protocol:
    """A byte-level BPE of three addresses and needles."""
    needles = [draw(setting, Random(place)) for place in range(9) for setting in SETTINGS.values()]
    words = [text for drawn in needles for text in (*drawn.needles, drawn.preamble, drawn.question, drawn.lead)]
    return Protocol(train_tokenizer([*addresses()[:3], NOISE, *words], 1500, folder))


def texts(task: Task, length: int, trial: Trial) -> list[str]:
    """Words of a trial's documents, in order."""
    return Memory(task.pool(length), trial).texts()
