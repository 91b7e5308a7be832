"""ZeRO on two real ranks: the losses of DDP, weights shared out from one copy, checkpoints that open without DeepSpeed.

Every start of two ranks takes a quarter of a minute, so one run of each stage answers most questions.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from msa_train import cli, model
from msa_train.checkpoints import check_resumable, newest_checkpoint, read_checkpoint
from msa_train.errors import UserError
from msa_train.folder_files import FolderReader
from msa_train.folders import FACTS, MANIFEST, TRAINER, WEIGHTS
from msa_train.losses import label_cross_entropy
from msa_train.runs import open_run
from msa_train.strategies import ZeRO
from tests.hooks import digests
from tests.test_training import ROOT, losses, start

pytest.importorskip("deepspeed")

Arguments = Callable[..., list[str]]
STEPS, SAVED, BARE, BROKEN = 8, 4, 2, 4
COLUMNS = ("loss/total", "loss/lm", "loss/routing", "train/grad_norm", "train/skipped_steps")
CONFIGS = [ROOT / "configs" / "strategy" / "ddp.yaml", *sorted((ROOT / "configs" / "strategy").glob("zero*.yaml"))]
ROUTERS = json.dumps([{"name": "routers", "steps": 2, "router_lr": 3e-3, "trainable": "routers"}])


def zero(stage: int, **arguments: Any) -> str:
    """The strategy; nothing is small enough to stay whole."""
    return json.dumps(
        {"class_path": "msa_train.strategies.ZeRO",
         "init_args": {"stage": stage, "persistence_threshold": 0, "timeout_minutes": 2, **arguments}}
    )  # fmt: skip


def flags(folder: Path, name: str, strategy: str, **others: Any) -> dict[str, Any]:
    """A run of two ranks in bfloat16: one empty pack, one broken gradient, a checkpoint in the middle that is kept."""
    trials = {"out": str(folder / f"{name}.json"), "bare": BARE, "broken": BROKEN}
    return {
        "name": name, "trainer.devices": 2, "trainer.strategy": strategy, "trainer.precision": "bf16-true",
        "model.weights": "bfloat16", "checkpoint.every_n_train_steps": SAVED, "trainer.limit_val_batches": 1,
        "trainer.val_check_interval": 3, "trainer.gradient_clip_val": 1.0,
        "trainer.callbacks": json.dumps([{"class_path": "tests.hooks.Trials", "init_args": trials}]), **others,
    }  # fmt: skip


def ran(arguments: list[str], command: str = "fit") -> None:
    done = start(arguments, command, OMP_WAIT_POLICY="passive")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def column(folder: Path, name: str) -> torch.Tensor:
    return torch.tensor([float(value) for value in losses(folder, name).values()], dtype=torch.float64)


def seen(folder: Path, name: str, rank: int) -> dict[str, dict[str, str]]:
    return json.loads((folder / f"{name}-{rank}.json").read_text())


@pytest.fixture(scope="module")
def runs(tiny_run: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with DDP and one of each stage."""
    folder = tmp_path_factory.mktemp("runs")
    for name, strategy in (("ddp", "ddp"), *((f"zero{stage}", zero(stage)) for stage in (1, 2, 3))):
        ran(tiny_run(folder, steps=STEPS, **flags(folder, name, strategy)))
    return folder


def test_all_stages_start_bitwise_as_ddp_does_and_have_its_losses(runs: Path) -> None:
    """All keep a float32 copy and add up in another order: 1 in 200. DDP has no copy: 1 in 50.

    Norms of gradients twice that, the broken step's aside. Not every schedule would do: one over six steps has a norm
    of 28.6 or 33.8, and one over eight without a broken step has 32.8 with DDP and 40.7 to 40.8 with ZeRO, at losses as
    alike as anywhere. So what is skipped is not the cause; that a largest score lies on another chunk there is likely.
    """
    finite = torch.arange(STEPS) != BROKEN
    for stage in (1, 2, 3):
        name = f"zero{stage}"
        for rank in (0, 1):
            for what in ("start", "buffers"):
                ours, theirs = (seen(runs, run, rank)[what] for run in (name, "ddp"))
                assert ours and ours == theirs, (name, rank, what)
        for other, tolerance in (("zero1", 5e-3), ("ddp", 2e-2)):
            for log in ("loss/total", "loss/lm", "loss/routing"):
                ours, theirs = column(runs / name, log), column(runs / other, log)
                assert len(ours) == STEPS and ours[0] == theirs[0], (name, log)
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
            ours, theirs = (column(runs / run, "train/grad_norm")[finite] for run in (name, other))
            torch.testing.assert_close(ours, theirs, rtol=2 * tolerance, atol=0)


