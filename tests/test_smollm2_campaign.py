"""The campaign over SmolLM2's recipe: its queue, with a stand-in for msa-train, and what it gathers and prints."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import time
from argparse import Namespace
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import smollm2_memory
from benchmarks.smollm2_results import dumped, figure, gathered, of_run, tables
from benchmarks.smollm2_variants import GROUPS, VARIANTS, Variant, chosen, evaluation, overlay
from examples.smollm2_memory import EVALUATION, RECIPE
from msa_train.cli import build
from msa_train.folders import TRAINER, digests_of, folder_of, settle, start_aside

ROOT = Path(__file__).parent.parent
STAND_IN = """
import json, os, pathlib, sys, time, yaml

words = sys.argv[1:]
def of(option):
    return [words[place + 1] for place, word in enumerate(words) if word == option]
(name,), (runs,) = of("--name"), of("--runs")
run, work, kind = pathlib.Path(runs) / name, pathlib.Path(runs).parent, words[0]
run.mkdir(parents=True, exist_ok=True)
saved = [int(path.name[5:-5]) for path in run.glob("step=*.ckpt")]
def note(what):
    with (work / "calls.jsonl").open("a") as file:
        told = {"name": name, "kind": kind, "what": what, "gpu": os.environ["CUDA_VISIBLE_DEVICES"],
                "ckpt_path": of("--ckpt_path"), "saved": max(saved, default=0)}
        file.write(json.dumps(told) + "\\n")
note("begins")
hold, until = json.loads(os.environ.get("HOLD", "{}")).get(kind, 1), time.monotonic() + 20
while (work / "calls.jsonl").read_text().count(f'"{kind}", "what": "begins"') < hold and time.monotonic() < until:
    time.sleep(0.01)
broken = json.loads(os.environ.get("BROKEN", "{}"))
if broken.get(name) == kind:
    print("one line\\n\\nthe reason")
    sys.exit(3)
if kind == "fit":
    config = {"model": {"phases": [{"steps": 80}]}, "data": {"init_args": {"document_tokens": 8192}},
              "trainer": {"log_every_n_steps": 10, "accumulate_grad_batches": 1}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "routing.json").write_text("{}")
    for step in range(max(saved, default=0) + 20, 100, 20):
        (run / f"step={step}.ckpt").mkdir()
        time.sleep(5.0 if step == 40 and name == "seed0" and not saved else 0.05)  # long enough to be killed there
    (run / "metrics.csv").write_text("loss/lm,loss/routing,loss/total,step\\n1,2,3,79\\n")
    (run / "last.ckpt").symlink_to("step=80.ckpt")
else:
    assert all((pathlib.Path(weights) / ".").is_dir() for weights in of("--ckpt_path"))
    assert pathlib.Path(of("--config")[0]).is_file()
    asked = yaml.safe_load(pathlib.Path(of("--config")[-1]).read_text())["trainer"]["callbacks"][0]["init_args"]
    task = asked["tasks"][0]["init_args"]
    task = task.get("task", task.get("name"))
    row = {"method": "router", "task": task, "length": 8192, "scores": {}, "depths": [[1.0, 2]]}
    last = {"step": 80, "seconds": 1.5, "cut": name == "bm25-3", "rows": [row], "metrics": {task: "recall@1"},
            "settings": {"tasks": {task: {}}}, "ask": asked["ask"],
            "asked": [*(["router"] if asked["router"] else []), *asked["baselines"]],
            "weighed": (run / "routing.json").is_file()}
    report = {"format": 1, "trained": 8192, "k": 16, "evaluations": [last]}
    (run / "report.json").write_text(json.dumps(report))
note("ends")
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(smollm2_memory, "MSA_TRAIN", (sys.executable, str(tmp_path / "stand_in.py")))
    monkeypatch.setattr(smollm2_memory, "POLL_S", 0.02)
    monkeypatch.setattr(smollm2_memory.signal, "signal", lambda *_: None)  # that is the test runner's
    return tmp_path / "work"


