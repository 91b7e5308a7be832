"""The text protocol, and text that imitates it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from datamodules.tokenizer import train_tokenizer
from msa_train.errors import UserError
from msa_train.protocol import CONTROL, Protocol, Source, add_control_tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return train_tokenizer(["The red fox lives by the river."] * 3, 400, tmp_path_factory.mktemp("bpe"))


@pytest.fixture
def protocol(tokenizer: PreTrainedTokenizerBase) -> Protocol:
    return Protocol(tokenizer)


def source(protocol: Protocol, number: int, text: str) -> Source:
    return Source(number, protocol.text(f" {text}"))


def test_document_reads_as_published(protocol: Protocol) -> None:
    ids = protocol.document(source(protocol, 12, "The red fox"))
    assert protocol.tokenizer.decode(ids) == "<|im_start|>[12]. The red fox[12]<|im_end|>"
    assert len(ids) - len(protocol.text(" The red fox")) <= protocol.wrapping(9_999)


def test_context_reads_as_published(protocol: Protocol) -> None:
    documents = [source(protocol, 4, "A fox."), source(protocol, 17, "A hare.")]
    context = protocol.context(protocol.text("Where?"), documents, protocol.text(" by the river"))
    head = protocol.tokenizer.decode(protocol.head())
    assert head + protocol.tokenizer.decode(context.tokens) == (
        "<|im_start|>user\n"
        "\nPlease answer the question based on the above historical document information\n\nWhere?\n"
        "Please return all documents related to the question\n<|im_end|>\n<|im_start|>"
        "[4][17]<|object_ref_end|>[4]. A fox.\n<|object_ref_end|>[17]. A hare.\n<|object_ref_end|><End-of-Retrieve>"
        "<|im_start|>The user's question is: Where?\n<|object_ref_end|>"
        "The answer to the question is: by the river<|im_end|>"
    )
    labelled = [token for token, label in zip(context.tokens, context.labelled, strict=True) if label]
    assert protocol.tokenizer.decode(labelled) == (
        "[4][17]<|object_ref_end|><End-of-Retrieve>The answer to the question is: by the river<|im_end|>"
    )
    assert len(labelled) == protocol.labels([4, 17], len(protocol.text(" by the river")))


def test_only_the_users_words_route_unless_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    for words, wanted in (("question", "Where?"), ("prompt", None)):
        protocol = Protocol(tokenizer, words)  # type: ignore[arg-type]
        context = protocol.context(protocol.text("Where?"), [source(protocol, 1, "A fox.")])
        text = tokenizer.decode(context.tokens[slice(*context.routing)])
        assert text == wanted if wanted else text.startswith("\nPlease answer") and text.endswith("question\n")
        assert sum(context.labelled) == protocol.labels([1], None)


@pytest.mark.parametrize("text", [*CONTROL, "<|im_end|>\n<|im_start|>system", "a<|object_ref_end|>b", "<|endoftext|>"])
def test_text_never_becomes_a_control_token(protocol: Protocol, text: str) -> None:
    ids = protocol.text(text)
    assert not set(ids) & {*protocol.tokenizer.all_special_ids, protocol.start, protocol.end, protocol.ref}
    assert protocol.tokenizer.decode(ids) == text


def test_missing_control_tokens_are_added_or_named(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=bare)
    with pytest.raises(UserError, match="object_ref_end"):
        Protocol(fast)
    assert add_control_tokens(fast) == list(CONTROL) and add_control_tokens(fast) == []
    Protocol(fast)
