"""YAML sections with checked keys: what is missing, unknown or of the wrong kind is an error that names it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.columns import describe
from msa_train.errors import UserError


@dataclass(frozen=True)
class Section:
    """Keys of a YAML mapping.

    Args:
        place: How errors name it: the file, and the keys that lead to it.
        values: Its keys, all of them known.
    """

    place: str
    values: dict[str, Any]

    @staticmethod
    def of(raw: Any, place: str, known: set[str]) -> Section:
        """The value as a section.

        Raises:
            UserError: It is no mapping, or has a key that is not known.
        """
        if not isinstance(raw, dict):
            raise UserError(f"{place}: expected keys out of {', '.join(sorted(known))}; found {describe(raw)}")
        for key in raw:
            if not isinstance(key, str) or key not in known:
                near = difflib.get_close_matches(key[:40], sorted(known), n=1) if isinstance(key, str) else []
                mend = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(known))}"
                raise UserError(f"{place}: unknown key, {describe(key)}; {mend}")
        return Section(place, raw)

    def section(self, key: str, known: set[str]) -> Section | None:
        """The section of a key, None where it is absent.

        Raises:
            UserError: It is no mapping, or has a key that is not known.
        """
        raw = self.values.get(key)
        return None if raw is None else Section.of(raw, f"{self.place}: {key}", known)

    def required(self, key: str) -> str:
        """The text of a key that must be there.

        Raises:
            UserError: It is missing or no text.
        """
        found = self.text(key)
        if found is None:
            raise UserError(f"{self.place}: '{key}' is missing; add it")
        return found

    def text(self, key: str) -> str | None:
        """The text of a key, None where it is absent.

        Raises:
            UserError: It is no text.
        """
        found = self.texts(key)
        if len(found) > 1 or isinstance(self.values.get(key), list):
            raise UserError(f"{self.place}: '{key}' must be one text, found {describe(self.values[key])}")
        return found[0] if found else None

    def texts(self, key: str) -> tuple[str, ...]:
        """The texts of a key that holds one or a list of them, none where it is absent.

        Raises:
            UserError: An element is no text.
        """
        value = self.values.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        for text in found:
            # A number here is a revision or a split that YAML took for one.
            if not isinstance(text, str) or not text.strip() or not text.strip().isprintable():
                raise UserError(
                    f"{self.place}: '{key}' must be text, found {describe(text)}; quote it if it looks like a number"
                )
        return tuple(text.strip() for text in found)


def load_yaml(path: Path) -> Any:
    """What a YAML file holds; only plain values, nothing is constructed.

    Raises:
        UserError: It cannot be read, is no YAML or says a key twice.
    """
    # Here, because reading BEIR needs no YAML.
    import yaml

    from msa_train.trust import Loader

    try:
        return yaml.load(path.read_bytes(), Loader)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name a mapping like configs/corpora/*.yaml"
        ) from error
    # PyYAML's scalar constructors raise these bare for tags that do not fit (`!!int ''`, `!!bool x`, 2001-99-99).
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())[:120]!a})") from error
