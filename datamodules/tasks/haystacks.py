"""The prose that needles lie in: public-domain addresses that are shipped, or a text of the user's own.

RULER takes Paul Graham's essays, which nobody may pass on. The invariant: the two halves of what is shipped have no
address in common, so that a model can be trained on needles in one and evaluated in the other.
"""

from __future__ import annotations

import hashlib
import lzma
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

from datamodules.splitting import sentence_ends
from datamodules.tasks.ruler import HALVES, Half
from msa_train.errors import UserError

FILE = "state_of_the_union.txt.xz"
SHA256 = "9a78e56c596de2ae26537c132d7b878944810b00d521189030441cfca750940c"


@dataclass(frozen=True)
class Prose:
    """A text in sentences.

    Args:
        sentences: Their words, one space between two.
        digest: Stands for the text.
    """

    sentences: tuple[str, ...]
    digest: str

    @staticmethod
    def of(text: str) -> Prose:
        """Splits at the ends of sentences.

        >>> Prose.of("It  rained.\\nDid it? Yes").sentences
        ('It rained.', 'Did it?', 'Yes')
        """
        text = " ".join(text.split())
        found = (text[start:end].strip() for start, end in pairwise([0, *sentence_ends(text)]))
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Prose(tuple(sentence for sentence in found if sentence), digest)


@cache
def shipped_prose(half: Half) -> Prose:
    """Every second address of data/README.md: from the first on for evaluation, from the second for training.

    Raises:
        UserError: The file is not the one that was shipped.
    """
    return Prose.of("\n".join(addresses()[HALVES.index(half) :: 2]))


def addresses() -> list[str]:
    """All addresses, oldest first.

    Raises:
        UserError: The file is not the one that was shipped.
    """
    packed = files("datamodules.tasks").joinpath("data", FILE).read_bytes()
    if hashlib.sha256(packed).hexdigest() != SHA256:
        raise UserError(f"datamodules/tasks/data/{FILE} is damaged (its SHA-256 is another): install msa-train again")
    return lzma.decompress(packed).decode().splitlines()


def prose_of(path: str) -> Prose:
    """A text file.

    Raises:
        UserError: It cannot be read, is not UTF-8 or has no words.
    """
    try:
        prose = Prose.of(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"haystack_path: {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"haystack_path: {path} is not UTF-8") from error
    if not prose.sentences:
        raise UserError(f"haystack_path: {path} has no words")
    return prose
