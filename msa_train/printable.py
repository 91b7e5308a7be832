"""Text from anywhere, made fit for a terminal."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    r"""Text whose control characters are shown, not obeyed: a document may hold a terminal's commands.

    >>> printable("a\x1b[2Jb\n")
    'a\ufffd[2Jb\n'
    """
    return "".join("\ufffd" if _commands(letter) else letter for letter in text)


def _commands(letter: str) -> bool:
    """Whether a terminal would obey it: control characters, and those that turn the direction of what follows."""
    turns = "\u202a" <= letter <= "\u202e" or "\u2066" <= letter <= "\u2069"
    return turns or (unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t")
