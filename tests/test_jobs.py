"""The jobs around training: pack, doctor, mine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import msa_train.doctor as doctor
from msa_train import cli
from msa_train.errors import UserError
from tests.conftest import write_corpus
from tests.datamodules.corpora import write_instructions, write_tangled_corpus

Arguments = Callable[..., list[str]]


def examine(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The doctor's exit code, and its words with the layout taken out."""
    code = 0
    try:
        cli.build(["doctor", *arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    return code, re.sub(r"\s+", " ", capsys.readouterr().out)


def test_pack_builds_the_store_that_fit_uses(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSA_TRAIN_CACHE", str(tmp_path / "cache"))
    tangled = write_tangled_corpus(tmp_path / "tangled")
    data = ["--data.corpus", str(tangled), "--data.vocab_size=400", "--data.max_document_tokens=60"]
    sizes = ["--data.document_tokens=4096", "--data.queries_per_pack=5"]
    cli.build(["pack", *data, *sizes])
    said = capsys.readouterr().out
    (manifest,) = (tmp_path / "cache" / "stores").glob("*/manifest.json")
    counts = json.loads(manifest.read_text())
    assert counts["queries"] == {"test": 48, "train": 192} and counts["split"] > 15 and counts["neutralised"] > 15
    for shown in ("192", "packs an epoch", "same text as another", "█", str(manifest.parent)):
        assert shown in said
    built = manifest.stat().st_mtime_ns
    flags = {"data.corpus": tangled, "data.max_document_tokens": 60, "data.document_tokens": 4096}
    found = cli.build(["fit", *tiny_run(tmp_path / "runs", steps=2, **flags)])
    assert manifest.stat().st_mtime_ns == built and found.trainer.global_step == 2


def test_a_whole_runs_config_packs_as_well(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.build(["pack", *tiny_run(tmp_path)])
    assert "22 packs an epoch, 3 queries" in capsys.readouterr().out


def test_help_of_pack_is_about_packing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.build(["pack", "--help"])
    shown = capsys.readouterr().out
    assert "Tokenise the corpora" in shown and "--trainer.precision" not in shown and "--model.backbone" not in shown


def test_pack_names_a_split_that_is_not_there(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.build(["pack", *tiny_run(tmp_path, **{"data.train_split": "trian"})])
    said = capsys.readouterr().out
    assert "trian       no such split; the corpus has test, train: name one in data.train_split" in said
    assert "test        6 packs an epoch" in said


def test_the_doctor_repeats_a_corpus_as_text(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_corpus(tmp_path / "hostile")
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write("q0\td\x1b]0;owned\x07\u202e\t1\n")
    with pytest.raises(SystemExit):
        cli.build(["doctor", *tiny_run(tmp_path / "runs", **{"data.corpus": folder})])
    said = capsys.readouterr().out
    assert "owned" in said and not {"\x1b", "\x07", "\u202e"} & set(said)


def test_the_doctor_lets_a_sound_run_pass(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = examine(tiny_run(tmp_path), capsys)
    assert code == 0 and "ready to train" in said
    for fact in ("80 documents, 1,664 tokens", "queries: 16 test, 64 train", "qwen3", "step 0, in an empty folder",
                 "1 packs:", "3 queries", "every document asked for is in its pack"):  # fmt: skip
        assert fact in said, fact
    assert not (tmp_path / "tiny").exists(), "nothing is written"


def test_the_doctor_counts_the_effective_batch(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"trainer.devices": 4, "trainer.accumulate_grad_batches": 2, "trainer.accelerator": "gpu"}
    code, said = examine(tiny_run(tmp_path, **flags), capsys)
    assert code == 0 and "8 packs:" in said and "23 queries" in said and "4 x gpu" in said


REPORT = json.dumps(["callbacks.BeforeAfterReport"])
MIXED = json.dumps([{"name": "a", "steps": 2, "trainable": "routers"}, {"name": "b", "steps": 2}])
ZERO, ZERO_2 = (
    json.dumps({"class_path": "msa_train.strategies.ZeRO", "init_args": {"stage": stage, "offload_parameters": True}})
    for stage in (3, 2)
)
BF16_TRUE = {"trainer.precision": "bf16-true", "model.weights": "bfloat16"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "corpus": ({"data.corpus": "nowhere"}, "data.corpus: 'nowhere' is neither"),
    "budget": ({"data.document_tokens": 30}, "lower max_document_tokens or raise the budget"),
    "too many queries": ({"data.queries_per_pack": 60}, "lower queries_per_pack"),
    "split": ({"data.val_splits": "[dev]"}, "no split 'dev'; the corpus has test, train"),
    "backbone": ({"model.backbone": "nowhere.json"}, "no such file 'nowhere.json'"),
    "layers": ({"model.msa.routed_layers": "[1, 7]"}, "the decoder has layers 0..1"),
    "checkpoint": ({"ckpt_path": "last"}, "has no checkpoint yet"),
    "start": ({"model.init_from": "nowhere.ckpt"}, "model.init_from: no such checkpoint"),
    "frozen under ddp": ({"trainer.strategy": "ddp", "model.phases": MIXED}, "ddp_find_unused_parameters_true"),
    "frozen, and ddp by itself": ({"trainer.devices": 2, "model.phases": MIXED}, "ddp_find_unused_parameters_true"),
    "report on nothing": (
        {"data.val_splits": "[]", "trainer.callbacks": '["callbacks.BeforeAfterReport"]'},
        "needs a split in data.val_splits",
    ),
    "no deepspeed": ({"trainer.strategy": ZERO, **BF16_TRUE}, "pip install 'msa-train[deepspeed]'"),
    "Lightning's deepspeed": (
        {"trainer.strategy": "deepspeed_stage_2"},
        "--trainer.strategy msa_train.strategies.ZeRO",
    ),
    "float32 under ZeRO": ({"trainer.strategy": ZERO}, "--trainer.precision bf16-true"),
    "frozen under ZeRO": ({"trainer.strategy": ZERO, "model.phases": MIXED, **BF16_TRUE}, "with --model.init_from"),
    "offload in stage 2": ({"trainer.strategy": ZERO_2, **BF16_TRUE}, "offload_parameters without stage 3"),
    "late stage": ({"data.document_tokens": "{0: 256, 500: 512}"}, "from 500 never reached: the run has 20 steps"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_doctor_finds_what_would_fail(
    case: str, tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, words = WRONG[case]
    if case == "no deepspeed":
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    code, said = examine(tiny_run(tmp_path, **flags), capsys)
    assert code == 1 and "WRONG" in said and words in said, said


def test_the_doctor_says_what_zero_shares(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = examine(tiny_run(tmp_path, **{"trainer.strategy": ZERO, **BF16_TRUE}), capsys)
    assert code == 0 and "the ranks share optimiser, gradients, weights; weights in the host's memory" in said


def test_the_doctor_finds_a_run_in_the_way_and_a_malicious_release(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.yaml").touch()
    code, said = examine(tiny_run(tmp_path), capsys)
    assert code == 1 and "holds a run already" in said
    monkeypatch.setattr(doctor, "_version", lambda name: "2.6.3")
    code, said = examine(tiny_run(tmp_path / "other"), capsys)
    assert code == 1 and "lightning 2.6.3 is a malicious release" in said


BF16 = json.dumps([{"name": "a", "steps": 2, "backbone_lr": 1e-5}])
LOOK: dict[str, tuple[dict[str, Any], str]] = {
    "no validation": ({"data.val_splits": "[]"}, "nothing watches the router on held-out queries"),
    "steps": ({"trainer.max_steps": 10}, "not the phases' 20"),
    "validation late": ({"trainer.val_check_interval": 100}, "never within 20 packs"),
    "bf16": ({"model.weights": "bfloat16", "model.phases": BF16}, "most updates"),
    "by heart": ({"trainer.max_steps": 2000}, "may learn them by heart"),
}  # fmt: skip


@pytest.mark.parametrize("case", LOOK)
def test_the_doctor_points_at_what_may_disappoint(
    case: str, tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, words = LOOK[case]
    code, said = examine(tiny_run(tmp_path, **flags), capsys)
    assert code == 0 and " look " in said and words in said, said


def test_the_doctor_sees_questions_in_both_splits(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_corpus(tmp_path / "leaky")
    for name in ("queries.jsonl", "qrels/test.tsv"):
        text = (folder / name).read_text()
        (folder / name).write_text(re.sub(r"q70\b", "q70", text))
    with (folder / "queries.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "again", "text": "Where does the red fox live?"}) + "\n")
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("again\td0\t1\n")
    code, said = examine(tiny_run(tmp_path, **{"data.corpus": folder}), capsys)
    assert code == 0 and "17 queries, 1 of them asked in training as well" in said


def test_mined_negatives_of_a_router_serve_the_next_run(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.build(["fit", *tiny_run(tmp_path, steps=10)])
    out = tmp_path / "negatives"
    cli.build(["mine", *tiny_run(tmp_path, steps=10, ckpt_path="last", out=out, pool_tokens=600)])
    capsys.readouterr()
    flags = {"data.negatives": json.dumps({str(out): 2, "bm25": 1}), "name": "next"}
    found = cli.build(["fit", *tiny_run(tmp_path, steps=3, **flags)])
    packer = found.datamodule.stages[0]
    (router, _), (lexical, _) = packer.planner.mined
    mined = {query: router.of(query) for query in packer.planner.rows[0].tolist()}
    assert sum(map(bool, mined.values())) > 40 and any(rows != lexical.of(query) for query, rows in mined.items())
    for query, rows in mined.items():
        assert not set(rows) & set(packer.data.steps(query)[0]) and len(set(rows)) == len(rows) <= 16
    with pytest.raises(UserError, match="msa-train mine writes it"):
        cli.build(["fit", *tiny_run(tmp_path, name="no", **{"data.negatives": json.dumps({"nowhere": 1})})])


def test_a_runs_own_config_serves_every_command(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the README says it: `--config checkpoints/NAME/config.yaml --ckpt_path last`."""
    cli.build(["fit", *tiny_run(tmp_path, steps=2, **{"trainer.limit_val_batches": 1})])
    kept = ["--config", str(tmp_path / "tiny" / "config.yaml")]
    for command in ("validate", "test", "predict", "doctor"):
        cli.build([command, *kept, "--ckpt_path=last"])
    cli.build(["mine", *kept, "--ckpt_path=last", "--out", str(tmp_path / "negatives"), "--pool_tokens=300"])
    cli.build(["pack", *kept])
    found = cli.build(["fit", *kept, "--ckpt_path=last", "--trainer.max_steps=4"])
    assert found.trainer.global_step == 4 and list((tmp_path / "negatives").glob("*.arrow"))
    again = cli.build(["fit", *kept, "--name=again"])
    assert again.trainer.global_step == 4, "the config was kept anew with what was asked last"


def test_mine_needs_a_checkpoint(tiny_run: Arguments, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mine needs --ckpt_path"):
        cli.build(["mine", *tiny_run(tmp_path, out=tmp_path / "out")])


def test_chains_instructions_curriculum_and_weights_train_together(tiny_run: Arguments, tmp_path: Path) -> None:
    """Every stage of the paper in one run: interleave steps, answers, instructions, 2K then 4K."""
    corpus = {str(write_tangled_corpus(tmp_path / "tangled")): 1.0, str(write_instructions(tmp_path / "chat")): 0.5}
    flags = {
        "data.corpus": json.dumps(corpus), "data.max_document_tokens": 60,
        "data.document_tokens": "{0: 2048, 3: 4096}", "data.queries_per_pack": 0.3, "trainer.limit_val_batches": 1,
        "trainer.val_check_interval": 6,
    }  # fmt: skip
    found = cli.build(["fit", *tiny_run(tmp_path, steps=6, **flags)])
    assert found.trainer.global_step == 6
    dataset = found.datamodule.train_dataloader().dataset
    sizes = [dataset[index].documents.tokens_T.numel() for index in range(6)]
    assert max(sizes[:3]) <= 2048 < 4000 < min(sizes[3:])
    with (tmp_path / "tiny" / "metrics.csv").open() as file:
        assert len(file.readlines()) >= 7
