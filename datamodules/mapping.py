"""A column mapping: which columns of a dataset hold questions, answers and documents, read from YAML and validated.

    dataset: owner/name             # or  files: {train: data/*.jsonl, test: held_out.parquet}
    config: distractor              # optional, as is  revision:
    splits: {train: train, test: validation}                   # our split: theirs
    id: id                          # optional; without it questions are named {split}-{row number}
    query: question                 # or several columns, joined by a blank line
    answers: [answer, aliases]      # one or several columns; optional
    documents: {id: ..., title: context.title, text: context.sentences}
    negatives: {text: ...}          # optional: documents of the row that never answer
    relevant: all                   # the default; or {flag: paragraphs.is_supporting}, or those that a column names:
                                    # {column: supporting_facts.title, match: context.title}
    steps: {column: ..., match: ...}                           # optional: the evidence chain, one element per step
    json: [possible_answers]        # optional: columns whose text holds JSON
    hold_out: {split: test, share: 0.05, by: source}           # optional: questions of `train` for another split, drawn
                                    # by the value of a column (whole sources stay together), or without `by` one by one

Instead of `documents`, `corpus: {dataset, config, split, id, title, text}` names a set of its own that
`relevant: {column: ...}` points into by id, or `relevant: {qrels: {dataset, splits, query, document, score}}` relates.
`instruction: true` marks pairs of instruction (`query`) and response (`answers`) that read no document.

The invariant: a mapping that exists is complete and consistent; everything else is a `UserError` that names the key.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from datamodules.columns import describe
from datamodules.sections import Section, load_yaml
from msa_train.errors import UserError

# With the owner: a bare name can be a local folder, or one of the library's own readers (one of which unpickles).
_DATASET = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)

_WHERE = {"dataset", "config", "revision", "files"}
_DOCUMENT = {"id", "title", "text"}


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
        dataset: Name on the Hugging Face hub, None where the rows come from files.
        config: Its configuration, None for the default one.
        revision: Branch, tag or commit; None for the main branch.
        splits: Our split's name -> theirs, or the file patterns.
        folder: What relative patterns are relative to, before the current folder.
    """

    dataset: str | None
    config: str | None
    revision: str | None
    splits: dict[str, str | tuple[str, ...]]
    folder: Path = field(repr=False)


@dataclass(frozen=True)
class DocumentColumns:
    """Columns of a document; `id` is None where its text names it, `title` is None where it has none."""

    text: str
    title: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Pointer:
    """Documents whose `match` column holds a value of `column`; without `match`, `column` holds ids of the corpus."""

    column: str
    match: str | None = None


@dataclass(frozen=True)
class Qrels:
    """A relation in a set of its own: a query's id, a document's id, and a score above 0 where it answers."""

    source: Source
    query: str
    document: str
    score: str | None


@dataclass(frozen=True)
class HoldOut:
    """Questions of `train` that go to another split instead: those whose `by` column (or id) falls into the share."""

    split: str
    share: float
    by: str | None


@dataclass(frozen=True)
class ColumnMapping:
    """A whole mapping; see the top of this file.

    Args:
        relevant: None: all of the row's documents. A text: the flag column.
        corpus: The separate document set and its columns, None where the rows hold the documents.
    """

    name: str
    source: Source
    query: tuple[str, ...]
    id: str | None
    answers: tuple[str, ...]
    documents: DocumentColumns | None
    negatives: DocumentColumns | None
    corpus: tuple[Source, DocumentColumns] | None
    relevant: str | Pointer | Qrels | None
    steps: Pointer | None
    json: tuple[str, ...]
    instruction: bool
    hold_out: HoldOut | None

    def with_files(self, files: dict[str, str]) -> ColumnMapping:
        """The same columns, read from files.

        Args:
            files: Our split -> path or pattern; `corpus` stands for the separate document set.

        Raises:
            UserError: There is no split, or a `corpus` that the mapping does not have.
        """
        rest = {split: (str(path),) for split, path in files.items() if split != "corpus"}
        if not rest:
            raise UserError(f"{self.name}: files must name at least one split, for example train: rows.jsonl")
        changed = replace(self, source=Source(None, None, None, dict(rest), self.source.folder))
        if "corpus" not in files:
            return changed
        if self.corpus is None:
            raise UserError(f"{self.name}: files name a corpus, which this mapping does not read; leave it out")
        where: dict[str, str | tuple[str, ...]] = {"corpus": (str(files["corpus"]),)}
        return replace(changed, corpus=(Source(None, None, None, where, self.source.folder), self.corpus[1]))


def read_mapping(path: str | os.PathLike[str]) -> ColumnMapping:
    """Reads and validates a mapping.

    Raises:
        UserError: The file cannot be read or is no YAML, a key is unknown, missing or of the wrong kind, or keys
            contradict each other.
    """
    path = Path(path)
    keys = {
        "splits",
        "id",
        "query",
        "answers",
        "documents",
        "negatives",
        "corpus",
        "relevant",
        "steps",
        "json",
        "hold_out",
    }
    top = Section.of(load_yaml(path), str(path), _WHERE | keys | {"instruction"})
    instruction = top.values.get("instruction", False)
    if not isinstance(instruction, bool):
        raise UserError(f"{path}: instruction must be true or false, found {describe(instruction)}")
    steps = top.section("steps", {"column", "match"})
    mapping = ColumnMapping(
        name=path.stem,
        source=_source(top, path.parent),
        query=top.texts("query"),
        id=top.text("id"),
        answers=top.texts("answers"),
        documents=_columns(top.section("documents", _DOCUMENT)),
        negatives=_columns(top.section("negatives", _DOCUMENT)),
        corpus=_corpus(top, path.parent),
        relevant=_relevant(top, path.parent),
        steps=_pointer(steps) if steps else None,
        json=top.texts("json"),
        instruction=instruction,
        hold_out=_hold_out(top),
    )
    problems = _contradictions(mapping)
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    return mapping


