"""Export: a run as one Hugging Face folder, which is three things at once.

    config.json         the backbone's own, with `msa_config` (what memory the routers were trained for) and `msa_train`
    model*.safetensors  all weights under the published names
    tokenizer*          the run's, the protocol's control tokens among them
    routing.json        how layers weigh in a document's score, where a validation measured it
    README.md           the model card

To transformers it is the plain backbone, to this library a run or the start of one, to the published code its model.
The invariant: a weight is written as it was trained, or rounded to the precision asked for, and nothing else happens to
it; and the folder is there when all of it is, and not before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from safetensors import SafetensorError

from msa_train.backbone import MEMORY, OURS, published_memory
from msa_train.checkpoints import DTYPES
from msa_train.errors import UserError
from msa_train.runs import EXPORTED, RECALL, Run, open_run

DType = Literal["bfloat16", "float32"]
SHARD = "5GB"  # larger models are several files and an index


def export_run(name: str | Path, out: str | Path, dtype: DType | None = None) -> Path:
    """Writes a run as a Hugging Face folder.

    Args:
        name: As for `open_run`.
        out: The folder to write; it must not exist, or be empty.
        dtype: Precision of the weights; None for the run's.

    Returns:
        The folder.

    Raises:
        UserError: It is no run, the folder is not empty, or it cannot be written.
    """
    folder = Path(out).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{out} is there already and not empty: give another folder, or delete it first")
    run = open_run(name)
    if dtype is not None:
        run.model.to(DTYPES[dtype])
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
            whole = Path(aside) / "whole"  # of ordinary rights, which the temporary folder has not
            whole.mkdir()
            _write(run, whole)
            whole.replace(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{out}: cannot be written ({reason}); nothing is left of it, give another folder") from error
    return folder


def _write(run: Run, folder: Path) -> None:
    run.model.backbone.save_pretrained(folder, max_shard_size=SHARD)
    run.protocol.tokenizer.save_pretrained(folder)
    config = folder / EXPORTED
    _rewrite(config, lambda values: {**values, **_additions(run)})
    _rewrite(folder / "tokenizer_config.json", _tokenizer_for_all)
    for file in folder.glob("*.safetensors"):
        file.chmod(config.stat().st_mode)  # left to itself, safetensors lets nobody but the owner read what it writes
    if (run.folder / RECALL).is_file():
        shutil.copyfile(run.folder / RECALL, folder / RECALL)
    (folder / "README.md").write_text(model_card(run), encoding="utf-8")


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


def _additions(run: Run) -> dict[str, Any]:
    """What config.json says beyond the backbone's own."""
    rope = dict(run.model.backbone.config.rope_parameters)
    theta = rope.pop("rope_theta")
    # transformers before 5, which the published code asks for, knows these keys alone, and takes 10,000 without them
    legacy = {"rope_theta": theta, "rope_scaling": None if rope["rope_type"] == "default" else rope}
    return {
        **legacy,
        MEMORY: published_memory(run.model.config, run.model.routed_layers, run.temperature),
        OURS: {"routing_words": run.protocol.routing_words, "max_document_tokens": run.max_document_tokens},
    }


def model_card(run: Run) -> str:
    """The folder's README.md: what the model is and how each of its readers opens it; no results."""
    model, config = run.model, run.model.backbone.config
    backbone, routers = (
        sum(weight.numel() for _, weight in weights)
        for weights in (model.backbone_parameters(), model.router_parameters())
    )
    dtype = str(model.backbone.dtype).removeprefix("torch.")
    rows = {
        "backbone": f"{config.model_type}, {backbone:,} parameters, {dtype}",
        "layers": f"{config.num_hidden_layers}, {config.hidden_size} wide",
        "heads": f"{config.num_attention_heads}, {config.num_key_value_heads} of keys and values",
        "vocabulary": f"{config.vocab_size:,}",
        "routers": f"{routers:,} parameters, in layers {', '.join(map(str, model.routed_layers))}",
        "chunk": f"{model.config.chunk_size} tokens",
        "selected documents": f"{model.config.top_k} per query and layer",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return CARD.format(table=table) + (PUBLISHED_CARD if config.model_type == "qwen3" else "")


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
