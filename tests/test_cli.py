"""The command: one line for a user's mistake, before anything is written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
import torch

from msa_train import cli
from msa_train.errors import UserError
from tests.conftest import TINY_BACKBONE, newest, write_corpus

Arguments = Callable[..., list[str]]


def run(arguments: list[str], command: str = "fit") -> Any:
    return cli.build([command, *arguments])


def test_help_and_print_config_teach(tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run([*tiny_run(tmp_path), "--print_config"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "chunk_size: 8" in shown and "document_tokens: 512" in shown
    with pytest.raises(SystemExit) as end:
        run(["--help"])
    text = capsys.readouterr().out
    assert (
        end.value.code == 0
        and "Tokens mean-pooled into one latent" in text
        and "Token budget" not in text.partition("model")[0]
    )
    assert "--optimizer" not in text and "--lr_scheduler" not in text, "both are refused: the phases say them"
    assert "msa-train fit --data.help datamodules.PackedMemory" in " ".join(text.split())
    with pytest.raises(SystemExit):
        run(["--data.help", "datamodules.PackedMemory"])
    assert "Token budget of a pack's documents" in " ".join(capsys.readouterr().out.split())
    assert not any(tmp_path.iterdir())


def test_k_beyond_the_documents_trains(tiny_run: Arguments, tmp_path: Path) -> None:
    run(tiny_run(tmp_path, steps=1, **{"model.msa.top_k": 99}))


def test_an_existing_run_is_kept(tiny_run: Arguments, tmp_path: Path) -> None:
    arguments = tiny_run(tmp_path, steps=2)
    run(arguments)
    kept = {path.name for path in (tmp_path / "tiny").iterdir()}
    assert {"config.yaml", "metrics.csv", "last.ckpt"} <= kept and any(name.startswith("events") for name in kept)
    with pytest.raises(UserError, match="holds a run already: --ckpt_path last goes on with it"):
        run(arguments)
    run([*arguments, "--overwrite=true"])
    assert "overwrite: false" in (tmp_path / "tiny" / "config.yaml").read_text(), "the kept config deletes nothing"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    for config in (None, b"database: x\n", b"model: x\nmodel: y\ndata: z\n", b"- model\n", b"a: !!bool x", b"\xff"):
        if config is not None:
            (tmp_path / "other" / "config.yaml").write_bytes(config)
        with pytest.raises(UserError, match="no run of msa-train"):
            run([*arguments, "--name=other", "--overwrite=true"])
        assert (tmp_path / "other" / "thesis.tex").exists()


def test_a_start_that_a_callback_refused_is_no_run(tiny_run: Arguments, tmp_path: Path) -> None:
    """TensorBoard has begun its file by then."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "events.out.tfevents.1.host.2.0").touch()
    run(tiny_run(tmp_path, steps=1))
    assert newest(tmp_path / "tiny")["global_step"] == 1


def test_a_run_is_not_written_through_a_link(tiny_run: Arguments, tmp_path: Path) -> None:
    run(tiny_run(tmp_path, steps=1))
    (tmp_path / "empty").mkdir()
    for name in ("tiny", "empty", "gone"):
        (tmp_path / "link").symlink_to(tmp_path / name)
        with pytest.raises(UserError, match="link is a link: give another --name"):
            run(tiny_run(tmp_path, steps=1, name="link", overwrite="true"))
        (tmp_path / "link").unlink()
    assert newest(tmp_path / "tiny")["global_step"] == 1 and not any((tmp_path / "empty").iterdir())


def test_checkpoint_of_another_architecture_names_the_first_mismatch(tiny_run: Arguments, tmp_path: Path) -> None:
    run(tiny_run(tmp_path, steps=1))
    wider = tmp_path / "wider.json"
    wider.write_text(json.dumps({**TINY_BACKBONE, "intermediate_size": 64}))
    changed = {"model.backbone": wider, "name": "other"}
    last = tmp_path / "tiny" / "last.ckpt"
    for way in ("model.init_from", "ckpt_path"):
        with pytest.raises(
            UserError, match=r"another architecture: '.*gate_proj.weight' is \(48, 32\) there, \(64, 32\)"
        ):
            run(tiny_run(tmp_path, steps=1, **changed, **{way: last}))
        assert not (tmp_path / "other" / "last.ckpt").exists()