def test_a_broken_gradient_of_one_rank_is_skipped_by_all_and_counted(runs: Path) -> None:
    for name in ("zero1", "zero2", "zero3"):
        assert column(runs / name, "train/skipped_steps").tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
        assert torch.isinf(column(runs / name, "train/grad_norm")).tolist() == [step == BROKEN for step in range(STEPS)]
        saved = read_checkpoint(runs / name / "last.ckpt")
        assert saved["msa_train"]["skipped_steps"] == 1
        assert all(torch.isfinite(weight).all() for weight in saved["state_dict"].values())


def test_every_weight_moves_at_every_stage_routers_too(runs: Path) -> None:
    for stage in (1, 2, 3):
        before, after = (seen(runs, f"zero{stage}", 0)[when] for when in ("start", "end"))
        assert sum(".router_" in name for name in before) == 2
        assert not [name for name in before if before[name] == after[name]]


def test_ranks_hold_the_same_weights_and_the_folder_has_them(runs: Path) -> None:
    for stage in (1, 2, 3):
        name = f"zero{stage}"
        ends = [seen(runs, name, rank)["end"] for rank in (0, 1)]
        saved = read_checkpoint(runs / name / "last.ckpt")
        assert ends[0] == ends[1] == digests((key, saved["state_dict"][key]) for key in ends[0])
        tied = set(saved["state_dict"]) - set(ends[0])
        assert tied == {"model.backbone.lm_head.weight"}, "a tied weight has both names"
        assert {weight.dtype for weight in saved["state_dict"].values()} == {torch.bfloat16}
        assert saved["global_step"] == STEPS


def test_a_folder_holds_one_checkpoint_and_nothing_lies_about(runs: Path) -> None:
    for name in ("zero1", "zero2", "zero3"):
        folder = runs / name
        assert newest_checkpoint(folder) == folder / f"step={STEPS}.ckpt" == (folder / "last.ckpt").resolve()
        kept = {"last.ckpt", f"step={SAVED}.ckpt", f"step={STEPS}.ckpt"}
        assert {path.name for path in folder.glob("*.ckpt*")} == kept
        inside = {path.name for path in (folder / "last.ckpt").iterdir()}
        parts = {f"optimizer-{rank}-0.safetensors" for rank in (0, 1)}
        assert inside == {WEIGHTS, FACTS, TRAINER, MANIFEST, *parts}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumed_is_bitwise_the_uninterrupted_run(stage: int, runs: Path, tiny_run: Arguments) -> None:
    name = f"resumed{stage}"
    checkpoint = runs / f"zero{stage}" / f"step={SAVED}.ckpt"
    ran([*tiny_run(runs, steps=STEPS, **flags(runs, name, zero(stage))), f"--ckpt_path={checkpoint}"])
    for log in COLUMNS:
        whole, rest = (losses(runs / run, log) for run in (f"zero{stage}", name))
        assert rest == {step: value for step, value in whole.items() if step >= SAVED}, log
    assert seen(runs, name, 0)["end"] == seen(runs, f"zero{stage}", 0)["end"]


