"""Grades on disk: a file that is only ever added to, one JSON object a line.

    {"request": "<sha256 of all that was sent>", "grade": 4}

The invariant: a grade is in the file before it is used, and a kill loses at most the line that was being written. Such
a torn line stays where it is, and says nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from threading import Lock

from msa_train.errors import UserError

RECORD = b'{"request": "%s", "grade": %d}'
SOME_RECORD = RECORD % (b"0" * 64, 0)
ANY_RECORD = re.compile(rb'\{"request": "([0-9a-f]{64})", "grade": ([0-5])\}')


class Grades:
    """The grades of a file, by request.

    Args:
        path: The file; made where there is none, with its folder.

    Raises:
        UserError: It cannot be written, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                file.seek(0)
                written = file.read()
                self._grade = _read(written.split(b"\n"), path)
                if written and not written.endswith(b"\n"):
                    file.write(b"\n")  # what is added next begins a line of its own
        except OSError as error:
            raise UserError(f"the file of grades '{path}' cannot be used: {error.strerror}") from error

    def get(self, request: str) -> int | None:
        """The grade that this request got, if it got one."""
        return self._grade.get(request)

    def add(self, request: str, grade: int) -> None:
        """Writes a grade down; from any thread."""
        with self._lock, self.path.open("ab") as file:
            file.write(RECORD % (request.encode(), grade) + b"\n")
            self._grade[request] = grade


def _read(lines: list[bytes], path: Path) -> dict[str, int]:
    grades = {}
    for number, line in enumerate(lines, 1):
        record = ANY_RECORD.fullmatch(line)
        if record:
            grades[record[1].decode()] = int(record[2])
        # Of a torn line only the beginning is there: the end of any other makes it a whole one.
        elif not ANY_RECORD.fullmatch(line + SOME_RECORD[len(line) :]):
            raise UserError(f"'{path}', line {number} is no grade: give a file of grades, or a new one")
    return grades
