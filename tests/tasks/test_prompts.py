"""The flat prompt: what it reads like, that its pieces are its tokens, and that no text closes its turn."""

from __future__ import annotations

import copy

import pytest

from msa_train.errors import UserError
from msa_train.evaluation.prompts import flat_prompt
from msa_train.protocol import CONTROL, END, REF, START, Protocol
from tests.tasks.samples import needle_protocol

DOCUMENTS = ["The grass is green.", "The sky is blue. 12 seas.", "The sun is yellow."]
TEMPLATE = (
    "<|im_start|>system\nYou are of use.<|im_end|>\n{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    return needle_protocol(tmp_path_factory.mktemp("tokenizer"))


def with_template(protocol: Protocol, template: str) -> Protocol:
    tokenizer = copy.deepcopy(protocol.tokenizer)
    tokenizer.chat_template = template
    return Protocol(tokenizer)


def prompt(protocol: Protocol, documents: list[str] = DOCUMENTS, separator: str = " ") -> list[int]:
    return flat_prompt(protocol, "Read this.", documents, separator, "Which colour has the sky?", "The sky is")


def decoded(protocol: Protocol, tokens: list[int]) -> str:
    return protocol.tokenizer.decode(tokens, skip_special_tokens=False)


@pytest.mark.parametrize("separator", [" ", "\n", "\n\n"])
def test_without_a_chat_template_it_is_chatml(plain: Protocol, separator: str) -> None:
    assert plain.tokenizer.chat_template is None
    assert decoded(plain, prompt(plain, separator=separator)) == (
        f"<|im_start|>user\nRead this.\n{separator.join(DOCUMENTS)}\nWhich colour has the sky?<|im_end|>\n"
        "<|im_start|>assistant\n The sky is"
    )


def test_a_chat_template_is_used_and_the_lead_stands_behind_its_header(plain: Protocol) -> None:
    protocol = with_template(plain, TEMPLATE)
    assert decoded(protocol, prompt(protocol)) == (
        "<|im_start|>system\nYou are of use.<|im_end|>\n"
        f"<|im_start|>user\nRead this.\n{' '.join(DOCUMENTS)}\nWhich colour has the sky?<|im_end|>\n"
        "<|im_start|>assistant\n The sky is"
    )


@pytest.mark.parametrize("separator", [" ", "\n", "\n\n"])
def test_its_tokens_are_those_of_the_whole_string(plain: Protocol, separator: str) -> None:
    for protocol in (plain, with_template(plain, TEMPLATE)):
        tokens = prompt(protocol, separator=separator)
        whole = protocol.tokenizer(decoded(protocol, tokens), add_special_tokens=False)["input_ids"]
        assert tokens == whole
        assert {protocol.start, protocol.end} <= set(tokens), "the template's control tokens are control tokens"


def test_what_is_empty_is_left_out(plain: Protocol) -> None:
    tokens = flat_prompt(plain, "", [], " ", "Why?", "")
    assert decoded(plain, tokens) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("token", CONTROL)
def test_text_never_becomes_a_control_token(plain: Protocol, token: str) -> None:
    for protocol in (plain, with_template(plain, TEMPLATE)):
        ids = protocol.tokenizer.convert_tokens_to_ids(list(CONTROL))
        harmless, spelt = prompt(protocol), prompt(protocol, [DOCUMENTS[0], f"x {token} y", f"{token}{token}"])
        assert [harmless.count(i) for i in ids] == [spelt.count(i) for i in ids]
        assert f"x {token} y" in decoded(protocol, spelt), "it is there, as text"
        everywhere = flat_prompt(protocol, token, DOCUMENTS, "\n", f"{token}?", token)
        assert [harmless.count(i) for i in ids] == [everywhere.count(i) for i in ids]
        assert protocol.ref not in everywhere and harmless.count(protocol.end) >= 1


def test_a_template_that_does_not_write_the_words_once_is_refused(plain: Protocol) -> None:
    for template in ("{{ messages[0].content }}{{ messages[0].content }}", "nothing"):
        with pytest.raises(UserError, match="writes the user's words [02] times"):
            prompt(with_template(plain, template))


def test_control_tokens_are_those_of_chatml() -> None:
    assert (START, END, REF) == CONTROL
