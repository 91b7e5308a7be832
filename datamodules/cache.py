"""Derived data: where it is kept, and what is said where it cannot be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msa_train.errors import UserError


def cache_root() -> Path:
    """Where derived data is kept: $MSA_TRAIN_CACHE, or msa_train in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MSA_TRAIN_CACHE") or Path(base) / "msa_train")


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Tells what keeps derived data from being written.

    Raises:
        UserError: Nothing can be written there.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{place}: cannot be written ({reason}); let the variable MSA_TRAIN_CACHE name a folder that can be, and "
            "if this is a store that data.corpus names, copy it to where it can be"
        ) from error
