"""From a name in a config to a corpus: a folder, a store, a mapping, a pickle, or Python's own documentation."""

from __future__ import annotations

from pathlib import Path

from datamodules.beir import BeirReader
from datamodules.building import build_store, check_tokenizer
from datamodules.mapped import MappedReader
from datamodules.published import PublishedReader
from datamodules.python_docs import build_python_docs
from datamodules.records import CorpusReader
from datamodules.store import Store, is_store
from msa_train.errors import UserError
from msa_train.protocol import Protocol

PYTHON_DOCS = "python-docs"


def open_corpus(name: str) -> CorpusReader:
    """The reader of a corpus.

    Args:
        name: `python-docs`; a BEIR folder; a mapping (*.yaml); or a published benchmark's pickle (*.pkl).

    Raises:
        UserError: It is none of these.
    """
    if name == PYTHON_DOCS:
        return BeirReader(build_python_docs())
    path = Path(name)
    if path.is_dir():
        return BeirReader(path)
    if not path.is_file():
        raise UserError(f"data.corpus: '{name}' is neither a folder nor a file here, nor '{PYTHON_DOCS}'")
    if path.suffix in (".yaml", ".yml"):
        return MappedReader(path)
    if path.suffix in (".pkl", ".pickle"):
        return PublishedReader(path)
    raise UserError(f"data.corpus: '{name}': give a BEIR folder, a mapping (*.yaml) or a published pickle (*.pkl)")


def open_store(name: str, protocol: Protocol, root: Path, max_document_tokens: int, workers: int = 0) -> Store:
    """The store of a corpus: `name` itself where it is one, else built under `root` unless it is there."""
    if is_store(Path(name)):
        store = Store(Path(name))
        check_tokenizer(store, protocol)
        return store
    return build_store(open_corpus(name), protocol, root, max_document_tokens, workers)