class FewRows(L.Callback):
    """Has the head take few labels at a time, of which the last rank has fewer; writes the groups' settings."""

    def __init__(self) -> None:
        model.label_cross_entropy = functools.partial(label_cross_entropy, chunk=5)  # type: ignore[attr-defined]
        self.counts: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        """Takes labels away."""
        if trainer.global_rank == trainer.world_size - 1:
            for name in ("label_index_N", "label_target_N", "label_query_N"):
                object.__setattr__(batch.contexts, name, getattr(batch.contexts, name)[:3])
        self.counts.append(len(batch.contexts.label_target_N))

    on_validation_batch_start = on_train_batch_start

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes."""
        groups = {
            group["name"]: [group["lr"], group["weight_decay"], *group["betas"]]
            for group in trainer.optimizers[0].param_groups
        }
        told = json.dumps({"labels": self.counts, "groups": groups})
        Path(trainer.default_root_dir, f"rows-{trainer.global_rank}.json").write_text(told)


def test_stage_3_takes_uneven_labels_and_goes_on_with_other_groups_and_settings(
    runs: Path, tiny_run: Arguments, tmp_path: Path
) -> None:
    """Each call of the head gathers its weights, on all ranks or for ever."""

    def went_on(name: str, checkpoint: Path, phase: dict[str, Any], **others: Any) -> dict[str, Any]:
        phases = json.dumps([{"name": "only", "schedule": "constant", "router_lr": 1e-4, "backbone_lr": 1e-5, **phase}])
        given = flags(tmp_path, name, zero(3), **{"trainer.callbacks": callbacks, "model.phases": phases, **others})
        ran([*tiny_run(tmp_path, **given), f"--ckpt_path={checkpoint}"])
        rows = [json.loads((tmp_path / name / f"rows-{rank}.json").read_text()) for rank in (0, 1)]
        assert rows[0]["groups"] == rows[1]["groups"]
        assert min(rows[0]["labels"]) > 5 and set(rows[1]["labels"]) == {3}
        return rows[0]["groups"]

    callbacks = json.dumps([{"class_path": "tests.test_strategies.FewRows"}])
    routers = {"steps": SAVED + 2, "trainable": "routers"}
    groups = went_on("routers", runs / "zero3" / f"step={SAVED}.ckpt", routers)
    assert groups == {"routers": [1e-4, 0.0, 0.9, 0.95]}
    others = {"model.weight_decay": 0.5, "model.betas": "[0.5, 0.6]"}
    groups = went_on("all", tmp_path / "routers" / "last.ckpt", {"steps": SAVED + 4}, **others)
    assert groups == {
        "routers": [1e-4, 0.0, 0.5, 0.6], "backbone": [1e-5, 0.5, 0.5, 0.6], "backbone_no_decay": [1e-5, 0.0, 0.5, 0.6],
    }, "as matrices do"  # fmt: skip
    assert len(losses(tmp_path / "all", "loss/lm")) == 2 and losses(tmp_path / "routers", "loss/lm/test")


# from which run, with which strategy and how many ranks it goes on
OTHERS = {
    "1 to 1 rank": ("zero1", zero(1), 1), "2 to 1 rank": ("zero2", zero(2), 1), "3 to 1 rank": ("zero3", zero(3), 1),
    "2 to 3": ("zero2", zero(3), 2), "3 to 1": ("zero3", zero(1), 2), "2 to DDP": ("zero2", "ddp", 2),
    "DDP to 2": ("ddp", zero(2), 2),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_a_run_goes_on_with_other_ranks_and_strategies(case: str, runs: Path, tiny_run: Arguments) -> None:
    """The same packs, weights and moments; sums in another order: 1 in 200, without a float32 copy 1 in 50."""
    start_from, strategy, ranks = OTHERS[case]
    name, checkpoint = f"other {case}", runs / start_from / f"step={SAVED}.ckpt"
    trials = [{"class_path": "tests.hooks.Trials", "init_args": {"out": str(runs / f"{name}.json")}}]
    changed = {
        "trainer.devices": ranks, "trainer.accumulate_grad_batches": 2 // ranks, "trainer.val_check_interval": 12,
        "trainer.callbacks": json.dumps(trials), "trainer.max_steps": SAVED + 1, "ckpt_path": checkpoint,
    }  # fmt: skip
    given = flags(runs, name, strategy, **changed)
    ran(tiny_run(runs, steps=STEPS, **given))
    reader = FolderReader(checkpoint)
    kept = {key: reader.tensor(key) for key in reader.names()}
    for rank in range(ranks):
        started = seen(runs, name, rank)
        assert started["start"] == digests((key, kept[key]) for key in started["start"]), "the weights"
        assert len(started["state"]) > 40 or strategy == "ddp"
        for key, digest in started["state"].items():
            saved = kept[key] if key in kept else kept[key.removeprefix("master/")]
            assert digests([(key, saved.float())])[key] == digest, key
    plain = strategy == "ddp" or start_from == "ddp"
    for log in ("loss/lm", "loss/routing"):
        whole, rest = (losses(runs / run, log) for run in (start_from, name))
        assert list(rest) == [SAVED], log
        assert float(rest[SAVED]) == pytest.approx(float(whole[SAVED]), rel=2e-2 if plain else 5e-3), log


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_rank_with_two_packs_becomes_two_ranks(stage: int, runs: Path, tiny_run: Arguments) -> None:
    """Lightning and DeepSpeed would both divide by the packs."""
    name = f"packs{stage}"
    alone = {"trainer.devices": 1, "trainer.accumulate_grad_batches": 2, "trainer.val_check_interval": 8}
    callbacks = {"out": str(runs / f"{name}.json")}
    given = json.dumps([{"class_path": "tests.hooks.Trials", "init_args": callbacks}])
    changed = {**alone, "trainer.callbacks": given, "trainer.max_steps": BARE}
    ran(tiny_run(runs, steps=STEPS, **flags(runs, name, zero(stage), **changed)))
    for log, tolerance in (("loss/lm", 5e-3), ("loss/routing", 5e-3), ("train/grad_norm", 2e-2)):
        ranks = column(runs / f"zero{stage}", log)[:BARE]
        torch.testing.assert_close(column(runs / name, log), ranks, rtol=tolerance, atol=0)
    both = flags(runs, name, zero(stage), **{"trainer.callbacks": given, "trainer.max_steps": BARE + 1})
    ran([*tiny_run(runs, steps=STEPS, **both), "--ckpt_path=last"])
    reader = FolderReader(runs / name / f"step={BARE}.ckpt")
    for rank in (0, 1):
        state = seen(runs, name, rank)["state"]
        assert len(state) > 40 and state == digests((key, reader.tensor(key)) for key in state)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_folder_is_evaluated_and_opened_without_deepspeed(
    stage: int, runs: Path, tiny_run: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it raises
    name, end = f"zero{stage}", seen(runs, f"zero{stage}", 0)["end"]
    plain = {"name": name, "ckpt_path": "last", "trainer.precision": "bf16-true", "model.weights": "bfloat16"}
    for command in ("validate", "test", "predict"):
        found = cli.build([command, *tiny_run(runs, steps=STEPS, **plain, **{"trainer.limit_val_batches": 1})])
        assert digests(found.model.named_parameters()) == end and found.model.steps_done() == STEPS
        buffers = dict(found.model.net.backbone.named_buffers())
        assert buffers and {buffer.dtype for buffer in buffers.values()} == {torch.float32}, "RoPE in bfloat16 is none"
    assert {
        f"model.{key}": value for key, value in digests(open_run(runs / name).model.named_parameters()).items()
    } == end
    further = {**plain, "name": f"further{stage}", "ckpt_path": None, "model.init_from": runs / name / "last.ckpt"}
    del further["ckpt_path"]
    trials = [{"class_path": "tests.hooks.Trials", "init_args": {"out": str(runs / f"further{stage}.json")}}]
    cli.build(["fit", *tiny_run(runs, steps=1, **further, **{"trainer.callbacks": json.dumps(trials)})])
    assert seen(runs, f"further{stage}", 0)["start"] == end
    with pytest.raises(UserError, match="saved by a run of 2 packs a step, this one takes 1"):
        cli.build(["fit", *tiny_run(runs, steps=STEPS, **plain)])


def test_stage_3_trains_routers_alone_and_evaluation_has_the_whole_model(
    runs: Path, tiny_run: Arguments, tmp_path: Path
) -> None:
    """From the weights of another stage; two ranks then test the folder with what the first one found."""
    task = {"class_path": "datamodules.RetrievalTask", "init_args": {"questions": 3, "per_memory": 3}}
    trials = {"out": str(tmp_path / "routers.json")}
    callbacks = [
        {"class_path": "callbacks.Samples", "init_args": {"questions": 1}},
        {"class_path": "callbacks.ExtrapolationEvaluation", "init_args": {"tasks": [task], "lengths": ["512"]}},
        {"class_path": "tests.hooks.Trials", "init_args": trials},
    ]
    given = flags(tmp_path, "routers", zero(3), **{
        "model.phases": ROUTERS, "model.init_from": runs / "zero2" / "last.ckpt", "trainer.val_check_interval": 2,
        "checkpoint.every_n_train_steps": 1, "trainer.callbacks": json.dumps(callbacks),
    })  # fmt: skip
    ran(tiny_run(tmp_path, **given))
    before, after = (seen(tmp_path, "routers", 0)[when] for when in ("start", "end"))
    assert before == seen(runs, "zero2", 0)["end"]
    assert {name for name in before if before[name] != after[name]} == {name for name in before if ".router_" in name}
    folder = tmp_path / "routers"
    assert digests((name, read_checkpoint(folder / "last.ckpt")["state_dict"][name]) for name in after) == after
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {2} and all(sample["documents"] for sample in samples)

    def found() -> Any:
        return json.loads((folder / "report.json").read_text())["evaluations"][-1]

    during = found()
    ran(tiny_run(tmp_path, **given, ckpt_path="last"), "test")
    assert found()["step"] == during["step"] == 2
    assert [row["scores"] for row in found()["rows"]] == [row["scores"] for row in during["rows"]]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_ask_for_what_their_names_say(path: Path, tiny_run: Arguments, tmp_path: Path) -> None:
    built = cli.build(["fit", f"--config={path}", *tiny_run(tmp_path, **{"trainer.devices": 2})], run=False)
    strategy = built.trainer.strategy
    if path.stem == "ddp":
        assert type(strategy) is DDPStrategy and built.trainer.precision == "bf16-mixed"
        return
    assert isinstance(strategy, ZeRO) and built.trainer.precision == "bf16-true"
    asked = strategy.config["zero_optimization"]
    assert str(strategy.stage) in path.stem or path.stem == "zero_cpu"
    assert ("offload_optimizer" in asked) == ("offload" in path.stem)
    assert ("offload_param" in asked) == (path.stem == "zero3_offload")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"trainer.precision": "32-true"}, "trainer.precision is 32-true, give bf16-true"),
        ({"trainer.strategy": "deepspeed_stage_2"}, "give msa_train.strategies.ZeRO"),
        ({"trainer.strategy": zero(2, offload_parameters=True)}, "offload_parameters needs stage 3"),
        ({"trainer.strategy": zero(3), "model.recompute": "documents"}, "documents under ZeRO stage 3"),
        (
            {
                "model.phases": json.dumps(
                    [{"name": "a", "steps": 1, "trainable": "routers"}, {"name": "b", "steps": 1}]
                )
            },
            "which ZeRO cannot: train the routers in a run of their own",
        ),
    ],
)
def test_what_zero_cannot_run_is_refused(
    arguments: dict[str, Any], words: str, tiny_run: Arguments, tmp_path: Path
) -> None:
    given = {"trainer.strategy": zero(2), "trainer.precision": "bf16-true", **arguments}
    with pytest.raises(UserError, match=words):
        cli.build(["fit", *tiny_run(tmp_path, steps=2, **given)])


def test_another_number_of_packs_a_step_is_not_resumed(runs: Path) -> None:
    folder = runs / "zero2" / "last.ckpt"
    check_resumable(folder, packs_per_step=2)
    with pytest.raises(UserError, match=r"a run of 2 packs a step, this one takes 3: set --trainer.accumulate_grad"):
        check_resumable(folder, packs_per_step=3)


def test_a_damaged_folder_is_told(runs: Path, tmp_path: Path) -> None:
    for number, (file, text, words) in enumerate(
        (
            (FACTS, None, "no readable msa_train.json"),
            (FACTS, '{"chunk_size": 8}', "not of this project .no skipped_steps, global_step, tied, packs_per_step"),
            (WEIGHTS, "no weights", "not readable weights"),
            (WEIGHTS, None, "not readable weights"),
        )
    ):
        copy = tmp_path / f"{number}.ckpt"
        shutil.copytree(runs / "zero2" / "last.ckpt", copy)
        (copy / file).unlink()
        if text is not None:
            (copy / file).write_text(text)
        with pytest.raises(UserError, match=words):
            read_checkpoint(copy)
