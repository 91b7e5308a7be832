"""Dense retrieval with a tiny random model of this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from datamodules.dense import DenseIndex, DenseRetriever
from msa_train.errors import UserError
from msa_train.evaluation.retrieval import Retriever

WORDS = ["heron", "otter", "lynx", "crane", "lives", "by", "the", "river", "where", "ask", "text", "?", "."]
WINDOW = 12
TEXTS = [
    "the heron lives by the river .",
    "the otter lives where ?",
    "lynx",
    "the heron lives by the river .",
    "crane by crane by otter",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves the tiny model, with prompts if they are given."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    def save(**given: Any) -> Path:
        folder = tmp_path_factory.mktemp("dense")
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
        plain = folder / "plain"
        BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=WINDOW).save_pretrained(plain)
        torch.manual_seed(0)
        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
        model = BertModel(BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=20, **sizes))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
        model.save_pretrained(plain)
        transformer = Transformer(str(plain), max_seq_length=WINDOW)
        SentenceTransformer(modules=[transformer, Pooling(24)], device="cpu", **given).save(str(folder / "tiny"))
        return folder / "tiny"

    return save


@pytest.fixture(scope="module")
def tiny(saved: Callable[..., Path]) -> Path:
    return saved()


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that the model is given, questions apart."""
    from sentence_transformers import SentenceTransformer

    seen: list[str] = []
    encode = SentenceTransformer.encode_document

    def counted(self: Any, texts: list[str], **given: Any) -> Any:
        seen.extend(texts)
        return encode(self, texts, **given)

    monkeypatch.setattr(SentenceTransformer, "encode_document", counted)
    return seen


def slow_vector(folder: Path, text: str) -> torch.Tensor:
    """The mean of a text's hidden states, one text at a time, at length 1."""
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    model = BertModel.from_pretrained(folder).eval()
    given = tokenizer(text, truncation=True, max_length=WINDOW, return_tensors="pt")
    with torch.no_grad():
        mean = model(**given).last_hidden_state[0].mean(0)
    return mean / mean.norm()


def slow_cosines(folder: Path, question: str, texts: list[str]) -> list[float]:
    asked = slow_vector(folder, question)
    return [float(asked @ slow_vector(folder, text)) for text in texts]


def test_scores_are_the_cosines_of_a_slow_reference_and_the_best_come_first(tiny: Path) -> None:
    retriever: Retriever = DenseRetriever(str(tiny), "cpu")
    index = retriever.index(TEXTS)
    assert retriever.name == "dense"
    orders = set()
    for question in ["where lives the lynx ?", "crane", "otter otter by the river", ""]:
        cosines = slow_cosines(tiny, question, TEXTS)
        np.testing.assert_allclose(index.scores(question), cosines, rtol=0, atol=1e-5)
        order = sorted(range(5), key=lambda place: (-round(cosines[place], 4), place))
        assert [index.best(question, k) for k in (1, 3, 5, 8)] == [order[:1], order[:3], order, order]
        orders.add(tuple(order))
    assert len(orders) > 1


def test_equal_texts_tie_and_the_lower_place_comes_first(tiny: Path) -> None:
    texts = [*TEXTS, *(f"heron {word}" for word in WORDS), *TEXTS] * 3
    index = DenseRetriever(str(tiny), "cpu").index(texts)
    scores = index.scores("where lives the lynx ?")
    best = index.best("where lives the lynx ?", len(texts))
    for text in set(texts):
        places = [place for place, other in enumerate(texts) if other == text]
        assert len(places) >= 3 and len({scores[place].tobytes() for place in places}) == 1
        assert [place for place in best if place in places] == places


def test_equal_texts_tie_though_a_product_of_equal_rows_may_not() -> None:
    random = np.random.default_rng(0)

    class Fixed:
        def encode_query(self, question: str, **given: Any) -> np.ndarray:
            return random.standard_normal(384).astype(np.float32)

    vector_UM = random.standard_normal((2, 384)).astype(np.float32)
    for copies in range(2, 40):
        scores = DenseIndex(Fixed(), vector_UM, np.array([0, 1] * copies)).scores("")
        assert len(scores) == 2 * copies and len(np.unique(scores)) == 2


def test_no_texts_have_no_best(tiny: Path) -> None:
    assert DenseRetriever(str(tiny), "cpu").index([]).best("heron", 3) == []


