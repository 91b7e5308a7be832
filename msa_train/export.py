"""Export: a run as one Hugging Face folder, which is three things at once.

    config.json         the backbone's own, with `msa_config` (what memory the routers were trained for) and `msa_train`
    model*.safetensors  all weights under the published names
    tokenizer*          the run's, the protocol's control tokens among them
    routing.json        how layers weigh in a document's score, where a validation measured it
    README.md           the model card

To transformers it is the plain backbone, to this library a run or the start of one, to the published code its model.
Routers alone (apart.py) have routers.safetensors in the place of all weights, and are a run to this library alone.
The invariant: a weight is written as it was trained, or rounded to the precision asked for, and nothing else happens to
it but that adapters are merged, in that precision; and the folder is there when all of it is, and not before.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import save_file

from msa_train.apart import ADAPTERS, ROUTERS, Home, check_untrained, grown_rows
from msa_train.backbone import MEMORY, OURS, open_backbone, open_home, published_memory
from msa_train.checkpoints import BACKBONE_PREFIX, DTYPES
from msa_train.errors import UserError
from msa_train.lora import adapters_of, merge, own_weights
from msa_train.runs import EXPORTED, RECALL, Run, frozen_backbone, open_run

DType = Literal["bfloat16", "float32"]
Part = Literal["routers"]
SHARD = "5GB"  # larger models are several files and an index


def export_run(
    name: str | Path,
    out: str | Path,
    dtype: DType | None = None,
    only: Part | None = None,
    backbone: str | None = None,
) -> Path:
    """Writes a run as a Hugging Face folder.

    Args:
        name: As for `open_run`.
        out: The folder to write; it must not exist, or be empty.
        dtype: Precision of the weights; None for the run's.
        only: `routers` leaves the backbone out: the folder says which one it is. Adapters go with them.
        backbone: Where that is, if not where it was in training.

    Returns:
        The folder.

    Raises:
        UserError: It is no run, the folder is not empty, or it cannot be written; routers are to go alone, and the
            backbone was trained too.
    """
    folder = Path(out).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{out} is there already and not empty: give another folder, or delete it first")
    home_name = None if only is None else frozen_backbone(name, backbone)
    apart = (Path(name) / EXPORTED).is_file() and open_home(str(name)) is not None
    if backbone is not None and not apart and only is None:
        raise UserError("--backbone goes with --only routers, or with a folder of routers alone")
    run = open_run(name, backbone if apart else None, merged=False)
    if dtype is not None:
        run.model.to(DTYPES[dtype])  # before adapters are merged, for so they are where they go apart
    home = None if home_name is None else _home(run, home_name)
    if home is None and run.lora is not None:
        merge(run.model.backbone)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
            whole = Path(aside) / "whole"  # of ordinary rights, which the temporary folder has not
            whole.mkdir()
            _write(run, whole, home)
            whole.replace(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{out}: cannot be written ({reason}); nothing is left of it, give another folder") from error
    return folder


def _home(run: Run, name: str) -> Home:
    """The backbone that a run's routers go without, which is opened to see that it is the run's."""
    model = run.model.backbone
    began = open_backbone(name, model.dtype)
    home = Home.of(name, began)
    home.check_sizes(model.config, began.config, f"'{name}'")
    check_untrained(own_weights(model), began, f"'{name}'")
    return home


def _write(run: Run, folder: Path, home: Home | None) -> None:
    if home is None:
        run.model.backbone.save_pretrained(folder, max_shard_size=SHARD)
    else:
        _write_routers(run, folder, home)
    run.protocol.tokenizer.save_pretrained(folder)
    config = folder / EXPORTED
    _rewrite(config, lambda values: {**values, **_additions(run, home)})
    _rewrite(folder / "tokenizer_config.json", _tokenizer_for_all)
    for file in folder.glob("*.safetensors"):
        file.chmod(config.stat().st_mode)  # left to itself, safetensors lets nobody but the owner read what it writes
    if (run.folder / RECALL).is_file():
        shutil.copyfile(run.folder / RECALL, folder / RECALL)
    card = model_card(run) if home is None else routers_card(run, home)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_routers(run: Run, folder: Path, home: Home) -> None:
    backbone = run.model.backbone
    routers = {name.removeprefix(BACKBONE_PREFIX): weight for name, weight in run.model.router_parameters()}
    tensors = {**routers, **grown_rows(backbone, home), **adapters_of(backbone)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ROUTERS, {"format": "pt"})
    config = copy.deepcopy(backbone.config)
    config.dtype = backbone.dtype
    config.save_pretrained(folder)


def _rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    values = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_for_all(values: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's config in words that transformers before 5 knows as well."""
    kept = {key: value for key, value in values.items() if key not in ("is_local", "local_files_only")}
    if isinstance(kept.get("extra_special_tokens"), list):
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    return kept


