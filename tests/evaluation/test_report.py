"""The report: all that was measured, readable again, and nothing in it can break it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_train.errors import UserError
from msa_train.evaluation.evaluate import DEPTHS, Row
from msa_train.evaluation.report import FILE, TABLES, Evaluation, Report, label, parse_length
from msa_train.evaluation.scores import Mean

K = 2**10


def row(method: str, task: str, length: int, value: float, n: int = 20, **scores: Mean) -> Row:
    metric = "recall@1" if task == "finding" else "f1"
    depths = ((0.0, 0),) * (DEPTHS - 2) + ((0.25, 8), (1.0, 12))
    mean = Mean(value, value - 0.125, value + 0.0625, n)
    return Row(method, task, length, 0.9 * length, length / 100, {metric: mean, **scores}, depths, 1.5)


def evaluation(step: int, value: float = 0.5) -> Evaluation:
    rows = [
        row("router", "finding", 4 * K, value), row("router", "answers", 4 * K, 0.875, empty=Mean(0.1, 0.0, 0.2, 21)),
        row("router", "finding", 16 * K, value / 2, 19), row("router", "answers", 16 * K, 0.625),
        row("bm25", "finding", 4 * K, 0.25, 18), Row("bm25", "answers", 4 * K, note="left out: no time is left"),
        row("bm25", "finding", 16 * K, 0.1875, 17),
        replace(row("bm25", "answers", 16 * K, 0.3125, 16), note="ended early: no time for more questions"),
    ]  # fmt: skip
    return Evaluation(step, 12.5, {"mode": "router", "keys": "bfloat16"}, rows,
                      {"finding": "recall@1", "answers": "f1"})  # fmt: skip


@pytest.fixture
def report() -> Report:
    return Report(4 * K, 16, [evaluation(30), evaluation(700, 0.75)])


def text(report: Report) -> str:
    return json.dumps(report.json())


# --- there and back ----------------------------------------------------------------------------------------------


def test_what_is_saved_is_opened_again(report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    report.save(folder)
    assert Report.open(folder) == report and Report.of(json.loads(text(report))) == report
    assert sorted(path.name for path in folder.iterdir()) == sorted([FILE, TABLES])
    assert (folder / TABLES).read_bytes().decode() == report.markdown()
    later = report.with_evaluation(evaluation(900))
    later.save(folder)
    assert Report.open(folder) == later != report


def test_a_report_of_nothing_yet_survives_a_checkpoint() -> None:
    assert Report.of(Report(4608, 16, []).json()) == Report(4608, 16, [])


def test_an_evaluation_takes_the_place_of_an_earlier_one_of_its_step(report: Report) -> None:
    again = evaluation(30, 0.875)
    assert report.with_evaluation(again).evaluations == [again, report.evaluations[1]]
    between = evaluation(31)
    assert [one.step for one in report.with_evaluation(between).evaluations] == [30, 31, 700]
    assert len(report.evaluations) == 2, "and is another report"


def alone(step: int) -> Evaluation:
    """Baselines without the router."""
    whole = evaluation(step)
    return replace(whole, rows=[one for one in whole.rows if one.method != "router"])


def test_baselines_alone_take_the_place_of_no_evaluation_of_the_model(report: Report) -> None:
    both = report.with_evaluation(alone(700)).with_evaluation(alone(30)).with_evaluation(alone(800))
    assert [one.name for one in both.evaluations] == ["30", "30-baselines", "700", "700-baselines", "800-baselines"]
    assert both.latest == report.evaluations[1] and both.with_evaluation(alone(30)) == both
    assert Report(4 * K, 16, [alone(0), alone(5)]).latest == alone(5), "where nothing else is there"
    course = tables(both.markdown())[-1]
    assert [cells[0] for cells in course] == ["step", "30", "700"]
    told = both.markdown(alone(30))
    assert told.startswith("# Extrapolation after 30 steps\n") and "over steps" not in told and "| router" not in told


def test_a_report_until_a_step_has_no_later_evaluation(report: Report) -> None:
    assert report.until(699).evaluations == [evaluation(30)] and report.until(700) == report
    assert report.until(29).evaluations == []


def test_tables_are_of_the_evaluation_that_is_shown(report: Report, tmp_path: Path) -> None:
    first = report.evaluations[0]
    report.save(tmp_path, first)
    assert (tmp_path / TABLES).read_text() == report.markdown(first) != report.markdown()
    assert report.markdown(first).startswith("# Extrapolation after 30 steps\n")
    assert Report.open(tmp_path) == report


# --- damage ------------------------------------------------------------------------------------------------------


def opened(folder: Path, content: str | bytes) -> Report | None:
    """The report of a folder with this file; None where it is refused as it should be."""
    (folder / FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        found = Report.open(folder)
    except UserError as error:
        assert str(folder / FILE) in str(error) and "evaluate the run again" in str(error) and "\n" not in str(error)
        return None
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def test_where_there_is_none_it_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}: no report.json; .*callbacks.ExtrapolationEvaluation.*msa-train"):
        Report.open(tmp_path)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_file_that_was_cut_off_is_refused(folder: Path, data: st.DataObject) -> None:
    whole = text(Report(4 * K, 16, [evaluation(30)]))
    assert opened(folder, whole[: data.draw(st.integers(0, len(whole) - 1))]) is None


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_file_with_other_bytes_in_it_is_refused_or_read(folder: Path, data: st.DataObject) -> None:
    whole = bytearray(text(Report(4 * K, 16, [evaluation(30)])).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    found = opened(folder, bytes(whole))
    if found is not None:
        found.markdown()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a tree."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=4),
    st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2),
)  # fmt: skip


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_file_in_which_something_is_something_else_is_refused_or_can_be_shown(
    folder: Path, data: st.DataObject
) -> None:
    values = json.loads(text(Report(4 * K, 16, [evaluation(30), evaluation(31)])))
    path = data.draw(st.sampled_from(list(places(values))))
    part = values
    for key in path[:-1]:
        part = part[key]
    if data.draw(st.booleans()):
        part[path[-1]] = data.draw(JUNK)
    elif isinstance(part, dict) and data.draw(st.booleans()):
        part[data.draw(st.text(max_size=3))] = data.draw(JUNK)
    else:
        del part[path[-1]]
    found = opened(folder, json.dumps(values))
    if found is not None and found.evaluations:
        found.markdown()
        assert text(Report.of(json.loads(text(found)))) == text(found)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"1", b'"report"', b"\xff\xfe", b"[" * 100_000,
                                     b'{"format": 2, "trained": 1, "k": 1, "evaluations": []}',
                                     b'{"format": 1, "trained": 1e999, "k": 1, "evaluations": []}',
                                     b'{"format": 1, "trained": 1, "k": NaN, "evaluations": []}'])  # fmt: skip
def test_what_is_no_report_is_refused(folder: Path, content: bytes) -> None:
    assert opened(folder, content) is None


# --- tables ------------------------------------------------------------------------------------------------------


def tables(markdown: str) -> list[list[list[str]]]:
    """Cells of every table, its head first."""
    found: list[list[list[str]]] = []
    lines = markdown.split("\n")
    for number, line in enumerate(lines):
        if line.startswith("|"):
            if not lines[number - 1].startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return [[rows[0], *rows[2:]] for rows in found]


def test_every_mean_stands_with_its_interval_and_its_number_of_questions(report: Report) -> None:
    finding, f1, empty, course = tables(report.markdown())
    assert finding == [
        ["recall@1", "4K (1x)", "16K (4x)", "lost"],
        ["router", "0.750 [0.62, 0.81] n=20", "0.375 [0.25, 0.44] n=19", "50.0%"],
        ["bm25", "0.250 [0.12, 0.31] n=18", "0.188 [0.06, 0.25] n=17", "25.0%"],
    ]
    assert f1 == [
        ["f1", "4K (1x)", "16K (4x)", "lost"],
        ["router", "0.875 [0.75, 0.94] n=20", "0.625 [0.50, 0.69] n=20", "28.6%"],
        ["bm25", "–", "0.312 [0.19, 0.38] n=16", "–"],
    ]
    assert empty == [["empty", "4K (1x)", "16K (4x)"], ["router", "0.100 [0.00, 0.20] n=21", "–"]]
    assert course == [
        ["step", "finding", "answers"],
        ["30", "0.250 [0.12, 0.31] n=19", "0.625 [0.50, 0.69] n=20"],
        ["700", "0.375 [0.25, 0.44] n=19", "0.625 [0.50, 0.69] n=20"],
    ]


def test_no_number_stands_alone(report: Report) -> None:
    for rows in tables(report.markdown()):
        for cells in rows[1:]:
            for cell in cells[1:]:
                assert re.fullmatch(r"–|-?[0-9.]+%|-?[0-9.]+ \[-?[0-9.]+, -?[0-9.]+\] n=[0-9]+", cell), cell


def test_whatever_was_left_out_has_its_reason_beside_it(report: Report) -> None:
    answers = report.markdown().partition("## answers")[2].partition("##")[0]
    assert "* bm25, 4K (1x): left out: no time is left\n" in answers
    assert "* bm25, 16K (4x): ended early: no time for more questions\n" in answers
    nothing = Evaluation(5, 1.0, {}, [Row("router", "finding", 4 * K, note="left out")], {"finding": "recall@1"})
    alone = Report(3000, 16, [nothing]).markdown()
    assert "Nothing was measured." in alone and "* router, 4K: left out" in alone
    assert "after 5 steps" in alone and "Trained on packs of 3,000 document tokens" in alone


def test_a_mean_over_tasks_stands_before_them_and_says_what_it_is_of(report: Report) -> None:
    last = report.evaluations[-1]
    mean = [replace(row("router", "niah_mean_of_2", length, 0.5), depths=()) for length in (4 * K, 16 * K)]
    lacking = Row("bm25", "niah_mean_of_2", 4 * K, note="no mean without answers")
    told = replace(
        last,
        rows=[*last.rows, *mean, lacking],
        metrics={"niah_mean_of_2": "f1", **last.metrics},
        settings={"tasks": {"niah_mean_of_2": {"mean of": "finding, answers"}}},
    )
    whole = Report.of(json.loads(text(replace(report, evaluations=[last, told]))))
    markdown = whole.markdown()
    assert markdown.index("## niah_mean_of_2") < markdown.index("## finding")
    first, *_, course = tables(markdown)
    assert first[1] == ["router", "0.500 [0.38, 0.56] n=20", "0.500 [0.38, 0.56] n=20", "0.0%"]
    assert course[0] == ["step", "niah_mean_of_2", "finding", "answers"] and course[1][1] == "–"
    assert "* bm25, 4K (1x): no mean without answers\n\nRecorded: mean of finding, answers.\n" in markdown


def test_settings_sizes_and_the_latest_step_are_told(report: Report) -> None:
    told = report.markdown()
    assert told.startswith("# Extrapolation after 700 steps\n") and "mode router, keys bfloat16; k is 16." in told
    assert "Documents, on average: 4K (1x): 41, 16K (4x): 164." in told


HOSTILE = ["a|b", "a\nb", "a\r\n| b | c |\n| --- | --- |", "# a", "a\\|b", "|", "a\u2028b\x0bc\x85d", " a\t\n\n* b"]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_a_table_or_begins_another_line(report: Report, name: str) -> None:
    def renamed(one: Row) -> Row:
        method = name if one.method == "bm25" else one.method
        task = name if one.task == "answers" else one.task
        return replace(one, method=method, task=task, note=one.note and f"{name}{one.note}")

    last = report.evaluations[-1]
    hostile = replace(
        last,
        rows=[renamed(one) for one in last.rows],
        metrics={"finding": "recall@1", name: "f1"},
        settings={name: name, "keys": "bfloat16"},
    )
    told, plain = (replace(report, evaluations=[report.evaluations[0], one]).markdown() for one in (hostile, last))
    lines = told.splitlines()
    assert len(lines) == len(plain.splitlines())
    assert [line[:2] for line in lines] == [line[:2] for line in plain.splitlines()]
    mine, theirs = tables(told), tables(plain)
    assert [[len(cells) for cells in rows] for rows in mine] == [[len(cells) for cells in rows] for rows in theirs]


# --- lengths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "trained", "told"),
    [(1, 0, "1"), (1000, 0, "1000"), (1023, 0, "1023"), (1024, 0, "1K"), (1536, 0, "1.5K"), (65_536, 0, "64K"),
     (1_048_576, 0, "1M"), (1_572_864, 0, "1.5M"), (16 * K, 4 * K, "16K (4x)"), (4 * K, 4 * K, "4K (1x)"),
     (6 * K, 4 * K, "6K"), (2 * K, 4 * K, "2K"), (100_000_000, 0, "100000000")],
)  # fmt: skip
def test_a_length_is_labelled_as_people_say_it(length: int, trained: int, told: str) -> None:
    assert label(length, trained) == told


@given(st.integers(1, 9999), st.sampled_from(["", "K", "M", "x"]))
def test_a_label_is_the_length_that_it_names(number: int, unit: str) -> None:
    trained = 4608
    length = parse_length(f"{number}{unit}", trained)
    assert length == number * {"": 1, "K": 2**10, "M": 2**20, "x": trained}[unit]
    assert parse_length(label(length), trained) == length
    assert label(length, trained).endswith("x)") == (length % trained == 0)


@pytest.mark.parametrize("words", ["", "x", "0", "0x", "-5", "1e6", "64 K", "64k", "K64", "6_000", "٣", "1.", "nan",
                                   "64x\n", "9" * 400, 0, -3, 1.5e300, None, True])  # fmt: skip
def test_what_is_no_length_is_refused_with_the_mend(words: Any) -> None:
    with pytest.raises(UserError, match=r"lengths: \S.* is no length; give tokens, like 65536, 64K or 1M, or 64x"):
        parse_length(words, 4608)
