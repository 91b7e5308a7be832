"""An exported run is the plain backbone, a run, the start of a run and the published layout, bit by bit; and back."""

from __future__ import annotations

import filecmp
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from msa_train import cli, export
from msa_train.backbone import open_backbone, open_memory, published_memory
from msa_train.checkpoints import read_checkpoint
from msa_train.config import MSAConfig
from msa_train.errors import UserError
from msa_train.export import export_run
from msa_train.model import MemorySparseModel
from msa_train.module import MemorySparseModule
from msa_train.phases import Phase
from msa_train.runs import open_run
from tests.conftest import TINY_BACKBONE, tiny_pack

Arguments = Callable[..., list[str]]
ROOT = Path(__file__).parent.parent
ROPE: dict[str, dict[str, Any]] = {
    "qwen3": {"rope_type": "default", "rope_theta": 700.0},
    "llama": {
        "rope_type": "llama3", "rope_theta": 900.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
        "original_max_position_embeddings": 128,
    },
}  # fmt: skip
SIZES = {"model.msa.routed_layers": "[0, 1]", "model.msa.chunk_size": 8, "model.msa.top_k": 2}
DTYPE = {"bfloat16": torch.bfloat16, "float32": torch.float32}
KINDS = [
    (model_type, tied, weights)
    for model_type in ("qwen3", "llama")
    for tied in (True, False)
    for weights in ("bfloat16", "float32")
]


@pytest.fixture(scope="module")
def trained(tiny_run: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A trained and validated run of a kind, made once; its vocabulary had to grow to its tokenizer."""
    root = tmp_path_factory.mktemp("runs")

    def run(model_type: str = "qwen3", tied: bool = True, weights: str = "float32") -> Path:
        name = f"{model_type}-{tied}-{weights}"
        if not (root / name).exists():
            backbone = root / f"{name}.json"
            changes = {"model_type": model_type, "tie_word_embeddings": tied, "rope_parameters": ROPE[model_type]}
            backbone.write_text(json.dumps({**TINY_BACKBONE, **changes, "vocab_size": 301}))
            flags = {
                **SIZES, "model.backbone": backbone, "model.weights": weights, "model.temperature": 0.07,
                "data.max_document_tokens": 77, "trainer.limit_val_batches": 1.0, "trainer.val_check_interval": 3,
            }  # fmt: skip
            cli.build(["fit", *tiny_run(root, steps=3, name=name, **flags)])
        return root / name

    return run


@pytest.fixture
def exported(trained: Callable[..., Path], tmp_path: Path) -> Path:
    return export_run(trained(), tmp_path / "exported")


def plain(run: Path, dtype: str) -> Any:
    """A run's backbone as transformers alone has it, of the run's config.json and checkpoint."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run / "backbone"), dtype=DTYPE[dtype])
    weights = read_checkpoint(run / "last.ckpt")["state_dict"]
    prefix = "model.backbone."
    model.load_state_dict({name.removeprefix(prefix): weights[name] for name in weights if ".router_" not in name})
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.randint(301, (2, 37), generator=torch.Generator().manual_seed(0))).logits


def start(backbone: Path, weights: str = "float32", **msa: Any) -> MemorySparseModel:
    """What a run that starts from a folder starts from."""
    sizes = MSAConfig(**{"chunk_size": 8, "top_k": 2, "routed_layers": (0, 1), **msa})
    return MemorySparseModule(str(backbone), [Phase("only", 1)], sizes, weights=weights).untrained().eval()  # type: ignore[arg-type]


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


# --- what is exported is what was trained --------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "tied", "weights"), KINDS)
def test_every_reader_opens_what_was_trained(
    model_type: str, tied: bool, weights: str, trained: Callable[..., Path], tmp_path: Path
) -> None:
    run = trained(model_type, tied, weights)
    folder = export_run(run, tmp_path / "exported")
    wanted = logits(plain(run, weights))

    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert opened.config.model_type == model_type and opened.dtype == DTYPE[weights]
    assert (opened.lm_head.weight is opened.model.embed_tokens.weight) == tied
    assert torch.equal(logits(opened), wanted)

    ours, pack = open_run(run), tiny_pack(chunk_size=8)
    scores = ours.model(pack).doc_score_LQD
    assert scores.shape == (2, 3, 5) and scores.unique().numel() > 20
    for model in (open_run(folder).model, start(folder, weights)):
        assert torch.equal(logits(model.backbone), wanted)
        assert torch.equal(model(pack).doc_score_LQD, scores)
        for name, weight in ours.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], weight) and weight.dtype == DTYPE[weights], name