def _contradictions(mapping: ColumnMapping) -> list[str]:
    relevant, apart, qrels = mapping.relevant, mapping.corpus is not None, isinstance(mapping.relevant, Qrels)
    pointers = [pointer for pointer in (relevant, mapping.steps) if isinstance(pointer, Pointer)]
    checks = {
        "query is missing; name the column that holds the question": not mapping.query,
        "name exactly one of documents (in the row), corpus (a set of its own) and instruction: true": (
            (mapping.documents is not None) + apart + mapping.instruction != 1
        ),
        "an instruction needs answers, the column that holds the response": (
            mapping.instruction and not mapping.answers
        ),
        "an instruction reads no document; leave negatives, relevant and steps out": (
            mapping.instruction and bool(mapping.negatives or relevant or mapping.steps)
        ),
        "negatives belong to documents, not to a corpus": apart and mapping.negatives is not None,
        "with a corpus, relevant must be {column: ...}, which holds ids of its documents, or {qrels: ...}": (
            apart and not isinstance(relevant, Pointer | Qrels)
        ),
        "match names a column of the row's documents: add it with documents, leave it out with a corpus": any(
            (pointer.match is None) != apart for pointer in pointers
        ),
        "qrels relate queries to a corpus; add corpus": qrels and not apart,
        "qrels name queries by id; add id, the column that holds it": qrels and not mapping.id,
        "hold_out draws from files or splits named train; name one so": (
            mapping.hold_out is not None
            and "train" not in (relevant.source if isinstance(relevant, Qrels) else mapping.source).splits
        ),
        "json names whole columns, so none with a dot": any("." in column for column in mapping.json),
    }
    return [problem for problem, holds in checks.items() if holds]


def _source(keys: Section, folder: Path, splits_key: str = "splits") -> Source:
    dataset, raw_files = keys.text("dataset"), keys.values.get("files")
    if (dataset is None) == (raw_files is None):
        raise UserError(f"{keys.place}: name either dataset (on the Hugging Face hub) or files")
    if dataset is not None and not _DATASET.fullmatch(dataset):
        raise UserError(f"{keys.place}: dataset {dataset[:60]!a} must be owner/name, as its page on the hub has it")
    beside = sorted({"config", "revision", splits_key} & keys.values.keys())
    if dataset is None and beside:
        raise UserError(f"{keys.place}: {', '.join(beside)} belong to a dataset on the hub; leave out beside files")
    key = "files" if dataset is None else splits_key
    raw = keys.values.get(key)
    if splits_key == "split" and raw is not None:
        raw = {"corpus": raw}
    if not isinstance(raw, dict) or not raw:
        mend = "{train: rows.jsonl}" if dataset is None else "train" if splits_key == "split" else "{train: train}"
        raise UserError(f"{keys.place}: {key} must be like '{mend}', found {describe(raw)}")
    splits: dict[str, str | tuple[str, ...]] = {}
    for name in raw:
        if (
            not isinstance(name, str)
            or not re.fullmatch(r"[\w-]+", name)
            or (name == "corpus") != (splits_key == "split")
        ):
            raise UserError(f"{keys.place}: {key} has {describe(name)} for a split; use letters, digits, _ and -")
        named = Section(f"{keys.place}: {key}", raw)
        splits[name] = named.required(name) if dataset is not None else named.texts(name)
        if not splits[name]:
            raise UserError(f"{keys.place}: {key}.{name} names no file; add a path or a pattern")
    return Source(dataset, keys.text("config"), keys.text("revision"), splits, folder)


def _corpus(top: Section, folder: Path) -> tuple[Source, DocumentColumns] | None:
    keys = top.section("corpus", _WHERE | _DOCUMENT | {"split"})
    columns = _columns(keys)
    if keys is None or columns is None:
        return None
    keys.required("id")
    return _source(keys, folder, splits_key="split"), columns


def _columns(keys: Section | None) -> DocumentColumns | None:
    if keys is None:
        return None
    return DocumentColumns(keys.required("text"), keys.text("title"), keys.text("id"))


def _relevant(top: Section, folder: Path) -> str | Pointer | Qrels | None:
    if top.values.get("relevant") == "all":
        if top.values.get("steps") is not None:
            raise UserError(f"{top.place}: relevant: all contradicts steps; leave it out, the steps' documents answer")
        return None
    keys = top.section("relevant", {"flag", "column", "match", "qrels"})
    if keys is None:
        return None
    if len(keys.values.keys() & {"flag", "column", "qrels"}) != 1 or (
        "match" in keys.values and "column" not in keys.values
    ):
        raise UserError(f"{keys.place}: name one of flag, column (with match, except for a corpus) and qrels")
    qrels = keys.section("qrels", _WHERE | {"splits", "query", "document", "score"})
    if qrels is not None:
        return Qrels(_source(qrels, folder), qrels.required("query"), qrels.required("document"), qrels.text("score"))
    return keys.required("flag") if "flag" in keys.values else _pointer(keys)


def _hold_out(top: Section) -> HoldOut | None:
    keys = top.section("hold_out", {"split", "share", "by"})
    if keys is None:
        return None
    share = keys.values.get("share")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise UserError(f"{keys.place}: share must be a number between 0 and 1, found {describe(share)}")
    split = keys.required("split")
    if not re.fullmatch(r"[\w-]+", split):
        raise UserError(f"{keys.place}: split is {describe(split)}; use letters, digits, _ and -")
    return HoldOut(split, float(share), keys.text("by"))


def _pointer(keys: Section) -> Pointer:
    return Pointer(keys.required("column"), keys.text("match"))
