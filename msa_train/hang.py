"""A rank that hangs ends the job, and every rank leaves its stacks.

Collectives wait for the slowest rank, so where one hangs all do, silently, until a timeout half an hour later says that
somebody waited. Here a thread of every rank watches its steps. The invariant: whoever finds that a step takes too long
writes its stacks into the run's folder; a rank that finds such a file writes its own; and then all end, whatever became
of the files: on a full disk stacks go to stderr.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

STACKS = "stacks"  # the run's folder of them
POLL = 1.0  # seconds from one look to the next, at most


class HangWatch(threading.Thread):
    """Ends this process when a step takes too long, here or on another rank.

    Args:
        folder: Where ranks leave their stacks; empty, and the same to all of them.
        rank: This one.
        ranks: How many there are.
        seconds: How long a step may take.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, seconds: float) -> None:
        super().__init__(name="hang watch", daemon=True)
        self.folder, self.rank, self.ranks, self.seconds = folder, rank, ranks, seconds
        self.poll = min(POLL, seconds / 10)
        self._since: float | None = None
        self._ended = threading.Event()

    def working(self) -> None:
        """A step begins."""
        self._since = time.monotonic()

    def idle(self) -> None:
        """It has ended; evaluations and saving take as long as they take."""
        self._since = None

    def end(self) -> None:
        """Watches no more."""
        self._ended.set()

    def run(self) -> None:
        """Looks, every second."""
        while not self._ended.wait(self.poll):
            since = self._since
            late = since is not None and time.monotonic() - since > self.seconds
            if late or any(self.folder.glob("rank-*.txt")):
                self._leave(late)

    def _leave(self, late: bool) -> None:
        try:
            try:
                self._write(late)
            except OSError:  # a full disk
                faulthandler.dump_traceback(all_threads=True)
            if late:
                print(
                    f"msa-train: error: rank {self.rank} took more than {self.seconds:g} s for a step; the stacks of "
                    f"all ranks are in {self.folder}, and --guard.hang_minutes allows more",
                    file=sys.stderr,
                    flush=True,
                )
        finally:
            os._exit(1)

    def _write(self, late: bool) -> None:
        self.folder.mkdir(exist_ok=True)
        with (self.folder / f"rank-{self.rank}.txt").open("w") as file:
            file.write("a step took too long here\n" if late else "another rank's step took too long\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        deadline = time.monotonic() + 10 * self.poll
        while len(list(self.folder.glob("rank-*.txt"))) < self.ranks and time.monotonic() < deadline:
            time.sleep(self.poll / 4)
