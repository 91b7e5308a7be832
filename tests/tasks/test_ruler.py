"""What is drawn for a sample is RULER's: the eight settings, the words, the keys and values, their order."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from itertools import islice
from random import Random

import numpy as np
import pytest

from datamodules.tasks import ruler
from datamodules.tasks.ruler import DEPTHS, ORDER, SETTINGS, Drawn, draw, lines, word_list
from tests.tasks.samples import NEEDLE

# task: haystack, key type, value type, keys, values per key, keys asked, needles placed, answers
TABLE = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1, 4, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1, 4, 4),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4, 4, 4),
}


def sample(task: str, seed: int = 0) -> Drawn:
    return draw(SETTINGS[task], Random(seed))  # type: ignore[index]


def said(drawn: Drawn) -> list[tuple[str, str]]:
    """Key and value of every needle, in the order of placing."""
    return [match.groups() for needle in drawn.needles if (match := NEEDLE.fullmatch(needle))]  # type: ignore[misc]


def test_there_are_eight_tasks() -> None:
    assert list(SETTINGS) == list(TABLE)


@pytest.mark.parametrize("task", TABLE)
def test_settings_and_what_they_draw_are_those_of_the_table(task: str) -> None:
    haystack, key, value, keys, values, asked, placed, answers = TABLE[task]
    setting, drawn = SETTINGS[task], sample(task)  # type: ignore[index]
    assert (setting.haystack, setting.key, setting.value) == (haystack, key, value)
    assert (setting.keys, setting.values, setting.asked) == (keys, values, asked)
    assert len(drawn.needles) == len(said(drawn)) == len(drawn.wanted) == placed
    assert len(drawn.answers) == sum(drawn.wanted) == answers
    assert len({key for key, _ in said(drawn)}) == keys
    patterns = {"numbers": r"[1-9][0-9]{6}", "uuids": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}
    assert all(re.fullmatch(patterns[value], answer) for answer in drawn.answers)
    if key == "uuids":
        assert all(re.fullmatch(patterns["uuids"], key) for key, _ in said(drawn))


@pytest.mark.parametrize("task", TABLE)
def test_answers_are_the_values_of_the_keys_that_the_question_names(task: str) -> None:
    for seed in range(20):
        drawn = sample(task, seed)
        named = re.search(r" for (.+) mentioned", drawn.question).group(1)  # type: ignore[union-attr]
        keys = re.split(r", and |, ", named)
        wanted = [value for key in keys for place, value in said_unshuffled(drawn) if place == key]
        assert drawn.answers == tuple(wanted)
        assert [key in keys for key, _ in said(drawn)] == list(drawn.wanted)


def said_unshuffled(drawn: Drawn) -> list[tuple[str, str]]:
    """Key and value in the order of drawing."""
    places = ORDER[len(drawn.needles)]
    return [said(drawn)[places.index(place)] for place in range(len(places))]


def test_words_of_one_answer_are_singular_but_for_the_needle() -> None:
    drawn = sample("niah_single_3")
    ((key, value),) = said(drawn)
    assert drawn.needles == (f"One of the special magic uuids for {key} is: {value}.",)
    assert drawn.preamble == (
        "A special magic uuid is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the uuid afterwards."
    )
    assert drawn.question == f"What is the special magic uuid for {key} mentioned in the provided text?"
    assert drawn.lead == f"The special magic uuid for {key} mentioned in the provided text is"


def test_words_of_several_answers_are_plural_and_list_the_keys() -> None:
    drawn = sample("niah_multiquery")
    named = re.search(r" for (.+) mentioned", drawn.question).group(1)  # type: ignore[union-attr]
    one, two, three, four = re.split(r", and |, ", named)
    assert named == f"{one}, {two}, {three}, and {four}"
    assert {one, two, three, four} == {key for key, _ in said(drawn)}
    assert drawn.preamble == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards."
    )
    assert drawn.question == f"What are all the special magic numbers for {named} mentioned in the provided text?"
    assert drawn.lead == f"The special magic numbers for {named} mentioned in the provided text are"
    assert sample("niah_multivalue").preamble == drawn.preamble


@pytest.mark.parametrize("name", ["PREAMBLE", "QUESTION", "LEAD"])
def test_singular_is_rulers_replacement_on_the_tasks_words_alone(name: str) -> None:
    replaced = getattr(ruler, name)
    for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is")):
        replaced = replaced.replace(plural, singular)
    assert getattr(ruler, f"ONE_{name}") == replaced


def test_needles_are_always_shuffled_the_same_way() -> None:
    for count, order in ORDER.items():
        shuffled = list(range(count))
        Random(42).shuffle(shuffled)
        assert order == tuple(shuffled)
    assert "".join("abcd"[place] for place in ORDER[4]) == "cbda"


def test_depths_are_forty_rounded_even_steps() -> None:
    assert tuple(np.round(np.linspace(0, 100, 40)).astype(int)) == DEPTHS
    assert len(set(DEPTHS)) == 40 and DEPTHS[:6] == (0, 3, 5, 8, 10, 13) and DEPTHS[-3:] == (95, 97, 100)


def test_any_of_four_keys_may_be_asked_for_and_four_in_any_order() -> None:
    places = Counter(sample("niah_multikey_1", seed).wanted.index(True) for seed in range(400))
    assert sorted(places) == [0, 1, 2, 3] and min(places.values()) > 60
    orders = {tuple(map(drawn.answers.index, (value for _, value in said(drawn)))) for drawn in
              (sample("niah_multiquery", seed) for seed in range(400))}  # fmt: skip
    assert len(orders) == 24


def test_numbers_are_uniform_over_seven_digits() -> None:
    values = [int(sample("niah_single_2", seed).answers[0]) for seed in range(3000)]
    assert min(values) >= 1_000_000 and max(values) <= 9_999_999
    ninths = Counter(value // 1_000_000 for value in values)
    assert sorted(ninths) == list(range(1, 10)) and min(ninths.values()) > 250


def test_uuids_are_of_version_four() -> None:
    for seed in range(50):
        (value,) = sample("niah_single_3", seed).answers
        assert value == str(uuid.UUID(value)) and uuid.UUID(value).version == 4


def test_keys_are_any_adjective_with_any_noun() -> None:
    adjectives, nouns = set(word_list("adjective")), set(word_list("noun"))
    assert len(adjectives) * len(nouns) == 6_171_620
    # drawing the two apart is drawing from the set of pairs, for no two pairs read the same
    halves = {noun.partition("-")[0] for noun in nouns if "-" in noun}
    assert halves and not any(f"{one}-{half}" in adjectives for one in adjectives for half in halves)
    keys = [said(sample("niah_single_2", seed))[0][0] for seed in range(300)]
    cuts = [[(key[: m.start()], key[m.end() :]) for m in re.finditer("-", key)] for key in keys]
    assert all(sum(one in adjectives and two in nouns for one, two in cut) == 1 for cut in cuts)
    assert len(set(keys)) == 300 and len({cut[0][0] for cut in cuts}) > 200


def test_a_haystack_of_needles_says_something_new_on_every_line() -> None:
    some = list(islice(lines(SETTINGS["niah_multikey_3"], Random(1)), 500))
    assert len(set(some)) == 500
    assert all(NEEDLE.fullmatch(line) for line in some)
    found = [match.groups() for line in some if (match := NEEDLE.fullmatch(line))]
    assert len({key for key, _ in found}) == len({value for _, value in found}) == 500


def test_the_same_generator_draws_the_same_sample() -> None:
    assert sample("niah_multiquery", 3) == sample("niah_multiquery", 3) != sample("niah_multiquery", 4)
