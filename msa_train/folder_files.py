"""The files of a checkpoint folder (folders.py): writing them while a disk may refuse, and reading tensors by name.

The invariant: a writer never raises for what a disk refuses, since other ranks wait for this one; it remembers the
refusal, leaves nothing behind, and says so once. A reader unpickles nothing.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msa_train.errors import UserError
from msa_train.folders import ASIDE, FACTS, OPTIMIZER, TRAINER, WEIGHTS, digests_of, remove, settle, start_aside

ROOM = 2**31  # bytes of an optimiser's state that are held back before they are written


class FolderWriter:
    """Writes a rank's files of a checkpoint.

    Args:
        aside: Where, until the folder is whole.
    """

    def __init__(self, aside: Path) -> None:
        self.aside = aside
        self.files: dict[str, dict[str, Any]] = {}
        self.refused: str | None = None
        self._held: dict[str, Tensor] = {}
        self._written = 0

    def start(self) -> None:
        """Makes room; the first rank does."""
        self._try(lambda: start_aside(self.aside.with_name(self.aside.name.removesuffix(ASIDE))))

    def weights(self, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Writes the weights and what they do not tell."""
        self._save(WEIGHTS, weights)
        self._try(lambda: (self.aside / FACTS).write_text(json.dumps(facts, indent=1) + "\n"), FACTS)

    def trainer(self, state: dict[str, Any]) -> None:
        """Writes loops, callbacks and counters."""
        self._try(lambda: torch.save(state, self.aside / TRAINER), TRAINER)

    def optimizer(self, name: str, tensor: Tensor, rank: int) -> None:
        """Takes a tensor of the optimiser's, and writes when there are many."""
        if self.refused is None:
            self._held[name] = tensor.to("cpu", copy=True).contiguous()
            if sum(held.nbytes for held in self._held.values()) > ROOM:
                self.finish(rank)

    def finish(self, rank: int) -> None:
        """Writes what is held back."""
        if self._held:
            self._save(OPTIMIZER.replace("*", f"{rank}-{self._written}"), self._held)
            self._held, self._written = {}, self._written + 1

    def settle(self, folder: Path) -> None:
        """Gives the folder its name; or takes it back and warns, where a rank was refused."""
        if self.refused is None:
            self._try(lambda: settle(self.aside, folder, self.files))
        if self.refused is not None:
            remove(self.aside)
            warnings.warn(
                f"{folder} could not be saved ({self.refused}): training goes on, and the checkpoints before it are "
                "whole. Make room on that disk.",
                stacklevel=2,
            )

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        def save() -> None:
            file = self.aside / name
            file.touch()
            mode = file.stat().st_mode
            save_file(tensors, file, {"format": "pt"})
            file.chmod(mode)  # left to itself, safetensors lets nobody but the owner read what it writes

        self._try(save, name)

    def _try(self, write: Callable[[], Any], name: str | None = None) -> None:
        if self.refused is not None:
            return
        try:
            write()
            if name is not None:
                self.files |= digests_of([self.aside / name])
        except (OSError, SafetensorError) as error:
            self.refused = str(getattr(error, "strerror", None) or error)
        except RuntimeError as error:  # how torch.save says it
            if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
                raise
            self.refused = str(error).partition("\n")[0]


class FolderReader:
    """Reads a checkpoint's tensors by name.

    Args:
        folder: The checkpoint.

    Raises:
        UserError: A file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = read_facts(folder)
        self._open: dict[str, Any] = {}
        for file in (folder / WEIGHTS, *sorted(folder.glob(OPTIMIZER))):
            try:
                handle = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not readable weights ({error}); take another checkpoint") from error
            self._open |= dict.fromkeys(handle.keys(), handle)

    def names(self) -> list[str]:
        """All that is there: weights, and what has a "/" of optimizer_state.py."""
        return list(self._open)

    def tensor(self, name: str) -> Tensor | None:
        """A weight, or what optimizer_state.py names; None where there is none."""
        return self._open[name].get_tensor(name) if name in self._open else None

    def weight(self, name: str) -> Tensor:
        """A weight that must be there."""
        found = self.tensor(name)
        assert found is not None, f"preflight has looked for {name}"
        return found

    def weights(self, masters: bool = False) -> dict[str, Tensor]:
        """All weights, tied ones by each name.

        Args:
            masters: Take the float32 copy of those that have one.

        Raises:
            UserError: A tied weight's first name is not there.
        """
        names = [name for name in self.names() if "/" not in name]
        found = {name: self.tensor(f"master/{name}") if masters else None for name in names}
        weights = {name: self.weight(name) if master is None else master for name, master in found.items()}
        missing = next((same for same in self.facts["tied"].values() if same not in weights), None)
        if missing is not None:
            raise UserError(f"{self.folder / FACTS}: not of this project (it ties a weight to '{missing}')")
        return weights | {name: weights[same] for name, same in self.facts["tied"].items()}

    def trainer(self) -> dict[str, Any]:
        """Loops, callbacks and counters.

        Raises:
            UserError: They cannot be read.
        """
        file = self.folder / TRAINER
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of damaged bytes the reader raises whatever it stumbles over
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{file}: not readable ({reason}); resume from another checkpoint") from error


def read_facts(folder: Path) -> dict[str, Any]:
    """What a checkpoint's weights do not tell.

    Raises:
        UserError: The file is missing, damaged, or not of this project.
    """
    needed: dict[str, type | tuple[type, ...]] = {
        "chunk_size": int, "skipped_steps": (int, float), "global_step": int, "tied": dict, "packs_per_step": int
    }  # fmt: skip
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}: not a checkpoint of this project (no readable {FACTS})") from error
    wrong = [
        name for name, kind in needed.items() if not isinstance(facts, dict) or not isinstance(facts.get(name), kind)
    ]
    if wrong:
        raise UserError(f"{folder / FACTS}: not of this project (no {', '.join(wrong)})")
    if not all(isinstance(same, str) for same in facts["tied"].values()):
        raise UserError(f"{folder / FACTS}: not of this project (tied weights without names)")
    return facts
