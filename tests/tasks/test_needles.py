"""Needle tasks: length, cut, gold and repetition, over all eight tasks, held against the flat text."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from datamodules.tasks import NeedleTask, haystacks
from datamodules.tasks.haystacks import Prose, addresses, shipped_prose
from datamodules.tasks.ruler import ANSWER_TOKENS, NOISE, SETTINGS, word_list
from msa_train.errors import UserError
from msa_train.evaluation import Task
from msa_train.evaluation.prompts import flat_prompt
from msa_train.evaluation.task import Trial
from msa_train.protocol import Protocol
from tests.tasks.samples import NEEDLE, needle_protocol, texts

TASKS = list(SETTINGS)
ESSAYS = [task for task in TASKS if SETTINGS[task].haystack == "essay"]
LENGTHS = (1536, 4096, 7000)
SAMPLES = 4


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    return needle_protocol(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def opened(protocol: Protocol) -> dict[str, NeedleTask]:
    return {name: open_task(protocol, name) for name in TASKS}


@pytest.fixture(scope="module")
def drawn(opened: dict[str, NeedleTask]) -> dict[tuple[str, int], list[Trial]]:
    """All trials of all tasks and lengths."""
    return {(name, length): list(task.trials(length)) for name, task in opened.items() for length in LENGTHS}


def open_task(protocol: Protocol, name: str, **arguments: Any) -> NeedleTask:
    task = NeedleTask(**{"task": name, "samples": SAMPLES, "document_tokens": 256, **arguments})
    task.open(protocol)
    return task


def prompt_tokens(protocol: Protocol, task: Task, length: int, trial: Trial) -> list[int]:
    (asked,) = trial.asked
    return flat_prompt(protocol, asked.preamble, texts(task, length, trial), task.separator, asked.text, asked.lead)


def hidden_key(trial: Trial) -> str:
    """The key that is asked for."""
    found = re.search(r" for (.+?) mentioned", trial.asked[0].text)
    assert found is not None
    return found[1]


def hidden(text: str) -> list[tuple[str, str]]:
    """Key and value of every needle in a text, in order."""
    return NEEDLE.findall(text)


# --- the flat text, and the cut ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", TASKS)
def test_documents_joined_are_the_haystack_with_its_needles(
    opened: dict[str, NeedleTask], drawn: dict[Any, list[Trial]], name: str, length: int
) -> None:
    task, setting = opened[name], SETTINGS[name]
    essay = list(islice((word for s in cycle(shipped_prose("evaluation").sentences) for word in s.split(" ")), length))
    for trial in drawn[name, length]:
        flat = task.separator.join(texts(task, length, trial))
        assert flat == flat.strip() and "  " not in flat and "\n\n" not in flat
        needles = setting.keys * setting.values
        if setting.haystack == "needle":
            assert all(NEEDLE.fullmatch(line) for line in flat.split("\n"))
            assert flat.count("\n") > needles
        elif setting.haystack == "noise":
            lines = flat.split("\n")
            assert sum(bool(NEEDLE.fullmatch(line)) for line in lines) == needles == len(hidden(flat))
            assert lines.count(NOISE) == len(lines) - needles > 0
        else:
            words = re.sub(NEEDLE, "", flat).split()
            assert words == essay[: len(words)], "the first words of the haystack, and nothing else"
            assert len(hidden(flat)) == needles and len(words) > length // 5


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", TASKS)
def test_needles_lie_whole_in_one_document_each_and_gold_are_those_of_the_asked(
    opened: dict[str, NeedleTask], drawn: dict[Any, list[Trial]], name: str, length: int
) -> None:
    for trial in drawn[name, length]:
        found = texts(opened[name], length, trial)
        (asked,) = trial.asked
        flat = opened[name].separator.join(found)
        assert sum(len(hidden(text)) for text in found) == len(hidden(flat)), "none is cut in two"
        holders = {number for number, text in enumerate(found, start=1) for _, v in hidden(text) if v in asked.answers}
        assert asked.gold == tuple(sorted(holders)) and 1 <= len(asked.gold) <= len(asked.answers)
        assert all(
            f" {key} " in asked.text or f" {key}," in asked.text for key, v in hidden(flat) if v in asked.answers
        )
        assert len(asked.answers) == SETTINGS[name].asked * SETTINGS[name].values
        assert all(flat.count(value) == 1 for value in asked.answers)


@pytest.mark.parametrize("name", [task for task in TASKS if SETTINGS[task].haystack != "needle"])
def test_the_cut_does_not_know_the_needles(
    opened: dict[str, NeedleTask], drawn: dict[Any, list[Trial]], name: str
) -> None:
    task, length = opened[name], LENGTHS[-1]
    pool, changed = task.pool(length), 0
    for trial in drawn[name, length]:
        found = texts(task, length, trial)
        last = len(found)
        assert trial.pool in (last, last - 1) and trial.pool <= len(pool)
        assert set(trial.own) == {n for n, text in enumerate(found, start=1) if hidden(text) or n > trial.pool}
        for number, text in enumerate(found, start=1):
            if not hidden(text) and number <= trial.pool:
                assert text == pool[number - 1].text
            blind = task.separator.join(re.sub(rf"\s*{NEEDLE.pattern}", "", text).split(task.separator)).strip()
            assert blind == pool[number - 1].text if number <= trial.pool else pool[number - 1].text.startswith(blind)
            changed += number in trial.own
    assert changed > SAMPLES


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_where_the_haystack_is_needles_samples_share_it_and_hide_one_of_their_own(
    opened: dict[str, NeedleTask], drawn: dict[Any, list[Trial]], name: str
) -> None:
    pool, asked = opened[name].pool(4096), set()
    lines = [line for passage in pool for line in passage.text.split("\n")]
    assert len(set(lines)) == len(lines), "every line says something new"
    for trial in drawn[name, 4096]:
        found = texts(opened[name], 4096, trial)
        whole = "\n".join(found).split("\n")
        (own,) = set(whole) - set(lines)
        assert own.endswith(f"{trial.asked[0].answers[0]}.") and len(found) > 3
        whole.remove(own)
        assert whole == lines[: len(whole)]
        assert len(trial.own) <= 2, "the rest is the pool's"
        assert min(len(hidden(text)) for text in found[:-1]) > 1, "several needles a document"
        asked.add(own)
    assert len(asked) == SAMPLES


def test_words_for_training_are_no_keys_of_evaluation(protocol: Protocol) -> None:
    adjectives = set(word_list("adjective"))
    task = open_task(protocol, "niah_multikey_2", half="training")
    evaluated = open_task(protocol, "niah_multikey_2")
    keys, others = (
        [key for passage in one.pool(20_000) for key, _ in hidden(passage.text)] for one in (task, evaluated)
    )
    assert len(keys) > 300 and not any(key.startswith(f"{word}-") for key in keys for word in adjectives)
    assert all(any(key.startswith(f"{word}-") for word in adjectives) for key in others)
    assert all(asked not in adjectives for trial in task.trials(1536) for asked in [hidden_key(trial).split("-")[0]])


# --- length --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_and_its_answer_are_never_longer_than_asked_and_hardly_shorter(
    protocol: Protocol, opened: dict[str, NeedleTask], drawn: dict[Any, list[Trial]], name: str, length: int
) -> None:
    essay = SETTINGS[name].haystack == "essay"
    for trial in drawn[name, length]:
        (asked,) = trial.asked
        tokens = prompt_tokens(protocol, opened[name], length, trial)
        assert len(tokens) + ANSWER_TOKENS <= length
        flat = opened[name].separator.join(texts(opened[name], length, trial))
        words = f"{asked.preamble}\n{flat}\n{asked.text}"
        written = f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n {asked.lead}"
        whole = protocol.tokenizer(written, add_special_tokens=False)["input_ids"]
        assert len(whole) == len(tokens), "encoded as one string, it is as long"
        assert all(list(own.tokens) == protocol.text(f" {own.text}") for own in trial.own.values())
        unit = 1 + max(map(len, protocol.texts(flat.split(opened[name].separator))))
        step = 500 if essay else 25 if length >= 4096 else 5
        assert len(tokens) + ANSWER_TOKENS + unit * (step + 1) > length
        assert trial.tokens == sum(len(passage.tokens) for passage in passages(opened[name], length, trial))


def passages(task: NeedleTask, length: int, trial: Trial) -> list[Any]:
    pool = task.pool(length)
    return [trial.own.get(n) or pool[n - 1] for n in range(1, max([trial.pool, *trial.own]) + 1)]


@pytest.mark.parametrize("name", TASKS)
def test_the_first_sample_has_no_room_for_one_unit_more(
    protocol: Protocol, opened: dict[str, NeedleTask], drawn: dict[Any, list[Trial]], name: str
) -> None:
    trial = drawn[name, 4096][0]
    task, unit = opened[name], {"noise": f"\n{NOISE}", "needle": f"\n{trial.own[max(trial.own)].text[:90]}"}
    missing = 4096 - ANSWER_TOKENS - len(prompt_tokens(protocol, task, 4096, trial))
    assert 0 <= missing < len(protocol.text(unit.get(SETTINGS[name].haystack, " a-rather-long-word, longer than any")))


@pytest.mark.parametrize("name", TASKS)
def test_a_length_that_holds_nothing_is_refused(opened: dict[str, NeedleTask], name: str) -> None:
    with pytest.raises(UserError, match=rf"^length 200: {name} needs about \d+ tokens at least; give a longer one$"):
        next(opened[name].trials(200))


def test_short_lengths_work_down_to_the_one_that_is_named(opened: dict[str, NeedleTask]) -> None:
    task = opened["niah_multivalue"]
    with pytest.raises(UserError) as refused:
        next(task.trials(200))
    needed = int(re.search(r"about (\d+)", str(refused.value)).group(1))  # type: ignore[union-attr]
    assert next(task.trials(needed + 20)).asked[0].gold == (1,)


def test_without_rulers_prefix_the_answer_begins_freely(protocol: Protocol) -> None:
    led, free = (open_task(protocol, "niah_single_1", answer_prefix=prefix) for prefix in ("ruler", "none"))
    one, other = next(led.trials(1536)).asked[0], next(free.trials(1536)).asked[0]
    assert (one.text, one.answers, one.preamble) == (other.text, other.answers, other.preamble)
    assert one.lead.startswith("The special magic number for ") and one.lead.endswith(" is") and other.lead == ""


# --- the pool ------------------------------------------------------------------------------------------------------


def test_essay_tasks_share_one_pool_and_the_others_have_their_own(opened: dict[str, NeedleTask]) -> None:
    names = {task: opened[task].pool_name for task in TASKS}
    assert len({names[task] for task in ESSAYS}) == 1 and len(ESSAYS) == 5
    assert len(set(names.values())) == 4
    first, *others = (opened[task].pool(4096) for task in ESSAYS)
    for other in others:
        assert all(one is another for one, another in zip(first, other, strict=True)), "cut and tokenised once"


def test_the_pool_is_named_after_text_and_cut(protocol: Protocol, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("It rained. " * 50)
    variants: list[dict[str, Any]] = [
        {}, {"half": "training"}, {"document_tokens": 128}, {"haystack_path": str(tmp_path / "own.txt")},
    ]  # fmt: skip
    assert len({open_task(protocol, "niah_single_2", **variant).pool_name for variant in variants}) == 4


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multiquery"])
def test_a_shorter_memorys_pool_begins_a_longer_ones(protocol: Protocol, name: str) -> None:
    rising, falling = open_task(protocol, name), open_task(Protocol(protocol.tokenizer), name)  # cut apart
    pools = {length: [p.id for p in rising.pool(length)] for length in (1000, 2000, 6000)}
    assert 0 < len(pools[1000]) < len(pools[2000]) < len(pools[6000])
    for shorter, longer in pairwise(pools.values()):
        assert longer[: len(shorter)] == shorter
    for length in reversed(pools):
        assert [p.id for p in falling.pool(length)] == pools[length], "whatever was asked for before"
    assert rising.reach() is None


def test_no_document_is_longer_than_asked_before_it_has_a_needle(
    protocol: Protocol, opened: dict[str, NeedleTask]
) -> None:
    for name in ("niah_single_1", "niah_single_2"):
        sizes = [len(passage.tokens) for passage in opened[name].pool(20_000)]
        assert max(sizes) <= 256 and sum(sizes) / len(sizes) > 200, "and they are well filled"
        assert all(list(p.tokens) == protocol.text(f" {p.text}") for p in opened[name].pool(2000))


@pytest.mark.parametrize("name", TASKS)
def test_names_are_unique_in_a_memory_and_over_pool_and_trials(
    opened: dict[str, NeedleTask], drawn: dict[Any, list[Trial]], name: str
) -> None:
    own = [passage.id for length in LENGTHS for trial in drawn[name, length] for passage in trial.own.values()]
    every = own + [passage.id for passage in opened[name].pool(LENGTHS[-1])]
    assert len(set(every)) == len(every) > SAMPLES


# --- chance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_depends_on_seed_task_length_and_number_alone(
    protocol: Protocol, drawn: dict[Any, list[Trial]], name: str
) -> None:
    def shown(trials: list[Trial]) -> list[Any]:
        return [
            (trial.asked, trial.pool, trial.tokens, {n: (p.id, p.text) for n, p in trial.own.items()})
            for trial in trials
        ]

    kept = shown(drawn[name, 1536])
    few = shown(list(open_task(protocol, name, samples=2).trials(1536)))
    assert few == kept[:2], "a fresh task that has seen no other length, and fewer samples"
    assert len({trial.asked[0].answers for length in LENGTHS for trial in drawn[name, length]}) == 3 * SAMPLES
    other = shown(list(open_task(protocol, name, samples=1, seed=43).trials(1536)))
    assert other[0][0][0].answers != kept[0][0][0].answers
    assert [trial.asked[0].id for trial in drawn[name, 1536]] == ["0", "1", "2", "3"]


def test_gold_is_spread_over_the_memory_and_depth_says_where(protocol: Protocol) -> None:
    for name in ("niah_single_1", "niah_single_2", "niah_multikey_2"):
        task = open_task(protocol, name, samples=40, document_tokens=64)
        depths = []
        for trial in task.trials(1536):
            (asked,) = trial.asked
            before = sum(len(passage.tokens) for passage in passages(task, 1536, trial)[: asked.gold[0] - 1])
            assert asked.depth == pytest.approx(before / trial.tokens)
            depths.append(asked.depth)
        quarters = Counter(int(4 * depth) for depth in depths)
        assert (
            min(depths) < 0.1
            and max(depths) > 0.85
            and sorted(quarters) == [0, 1, 2, 3]
            and min(quarters.values()) >= 5
        ), quarters


def test_needles_of_an_essay_stand_at_sentence_starts_of_the_depth_grid(protocol: Protocol) -> None:
    task = open_task(protocol, "niah_multikey_1", samples=30)
    sentences = shipped_prose("evaluation").sentences
    starts = [0]
    for sentence in sentences[:900]:
        starts.append(starts[-1] + len(sentence.split(" ")))
    drawn_depths = Counter[int]()
    for trial in task.trials(7000):
        flat = " ".join(texts(task, 7000, trial))
        words = re.sub(NEEDLE, "", flat).split()
        count = sum(start < len(words) for start in starts)
        grid = {min(count * depth // 100, count): depth for depth in (round(100 * n / 39) for n in range(40))}
        begun = re.split(NEEDLE.pattern.replace("(.+?)", ".+?").replace("([0-9a-f-]+)", "[0-9a-f-]+"), flat)
        place = 0
        for before in begun[:-1]:
            place += len(before.split())
            assert place == len(words) or place in starts
            index = count if place == len(words) else starts.index(place)
            assert index in grid
            drawn_depths[index * 100 // count] += 1
    assert sum(drawn_depths.values()) == 4 * 30 and min(drawn_depths) < 5 and max(drawn_depths) == 100


def test_four_needles_have_four_places(protocol: Protocol) -> None:
    for trial in open_task(protocol, "niah_multivalue", samples=30, document_tokens=16).trials(7000):
        assert len(trial.asked[0].gold) >= 2
    grouped = [len(trial.asked[0].gold) for trial in open_task(protocol, "niah_multivalue", samples=30).trials(7000)]
    assert max(grouped) == 4, "most often in four documents"


# --- scoring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_the_right_values_score_one_and_silence_nothing(
    opened: dict[str, NeedleTask], drawn: dict[Any, list[Trial]], name: str
) -> None:
    task = opened[name]
    assert (task.name, task.metric, task.answers) == (name, "accuracy", True)
    for trial in drawn[name, 4096]:
        (asked,) = trial.asked
        assert task.score(asked, ", ".join(asked.answers).upper()) == {"accuracy": 1.0}
        assert task.score(asked, "") == task.score(asked, "I do not know.") == {"accuracy": 0.0}
        assert task.score(asked, asked.text + asked.lead) == {"accuracy": 0.0}, "the question does not give it away"
        share = 1 / len(asked.answers)
        assert task.score(asked, f"It is {asked.answers[-1]}, or 1234567.") == {"accuracy": share}


def test_scoring_sees_the_answer_alone(opened: dict[str, NeedleTask], drawn: dict[Any, list[Trial]]) -> None:
    task, trial = opened["niah_single_2"], drawn["niah_single_2", 4096][0]
    (asked,) = trial.asked
    injected = trial.own[asked.gold[0]].text
    assert asked.answers[0] in injected and task.score(asked, injected)["accuracy"] == 1.0, "so it must not be shown it"
    assert not any(hidden(str(value)) for value in vars(asked).values()), "and a question brings no document along"


# --- haystacks -----------------------------------------------------------------------------------------------------


def test_shipped_halves_have_no_address_in_common() -> None:
    every = addresses()
    assert len(every) == len(set(every)) == 233
    evaluation, training = shipped_prose("evaluation"), shipped_prose("training")
    assert " ".join(evaluation.sentences) == " ".join(every[0::2])
    assert " ".join(training.sentences) == " ".join(every[1::2])
    assert evaluation.digest != training.digest


def test_the_splitter_is_the_one_that_results_were_made_with() -> None:
    sentences = shipped_prose("evaluation").sentences
    assert len(sentences) == 31_691
    assert hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:16] == "ee057fcdd6849ad7"


def test_a_damaged_haystack_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haystacks, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="state_of_the_union.txt.xz is damaged"):
        addresses()


def test_the_text_of_the_user_is_taken_whole_and_repeats_when_it_ends(protocol: Protocol, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("The first  word.\n\nA second sentence, longer. And the end!")
    task = open_task(protocol, "niah_single_2", haystack_path=str(own))
    trial = next(task.trials(1536))
    words = re.sub(NEEDLE, "", " ".join(texts(task, 1536, trial))).split()
    assert words == list(islice(cycle(own.read_text().split()), len(words))) and len(words) > 100
    assert task.about()["definition"] == "NIAH (RULER definition, other haystack)"


def test_haystacks_that_cannot_be_read_are_refused(protocol: Protocol, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n ")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, why in (("missing.txt", "cannot be read"), ("empty.txt", "has no words"), ("latin.txt", "is not UTF-8")):
        with pytest.raises(UserError, match=rf"^haystack_path: .*{name} {why}"):
            open_task(protocol, "niah_single_2", haystack_path=str(tmp_path / name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "niah_single_4"}, "task is 'niah_single_4': give one of niah_single_1, "),
        ({"half": "both"}, "half is 'both': give one of evaluation, training"),
        ({"answer_prefix": "yes"}, "answer_prefix is 'yes': give one of ruler, none"),
        ({"samples": 0}, "samples is 0: give at least 1"),
        ({"document_tokens": -1}, "document_tokens is -1: give at least 1"),
        ({"haystack_path": "x", "half": "training"}, "half is 'training', of the shipped text: leave it out"),
    ],
)
def test_arguments_without_such_a_value_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        NeedleTask(**{"task": "niah_single_1", **arguments})
    assert str(refused.value).startswith(message)


def test_what_makes_results_comparable_is_told(opened: dict[str, NeedleTask]) -> None:
    about = opened["niah_multikey_1"].about()
    assert about["definition"] == "NIAH (RULER definition, public-domain haystack)"
    assert about["haystack"] == opened["niah_single_2"].pool_name and about["wonderwords"].startswith("3.")
    assert (about["answer_prefix"], about["seed"], about["document_tokens"]) == ("ruler", "42", "256")


def test_sentences_end_where_prose_says() -> None:
    assert Prose.of('He said "Yes." Then  he\nleft. Why?').sentences == ('He said "Yes."', "Then he left.", "Why?")


def test_the_documentation_names_tests_that_exist() -> None:
    root = Path(__file__).parents[2]
    named = set(re.findall(r"`(test_\w+)`", (root / "docs" / "evaluation.md").read_text()))
    written = {
        name for file in (root / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert len(named) > 20 and named <= written, named - written
