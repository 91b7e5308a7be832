"""A run's folder is enough to ask the run: weights, words and layer weights, and nothing of the config is executed."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datamodules.tokenizer import train_tokenizer
from msa_train import cli
from msa_train.checkpoints import newest_checkpoint, read_checkpoint
from msa_train.errors import UserError
from msa_train.folders import FACTS, WEIGHTS, checkpoints_of
from msa_train.runs import layer_shares, open_run
from tests.conftest import TINY_BACKBONE, tiny_pack, write_corpus

Arguments = Callable[..., list[str]]
VALIDATED = {
    "model.msa.routed_layers": "[0, 1]", "trainer.limit_val_batches": 1.0, "trainer.val_check_interval": 5,
    "checkpoint.every_n_train_steps": 5, "data.val_splits": "[test, train]", "data.val_packs": 0,
}  # fmt: skip


def every(damage: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Damages all checkpoints of a run."""

    def damaged(folder: Path) -> None:
        for checkpoint in checkpoints_of(folder):
            damage(checkpoint)

    return damaged


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def fit(arguments: list[str]) -> Any:
    return cli.build(["fit", *arguments])


@pytest.fixture(scope="module")
def trained(tiny_run: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Twenty steps with a validation at every fifth."""
    return fit(tiny_run(tmp_path_factory.mktemp("runs"), steps=20, **VALIDATED, **{"data.max_document_tokens": 77}))


@pytest.fixture(scope="module")
def folder(trained: Any) -> Path:
    return Path(trained.trainer.default_root_dir)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def measured(folder: Path) -> list[list[float]]:
    """Recall@1 per routed layer of every validation, a mean over both splits, as the log has it."""
    with (folder / "metrics.csv").open() as handle:
        rows = [row for row in csv.DictReader(handle) if row.get("routing/layer_0/recall@1/test")]
    return [
        [
            sum(float(row[f"routing/layer_{layer}/recall@1/{split}"]) for split in ("test", "train")) / 2
            for layer in (0, 1)
        ]
        for row in rows
    ]


def recorded(folder: Path) -> list[float]:
    recall = json.loads((folder / "routing.json").read_text())["recall@1"]
    assert list(recall) == ["0", "1"]
    return list(recall.values())


def newest(folder: Path) -> dict[str, Any]:
    file = newest_checkpoint(folder)
    assert file is not None
    return read_checkpoint(file)


def test_an_opened_run_is_what_was_trained(trained: Any, folder: Path) -> None:
    run = open_run(folder)
    assert run.folder == folder and run.checkpoint == newest_checkpoint(folder) and run.max_document_tokens == 77
    weights = dict(trained.model.net.state_dict())
    assert run.model.state_dict().keys() == weights.keys() and len(weights) > 20
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, weights[name]) and weight.dtype == torch.float32 and weight.device.type == "cpu", (
            name
        )
    assert not any(module.training for module in run.model.modules())
    assert not any(weight.requires_grad for weight in run.model.parameters())
    assert run.model.config == trained.model.msa and run.model.routed_layers == (0, 1)
    data = trained.datamodule
    assert run.protocol.fingerprint() == data.protocol.fingerprint() and len(run.protocol.tokenizer) == len(
        data.tokenizer
    )
    assert run.protocol.routing_words == "question"
    pack, net = tiny_pack(chunk_size=8), trained.model.net.eval()
    with torch.no_grad():
        ours, theirs = run.model(pack), net(pack)
    assert torch.equal(ours.doc_score_LQD, theirs.doc_score_LQD) and torch.equal(ours.hidden_AM, theirs.hidden_AM)


def test_a_checkpoints_path_names_a_run_as_well(folder: Path, copy: Path) -> None:
    saved = newest_checkpoint(copy)
    assert saved is not None and open_run(str(copy / "last.ckpt")).checkpoint == copy / "last.ckpt"
    saved.rename(copy / "kept.ckpt")
    assert open_run(str(copy / "kept.ckpt")).checkpoint == copy / "kept.ckpt"
    for step in (90, 100, 20):
        shutil.copytree(copy / "kept.ckpt", copy / f"step={step}.ckpt")
    assert newest_checkpoint(copy) == open_run(copy).checkpoint == copy / "step=100.ckpt"
    (copy / "step=100.ckpt" / WEIGHTS).unlink()
    assert newest_checkpoint(copy) == copy / "step=90.ckpt", "it is not whole"


def test_a_folder_alone_is_enough(tiny_run: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved, with backbone, tokenizer and corpus gone, from another working folder; the vocabulary had to grow."""
    source = tmp_path / "source"
    corpus = write_corpus(source / "animals")
    texts = [json.loads(line)["text"] for line in (corpus / "corpus.jsonl").read_text().splitlines()]
    train_tokenizer(texts, 350, source / "cache").save_pretrained(source / "bpe")
    (source / "small.json").write_text(json.dumps({**TINY_BACKBONE, "vocab_size": 301}))
    flags = {
        "model.backbone": "source/small.json", "data.corpus": corpus, "data.tokenizer": source / "bpe",
        "model.weights": "bfloat16", "model.routing_words": "prompt",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found = fit(tiny_run(source / "runs", steps=2, **flags))
    moved = Path(shutil.copytree(source / "runs" / "tiny", tmp_path / "moved"))
    shutil.rmtree(source)
    monkeypatch.chdir(tmp_path / "moved" / "backbone")
    run = open_run(moved)
    assert len(run.protocol.tokenizer) == 350 and run.protocol.routing_words == "prompt"
    assert run.protocol.fingerprint() == found.datamodule.protocol.fingerprint()
    assert run.model.backbone.get_input_embeddings().weight.shape == (350, 32)
    for name, weight in found.model.net.state_dict().items():
        kept = run.model.state_dict()[name]
        assert torch.equal(weight, kept) and kept.dtype == torch.bfloat16, name
    assert run.layer_weights == (1.0,), "nothing was validated"


def test_a_tokenizer_that_the_protocol_was_added_to_comes_back(tiny_run: Arguments, tmp_path: Path) -> None:
    raw = Tokenizer(models.BPE({letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(tmp_path / "bytes")
    sizes = {"data.tokenizer": tmp_path / "bytes", "data.document_tokens": 2048, "trainer.limit_train_batches": 1}
    found = fit(tiny_run(tmp_path, steps=1, **sizes))
    protocol = open_run(tmp_path / "tiny").protocol
    assert protocol.fingerprint() == found.datamodule.protocol.fingerprint() and len(protocol.tokenizer) == 259
    assert (protocol.start, protocol.end, protocol.ref) == tuple(
        getattr(found.datamodule.protocol, name) for name in ("start", "end", "ref")
    )


def test_layers_weigh_by_the_last_validation(folder: Path) -> None:
    validations = measured(folder)
    assert len(validations) == 4 and validations[-1] != validations[-2] and all(validations[-1])
    assert recorded(folder) == pytest.approx(validations[-1]), "also where Lightning saves before it validates"
    weights = open_run(folder).layer_weights
    assert sum(weights) == pytest.approx(1) and weights == layer_shares(recorded(folder))
    assert weights[0] / weights[1] == pytest.approx(validations[-1][0] / validations[-1][1])


def test_shares_of_recall_are_of_one() -> None:
    assert layer_shares([0.5, 0.0, 1.5]) == (0.25, 0.0, 0.75)
    assert layer_shares([0.0] * 4) == (0.25,) * 4


def test_a_resume_keeps_what_was_validated(folder: Path, tiny_run: Arguments, copy: Path) -> None:
    before = recorded(copy)
    flags = {**VALIDATED, "name": "copy", "ckpt_path": "last", "trainer.max_steps": 25}
    resumed = fit(tiny_run(copy.parent, steps=30, **{**flags, "trainer.limit_val_batches": 0}))
    assert resumed.trainer.global_step == newest(copy)["global_step"] == 25
    assert recorded(copy) == before == recorded(folder) != []
    fit(tiny_run(copy.parent, steps=30, **{**flags, "trainer.max_steps": 30}))
    assert recorded(copy) == pytest.approx(measured(copy)[-1]) != before


def test_a_run_in_parts_with_validations_is_the_whole_run(tiny_run: Arguments, tmp_path: Path) -> None:
    """What a validation adds to a checkpoint leaves its resume alone: the same steps in the log, the same weights."""
    for name, limits in (("whole", (15,)), ("parts", (5, 10, 15))):
        for number, limit in enumerate(limits):
            resume = {"ckpt_path": "last"} if number else {}
            fit(tiny_run(tmp_path, steps=15, **VALIDATED, name=name, **{"trainer.max_steps": limit}, **resume))
    logs = [list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("whole", "parts")]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]] and len(logs[0]) >= 15
    whole, parts = (newest(tmp_path / name) for name in ("whole", "parts"))
    assert whole["msa_train"] == parts["msa_train"]
    assert recorded(tmp_path / "whole") == pytest.approx(recorded(tmp_path / "parts"))
    for name, weight in whole["state_dict"].items():
        torch.testing.assert_close(weight, parts["state_dict"][name], rtol=1e-4, atol=1e-5)


def test_a_sanity_check_is_no_validation(tiny_run: Arguments, tmp_path: Path) -> None:
    flags = {**VALIDATED, "trainer.num_sanity_val_steps": 1, "trainer.val_check_interval": 19}
    fit(tiny_run(tmp_path, steps=5, **flags))
    assert not (tmp_path / "tiny" / "routing.json").exists()
    assert open_run(tmp_path / "tiny").layer_weights == (0.5, 0.5)


@pytest.mark.parametrize("content", ["", "[]", '{"recall@1": {"0": 0.5}}', '{"recall@1": {"0": 2, "1": 0}}'])
def test_a_broken_note_of_recall_is_named(content: str, copy: Path) -> None:
    (copy / "routing.json").write_text(content)
    with pytest.raises(UserError, match=r"routing.json: .* delete it to have all layers weigh alike"):
        open_run(copy)


@pytest.mark.parametrize("flag", ["trainer.fast_dev_run=true", "trainer.logger=false"])
def test_nothing_is_kept_where_no_config_is(flag: str, tiny_run: Arguments, tmp_path: Path) -> None:
    fit([*tiny_run(tmp_path, steps=1), f"--{flag}"])
    kept = {file.name for file in tmp_path.rglob("*")}
    assert not kept & {"config.yaml", "tokenizer", "tokenizer.json", "backbone"}


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    change(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_no_class_of_a_config_is_imported(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "malicious.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('written').touch()\nclass Data: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    naming = {"class_path": "malicious.Data", "init_args": {"max_document_tokens": 31}}

    def change(config: dict[str, Any]) -> None:
        config["data"] = naming
        config["trainer"]["callbacks"] = [naming]
        config["model"]["class_path"] = "malicious.Data"
        config["model"]["backbone"] = "nowhere"

    edit(copy, change)
    assert open_run(copy).max_document_tokens == 31
    assert not (tmp_path / "written").exists() and "malicious" not in sys.modules
    edit(copy, lambda config: config["data"].pop("init_args"))
    assert open_run(copy).max_document_tokens == 1024


def test_a_tag_of_a_config_is_not_obeyed(copy: Path, tmp_path: Path) -> None:
    text = f"model: !!python/object/apply:os.mkdir [{tmp_path / 'written'}]\n"
    (copy / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="config.yaml: not readable YAML"):
        open_run(copy)
    assert not (tmp_path / "written").exists()


def unlink(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def changed(key: str, value: Any) -> Callable[[Path], Any]:
    *path, last = key.split(".")

    def change(config: dict[str, Any]) -> None:
        for name in path:
            config = config[name]
        config[last] = value

    return lambda folder: edit(folder, change)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing there": (shutil.rmtree, r"no run '.*copy': give a run's folder"),
    "no config": (unlink("config.yaml"), r"copy: not a run of msa-train \(no config.yaml\); give the folder"),
    "no tokenizer": (
        lambda folder: shutil.rmtree(folder / "tokenizer"),
        r"no tokenizer/tokenizer_config.json, as in runs of older versions; resume it once \(msa-train fit --config",
    ),
    "no backbone": (
        lambda folder: shutil.rmtree(folder / "backbone"),
        r"no backbone/config.json, as in runs of older versions; resume it once .* or train it anew",
    ),
    "no checkpoint": (
        every(shutil.rmtree), r"copy: no whole checkpoint \(step=N.ckpt\) yet; let msa-train fit"
    ),
    "broken YAML": (write("config.yaml", "model: [\n  b"), "config.yaml: not readable YAML .* correct it, or resume"),
    "YAML of a bad date": (write("config.yaml", "a: 2001-99-99"), "config.yaml: not readable YAML"),
    "empty YAML": (write("config.yaml", ""), "config.yaml: model.msa.chunk_size is missing"),
    "a list": (write("config.yaml", "[1]"), "config.yaml: model.msa.chunk_size is missing: it must be a whole number"),
    "chunk size": (changed("model.msa.chunk_size", 8.0), "model.msa.chunk_size is '8.0'.* a whole number from 1"),
    "chunk size of another run": (changed("model.msa.chunk_size", 4), r"\d+.ckpt: trained with msa.chunk_size 8, .* 4"),
    "top-k": (changed("model.msa.top_k", True), "model.msa.top_k is 'True'"),
    "layers": (changed("model.msa.routed_layers", ["1"]), "model.msa.routed_layers is .*: it must be a list of whole"),
    "layers unsorted": (changed("model.msa.routed_layers", [1, 0]), "routed_layers is .*ascending"),
    "layer beyond": (changed("model.msa.routed_layers", [7]), "names layer 7, but the decoder has layers 0..1"),
    "words": (changed("model.routing_words", "all"), "model.routing_words is 'all': it must be one of question"),
    "words of a list": (changed("model.routing_words", []), r"model.routing_words is '\[\]'"),
    "precision": (changed("model.weights", "float64"), "model.weights is 'float64': it must be one of float32, bfl"),
    "limit": (changed("data.init_args.max_document_tokens", 0), "data.init_args.max_document_tokens is '0'"),
    "other layers": (changed("model.msa.routed_layers", [1]), "another architecture: it has 'model.backbone.*router_"),
    "other backbone": (
        write("backbone/config.json", json.dumps({**TINY_BACKBONE, "intermediate_size": 64})),
        r"step=\d+.ckpt: another architecture: '.*gate_proj.weight' is \(48, 32\) there, \(64, 32\) here",
    ),
    "broken backbone": (write("backbone/config.json", "{"), "backbone/config.json"),
    "broken tokenizer": (write("tokenizer/tokenizer.json", "{}"), "tokenizer: not a readable tokenizer .* resume"),
    "strange tokenizer": (write("tokenizer/tokenizer_config.json", "[]"), "tokenizer: not a readable tokenizer"),
    "broken weights": (
        every(lambda saved: flip(saved / WEIGHTS)), "step=20.ckpt/weights.safetensors: damaged .its checksum differs"
    ),
    "strange checkpoint": (every(lambda saved: (saved / FACTS).write_text("{}")), "msa_train.json: damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_run_is_one_line(case: str, copy: Path) -> None:
    damage, message = BAD[case]
    damage(copy)
    with pytest.raises(UserError, match=message) as told:
        open_run(copy)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


def test_a_checkpoint_outside_of_a_run_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "last.ckpt", tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="not a run of msa-train"):
        open_run(tmp_path / "last.ckpt")


def test_an_older_run_is_mended_by_a_resume(tiny_run: Arguments, copy: Path) -> None:
    for name in ("tokenizer", "backbone"):
        shutil.rmtree(copy / name)
    cli.build(
        ["fit", "--config", str(copy / "config.yaml"), f"--runs={copy.parent}", "--name=copy", "--ckpt_path=last"]
    )
    assert open_run(copy).model.routed_layers == (0, 1)