def _additions(run: Run, home: Home | None) -> dict[str, Any]:
    """What config.json says beyond the backbone's own."""
    rope = dict(run.model.backbone.config.rope_parameters)
    theta = rope.pop("rope_theta")
    # transformers before 5, which the published code asks for, knows these keys alone, and takes 10,000 without them
    legacy = {"rope_theta": theta, "rope_scaling": None if rope["rope_type"] == "default" else rope}
    return {
        **legacy,
        MEMORY: published_memory(run.model.config, run.model.routed_layers, run.temperature),
        OURS: {
            "routing_words": run.protocol.routing_words,
            "max_document_tokens": run.max_document_tokens,
            **({} if home is None else home.facts),
            **({} if home is None or run.lora is None else {ADAPTERS: run.lora.facts}),
        },
    }


def model_card(run: Run) -> str:
    """The folder's README.md: what the model is and how each of its readers opens it; no results."""
    published = run.model.backbone.config.model_type == "qwen3"
    return CARD.format(table=_table(run)) + (PUBLISHED_CARD if published else "")


def routers_card(run: Run, home: Home) -> str:
    """The README.md of routers alone: which backbone they belong to, and how to open both."""
    beside = "" if run.lora is None else BESIDE
    return ROUTERS_CARD.format(table=_table(run), backbone=home.name, beside=beside)


def _table(run: Run) -> str:
    model, config = run.model, run.model.backbone.config
    routers = sum(weight.numel() for _, weight in model.router_parameters())
    adapters = sum(weight.numel() for weight in adapters_of(model.backbone).values())
    backbone = sum(weight.numel() for _, weight in model.backbone_parameters()) - adapters
    dtype = str(model.backbone.dtype).removeprefix("torch.")
    rows = {
        "backbone": f"{config.model_type}, {backbone:,} parameters, {dtype}",
        "layers": f"{config.num_hidden_layers}, {config.hidden_size} wide",
        "heads": f"{config.num_attention_heads}, {config.num_key_value_heads} of keys and values",
        "vocabulary": f"{config.vocab_size:,}",
        "routers": f"{routers:,} parameters, in layers {', '.join(map(str, model.routed_layers))}",
        **_adapters(run, adapters),
        "chunk": f"{model.config.chunk_size} tokens",
        "selected documents": f"{model.config.top_k} per query and layer",
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _adapters(run: Run, numbers: int) -> dict[str, str]:
    """What a card's table says of adapters."""
    if run.lora is None:
        return {}
    where = f"{numbers:,} parameters" if numbers else "merged into the backbone"
    facts = run.lora.facts
    sizes = f"rank {facts['rank']}, alpha {facts['alpha']:g}, on {', '.join(facts['targets'])}"
    return {"adapters": f"LoRA of {sizes}; {where}"}


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [memory-sparse-attention, msa-train]
---
# A decoder with a memory

A decoder trained with [Memory Sparse Attention](https://arxiv.org/abs/2603.23516): routers choose which documents of a
memory its upper layers read. Trained and exported by `msa-train`.

| | |
|---|---|
{table}

## As a plain decoder

No document, no router, no code beyond transformers; routers are reported as unexpected weights and left out.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

## With a memory

```bash
msa-train encode --model FOLDER --corpus CORPUS --out BANK
msa-train ask --model FOLDER --bank BANK "a question"
```

`msa-train fit --model.backbone FOLDER` starts a further run from it, with its routers.
"""

PUBLISHED_CARD = """
## With the published code

Weights have the published names, and config.json has `msa_config`. `aux_loss_method` is `INFONCE` whatever the loss
was: of all names it is the one for which the published inference scores by cosine, as this model was trained to.

```python
from src.msa.model import MSAForCausalLM

model = MSAForCausalLM.from_pretrained("FOLDER")
```
"""

ROUTERS_CARD = """---
tags: [memory-sparse-attention, msa-train]
---
# Routers of a memory

Routers of a decoder trained with [Memory Sparse Attention](https://arxiv.org/abs/2603.23516): they choose which
documents of a memory its upper layers read. They were trained on a backbone that stayed as it is, and are of no use
without it: `{backbone}`. Trained and exported by `msa-train`.

| | |
|---|---|
{table}

`routers.safetensors` has them under the published names, config.json the backbone's sizes and the memory's.
{beside}
## With a memory

```bash
msa-train encode --model FOLDER --corpus CORPUS --out BANK
msa-train ask --model FOLDER --bank BANK "a question"
```

The backbone is opened from `{backbone}`; `--backbone WHERE` opens it from elsewhere. One of other sizes or of other
weights is refused.

`msa-train fit --model.backbone FOLDER` starts a further run from both, and `msa-train test` with it tests them.
"""

BESIDE = """
Adapters were trained with them, on layers of that backbone. They lie in the same file, under the names that the decoder
has for them once it has them, and are merged into its weights when both are opened: that needs peft.
"""