def campaign(work: Path, *words: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs the script: what was called meanwhile, and what it gathered."""
    file = work / "calls.jsonl"
    before = len(calls(work))
    smollm2_memory.main([str(work), *words])
    assert file.is_file() or not before
    return calls(work)[before:], json.loads((work / smollm2_memory.RESULT).read_text())["variants"]


def arguments() -> Namespace:
    return Namespace(config=[], evaluation=[], gpus=["0", "1"], per_gpu=1, steps_factor=1.0, minutes=None, resume=False)


def calls(work: Path) -> list[dict[str, Any]]:
    file = work / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def told(made: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(call["name"], call["kind"]) for call in made if call["what"] == "begins"]


# --- the queue ------------------------------------------------------------------------------------------------------


def test_a_gpu_has_one_part_at_a_time_and_weights_are_there_before_they_are_evaluated(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOLD", '{"fit": 2}')  # the first waits for the second, so that neither GPU is idle
    names = ("seed0", "coupled", "focal", "generative", "equal_layers")
    made, found = campaign(work, "--only", *names, "--gpus", "4", "7")
    trained = {"seed0", "focal", "coupled"}
    assert sorted(told(made)) == sorted([
        ("seed0", "fit"), *((name, "fit") for name in trained), *((name, "test") for name in names)
    ])  # fmt: skip
    running: dict[str, str] = {}
    ended: set[tuple[str, str]] = set()
    for call in made:
        part = (call["name"], call["kind"])
        if call["what"] == "begins":
            if running.get(call["gpu"]) == "seed0 fit":  # it was killed, and so ended unseen
                assert part == ("seed0", "fit") and call["ckpt_path"] == ["last"] and call["saved"] == 40
            else:
                assert call["gpu"] not in running
            running[call["gpu"]] = " ".join(part)
            if call["kind"] == "test":
                over = VARIANTS[call["name"]].over or call["name"]
                assert (over, "fit") in ended
                assert call["ckpt_path"] == [str(work / "runs" / over / "last.ckpt")]
        else:
            del running[call["gpu"]]
            ended.add(part)
    assert {call["gpu"] for call in made} == {"4", "7"}

    assert list(found) == list(names), "in the order of the variants"
    assert [call["code"] for call in found["seed0"]["training"]] == [-9, 0]
    assert [call["code"] for call in found["focal"]["training"]] == [0]
    assert all(one["failed"] is None and one["evaluation"][-1]["code"] == 0 for one in found.values())
    reports = {name: one["report"] for name, one in found.items()}
    assert all(report["asked"] == ["router"] for report in reports.values())
    assert reports["generative"]["ask"] == {**reports["seed0"]["ask"], "mode": "generative"}
    assert {name: report["weighed"] for name, report in reports.items()} == {
        **dict.fromkeys(names, True), "equal_layers": False
    }  # fmt: skip
    assert all("depths" not in row for report in reports.values() for row in report["rows"])
    assert str(work) not in (work / smollm2_memory.RESULT).read_text(), "a folder of somebody's is nobody's business"
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " GPU " in line]
    assert sorted((name, kind) for name, kind, *_ in lines) == sorted(
        [*((name, "training") for name in trained), *((name, "evaluation") for name in names)]
    )


def test_baselines_are_asked_alone_and_without_weights(work: Path) -> None:
    made, found = campaign(work, "--only", "baselines")
    assert told(made) == [(name, "test") for name in GROUPS["baselines"]]
    assert all(call["ckpt_path"] == [] for call in made)
    assert [one["report"]["asked"] for one in found.values()] == [
        ["untrained"], ["bm25"], ["dense"], ["full_attention_beyond"]
    ]  # fmt: skip
    assert campaign(work, "--only", "baselines", "--resume")[0] == []


def test_as_many_evaluations_share_a_gpu_as_are_asked_for_and_a_training_has_it_alone(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLD", '{"test": 3}')  # none ends before the third begins
    made, found = campaign(work, "--only", "seed1", "seed2", "baselines", "--gpus", "0", "--per-gpu", "3")
    assert [call["kind"] for call in made[:4]] == ["fit"] * 4, "trainings come first, each to its end"
    running, most = 0, 0
    for call in made:
        running += 1 if call["what"] == "begins" else -1
        most = max(most, running)
        assert call["kind"] == "test" or running <= 1
    assert most == 3 and running == 0
    shared = {name: [call["per_gpu"] for call in one["evaluation"]] for name, one in found.items()}
    assert shared == {name: [1] if name == "full_attention" else [3] for name in found}
    assert {call["per_gpu"] for call in found["seed1"]["training"]} == {1}


def test_full_attention_has_its_gpu_alone() -> None:
    baselines = [smollm2_memory.Part(name, smollm2_memory.EVALUATING, name) for name in GROUPS["baselines"]]
    queue = smollm2_memory.Queue(baselines)
    first = [queue.take("0") for _ in range(3)]
    assert first == baselines[:3] and not queue.done(baselines[0], "0", True)
    assert not queue._may_begin(baselines[-1], queue.running["0"])
    last = queue.take("1")
    assert last == baselines[-1] and not queue._may_begin(baselines[0], queue.running["1"])


def test_the_second_signal_breaks_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    set_: dict[int, Any] = {}
    monkeypatch.setattr(smollm2_memory.signal, "signal", set_.__setitem__)
    with pytest.raises(KeyboardInterrupt):
        smollm2_memory.break_off(signal.SIGINT, None)
    assert set_ == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}


def test_an_evaluation_of_several_files_is_as_many_parts_and_one_report(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = yaml.safe_load((ROOT / EVALUATION).read_text())
    asked = whole["trainer"]["callbacks"][0]["init_args"]
    files = []
    needles, real, answers = asked["tasks"][:8], asked["tasks"][8], asked["tasks"][-1]
    for number, tasks_ in enumerate((needles, [answers], [real]), 1):
        asked["tasks"] = tasks_
        files.append(str(tmp_path / f"{number}.yaml"))
        Path(files[-1]).write_text(yaml.safe_dump(whole))
    names = ("focal", "bm25")
    monkeypatch.setenv("BROKEN", json.dumps({"focal-2": "test"}))
    with pytest.raises(SystemExit):
        campaign(work, "--only", *names, "--evaluation", *files, "--per-gpu", "2")
    partly = json.loads((work / smollm2_memory.RESULT).read_text())["variants"]
    assert partly["focal"]["failed"] == "exit code 3\none line\nthe reason", "of its own log"
    assert "Failed in part, so that rows are missing: focal." in tables({"variants": partly})
    monkeypatch.delenv("BROKEN")
    made, found = campaign(work, "--only", *names, "--evaluation", *files, "--resume")
    assert sorted(told(made)) == [("bm25-3", "test"), ("focal-2", "test")], "what was cut short, and what failed"
    assert made[-1]["ckpt_path"] == [str(work / "runs" / "focal" / "last.ckpt")]
    for name, weighed in (("focal", True), ("bm25", False)):
        report = found[name]["report"]
        assert [row["task"] for row in report["rows"]] == ["niah_single_1", "answers", "real"]
        assert report["metrics"].keys() == report["settings"]["tasks"].keys() == {row["task"] for row in report["rows"]}
        assert (report["seconds"], report["cut"]) == (4.5, name == "bm25")
        assert all("depths" not in row for row in report["rows"])
        told_weighed = [json.loads(path.read_text()) for path in sorted(work.glob(f"runs/{name}*/report.json"))]
        assert [one["evaluations"][0]["weighed"] for one in told_weighed] == [weighed] * 3, "layers, by their recall"
    assert tables({"variants": found}).endswith("Cut short, so that rows are missing: bm25.")
    assert found["focal"]["evaluation"][-1]["run"] == "focal-2" and found["focal"]["failed"] is None
    again = ["--only", "focal", "--resume", "--evaluation"]
    assert campaign(work, *again, *files)[0] == []
    made, found = campaign(work, *again, files[0], files[2])
    assert told(made) == [("focal-2", "test")] and not (work / "runs" / "focal-3").exists(), "what is asked counts"
    assert [row["task"] for row in found["focal"]["report"]["rows"]] == ["niah_single_1", "real"]
    made, _ = campaign(work, "--only", "bm25", "--evaluation", files[0])
    assert told(made) == [("bm25", "test")] and not list(work.glob("bm25-*")), "anew"
    with pytest.raises(SystemExit, match="NeedleTask in several files"):
        campaign(work, "--only", "focal", "--evaluation", files[0], files[0])
    with pytest.raises(FileNotFoundError):
        campaign(work, "--only", "focal", "--evaluation", "nowhere.yaml")
    assert (work / "runs" / "focal" / "last.ckpt").exists(), "a mistake costs no weights"


def test_a_variant_that_fails_is_told_with_the_end_of_its_log_and_the_others_go_on(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BROKEN", json.dumps({"focal": "test", "seed0": "fit"}))
    with pytest.raises(SystemExit) as ended:
        smollm2_memory.main([str(work), "--only", "seed0", "focal", "coupled", "documents_16"])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "focal: evaluation failed: exit code 3\n    one line\n    the reason\n" in out
    assert "documents_16: evaluation failed: seed0 was not trained\n" in out
    assert told(calls(work)) == [
        ("seed0", "fit"), ("coupled", "fit"), ("focal", "fit"), ("coupled", "test"), ("focal", "test"),
    ]  # fmt: skip
    found = json.loads((work / smollm2_memory.RESULT).read_text())["variants"]
    assert found["focal"]["failed"] == "exit code 3\none line\nthe reason" and "report" not in found["focal"]
    assert found["documents_16"]["failed"] == "seed0 was not trained"
    assert found["seed0"]["failed"] == "exit code 3\none line\nthe reason"
    assert found["coupled"]["failed"] is None and found["coupled"]["report"]["step"] == 80
    assert "exit code 3" in tables({"variants": found})


def test_resuming_does_what_is_not_done_and_nothing_twice(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN", json.dumps({"focal": "test", "coupled": "fit"}))
    names = ("full", "coupled", "focal")
    with pytest.raises(SystemExit):
        campaign(work, "--only", *names)
    (work / "runs" / "coupled" / "step=40.ckpt").mkdir()
    monkeypatch.delenv("BROKEN")
    made, found = campaign(work, "--only", *names, "--resume")
    assert told(made) == [("coupled", "fit"), ("coupled", "test"), ("focal", "test")]
    assert made[0]["ckpt_path"] == ["last"]
    assert [call["code"] for call in found["coupled"]["training"]] == [3, 0], "what went before is told too"
    assert all(one["failed"] is None for one in found.values())
    assert campaign(work, "--only", *names, "--resume")[0] == []
    file = work / "runs" / "focal" / "report.json"
    report = json.loads(file.read_text())
    report["evaluations"][-1]["cut"] = True
    file.write_text(json.dumps(report))
    assert told(campaign(work, "--only", *names, "--resume")[0]) == [("focal", "test")], "it was told to stop"
    made, _ = campaign(work, "--only", "focal")
    assert told(made) == [("focal", "fit"), ("focal", "test")] and made[0]["ckpt_path"] == [], "anew"


def test_an_evaluation_needs_somebodys_weights(work: Path) -> None:
    with pytest.raises(SystemExit, match="documents_1 is evaluated over seed0, which is not trained"):
        smollm2_memory.main([str(work), "--only", "documents_1", "focal"])
    assert calls(work) == []


def test_a_broken_off_campaign_ends_what_it_started(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "runs").mkdir(parents=True)
    begun: list[int] = []

    def interrupted(*_: Any, **__: Any) -> Any:
        while len(calls(work)) < 2:
            time.sleep(0.01)
        begun.extend(process.pid for process in running)
        raise KeyboardInterrupt

    one = smollm2_memory.Campaign(work, arguments())
    running = one.running
    monkeypatch.setattr(smollm2_memory, "wait", interrupted)
    monkeypatch.setattr(smollm2_memory, "MSA_TRAIN", (sys.executable, "-c", SLEEPS, str(work / "calls.jsonl")))
    with pytest.raises(KeyboardInterrupt):
        one.work_off(one.parts(["seed1", "seed2", "full"]))
    assert len(begun) == 2 and not running and not one.failed
    for pid in begun:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_run_that_trains_is_not_read(work: Path) -> None:
    one = smollm2_memory.Campaign(work, arguments())
    for name in ("focal", "coupled"):
        a_run(work / "runs" / name)
        (work / f"{name}.json").write_text('{"failed": null}')
    with (work / "runs" / "focal" / "metrics.csv").open("a") as file:
        file.write("29,6.0e")  # a row that is being written
    one.training.add("focal")
    one.gather()
    found = json.loads((work / smollm2_memory.RESULT).read_text())["variants"]
    assert list(found) == ["coupled"] and found["coupled"]["steps"]["done"] == 27


SLEEPS = "import sys, time; open(sys.argv[1], 'a').write('{}\\n'); time.sleep(600)"


# --- what differs ---------------------------------------------------------------------------------------------------


def test_names_and_groups_choose_variants_in_their_order() -> None:
    assert (
        chosen([]) == list(VARIANTS) and chosen(["headline"]) == ["seed0"] and chosen(["seeds"]) == ["seed1", "seed2"]
    )
    assert chosen(["focal", "seed0", "headline"]) == ["seed0", "focal"]
    assert {name for group in GROUPS.values() for name in group} == set(VARIANTS)


def test_a_shorter_run_has_shorter_phases_and_a_nearer_curriculum() -> None:
    found = overlay([ROOT / RECIPE], Variant(), 0.25, minutes=1.5)
    first, main = found["model"]["phases"]
    assert (first["steps"], first["warmup_steps"], main["steps"], main["warmup_steps"]) == (12, 2, 188, 0)
    assert found["data"]["init_args"]["document_tokens"] == {0: 8192, 12: 65536}
    assert found["checkpoint"]["every_n_train_steps"] == 10 and found["trainer"]["val_check_interval"] == 50
    assert found["trainer"]["max_time"] == {"seconds": 90}
    tiny = overlay([ROOT / RECIPE], Variant(), 0.01)["model"]["phases"]
    assert [(phase["steps"], phase["warmup_steps"]) for phase in tiny] == [(1, 0), (8, 0)]


def test_phases_of_a_further_config_are_merged_as_msa_train_merges_them(tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("model: {phases: [{name: warm-up, steps: 40}, {name: main, steps: 60}]}\n")
    configs = [ROOT / RECIPE, more]
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay(configs, Variant())))
    merged, ours = (composed(*configs, *last).model.phases for last in ((), (tmp_path / "overlay.yaml",)))
    assert merged == ours and [phase.steps for phase in ours] == [40, 60] and ours[0].lm_weight == 0.1


def test_without_a_warm_up_the_main_phase_has_all_steps() -> None:
    (only,) = overlay([ROOT / RECIPE], VARIANTS["no_warm_up"])["model"]["phases"]
    assert (only["steps"], only["warmup_steps"], only["lm_weight"]) == (800, 10, 1.0)


@cache
def composed(*files: Path) -> Any:
    """The config of a training."""
    here = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    built = build(["fit", *(word for file in files for word in ("--config", str(file))), *here], run=False)
    assert built is not None
    return built.config.fit


def flat(value: Any, place: str = "") -> dict[str, Any]:
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, dict) and value:
        return {name: one for key in value for name, one in flat(value[key], f"{place}.{key}").items()}
    return {place: value}


CHANGED = {
    "seed0": set(), "seed1": {"seed_everything", "seed"}, "seed2": {"seed_everything", "seed"},
    "full": {"lora", "phases"}, "no_warm_up": {"phases"}, "only_8k": {"document_tokens"},
    "random_start": {"router_init"}, "queries_1": {"queries_per_pack"}, "queries_16": {"queries_per_pack"},
    "queries_64": {"queries_per_pack"}, "coupled": {"routing_loss"}, "focal": {"routing_loss"},
    "temperature_0.1": {"temperature"}, "temperature_0.05": {"temperature"}, "layers_all": {"routed_layers"},
    "layers_upper_third": {"routed_layers"}, "layers_middle": {"routed_layers"}, "chunk_32": {"chunk_size"},
    "chunk_128": {"chunk_size"}, "prompt_words": {"routing_words"}, "no_distractors": {"distractors"},
    "no_mined": {"negatives"},
}  # fmt: skip


OURS = ("name", "runs", "dirpath", "default_root_dir", "enable_progress_bar", "config")


@pytest.mark.parametrize("name", CHANGED)
def test_msa_train_takes_a_variants_words_which_change_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the shape of the backbone, since the weights need a registry; corpora are not opened."""
    monkeypatch.chdir(ROOT)
    one = smollm2_memory.Campaign(tmp_path, arguments())
    one.parts([name])
    words = one.fit_words(name)
    assert words[0] == "fit" and words[words.index("--name") + 1] == name
    built = build([*words, "--trainer.accelerator=cpu", "--trainer.precision=32-true"], run=False)
    assert built is not None and str(built.trainer.default_root_dir) == str(tmp_path / "runs" / name)
    ours, theirs = (flat(config) for config in (built.config.fit, composed(ROOT / RECIPE)))
    places = {place for place in ours.keys() | theirs.keys() if ours.get(place) != theirs.get(place)}
    assert {part for place in places for part in place.split(".")} & set().union(*CHANGED.values()) == CHANGED[name]
    places -= {place for place in places if CHANGED[name] & set(place.split("."))}
    assert {place.rpartition(".")[2] for place in places} == {*OURS}
    backbone = str(ROOT / "configs/backbones/smollm2_135m.json")
    model = replace(built.model.blueprint, backbone=backbone).blank(None)
    assert (name == "layers_all") == (len(model.routed_layers) == 30)
    assert set(model.routed_layers) <= set(range(30))


@pytest.mark.parametrize("name", ["seed0", *GROUPS["baselines"], *GROUPS["evaluations"]])
def test_msa_train_takes_a_variants_evaluation(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file, variant = tmp_path / "evaluation.yaml", VARIANTS[name]
    file.write_text(yaml.safe_dump(evaluation(ROOT / EVALUATION, variant)))
    words = ["test", "--config", RECIPE, "--config", str(file), "--trainer.accelerator=cpu"]
    built = build([*words, "--trainer.precision=32-true"], run=False)
    assert built is not None
    (callback,) = (one for one in built.trainer.callbacks if type(one).__name__ == "ExtrapolationEvaluation")
    assert callback.baselines == ((variant.baseline,) if variant.baseline else ())
    assert callback.router == (name not in GROUPS["baselines"])
    recipes = {"mode": "router", "documents": 6} | dict(variant.ask)
    assert {key: getattr(callback.ask, key) for key in recipes} == recipes


def test_every_trained_variant_has_its_change_told_here() -> None:
    assert [*CHANGED] == [name for name, variant in VARIANTS.items() if variant.trained]


# --- what is gathered -----------------------------------------------------------------------------------------------


def a_run(folder: Path) -> None:
    """30 steps of two lengths, the second from step 15 on, logged every 5; a log repeated at the end, by the clock."""
    folder.mkdir(parents=True)
    config = {
        "model": {"phases": [{"steps": 10}, {"steps": 40}]},
        "data": {"init_args": {"document_tokens": {0: 8192, 15: 65536}}},
        "trainer": {"log_every_n_steps": 5, "accumulate_grad_batches": 2},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    recalls = ["layer_10/recall@1", "layer_9/recall@1", "layer_9/recall@5", "recall@1", "recall@5", "recall@k"]
    names = ["loss/total", "loss/lm", "loss/routing", "memory/peak_gib", "speed/packs_per_s", "speed/tokens_per_s"]
    held_out = ["loss/lm/test", "loss/routing/test", *(f"routing/{name}/test" for name in recalls)]

    def trained(step: int, at: int, *values: float) -> dict[str, float]:
        return {"step": step, **dict(zip(names, (at, at / 2, 3, *values), strict=True))}

    def validated(step: int, recall: float) -> dict[str, float]:
        return {"step": step, **dict(zip(held_out, (1.25, step, 0.75, recall, 0.875, 0.625, 0.9, 0.95), strict=True))}

    rows = [
        trained(4, 4, 1.5, 5, 100), trained(9, 9, 2.5, 10, 300), validated(11, 0.25), trained(14, 14, 2.0, 10, 200),
        trained(19, 19, 8.0, 2, 700), trained(24, 24, 9.0, 4, 900), trained(26, 24, 9.0, 4, 900), validated(26, 0.5),
    ]  # fmt: skip
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", *names, *held_out])
        writer.writeheader()
        writer.writerows(rows)
    starts = [{"started": "then", "step": 0, "gpus": ["a"]}, {"started": "later", "step": 20, "gpus": ["b"]}]
    (folder / "environment.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))


def test_what_a_run_logged_is_gathered_by_length_of_packs(tmp_path: Path) -> None:
    a_run(tmp_path / "run")
    found = of_run(tmp_path / "run")
    assert found["steps"] == {"planned": 50, "done": 27}
    assert found["steps_s"] == 10 / 5 + 10 / 10 + 10 / 10 + 10 / 2 + 10 / 4, "ten packs a log; none is counted twice"
    assert found["speed"] == {
        "8K": {"tokens_per_s": {"median": 200, "max": 300}, "peak_gib": {"median": 2.0, "max": 2.5}},
        "64K": {"tokens_per_s": {"median": 800, "max": 900}, "peak_gib": {"median": 8.5, "max": 9.0}},
    }
    assert found["losses"] == {"total": 24, "lm": 12, "routing": 3}
    assert found["environment"] == {
        **{"started": "later", "step": 20, "gpus": ["b"]},
        "starts": [["then", 0], ["later", 20]],
    }
    first, last = (found["held_out"]["test"][when] for when in ("first", "last"))
    assert first == {
        "step": 12, "lm": 1.25, "routing": 11, "recall@1": {"overall": 0.625, 9: 0.25, 10: 0.75},
        "recall@5": {"overall": 0.9, 9: 0.875}, "recall@k": {"overall": 0.95},
    }  # fmt: skip
    assert last["step"] == 27 and last["recall@1"][9] == 0.5
    assert "untrained" not in found["held_out"]["test"], "there is no checkpoint that knows"
    assert of_run(tmp_path / "nothing") == {}


def test_a_log_of_two_lengths_is_of_neither(tmp_path: Path) -> None:
    a_run(tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("15: 65536", "17: 65536"))
    speed = of_run(tmp_path / "run")["speed"]
    assert speed["8K"]["tokens_per_s"]["max"] == 300 and speed["64K"]["tokens_per_s"] == {"median": 900, "max": 900}


def test_recall_before_training_is_what_the_monitor_saw(tmp_path: Path) -> None:
    a_run(tmp_path / "run")
    folder = folder_of(tmp_path / "run", 27)
    aside = start_aside(folder)
    rows = [{"step": 0, "recall@1": {"9": 0.125, "overall": 0.0625}}, {"step": 12, "recall@1": {"9": 0.25}}]
    torch.save({"callbacks": {"RouterMonitor": {"history": {"test": rows}}}}, aside / TRAINER)
    settle(aside, folder, digests_of([aside / TRAINER]))
    assert of_run(tmp_path / "run")["held_out"]["test"]["untrained"] == {"recall@1": {"9": 0.125, "overall": 0.0625}}


def test_the_json_is_what_was_gathered_with_a_row_to_a_line(tmp_path: Path) -> None:
    rows = [
        {"method": "router", "task": "real", "length": n, "scores": {"recall@1": {"value": 0.5, "n": 3}}}
        for n in (7, 9)
    ]
    result = {"variants": {"seed0": {"report": {"rows": rows}, "fit": ["row 0"]}}}
    text = dumped(result)
    assert json.loads(text) == result
    assert sum('"length"' in line for line in text.splitlines()) == 2
    assert gathered(tmp_path, VARIANTS)["variants"] == {}


# --- tables -----------------------------------------------------------------------------------------------------------

SHORT, LONG = 8192, 10 * 2**20
METRICS = {
    "niah_mean_of_2": "accuracy",
    "niah_a": "accuracy",
    "niah_b": "accuracy",
    "real": "recall@1",
    "answers": "f1",
}


def row(task: str, length: int, n: int = 50, method: str = "router", **scores: float) -> dict[str, Any]:
    named = {
        name.replace("_at_", "@"): {"value": value, "low": 0.0, "high": 1.0, "n": n} for name, value in scores.items()
    }
    return {"method": method, "task": task, "length": length, "scores": named, "note": ""}


def report(needles: float, long: float, *more: dict[str, Any]) -> dict[str, Any]:
    rows = [
        row("niah_mean_of_2", SHORT, 100, accuracy=needles), row("niah_a", SHORT, accuracy=needles + 0.05),
        row("niah_b", SHORT, accuracy=needles - 0.05), row("niah_mean_of_2", LONG, 100, accuracy=long),
        row("real", SHORT, 512, recall_at_1=0.75, recall_at_k=0.875),
        row("real", 2**20, 300, recall_at_1=0.5, recall_at_k=0.6),
        row("answers", SHORT, 96, f1=0.25), row("answers", LONG),
    ]  # fmt: skip
    return {"report": {"step": 800, "k": 16, "metrics": METRICS, "rows": [*rows, *more]}}


def test_tables_have_the_seeds_spread_the_needles_apart_and_a_line_for_every_ablation() -> None:
    beside = row("real", SHORT, 512, "BM25", recall_at_1=0.7, recall_at_k=0.8)
    result = {
        "variants": {
            "seed0": report(0.9, 0.6), "seed1": report(0.8, 0.5), "seed2": report(0.7, 0.1),
            "bm25": {"report": {"step": 0, "k": 16, "metrics": METRICS, "rows": [beside]}},
            "focal": report(0.5, 0.25), "chunk_32": {"failed": "exit code 3\nits log", "steps": {"done": 70}},
        }
    }  # fmt: skip
    headline, needles, ablations = tables(result).split("\n\n## ")
    assert headline.splitlines() == [
        "## Headline: mean of 3 seeds, lowest to highest",
        "",
        "| task | by | 8K | 1M | 10M |",
        "| --- | --- | --- | --- | --- |",
        "| niah_mean_of_2: accuracy, n 100 | router | 0.800 (0.700 to 0.900) | – | 0.400 (0.100 to 0.600) |",
        "| real: recall@1, n 300 to 512 | router | 0.750 (0.750 to 0.750) | 0.500 (0.500 to 0.500) | – |",
        "| real: recall@1, n 512 | BM25 | 0.700 | – | – |",
        "| real: recall@16, n 300 to 512 | router | 0.875 (0.875 to 0.875) | 0.600 (0.600 to 0.600) | – |",
        "| real: recall@16, n 512 | BM25 | 0.800 | – | – |",
        "| answers: f1, n 96 | router | 0.250 (0.250 to 0.250) | – | – |",
    ]
    assert needles.splitlines()[2:] == [
        "| task | by | 8K |",
        "| --- | --- | --- |",
        "| niah_a: accuracy, n 50 | router | 0.850 (0.750 to 0.950) |",
        "| niah_b: accuracy, n 50 | router | 0.750 (0.650 to 0.850) |",
    ]
    assert ablations.splitlines()[2:] == [
        "| variant | steps | needles: 8K / 1M / 10M | real recall@1: 8K / 1M / 10M | real recall@16: 8K / 1M / 10M | "
        "answers F1: 8K / 1M / 10M |",
        "| --- | --- | --- | --- | --- | --- |",
        "| seed0 | 800 | 0.900 / – / 0.600 | 0.750 / 0.500 / – | 0.875 / 0.600 / – | 0.250 / – / – |",
        "| focal | 800 | 0.500 / – / 0.250 | 0.750 / 0.500 / – | 0.875 / 0.600 / – | 0.250 / – / – |",
        "| chunk_32 | 70 | exit code 3 | – | – | – |",
    ]


def test_variants_are_compared_at_the_shortest_length_that_all_of_them_have() -> None:
    seed = report(0.9, 0.6, row("real", 4096, 512, recall_at_1=1.0, recall_at_k=1.0))
    (head,) = (line for line in tables({"variants": {"seed0": seed, "focal": report(0.5, 0.2)}}).splitlines()
               if line.startswith("| variant"))  # fmt: skip
    assert "needles: 8K / 1M / 10M" in head
    assert "needles: 4K / 1M / 10M" in tables({"variants": {"seed0": seed}})


def test_a_seed_that_lacks_a_length_is_counted_out() -> None:
    second = report(0.8, 0.5)
    second["report"]["rows"] = [one for one in second["report"]["rows"] if one["length"] != LONG]
    text = tables({"variants": {"seed0": report(0.9, 0.6), "seed1": second}})
    assert "| 0.850 (0.800 to 0.900) | – | 0.600, 1 of 2 |" in text


def test_the_figure_has_the_seed_and_the_baselines(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = {"trained": 65536, "seconds": 1.0, "settings": {}}
    rows = [row("real", length, 512, "BM25", recall_at_1=0.7) for length in (SHORT, LONG)]
    seed, bm25 = report(0.9, 0.6), {"report": {"step": 0, "k": 16, "metrics": METRICS, "rows": rows}}
    seed["report"] |= named
    result = {"variants": {"seed0": seed, "bm25": bm25, "dense": {"failed": "exit code 3"}}}
    drawn = {axes.get_title(): axes for axes in figure(result).axes}
    assert [title for title in drawn if title] == ["niah_mean_of_2", "real", "answers"]
    lines = {line.get_label(): list(line.get_xdata()) for line in drawn["real"].lines}
    assert lines["router"] == [SHORT, 2**20] and lines["BM25"] == [SHORT, LONG]
    work.mkdir()
    (work / smollm2_memory.RESULT).write_text(json.dumps(result))
    smollm2_memory.main([str(work), "--table", "--figure", str(work / "curves.png")])
    assert (work / "curves.png").read_bytes().startswith(b"\x89PNG") and "## Headline" in capsys.readouterr().out


def test_the_table_is_printed_from_the_json_alone(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        smollm2_memory.main([str(work), "--table"])
    work.mkdir()
    (work / smollm2_memory.RESULT).write_text(json.dumps({"variants": {"seed0": report(0.9, 0.6)}}))
    capsys.readouterr()
    smollm2_memory.main([str(work), "--table"])
    assert "## Headline: one seed" in capsys.readouterr().out and calls(work) == []