def test_a_text_is_embedded_once_however_often_it_is_indexed(tiny: Path, embedded: list[str]) -> None:
    retriever = DenseRetriever(str(tiny), "cpu")
    first = retriever.index(["heron", "otter", "heron", "lynx"])
    before = first.scores("crane").tobytes()
    second = retriever.index(["lynx", "crane", "otter"])
    assert embedded == ["heron", "otter", "lynx", "crane"]
    assert first.scores("crane").tobytes() == before
    assert second.best("crane", 1) == [1]
    np.testing.assert_allclose(
        second.scores("crane"), slow_cosines(tiny, "crane", ["lynx", "crane", "otter"]), rtol=0, atol=1e-5
    )


def test_what_was_longest_unused_is_forgotten_first(tiny: Path, embedded: list[str]) -> None:
    retriever = DenseRetriever(str(tiny), "cpu", kept=3)
    retriever.index(["heron", "otter", "lynx"])
    retriever.index(["heron", "crane"])  # otter was used before lynx, and is forgotten
    embedded.clear()
    retriever.index(["lynx", "heron", "crane"])
    assert embedded == []
    retriever.index(["otter"])
    assert embedded == ["otter"]
    index = retriever.index([*WORDS])  # more than are kept: all are there for this index
    np.testing.assert_allclose(index.scores("by"), slow_cosines(tiny, "by", WORDS), rtol=0, atol=1e-5)
    assert len(retriever._vector) == 3 and all(vector.base is None for vector in retriever._vector.values())


def test_a_text_is_cut_at_the_window(tiny: Path) -> None:
    retriever = DenseRetriever(str(tiny), "cpu")
    assert retriever.window == WINDOW
    seen = " ".join(["heron"] * (WINDOW - 2))  # beside two control tokens
    longer, other = retriever.index([f"{seen} otter", f"{seen[:-5]}otter"]).scores(seen)
    assert longer == pytest.approx(1, abs=1e-5) and other < 1 - 1e-4


def test_a_models_own_prompts_are_put_before_texts_and_questions(tiny: Path, saved: Callable[..., Path]) -> None:
    prompted = saved(prompts={"query": "ask ", "document": "text "})
    found = DenseRetriever(str(prompted), "cpu").index(["heron", "otter river"]).scores("where")
    asked, given = (
        slow_vector(tiny, "ask where"),
        [slow_vector(tiny, f"text {text}") for text in ("heron", "otter river")],
    )
    np.testing.assert_allclose(found, [float(asked @ vector) for vector in given], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["", "nobody/nothing", "/no/such/folder"])
def test_a_model_that_is_not_there_is_told_with_the_mend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"cannot open the embedding model '{name}'.*give a folder") as raised:
        DenseRetriever(name, "cpu")
    assert "\n" not in str(raised.value)


def test_a_plain_decoder_is_not_given_a_pooling_of_our_making(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"no modules.json"):
        DenseRetriever(str(tiny.parent / "plain"), "cpu")


def test_no_code_of_a_folder_is_run_and_nothing_is_unpickled(saved: Callable[..., Path]) -> None:
    folder = saved()
    modules = (folder / "modules.json").read_text()
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Pooling: pass\n")
    (folder / "modules.json").write_text(modules.replace('"type": "', '"type": "own.Pooling", "was": "'))
    with pytest.raises(UserError, match="cannot open"):
        DenseRetriever(str(folder), "cpu")
    assert not (folder / "ran").exists()
    (folder / "modules.json").write_text(modules)
    torch.save(BertModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    DenseRetriever(str(folder), "cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors"):
        DenseRetriever(str(folder), "cpu")


def test_a_torn_download_is_told_as_one(saved: Callable[..., Path]) -> None:
    weights = saved() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot open the embedding model"):
        DenseRetriever(str(weights.parent), "cpu")


@pytest.mark.parametrize("device", ["nonsense", "cuda:97"])
def test_a_device_that_is_not_there_is_told_with_the_mend(tiny: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"device '{device}' cannot be used: give 'auto'"):
        DenseRetriever(str(tiny), device)


def test_without_sentence_transformers_the_mend_is_an_extra(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install msa-train\[dense\]"):
        DenseRetriever(str(tiny), "cpu")