def test_resuming_with_other_chunks_or_a_strange_file_is_refused(tiny_run: Arguments, tmp_path: Path) -> None:
    run(tiny_run(tmp_path, steps=1))
    last = tmp_path / "tiny" / "last.ckpt"
    with pytest.raises(UserError, match=r"last.ckpt: trained with msa.chunk_size 8, this run has 4"):
        run(tiny_run(tmp_path, steps=1, ckpt_path=last, **{"model.msa.chunk_size": 4}))
    torch.save({"state_dict": {}}, tmp_path / "strange.ckpt")
    for strange in (tmp_path / "strange.ckpt", tmp_path / "tiny"):
        with pytest.raises(UserError, match="not a checkpoint of this project, which is a folder with msa_train.json"):
            run(tiny_run(tmp_path, steps=1, name="other", ckpt_path=strange))
    assert not (tmp_path / "other").exists()


def test_init_from_starts_anew_with_other_weights(tiny_run: Arguments, tmp_path: Path) -> None:
    run(tiny_run(tmp_path, steps=3))
    start = newest(tmp_path / "tiny")
    stage = run(
        tiny_run(
            tmp_path, steps=1, name="second",
            **{"model.init_from": tmp_path / "tiny" / "last.ckpt", "model.phases": json.dumps([
                {"name": "still", "steps": 1, "backbone_lr": 0.0, "router_lr": 0.0}])},
        )
    )  # fmt: skip
    assert stage.trainer.global_step == 1
    for name, weight in stage.model.state_dict().items():
        torch.testing.assert_close(weight, start["state_dict"][name])


def test_validate_test_and_predict(tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_run(tmp_path, steps=2))
    for command in ("validate", "test"):
        found = run([*tiny_run(tmp_path, steps=2), "--ckpt_path=last", "--trainer.limit_val_batches=1.0"], command)
        assert 0 <= found.trainer.callback_metrics["routing/recall@1/test"] <= 1
    kept = (tmp_path / "tiny" / "metrics.csv").read_text()
    assert len(kept.splitlines()) == 3
    flags = {"trainer.callbacks": '[{"class_path": "callbacks.RankingWriter"}]'}
    run([*tiny_run(tmp_path, steps=2, **flags), "--ckpt_path=last"], "predict")
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "rankings.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and len({row["query"] for row in rows}) == 16
    assert (tmp_path / "tiny" / "metrics.csv").read_text() == kept, "evaluating leaves the training's log alone"
    assert len(rows[0]["documents"]) == 2 and rows[0]["positives"][0].startswith("d")


def test_the_installed_command_answers(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("msa-train")), "fit", "--config", "nowhere.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "nowhere.yaml" in done.stderr


def test_an_empty_pack_folder_is_named(tiny_run: Arguments, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "c", documents=5)
    (folder / "corpus.jsonl").write_text('{"_id": "d0", "text": "a"}\n{"_id": "d1",\n')
    with pytest.raises(UserError, match="corpus.jsonl:2: not valid JSON"):
        run(tiny_run(tmp_path / "runs", **{"data.corpus": folder}))


UNIONS = """
import typing
for clear in typing._cleanups: clear()
broken = typing.Optional[typing.Union[float, int]]
import lightning as L
hints = L.Trainer.__init__.__annotations__
for name in hints:
    if name.startswith("limit_"): hints[name] = broken
assert typing.get_args(hints["limit_val_batches"])[0] is float
from msa_train.cli import build
trainer = build(CONFIG, run=False).trainer
print("limits", repr(trainer.limit_val_batches), repr(trainer.limit_test_batches))
"""


def test_a_limit_of_one_batch_is_one_batch(tiny_run: Arguments, tmp_path: Path) -> None:
    """Where another library has asked typing for the same union, floats first."""
    limits = {"trainer.limit_val_batches": 1, "trainer.limit_test_batches": 0.5}
    code = UNIONS.replace("CONFIG", repr(["fit", *tiny_run(tmp_path, steps=3, **limits)]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "limits 1 0.5\n" in done.stdout, done.stderr[-2000:]


def test_whole_numbers_come_first_in_unions_alone() -> None:
    for kind in (dict[int, float], tuple[float, int], Callable[[int], float], float | None, int):
        assert cli._whole_first(kind) is kind
    assert get_args(cli._whole_first(float | int | str | None)) == (int, float, str, NoneType)
