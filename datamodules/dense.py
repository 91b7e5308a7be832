"""Dense retrieval by sentence-transformers: texts and questions become unit vectors, and the cosine ranks.

The invariant: a text has one vector, however often it stands in a memory or comes back in another, so that equal texts
tie and go to the lower place.

Shapes: N texts, U distinct ones, M width of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from msa_train.errors import UserError
from msa_train.evaluation.retrieval import best_places


class DenseRetriever:
    """Ranks texts by the cosine to the question.

    The model cuts what is longer than its `window`: the end of a longer text is not seen, and a report should say so.
    A model that has prompts for questions and for documents is given them. The last bits of a vector depend on which
    texts were embedded beside it.

    Args:
        model: A folder or Hub name that sentence-transformers opens. No code of the model's own is run, and weights
            are read from safetensors alone.
        device: Where it runs, as torch names it; `auto` takes an accelerator where there is one.
        kept: Texts whose vectors are remembered between memories, in host memory; the longest unused go first. Vectors
            of 384 numbers take 1.5 KiB each.

    Raises:
        UserError: sentence-transformers is not installed, or the model or the device cannot be used.
    """

    name = "dense"

    def __init__(
        self, model: str = "sentence-transformers/all-MiniLM-L6-v2", device: str = "auto", kept: int = 1 << 17
    ) -> None:
        self.kept = kept
        self._model = _open(model, device)
        self._vector: dict[str, NDArray[np.float32]] = {}  # in the order of their last use

    @property
    def window(self) -> int | None:
        """Tokens of a text that the model sees, its own control tokens included; None where it sees all."""
        return self._model.max_seq_length

    def index(self, texts: Sequence[str]) -> DenseIndex:
        """An index of these texts; those that are not remembered are embedded."""
        place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        missing = [text for text in place if text not in self._vector]
        if missing:
            vectors = self._model.encode_document(missing, **ENCODING)
            # Copies: a row of the whole would keep the whole in memory.
            self._vector.update((text, vector.copy()) for text, vector in zip(missing, vectors, strict=True))
        for text in place:
            self._vector[text] = self._vector.pop(text)
        vector_UM = np.array([self._vector[text] for text in place])
        for text in list(self._vector)[: max(len(self._vector) - self.kept, 0)]:
            del self._vector[text]
        return DenseIndex(self._model, vector_UM, np.array([place[text] for text in texts], np.int64))


class DenseIndex:
    """Vectors of texts.

    Args:
        model: Embeds questions.
        vector_UM: One per distinct text.
        text_N: Which of them each text has.
    """

    def __init__(self, model: Any, vector_UM: NDArray[np.float32], text_N: NDArray[np.int64]) -> None:
        self.model, self.vector_UM, self.text_N = model, vector_UM, text_N

    def scores(self, question: str) -> NDArray[np.float32]:
        """The cosine to every text."""
        if not len(self.text_N):
            return np.zeros(0, np.float32)
        # One product per distinct text: the same row twice may differ in the last bit, by where in the matrix it is.
        return (self.vector_UM @ self.model.encode_query(question, **ENCODING))[self.text_N]

    def best(self, question: str, k: int) -> list[int]:
        """Places of the k best texts, best first; equal ones in the order of their places."""
        return best_places(self.scores(question), k)


ENCODING = {"normalize_embeddings": True, "convert_to_numpy": True, "show_progress_bar": False}


def _open(name: str, device: str) -> Any:
    """The model, ready to embed."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.util import is_sentence_transformer_model
    except ImportError as error:
        raise UserError("dense retrieval needs sentence-transformers: pip install msa-train[dense]") from error
    try:
        where = None if device == "auto" else str(torch.empty(0, device=device).device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' cannot be used: give 'auto', 'cpu' or one that torch has here") from error
    try:
        if not is_sentence_transformer_model(name):  # it would be opened all the same, with a pooling made up for it
            raise ValueError("no modules.json is found, which says how vectors are made")
        return SentenceTransformer(name, device=where, trust_remote_code=False, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"cannot open the embedding model '{name}': {reason}; give a folder that sentence-transformers saved, or "
            "the owner/name of such a model on the Hub, with the network on or the model downloaded before"
        ) from error
