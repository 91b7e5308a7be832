"""Bad input, of all commands: one line that names the place and the mend, exit code 2, and nothing is written.

Every case is the arguments of a command, the files that it brings along (in `$here`), and what its line must say. Most
end before anything is opened; a trained run and a bank are there once, and no case may change them.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch

from msa_train import cli
from msa_train.commands import COMMANDS
from msa_train.memory.manifest import FORMAT
from tests.conftest import write_corpus

Arguments = Callable[..., list[str]]
CONFIGS = Path(__file__).parent.parent / "configs"
KEY = "sk-planted-0123456789"


@dataclass(frozen=True)
class Case:
    """Arguments with `$here` (the case's files), `$out` (where nothing may be), `$run`, `$bank`, `$corpus`."""

    arguments: tuple[str, ...]
    message: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    changes: Mapping[str, Any] | None = None  # of a run that would train


def fit(message: str, changes: Mapping[str, Any], command: str = "fit", **files: str | bytes) -> Case:
    """A run that would train, but for these flags."""
    return Case((command,), message, {name.replace("__", "."): text for name, text in files.items()}, changes)


def config(message: str, content: str | bytes) -> Case:
    """A run that would train, but for one of its config files."""
    return Case(("fit", "--config=$here/c.yaml"), message, {"c.yaml": content}, {})


def shipped(name: str, message: str, content: str = "", *flags: str, command: str = "fit") -> Case:
    """A shipped config with another one on top."""
    given = (f"--config={CONFIGS / name}", *(("--config=$here/c.yaml",) if content else ()))
    return Case((command, *given, "--runs=$out", *flags), message, {"c.yaml": content} if content else {})


def corpus(message: str, files: Mapping[str, str | bytes], name: str = "") -> Case:
    """A run on a corpus of these files."""
    return Case(("fit",), message, files, {"data.corpus": f"$here/{name}" if name else "$here"})


def callback(path: str, message: str, files: Mapping[str, str | bytes] | None = None, **arguments: Any) -> Case:
    """A run with a callback of this class."""
    named = json.dumps([{"class_path": path, "init_args": arguments} if arguments else {"class_path": path}])
    return Case(("fit",), message, files or {}, {"trainer.callbacks": named})


def judged(message: str, **judge: Any) -> Case:
    """A run whose answers this judge would grade."""
    tasks = [{"class_path": "datamodules.RetrievalTask", "init_args": {"split": "test"}}]
    return callback("callbacks.ExtrapolationEvaluation", message, tasks=tasks, judge={"model": "m", **judge})


def ask(message: str, *flags: str, question: str = "hm?") -> Case:
    """A question that would be answered, but for these flags; a later flag wins."""
    return Case(("ask", "--model=$run", "--bank=$bank", *flags, question), message)


def encode(message: str, *flags: str, **files: str | bytes) -> Case:
    """A corpus that would be encoded."""
    named = {name.replace("__", "."): text for name, text in files.items()}
    return Case(("encode", "--model=$run", "--corpus=$corpus", "--out=$out", *flags), message, named)


class Attack:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.mkdir, (Path("unpickled"),)


DOCUMENTS = '{"_id": "d1", "text": "a fox"}\n'
QUERIES = '{"_id": "q1", "text": "where?"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t1\n"
BEIR = {"corpus.jsonl": DOCUMENTS, "queries.jsonl": QUERIES, "qrels/train.tsv": QRELS}
MAPPING = "files: {train: rows.jsonl}\nquery: q\ndocuments: {text: t}\n"
MODULE = "from lightning import Callback\n\ndef make() -> Callback:\n    return Callback()\n"
PHASE = '[{"name": "a", "steps": 2, %s}]'

TRAINING: dict[str, Case] = {
    "unknown key": fit("did you mean .*chunk_size", {"model.chunk_siez": 4}),
    "unknown trainer key": fit("did you mean .*max_steps", {"trainer.max_step": 4}),
    "unknown data key": fit("did you mean document_tokens", {"data.documents_tokens": 4}),
    "unknown phase key": fit("did you mean steps", {"model.phases": '[{"name": "a", "step": 2}]'}),
    "wrong type": fit("temperature", {"model.temperature": "warm"}),
    "missing backbone": fit("no such file 'nowhere.json'", {"model.backbone": "nowhere.json"}),
    "missing corpus": fit("data.corpus: 'nowhere' is neither a folder nor a file here", {"data.corpus": "nowhere"}),
    "missing tokenizer": fit("data.tokenizer: cannot open '.*nowhere'", {"data.tokenizer": "$here/nowhere"}),
    "missing split": fit("no split 'dev'", {"data.train_split": "dev"}),
    "missing checkpoint": fit("no such checkpoint 'nowhere.ckpt'", {"ckpt_path": "nowhere.ckpt"}),
    "no such checkpoint word": fit("no such checkpoint 'best'", {"ckpt_path": "best"}),
    "nothing to resume": fit("has no checkpoint yet", {"ckpt_path": "last"}),
    "missing start": fit("model.init_from: no such checkpoint", {"model.init_from": "nowhere.ckpt"}),
    "chunk size 0": fit("chunk_size is 0", {"model.msa.chunk_size": 0}),
    "top-k 0": fit("top_k is 0", {"model.msa.top_k": 0}),
    "layer out of range": fit("layer 7.*layers 0..1", {"model.msa.routed_layers": "[1, 7]"}),
    "layers unsorted": fit("ascending", {"model.msa.routed_layers": "[1, 0]"}),
    "budget too small": fit("more than document_tokens 30", {"data.document_tokens": 30}),
    "too many queries": fit("lower queries_per_pack", {"data.queries_per_pack": 60}),
    "epochs": fit("max_epochs is 3: a run is as long as its phases", {"trainer.max_epochs": 3}),
    "no phase": fit("phases is empty", {"model.phases": "[]"}),
    "phase of no steps": fit("steps is 0", {"model.phases": '[{"name": "a", "steps": 0}]'}),
    "temperature 0": fit("temperature is 0", {"model.temperature": 0}),
    "a split for a list of them": fit(r"val_splits.*give a list, like \[a, b\]$", {"data.val_splits": "test"}),
    "negatives without a number": fit(
        r"negatives.*give a value for each name, like \{a: 1\}$", {"data.negatives": "bm25"}
    ),
    "share of 2": fit("answer_share is 2", {"data.answer_share": 2.0}),
    "vocabulary too small": fit("vocab_size is 10", {"data.vocab_size": 10}),
    "share of an epoch": fit("val_check_interval", {"trainer.val_check_interval": 0.25}),
    **({} if torch.cuda.is_available() else {"no GPU here": fit("gpu", {"trainer.accelerator": "gpu"})}),
    # numbers
    "no number": fit("model.temperature is nan: give a number", {"model.temperature": ".nan"}),
    "infinite rate": fit(r"model.phases\S*backbone_lr is inf: give", {"model.phases": PHASE % '"backbone_lr": .inf'}),
    "negative rate": fit("router_lr is -1.0: give 0 or more", {"model.phases": PHASE % '"router_lr": -1'}),
    "huge top-k": fit("top_k is a number of 31 digits: give one below", {"model.msa.top_k": 10**30}),
    "huge pack": fit("document_tokens is 10,000.*give at most 134,217,728", {"data.document_tokens": 10**16}),
    "negative steps": fit("max_steps.*-5", {"trainer.max_steps": -5}),
    "negative seed": fit("seed_everything is -1: give a number from 0", {"seed_everything": -1}),
    "seed beyond 32 bits": fit(r"seed_everything is \d+: give a number from 0", {"seed_everything": 2**32}),
    "no batch": fit("accumulate_grad_batches is 0: give at least 1", {"trainer.accumulate_grad_batches": 0}),
    "weight 0": fit("every weight above 0", {"data.corpus": '{"$corpus": 0}'}),
    "weight nan": fit("data.init_args.corpus.* is nan", {"data.corpus": '{"$corpus": .nan}'}),
    "a curriculum without a beginning": fit("begins at step 0", {"data.document_tokens": "{5: 512}"}),
    "half a query": fit("queries_per_pack is 1.5: give a whole number", {"data.queries_per_pack": 1.5}),
    "devices in words": fit("trainer.devices|devices", {"trainer.devices": "many"}),
    "no nodes": fit("num_nodes", {"trainer.num_nodes": 0}),
    # places
    "runs below a file": fit("is a file; give another --runs", {"runs": "$here/file"}, file="x"),
    "a name that leads out": fit(r"--name '\.\./x': give a name", {"name": "../x"}),
    "a name that leads out and back": fit("--name 'a/../b': give a name", {"name": "a/../b"}),
    "an absolute name": fit("--name '/x': give a name", {"name": "/x"}),
    "an empty name": fit("--name '': give a name", {"name": ""}),
    "a name too long": fit("--name 'aaa.*: give a name", {"name": "a" * 300}),
    "a name of control characters": fit(r"--name 'a\\x1bb': give a name", {"name": "a\x1bb"}),
    # classes
    "unknown callback": callback("callbacks.Nope", "no attribute 'Nope'"),
    "a shell as callback": callback("os.system", "'os.system' may not be named: give a class"),
    "a process as callback": callback("subprocess.Popen", "'subprocess.Popen' may not be named", args=["touch", "x"]),
    "a shell by another name": callback(
        "own_system.o.system", "'posix.system' may not be named", {"own_system.py": "import os as o\n"}
    ),
    "eval as callback": callback("builtins.eval", "'builtins.eval' may not be named"),
    "a path as callback": callback("pathlib.Path", "'pathlib.Path' may not be named"),
    "a loader as callback": callback("torch.load", "torch.load does not correspond to a subclass of Callback"),
    "a data module as callback": callback("datamodules.PackedMemory", "does not correspond to a subclass of Callback"),
    "a function that makes a callback": callback(
        "own_function.make", "'own_function.make' is a function, not a class", {"own_function.py": MODULE}
    ),
    "a function as argument": callback(
        "lightning.pytorch.callbacks.LambdaCallback",
        "on_fit_start: a config gives no functions, and 'load' is one",
        on_fit_start="torch.load",
    ),
    "a shell as argument": callback(
        "lightning.pytorch.callbacks.LambdaCallback", "'os.system' may not be named", on_fit_start="os.system"
    ),
    "a process within a callback": callback(
        "lightning.pytorch.callbacks.LambdaCallback",
        "'subprocess.Popen' may not be named",
        on_fit_start={"class_path": "subprocess.Popen", "init_args": {"args": "x"}},
    ),
    "a callback without its argument": callback("lightning.pytorch.callbacks.EarlyStopping", "monitor"),
    "a callback that refuses": callback("callbacks.Samples", "Samples: questions is 0: give at least 1", questions=0),
    "an unknown argument of a callback": callback("callbacks.Samples", "did you mean questions|question", question=1),
    "no class": callback("nope", "dot import path string: nope"),
    "unknown data class": fit('Parser key "data"', {"data": "datamodules.Nope"}),
    "a shell as data": fit("'os.system' may not be named", {"data": "os.system"}),
    "a callback as data": fit(
        "does not correspond to a subclass of LightningDataModule", {"data": "callbacks.Samples"}
    ),
    "a path as logger": fit("'pathlib.Path' may not be named", {"trainer.logger": '{"class_path": "pathlib.Path"}'}),
    "a callback as logger": fit(
        "trainer.logger.*subclass of Logger", {"trainer.logger": '{"class_path": "callbacks.Samples"}'}
    ),
    "a callback as profiler": fit(
        "trainer.profiler|profiler", {"trainer.profiler": '{"class_path": "callbacks.Samples"}'}
    ),
    "unknown strategy": fit("invalid strategy name.*magic", {"trainer.strategy": "magic"}),
    "unknown strategy class": config(
        "no attribute 'Zero9'", "trainer: {strategy: {class_path: msa_train.strategies.Zero9}}"
    ),
    "a callback as strategy": config(
        "callbacks.Samples does not correspond to a subclass of Strategy",
        "trainer: {strategy: {class_path: callbacks.Samples}}",
    ),
    "an optimiser": config(
        "optimizer: class_path .* may not stand in a config", "optimizer: {class_path: torch.optim.SGD}"
    ),
    # keys
    "a key for the judge": judged("environment variable OPENAI_API_KEY", api_key=KEY),
    "a key in the place of its variable": judged("give its name in capitals.*OPENAI_API_KEY", key_variable=KEY),
    "a key in the address": judged("base_url is no plain address", base_url=f"https://me:{KEY}@host/v1"),
    "a key as judge": callback(
        "callbacks.ExtrapolationEvaluation", "environment variable OPENAI_API_KEY", tasks=[], judge=KEY
    ),
    "a key on the command line": fit("environment variable OPENAI_API_KEY", {"api_key": KEY}),
    # config files
    "no config file": fit("nowhere.yaml", {"config": "nowhere.yaml"}),
    "a config without a name": fit("--config: the name is empty", {"config": ""}),
    "a folder as config": fit("not a file: '.*'", {"config": "$here"}),
    "a list": config("c.yaml: a config has keys like model.*list", "- a\n- b\n"),
    "a word": config("c.yaml: a config has keys like model.*str", "hello\n"),
    "an empty config": config("c.yaml: a config has keys like model.*nothing", ""),
    "tabs": config("c.yaml:2: not valid YAML .*: indent with spaces", "trainer:\n\tmax_steps: 3\n"),
    "an open bracket": config("c.yaml:1: not valid YAML .*: correct it", "trainer: {max_steps: 3"),
    "a binary file": config("c.yaml: not UTF-8 text .byte 128.: give a YAML file", bytes(range(256))),
    "another encoding": config("c.yaml: not UTF-8 text", "trainer: {max_steps: 3} # é".encode("latin-1")),
    "a tag that would run": config("c.yaml:1: not valid YAML", "model: !!python/object/apply:os.mkdir [x]\n"),
    "a key twice in a file that a config names": fit(
        "d.yaml: 'vocab_size' comes twice",
        {"data": "$here/d.yaml"},
        d__yaml="class_path: datamodules.PackedMemory\ninit_args: {vocab_size: 400, vocab_size: 500}\n",
    ),
    "a key twice": config("c.yaml:2: not valid YAML .'trainer' comes twice.", "trainer: {}\ntrainer: {max_steps: 4}\n"),
    "an empty section": config("c.yaml: trainer has no keys below it", "trainer:\n"),
    "a list for a section": config("c.yaml: model has no keys below it", "model: [1]\n"),
    "a number for a key": config("string", "1: 2\n"),
    "a misspelt section": config("did you mean trainer", "trianer: {max_steps: 3}\n"),
    # corpora
    "a text file as corpus": corpus("give a BEIR folder, a mapping", {"c.txt": "x"}, "c.txt"),
    "no documents": corpus("corpus.jsonl: empty; it needs", {**BEIR, "corpus.jsonl": ""}),
    "no queries file": corpus("queries.jsonl: no such file", {"corpus.jsonl": DOCUMENTS}),
    "no qrels": corpus("add qrels/train.tsv", {"corpus.jsonl": DOCUMENTS, "queries.jsonl": QUERIES}),
    "a document twice": corpus("corpus.jsonl:2: _id 'd1' occurs twice", {**BEIR, "corpus.jsonl": DOCUMENTS * 2}),
    "qrels to nowhere": corpus(
        "train.tsv:3: document 'd9' is not in", {**BEIR, "qrels/train.tsv": QRELS + "q1\td9\t1\n"}
    ),
    "qrels of nobody": corpus("train.tsv:3: query 'q9' is not in", {**BEIR, "qrels/train.tsv": QRELS + "q9\td1\t1\n"}),
    "qrels without a header": corpus("train.tsv:1: the first line must", {**BEIR, "qrels/train.tsv": "q1\td1\t1\n"}),
    "a score in words": corpus("score 'high' is not a number", {**BEIR, "qrels/train.tsv": QRELS + "q1\td1\thigh\n"}),
    "a corpus that is not UTF-8": corpus("corpus.jsonl:1: not UTF-8", {**BEIR, "corpus.jsonl": b"\xff\xfe"}),
    "a folder in a file's place": corpus("corpus.jsonl: no such file", {"corpus.jsonl/x": ""}),
    "half a letter": corpus("half a surrogate", {**BEIR, "corpus.jsonl": '{"_id": "d1", "text": "\\ud800"}'}),
    "a mapping that is a list": corpus("m.yaml: expected keys", {"m.yaml": "- a"}, "m.yaml"),
    "a mapping with tabs": corpus("m.yaml: not valid YAML", {"m.yaml": "files:\n\ttrain: x"}, "m.yaml"),
    "a misspelt mapping": corpus("did you mean 'query'", {"m.yaml": MAPPING.replace("query", "qeury")}, "m.yaml"),
    "a mapping of no file": corpus("matches no file", {"m.yaml": MAPPING}, "m.yaml"),
    "a column that is not there": corpus("no column 'q'", {"m.yaml": MAPPING, "rows.jsonl": '{"t": "x"}'}, "m.yaml"),
    "a split that leads out": corpus(
        r"hold_out: split is .*use letters", {"m.yaml": f'{MAPPING}hold_out: {{split: "../x", share: 0.5}}'}, "m.yaml"
    ),
    "no parquet": corpus(
        "rows.parquet: not valid Parquet",
        {"m.yaml": MAPPING.replace("jsonl", "parquet"), "rows.parquet": b"PAR1xx"},
        "m.yaml",
    ),
    "a pickle that would run": corpus("nothing was run", {"p.pkl": pickle.dumps([Attack()])}, "p.pkl"),
    "no pickle": corpus("p.pkl: byte", {"p.pkl": b"\x80"}, "p.pkl"),
    "a store that leads out": fit(
        "manifest.json: damaged: 'name'",
        {"data.corpus": "$here", "data.tokenizer": "$run/tokenizer"},
        manifest__json=json.dumps({"format": 1, "name": "../../x", "content": "0" * 64, "tokenizer": "x"}),
    ),
    "a store of nothing": fit(
        "a store of another format",
        {"data.corpus": "$here", "data.tokenizer": "$run/tokenizer"},
        manifest__json="{}",
    ),
    "negatives of nobody": fit("none", {"data.negatives": '{"$here/none": 2}'}),
    # backbones and tokenizers
    "an empty folder as backbone": fit("cannot open '.*'", {"model.backbone": "$here"}),
    "a backbone that is no JSON": fit("cannot open '.*b.json'", {"model.backbone": "$here/b.json"}, b__json="{"),
    "a backbone that is a list": fit("b.json", {"model.backbone": "$here/b.json"}, b__json="[]"),
    "an unknown kind of backbone": fit(
        "cannot open '.*b.json'", {"model.backbone": "$here/b.json"}, b__json='{"model_type": "abacus"}'
    ),
    "a backbone of words": fit(
        "b.json", {"model.backbone": "$here/b.json"}, b__json='{"model_type": "qwen3", "hidden_size": "wide"}'
    ),
    "a broken tokenizer": fit(
        "data.tokenizer: cannot open",
        {"data.tokenizer": "$here"},
        tokenizer__json="{}",
        tokenizer_config__json="{}",
    ),
    # checkpoints
    "a text file as checkpoint": fit("c.ckpt: not a", {"ckpt_path": "$here/c.ckpt"}, c__ckpt="x"),
    "a folder as checkpoint": fit("not a", {"ckpt_path": "$here"}),
    "a text file as start": fit("c.ckpt: not a", {"model.init_from": "$here/c.ckpt"}, c__ckpt="x"),
    # jobs and evaluations
    "nothing to validate": fit("has no checkpoint yet", {"ckpt_path": "last"}, "validate"),
    "nothing to test": fit("no such checkpoint 'nowhere.ckpt'", {"ckpt_path": "nowhere.ckpt"}, "test"),
    "nothing to predict with": fit("not a checkpoint", {"ckpt_path": "$here"}, "predict"),
    "a name that leads out of testing": fit(r"--name '\.\./x'", {"name": "../x"}, "test"),
    "a misspelt key of predict": fit("did you mean", {"data.val_split": "x"}, "predict"),
    "a shell in validation": fit("'os.system' may not be named", {"trainer.callbacks": '["os.system"]'}, "validate"),
    "a misspelt key of the doctor": fit("did you mean .*max_steps", {"trainer.max_step": 4}, "doctor"),
    "a number that is none for the doctor": fit("temperature is nan", {"model.temperature": ".nan"}, "doctor"),
    "no batch for the doctor": fit("accumulate_grad_batches is 0", {"trainer.accumulate_grad_batches": 0}, "doctor"),
    "data that is not packed": Case(
        ("pack", "--data=lightning.pytorch.demos.boring_classes.BoringDataModule"),
        "BoringDataModule is no .*PackSource",
    ),
    "data that the doctor cannot ask": Case(
        (
            "doctor",
            f"--config={CONFIGS / 'quickstart.yaml'}",
            "--runs=$out",
            "--data=lightning.pytorch.demos.boring_classes.BoringDataModule",
        ),
        "BoringDataModule is no .*PackSource",
    ),
    "two corpora of one name": Case(
        ("pack", '--data.corpus={"$corpus": 1, "$here/corpus": 1}', "--data.tokenizer=$run/tokenizer"),
        "2 corpora are named 'corpus'.*rename the folder",
        {f"corpus/{name}": text for name, text in BEIR.items()},
    ),
    "nothing to pack": Case(("pack", "--data.corpus=nowhere"), "data.corpus: 'nowhere' is neither"),
    "documents of no token": Case(
        ("pack", "--data.max_document_tokens=0"), "max_document_tokens is 0: give at least 1"
    ),
    "a document twice in a pack": Case(
        ("pack", "--data.corpus=$here", "--data.vocab_size=400"),
        "occurs twice",
        {**BEIR, "corpus.jsonl": DOCUMENTS * 2},
    ),
    "an unknown option of pack": Case(("pack", "--data.corpsu=x"), "did you mean corpus"),
    "an unknown card": fit("--card H9000 is not known: give the nearest", {"card": "H9000"}, "estimate"),
    "a card of no memory": fit("--card_gib is -1: give", {"card_gib": -1}, "estimate"),
    "a card of nan": fit("card_gib is nan: give a number", {"card_gib": ".nan"}, "estimate"),
    "a strategy without an estimate": fit("estimate knows auto, ddp", {"trainer.strategy": "fsdp"}, "estimate"),
    "mining without a router": fit("mine needs --ckpt_path", {"out": "$out/mined"}, "mine"),
    "mining to nowhere": fit("out", {"ckpt_path": "last"}, "mine"),
    # shipped configs
    "quickstart, misspelt": shipped("quickstart.yaml", "did you mean .*top_k", "model: {msa: {topk: 4}}"),
    "quickstart, another type": shipped("quickstart.yaml", "chunk_size", "model: {msa: {chunk_size: big}}"),
    "quickstart, nan": shipped("quickstart.yaml", "model.temperature is nan", "model: {temperature: .nan}"),
    "quickstart, two levels up": shipped("quickstart.yaml", "--name", "name: ../../x"),
    "chains, misspelt": shipped("chains.yaml", "did you mean .*answer_share", "data: {init_args: {answer_shar: 1}}"),
    "chains, a shell": shipped("chains.yaml", "may not be named", "trainer: {callbacks: [{class_path: os.system}]}"),
    "needles, unknown": shipped(
        "evaluation/needles.yaml",
        "niah_single_9|task",
        "",
        "--trainer.callbacks.init_args.tasks="
        '[{"class_path": "datamodules.NeedleTask", "init_args": {"task": "niah_single_9"}}]',
    ),
    "ZeRO, stage 7": shipped(
        "strategy/zero2.yaml",
        "stage",
        "trainer: {strategy: {class_path: msa_train.strategies.ZeRO, init_args: {stage: 7}}}",
    ),
    "smollm2, no phase": shipped("smollm2_135m/pretrain.yaml", "phases is empty", "model: {phases: []}"),
    "qwen3, no corpus": shipped("qwen3_4b/model.yaml", "no attribute 'Nope'", "data: {class_path: datamodules.Nope}"),
    "debug, epochs": shipped("quickstart.yaml", "max_epochs is 2", "", "--trainer.max_epochs=2"),
    "estimate of a shipped config": shipped(
        "quickstart.yaml", "--card A1 is not known", "", "--card=A1", command="estimate"
    ),
}

ASKING: dict[str, Case] = {
    "no command": Case((), "subcommand|command"),
    "unknown command": Case(("train",), "train"),
    "a command behind a config": Case(("--config=$here/c.yaml", "bank", "x"), "takes no --config", {"c.yaml": "{}"}),
    # encode
    "a text file as run": encode("not a run of msa-train", "--model=$here/x", x="x"),
    "a bank in a file's place": encode("cannot write the bank here", "--out=$here/x", x="x"),
    "a bank below a file": encode("cannot write the bank here", "--out=$here/x/bank", x="x"),
    "keys of four bits": encode("keys", "--keys=int4"),
    "tokens in words": encode("batch_tokens", "--batch_tokens=many"),
    "an unknown device": encode("device", "--device=tpu"),
    **({} if torch.cuda.is_available() else {"no GPU": encode("there is no GPU here; give", "--device=cuda")}),
    "nothing to encode with": Case(("encode", "--corpus=$corpus", "--out=$out"), "model"),
    "a document twice in a bank": encode("occurs twice", "--corpus=$here", corpus__jsonl=DOCUMENTS * 2),
    "a bank of no documents": encode("it needs at least one", "--corpus=$here", corpus__jsonl=""),
    "a bank of no UTF-8": encode("corpus.jsonl:1: not UTF-8", "--corpus=$here", corpus__jsonl=b"\xff"),
    "a pickle to encode": encode("nothing was run", "--corpus=$here/p.pkl", p__pkl=pickle.dumps([Attack()])),
    # ask
    "an infinite temperature": ask("temperature is inf: give a number", "--temperature=.inf"),
    "a temperature of nan": ask("temperature is nan: give a number", "--temperature=.nan"),
    "a margin below 0": ask("margin is -0.5: give 0 or more", "--margin=-0.5"),
    "no words": ask("max_new_tokens is 0", "--max_new_tokens=0"),
    "top-p of 0": ask("top_p 0.0: give", "--top_p=0"),
    "documents beyond counting": ask("documents is a number of 31 digits", f"--documents={10**30}"),
    "a question too long": ask("positions, the model has", question="fox " * 900),
    "half a letter asked": ask("not valid UTF-8", question="caf\udce9?"),
    "a file as bank": ask("is no memory bank", "--bank=$here/x"),
    "two questions": Case(("ask", "--model=$run", "--bank=$bank", "a?", "b?"), "unrecognized arguments"),
    "stdin that is not UTF-8": Case(("ask", "--model=$run", "--bank=$bank"), "a question is not UTF-8 text"),
    # bank
    "nothing to look into": Case(("bank",), "bank"),
    "an empty manifest": Case(("bank", "$here"), "not a readable manifest", {"manifest.json": ""}),
    "a manifest of another format": Case(("bank", "$here"), "another format", {"manifest.json": '{"format": 99}'}),
    "a manifest that is a list": Case(("bank", "$here"), "another format", {"manifest.json": "[]"}),
    "a manifest that is not UTF-8": Case(("bank", "$here"), "not a readable manifest", {"manifest.json": b"\xff"}),
    "half a manifest": Case(
        ("bank", "$here", "--verify"), "damaged: 'shape'", {"manifest.json": json.dumps({"format": FORMAT})}
    ),
    "removing from nothing": Case(("bank", "$here/none", "--remove", "d1"), "is no memory bank"),
    "removing nobody": Case(("bank", "$bank", "--remove", "nobody"), "no document 'nobody'"),
    "adding to nothing": Case(("bank", "$here/none", "--add", "$corpus"), "is no memory bank"),
    "adding nothing": Case(("bank", "$bank", "--add", "$here/none"), "neither a folder nor a file"),
    "adding with no run": Case(("bank", "$bank", "--add", "$corpus", "--model", "$here/none"), "no run '.*none'"),
    # report
    "a report of nothing": Case(("report",), "runs"),
    "a report without evaluations": Case(("report", "$run", "--out=$out"), "no report.json; add callbacks"),
    "a broken report": Case(("report", "$here", "--out=$out"), "not a report of this version", {"report.json": "[]"}),
    "a report without a name": Case(("report", "$run", "--out="), "--out '.': give a file's name"),
    "a report over a folder": Case(("report", "$run", "--out=$here/a"), "give a file's name", {"a.md/x": ""}),
    "a run twice": Case(("report", "$run", "$run", "--out=$out"), "named twice"),
    # export
    "exporting nothing": Case(("export", "$here/none", "--out=$out"), "no run '.*none'"),
    "exporting into a full folder": Case(("export", "$run", "--out=$here"), "not empty: give another", {"x": ""}),
    "exporting below a file": Case(("export", "$run", "--out=$here/x/y"), "cannot be written", {"x": ""}),
    "exporting float16": Case(("export", "$run", "--out=$out", "--dtype=float16"), "dtype"),
    "exporting a bank": Case(("export", "$bank", "--out=$out"), "not a run of msa-train"),
    "exporting to nowhere": Case(("export", "$run"), "out"),
    "exporting what leads out": Case(
        ("export", "$here", "--out=$out"), "not a run of msa-train", {"config.json": '{"model_type": "qwen3"}'}
    ),
    # checkpoint
    "checkpoints of nothing": Case(("checkpoint", "list", "$here"), "no checkpoint .* here; give the folder of a run"),
    "checkpoints of a file": Case(("checkpoint", "verify", "$here/x"), "no checkpoint .* here", {"x": ""}),
    "pruning all": Case(("checkpoint", "prune", "$run", "--keep_last=0"), "--keep_last 0 must be at least 1"),
    "an unknown thing to do": Case(("checkpoint", "polish", "$run"), "polish|action"),
    # bench
    "a bench of nothing": Case(("bench",), "backbone"),
    "a bench of no tokens": Case(("bench", "--backbone=x", "--out=$here/b", "--tokens=0"), "must be above 0"),
    "a bench of nan": Case(("bench", "--backbone=x", "--out=$here/b", "--gib=.nan"), "gib is nan: give a number"),
    "a bench over a folder": Case(("bench", "--backbone=x", "--out=$here"), "give a JSON file in a folder"),
    "a bench in no folder": Case(("bench", "--backbone=x", "--out=$out/b.json"), "give a JSON file in a folder"),
    "a bench of feelings": Case(("bench", "--backbone=x", "--measure=[joy]"), "measure"),
    "a bench of chunks of 0": Case(("bench", "--backbone=x", "--msa.chunk_size=0"), "chunk_size is 0"),
}

CASES = {**TRAINING, **ASKING}
assert len(CASES) == len(TRAINING) + len(ASKING)


def test_every_command_has_its_cases() -> None:
    assert {case.arguments[0] for case in CASES.values() if case.arguments} >= {*cli.MemoryCLI.subcommands(), *COMMANDS}


@pytest.fixture(scope="module")
def world(tiny_run: Arguments, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained run, a bank, and the corpus that it is of."""
    root = tmp_path_factory.mktemp("world")
    write_corpus(root / "corpus", documents=7)
    cli.build(["fit", *tiny_run(root / "runs", steps=1)])
    run = root / "runs" / "tiny"
    cli.build(["encode", f"--model={run}", f"--corpus={root / 'corpus'}", f"--out={root / 'bank'}"])
    return {"root": root, "run": run, "bank": root / "bank", "corpus": root / "corpus"}


def written(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file below a folder, and when it was changed."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


def lines(error: str) -> Iterator[str]:
    return filter(None, error.splitlines())


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_nothing_is_written(
    case: str,
    world: dict[str, Path],
    tiny_run: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, here, out = CASES[case], tmp_path / "here", tmp_path / "out"
    here.mkdir()
    for name, content in given.files.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    places = {**{name: str(path) for name, path in world.items()}, "here": str(here), "out": str(out)}
    arguments = list(given.arguments)
    if given.changes is not None:
        whole = [one for one in tiny_run(out) if one.partition("=")[0].lstrip("-") not in given.changes]
        if "data" in given.changes:  # another class has other arguments
            whole = [one for one in whole if not one.startswith("--data")]
        arguments += [*whole, *(f"--{name}={value}" for name, value in given.changes.items())]
    monkeypatch.setattr(sys, "argv", ["msa-train", *(Template(one).substitute(places) for one in arguments)])
    if arguments and arguments[0] in (every := cli.MemoryCLI.subcommands()):  # a parser takes long to make
        only = {arguments[0]: every[arguments[0]]}
        monkeypatch.setattr(cli.MemoryCLI, "subcommands", staticmethod(lambda: only))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?\n"), encoding="utf-8"))
    monkeypatch.syspath_prepend(here)
    monkeypatch.delenv("MSA_TRAIN_DEBUG", raising=False)
    before = {**written(world["root"]), **written(here)}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    (line,) = lines(said.err)
    assert end.value.code == 2 and line.startswith("msa-train: error: "), said.err
    assert re.search(given.message, line), line
    assert "Traceback" not in said.err + said.out and len(line) < 600 and KEY not in said.err + said.out, line
    now = {**written(world["root"]), **written(here)}
    assert {path for path in now if "__pycache__" not in path.parts} == before.keys(), "nothing may be written"
    assert all(now[path] == before[path] for path in before)
    assert not out.exists() and not (tmp_path / "x").exists() and not Path("unpickled").exists()


def test_debug_shows_where_an_error_comes_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, variable in (["--debug"], None), ([], "1"):
        for command in (["fit", "--config=nowhere.yaml"], ["bank", "nowhere"]):
            monkeypatch.delenv("MSA_TRAIN_DEBUG", raising=False)
            if variable is not None:
                monkeypatch.setenv("MSA_TRAIN_DEBUG", variable)
            monkeypatch.setattr(sys, "argv", ["msa-train", *arguments, *command])
            with pytest.raises(SystemExit) as end:
                cli.main()
            said = capsys.readouterr().err.strip()
            assert end.value.code == 2 and said.startswith("Traceback (most recent call last)"), said
            assert said.splitlines()[-1].startswith("msa-train: error: ") and "UserError" in said


def test_the_help_names_the_way_to_debug(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.build(["--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--debug" in said and "MSA_TRAIN_DEBUG=1" in said