@pytest.mark.parametrize(("kept", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_another_precision_is_the_weights_rounded_once(
    kept: str, wanted: str, trained: Callable[..., Path], tmp_path: Path
) -> None:
    run = trained("qwen3", True, kept)
    folder = export_run(run, tmp_path / "exported", wanted)  # type: ignore[arg-type]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(plain(run, wanted)))
    weights = open_run(run).model.state_dict()
    for name, weight in open_run(folder).model.state_dict().items():
        assert torch.equal(weight, weights[name].to(DTYPE[wanted])) and weight.dtype == DTYPE[wanted], name


def test_an_exported_run_keeps_its_words_and_layer_weights(trained: Callable[..., Path], exported: Path) -> None:
    run, opened = open_run(trained()), open_run(exported)
    assert opened.protocol.fingerprint() == run.protocol.fingerprint()
    assert opened.protocol.routing_words == run.protocol.routing_words == "question"
    assert opened.layer_weights == run.layer_weights and (trained() / "routing.json").is_file()
    assert opened.max_document_tokens == run.max_document_tokens == 77 and opened.temperature == 0.07
    assert opened.model.config == run.model.config and opened.folder == opened.checkpoint == exported
    assert not any(module.training for module in opened.model.modules())
    assert not any(weight.requires_grad for weight in opened.model.parameters())
    text = "Where does the red fox live?"
    assert AutoTokenizer.from_pretrained(exported)(text)["input_ids"] == run.protocol.tokenizer(text)["input_ids"]


def test_what_is_started_from_an_export_exports_the_same_bytes(
    trained: Callable[..., Path], exported: Path, tiny_run: Arguments, tmp_path: Path
) -> None:
    still = [{"name": "still", "steps": 1, "backbone_lr": 0.0, "router_lr": 0.0}]
    flags = {**SIZES, "model.backbone": exported, "model.phases": json.dumps(still), "model.temperature": 0.07}
    cli.build(["fit", *tiny_run(tmp_path / "runs", name="again", **flags, **{"data.max_document_tokens": 77})])
    again = export_run(tmp_path / "runs" / "again", tmp_path / "again")
    assert filecmp.cmp(exported / "model.safetensors", again / "model.safetensors", shallow=False)
    assert (exported / "config.json").read_text() == (again / "config.json").read_text()
    kept = json.loads((tmp_path / "runs" / "again" / "backbone" / "config.json").read_text())
    assert not kept.keys() & {"msa_config", "msa_train"}, "a run says itself what its memory is"
    once_more = export_run(again, tmp_path / "once more")
    assert filecmp.cmp(exported / "model.safetensors", once_more / "model.safetensors", shallow=False)


def test_large_weights_are_shards_that_open_alike(
    trained: Callable[..., Path], exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHARD", "20KB")
    folder = export_run(trained(), tmp_path / "shards")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and (folder / "model.safetensors.index.json").is_file()
    joined = {name: weight for file in files for name, weight in load_file(file).items()}
    whole = load_file(exported / "model.safetensors")
    assert joined.keys() == whole.keys() and all(torch.equal(joined[name], whole[name]) for name in whole)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(plain(trained(), "float32")))
    for name, weight in start(folder).state_dict().items():
        assert torch.equal(weight, start(exported).state_dict()[name]), name


def test_a_bank_of_the_run_is_a_bank_of_its_export(
    trained: Callable[..., Path], exported: Path, corpus_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    said = []
    for number, model in enumerate((trained(), exported)):
        out = tmp_path / f"bank{number}"
        cli.build(["encode", "--model", str(model), "--corpus", str(corpus_folder), "--out", str(out)])
        capsys.readouterr()
        cli.build(["ask", "--model", str(model), "--bank", str(tmp_path / "bank0"), "Where does the red fox live?"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "[" in said[0]
    segments = [sorted(file.name for file in (tmp_path / f"bank{n}").glob("*.safetensors")) for n in (0, 1)]
    assert segments[0] == segments[1] != [], "named by their content"


# --- the published layout ------------------------------------------------------------------------------------------


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published 4B model: Qwen3-4B's, its head tied, and routers in 18..35."""
    hidden, wide, keys, head, mlp = 2560, 4096, 1024, 128, 9728
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (151936, hidden),
        "model.norm.weight": (hidden,),
    }
    for number in range(36):
        layer = f"model.layers.{number}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = shapes[f"{layer}.mlp.up_proj.weight"] = (mlp, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, mlp)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (wide, hidden)
        shapes[f"{layer}.self_attn.k_proj.weight"] = shapes[f"{layer}.self_attn.v_proj.weight"] = (keys, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, wide)
        shapes[f"{layer}.self_attn.q_norm.weight"] = shapes[f"{layer}.self_attn.k_norm.weight"] = (head,)
        if number >= 18:
            shapes[f"{layer}.self_attn.router_q_proj.0.weight"] = (wide, hidden)
            shapes[f"{layer}.self_attn.router_k_proj.0.weight"] = (keys, hidden)
    return shapes


def test_qwen3_4b_has_the_published_names_and_shapes(exported: Path) -> None:
    with torch.device("meta"):
        backbone = open_backbone(str(ROOT / "configs/backbones/qwen3_4b.json"), torch.bfloat16)
        model = MemorySparseModel(backbone, MSAConfig())
    ours = {name: tuple(weight.shape) for name, weight in model.backbone.state_dict().items()}
    tied = ours.pop("lm_head.weight")
    assert ours == published_shapes() and len(ours) == 36 * 11 + 18 * 2 + 2 and tied == (151936, 2560)
    layers = published_memory(model.config, model.routed_layers, 0.1)["router_layer_idx"]
    assert layers == "18,19,20,21,22,23,24,25,26,27,28,29,30,31,32,33,34,35"
    # and a file holds exactly the names of the model in it, but for the tied one
    small = open_run(exported).model.backbone.state_dict()
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert set(file.keys()) == small.keys() - {"lm_head.weight"}


def test_config_says_what_the_published_code_reads(trained: Callable[..., Path], tmp_path: Path) -> None:
    values = json.loads((export_run(trained(), tmp_path / "qwen3") / "config.json").read_text())
    assert values["msa_config"] == {
        "top_k_docs": 2, "pooling_kernel_size": 8, "router_layer_idx": "0,1", "head_reduce_method": "mean",
        "query_reduce_method": "max", "chunk_reduce_method": "max", "decouple_pooling_mode": "mean",
        "decouple_router": True, "rewrite_position": True, "aux_loss_method": "INFONCE", "infonce_loss_temp": 0.07,
    }  # fmt: skip
    assert values["model_type"] == "qwen3" and values["architectures"] == ["Qwen3ForCausalLM"]
    assert values["rope_theta"] == 700.0 and values["rope_scaling"] is None, "all that transformers before 5 knows"
    assert (
        values["vocab_size"] == len(open_run(trained()).protocol.tokenizer) > 301
        and values["tie_word_embeddings"] is True
    )
    words = json.loads((tmp_path / "qwen3" / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in words
    assert {"<|im_start|>", "<|im_end|>", "<|object_ref_end|>"} == set(words["additional_special_tokens"])
    llama = json.loads((export_run(trained("llama", True, "float32"), tmp_path / "llama") / "config.json").read_text())
    scaling = {key: value for key, value in ROPE["llama"].items() if key != "rope_theta"}
    assert llama["rope_theta"] == 900.0 and llama["rope_scaling"] == scaling


def publish(folder: Path) -> None:
    """Makes of an export what the publication's own looks like, its code beside it."""
    code = "from pathlib import Path\nPath(__file__).with_name('run').touch()\nclass MSAConfig: pass\n"
    (folder / "configuration_msa.py").write_text(code)
    classes = {"AutoConfig": "configuration_msa.MSAConfig", "AutoModelForCausalLM": "configuration_msa.MSAConfig"}
    edit(folder, lambda values: values.update(model_type="msa", architectures=["MSAForCausalLM"], auto_map=classes))
    edit(folder, lambda values: (values.pop("msa_train"), values.pop("rope_parameters")))


def test_a_published_folder_is_a_start_and_a_run_and_its_code_is_left_alone(
    trained: Callable[..., Path], exported: Path, tiny_run: Arguments, tmp_path: Path
) -> None:
    publish(exported)
    ours, pack = open_run(trained()).model, tiny_pack(chunk_size=8)
    opened = open_run(exported)
    assert opened.protocol.routing_words == "prompt" and opened.max_document_tokens == 1024, "as published"
    for model in (opened.model, start(exported)):
        assert model.backbone.config.model_type == "qwen3"
        assert torch.equal(logits(model.backbone), logits(plain(trained(), "float32")))
        assert torch.equal(model(pack).doc_score_LQD, ours(pack).doc_score_LQD)
    cli.build(["fit", *tiny_run(tmp_path, steps=1, **SIZES, **{"model.backbone": exported})])
    assert open_run(tmp_path / "tiny").model.routed_layers == (0, 1)
    assert not (exported / "run").exists() and "configuration_msa" not in "".join(sys.modules)


@pytest.mark.parametrize(("layers", "read"), [("1", (1,)), ("0,1", (0, 1)), ("all", (0, 1))])
def test_routed_layers_are_read_as_published(layers: str, read: tuple[int, ...], exported: Path) -> None:
    edit(exported, lambda values: values["msa_config"].update(router_layer_idx=layers))
    memory = open_memory(str(exported))
    assert memory == MSAConfig(chunk_size=8, top_k=2, routed_layers=read)
    assert published_memory(memory, read, 0.1)["router_layer_idx"] == ",".join(map(str, read))


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"head_reduce_method": "max"}, "head_reduce_method is 'max', supported is 'mean'"),
    "queries": ({"query_reduce_method": "last"}, "query_reduce_method is 'last'"),
    "chunks": ({"chunk_reduce_method": "mean"}, "chunk_reduce_method is 'mean', supported is 'max'"),
    "pooling": ({"decouple_pooling_mode": "max"}, "decouple_pooling_mode is 'max'"),
    "no routers": ({"decouple_router": False}, "decouple_router is False, supported is True"),
    "positions": ({"rewrite_position": None}, "rewrite_position is None"),
    "two": ({"rewrite_position": False, "head_reduce_method": "max"}, "'max', .*; rewrite_position is False"),
    "loss": ({"aux_loss_method": "BCE"}, "aux_loss_method is 'BCE', supported are INFONCE and its variants"),
    "top-k": ({"top_k_docs": "2"}, "msa_config cannot be read .*: restore config.json"),
    "chunk": ({"pooling_kernel_size": 0}, "chunk_size is 0: give at least 1"),
    "layers": ({"router_layer_idx": "1,0"}, "ascending"),
    "no layer": ({"router_layer_idx": ""}, "msa_config cannot be read"),
    "beyond": ({"router_layer_idx": "0,7"}, "routers in layers|names layer 7, but the decoder has layers 0..1"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_memory_of_another_kind_is_refused_by_name(case: str, exported: Path) -> None:
    changes, message = UNSUPPORTED[case]
    edit(exported, lambda values: values["msa_config"].update(changes))
    for opening in (start, open_run):
        with pytest.raises(UserError, match=message) as told:
            opening(exported)
        assert "\n" not in str(told.value)


def test_a_missing_key_is_what_the_published_code_takes_it_for(exported: Path) -> None:
    edit(exported, lambda values: values.update(msa_config={"decouple_router": True, "rewrite_position": True}))
    with pytest.raises(UserError, match="head_reduce_method is 'max', supported is 'mean'"):
        open_memory(str(exported))
    edit(exported, lambda values: values["msa_config"].update(head_reduce_method="mean"))
    assert open_memory(str(exported)) == MSAConfig(chunk_size=64, top_k=16, routed_layers=(0, 1))


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_other_layers_than_the_folders_are_named(exported: Path) -> None:
    with pytest.raises(UserError, match=r"are \[1\], but '.*' has routers in layers \[0, 1\]: give --model.msa.routed"):
        start(exported, routed_layers=())
    assert start(exported, chunk_size=5, top_k=3).config.chunk_size == 5, "sizes that no weight depends on may change"


def without(name: str) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot open"),
    "cut weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "cannot open"),
    "a weight": (without("model.layers.1.mlp.up_proj.weight"), "lacks weights, among them 'model.layers.1.mlp.up_p"),
    "a router": (without("model.layers.1.self_attn.router_k_proj.0.weight"), "lacks the router 'model.layers.1.self_"),
    "other sizes": (lambda folder: edit(folder, lambda v: v.update(head_dim=16)), "cannot open"),
    "no config": (lambda folder: (folder / "config.json").write_text("{"), "cannot open"),
    "no mapping": (lambda folder: (folder / "config.json").write_text("[]"), "config.json is no mapping"),
    "no memory": (lambda folder: edit(folder, lambda v: v.pop("msa_config")), r"not a run .*has no msa_con"),
    "words": (lambda folder: edit(folder, lambda v: v["msa_train"].update(routing_words="all")), "words is 'all'"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not a readable tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_wrong_with_an_export_is_one_line(case: str, exported: Path) -> None:
    damage, message = DAMAGED[case]
    damage(exported)
    with pytest.raises(UserError, match=message) as told:
        open_run(exported)
    assert "\n" not in str(told.value)


def test_weights_are_never_unpickled(exported: Path) -> None:
    torch.save(load_file(exported / "model.safetensors"), exported / "pytorch_model.bin")
    (exported / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot open"):
        open_run(exported)


def command(capsys: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["msa-train", "export", *map(str, arguments)])
    capsys.readouterr()
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_exports_a_run_or_a_checkpoint_in_one(
    trained: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    for name, out in ((trained(), "empty"), (trained() / "last.ckpt", "new/deep")):
        code, said, _ = command(capsys, monkeypatch, name, "--out", tmp_path / out, "--dtype", "bfloat16")
        assert code == 0 and f"exported    {tmp_path / out}, " in said
    for out in ("empty", "new/deep"):
        assert AutoConfig.from_pretrained(tmp_path / out).dtype == torch.bfloat16
        modes = {file.stat().st_mode for file in (tmp_path / out).iterdir()}
        assert len(modes) == 1, "who may read one file may read all"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"], "nothing is left aside"


def test_the_card_says_what_it_is_and_how_to_open_it(trained: Callable[..., Path], tmp_path: Path) -> None:
    card = (export_run(trained(), tmp_path / "qwen3") / "README.md").read_text()
    routers = 2 * (32 * 32 + 16 * 32)
    assert "| backbone | qwen3, " in card and f"| routers | {routers:,} parameters, in layers 0, 1 |" in card
    for words in ("AutoModelForCausalLM.from_pretrained", "msa-train ask --model", "MSAForCausalLM.from_pretrained"):
        assert words in card
    assert str(tmp_path) not in card and "{" not in card
    llama = (export_run(trained("llama", True, "float32"), tmp_path / "llama") / "README.md").read_text()
    assert "MSAForCausalLM" not in llama, "the published code reads Qwen3 alone"


@pytest.mark.parametrize("case", ["not a run", "nowhere", "not empty", "a file", "dtype"])
def test_a_mistake_is_one_line_and_writes_nothing(
    case: str, trained: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("kept")
    arguments, message = {
        "not a run": ((tmp_path / "empty", "--out", tmp_path / "out"), "not a run of msa-train"),
        "nowhere": ((tmp_path / "none", "--out", tmp_path / "out"), "no run '"),
        "not empty": ((trained(), "--out", tmp_path / "full"), "full is there already and not empty: give another"),
        "a file": ((trained(), "--out", tmp_path / "full" / "note"), "note is there already and not empty"),
        "dtype": ((trained(), "--out", tmp_path / "out", "--dtype", "int8"), "dtype"),
    }[case]
    code, _, said = command(capsys, monkeypatch, *arguments)
    line = said.strip().splitlines()[-1]
    assert code == 2 and line.startswith("msa-train: error: ") and message in line, said
    assert (tmp_path / "full" / "note").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_an_export_that_is_broken_off_leaves_nothing(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="out: cannot be written .No space left on device.; nothing is left of it"):
        export_run(trained(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
