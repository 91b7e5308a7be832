"""Trust: what a config may name, looked at before anything is made of it.

A config is code that its user runs: to look at a class that it names, its module is imported, which runs that module.
What is promised is less, and holds for every config: nothing is made but classes below the bases that configs are for;
a function is never called; what runs commands, opens files or unpickles is not even imported (jsonargparse's list of
such modules); a run's folder lies below the folder of all runs; and every number is one that arithmetic can take.
The folder that one works in may be a stranger's corpus: nothing is imported from it that no config or option names.
Folders of runs, banks and corpora are data, whoever wrote them: no class that they name is imported at all (runs.py).
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import partial
from importlib.util import find_spec
from math import isfinite
from pathlib import Path, PurePath
from pkgutil import resolve_name
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings

from msa_train.errors import UserError

LARGEST = 2**63 - 1  # what torch and numpy count with
SECTIONS = ("model", "data", "trainer", "checkpoint", "guard")
_load_yaml = get_loader("yaml")  # jsonargparse's, whose numbers are not quite PyYAML's


def restrict_imports() -> None:
    """Has jsonargparse refuse what its list denies, make nothing of a class where any value may stand, read no key
    twice, and find a class where one works; in files that a config or an option names as well."""
    set_parsing_settings(import_path_denylist=[], instantiate_subclass_spec_in_any=False)
    set_loader("yaml", _load, (yaml.YAMLError,))


def check_file(name: str) -> None:
    """Looks at a config's file as such: what is wrong with it is told with its name and line.

    Args:
        name: The file.

    Raises:
        UserError: It cannot be read, is no YAML, says a key twice, or is no mapping of keys.
    """
    try:
        values = yaml.load(Path(name).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start}): give a YAML file, saved as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        mend = "indent with spaces" if "'\\t'" in str(error.problem) else "correct it"
        raise UserError(f"{name}:{line}: not valid YAML ({error.problem}): {mend}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid YAML ({' '.join(str(error).split())[:120]!a}): correct it") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a value of type {type(values).__name__}"
        raise UserError(f"{name}: a config has keys like model, data and trainer, here is {found}")
    for section in SECTIONS:
        kinds = (dict, str) if section == "data" else dict  # a class alone, without arguments
        if section in values and not isinstance(values[section], kinds):
            raise UserError(f"{name}: {section} has no keys below it: indent them, or leave {section} out")


def check_name(name: str) -> None:
    """Looks at a run's name: it may have folders, and leads nowhere else.

    Args:
        name: The name.

    Raises:
        UserError: It leads out of the folder of runs, or to it.
    """
    parts = PurePath(name).parts
    longest = max((len(part.encode("utf-8", "surrogateescape")) for part in parts), default=0)
    if not 0 < longest < 256 or PurePath(name).is_absolute() or ".." in parts or not name.isprintable():
        raise UserError(f"--name {name[:80]!a}: give a name for a folder in --runs, without '..' or '/' in front")


def check_config(config: Any, bases: tuple[type, ...]) -> None:
    """Looks at all that a parsed config holds.

    Args:
        config: The config, of which nothing is made yet.
        bases: A class of the config must lie below one of them.

    Raises:
        UserError: A class is of another kind, something is a function, or a number is none to calculate with.
    """
    for place, value in _leaves(config, ""):
        if place.rpartition(".")[2] == "class_path":
            _check_class(place.rpartition(".")[0], value, bases)
        elif inspect.isroutine(value) or isinstance(value, type | partial):
            told = getattr(value, "__name__", type(value).__name__)
            raise UserError(f"{place}: a config gives no functions, and '{told}' is one: leave it out")
        elif isinstance(value, float) and not isfinite(value):
            raise UserError(f"{place} is {value}: give a number")
        elif isinstance(value, int) and abs(value) > LARGEST:
            raise UserError(f"{place} is a number of {len(str(abs(value))):,} digits: give one below 2^63")


def _check_class(place: str, path: str, bases: tuple[type, ...]) -> None:
    try:
        named = resolve_name(path)  # imported before, where the parser looked at it
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{place}: class_path '{path}' names nothing ({error}): correct it") from error
    if not inspect.isclass(named):
        raise UserError(f"{place}: class_path '{path}' is a function, not a class: give a class")
    plain = is_dataclass(named) and named.__module__.partition(".")[0] == "msa_train"
    if not issubclass(named, bases) and not plain:
        kinds = ", ".join(base.__name__ for base in bases)
        raise UserError(f"{place}: class_path '{path}' may not stand in a config: give a subclass of one of {kinds}")


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Every value that holds no others, with the keys that lead to it."""
    values = vars(value) if isinstance(value, Namespace) else value
    if isinstance(values, Mapping):
        for key, inner in values.items():
            yield from _leaves(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(values, list | tuple):
        for number, inner in enumerate(values):
            yield from _leaves(inner, f"{place}[{number}]")
    else:
        yield place, value


class _Once:
    """PyYAML would keep the last of two equal keys and drop the other without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As it was; a key that comes twice is refused."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' comes twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)  # type: ignore[misc]


class Loader(_Once, yaml.SafeLoader):
    """PyYAML's for plain values; a key that comes twice is an error."""


class _Texts(_Once, yaml.BaseLoader):
    """Makes text of every value, so that nothing but a key that comes twice is refused."""


def _load(text: str) -> Any:
    yaml.load(text, _Texts)
    values = _load_yaml(text)
    for _, value in _leaves(values, ""):
        if isinstance(value, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", value) and not os.path.exists(value):
            _reach(value.partition(".")[0])
    return values


def _reach(module: str) -> None:
    """Puts the working folder at the end of the path, if this module is there and nowhere else. Not before: libraries
    try packages that are not installed, and would run what bears such a name there."""
    there = os.path.isfile(f"{module}.py") or os.path.isdir(module)
    if there and module not in sys.modules and find_spec(module) is None:
        sys.path.append(os.getcwd())
