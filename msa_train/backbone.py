"""Opening a backbone: trained weights from a folder or hub, or random ones from a config.json.

A folder may carry routers as well, and `msa_config` says what memory they were trained for: that of `msa-train export`,
whose `model_type` is the backbone's own, and that of the published code, whose `model_type` is `msa` and whose backbone
is Qwen3. The invariant: both are the plain decoder to transformers, and no code of a folder is run. A folder of routers
alone (apart.py) stands for the backbone that it names, wherever that lies, with the folder's adapters merged into it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from msa_train.apart import ADAPTERS, ROUTERS, Home, restore_rows
from msa_train.config import MSAConfig
from msa_train.errors import UserError
from msa_train.lora import LoRA, check_adapters_in, merge, restore_adapters

MEMORY, OURS = "msa_config", "msa_train"  # keys of config.json: what is published, and what this project adds
PUBLISHED = "msa"  # the published model_type
# what this library computes, and what the published code takes a missing key for
COMPUTED: dict[str, Any] = {
    "head_reduce_method": "mean", "query_reduce_method": "max", "chunk_reduce_method": "max",
    "decouple_pooling_mode": "mean", "decouple_router": True, "rewrite_position": True,
}  # fmt: skip
WHEN_MISSING = {**COMPUTED, "head_reduce_method": "max", "decouple_router": False, "rewrite_position": False}
COSINE = "INFONCE"  # the published losses of this name are over cosines, the other one is not


def open_backbone(
    name: str, dtype: torch.dtype | None, elsewhere: str | None = None, adapters: LoRA | None = None
) -> PreTrainedModel:
    """A Hugging Face causal language model.

    Args:
        name: Folder or hub name for trained weights; a `*.json` file (a config.json) for random ones of that shape.
        dtype: Precision of the weights; None for that in which they are kept.
        elsewhere: Where the backbone is, if `name` is of routers alone and their backbone is not where they say.
        adapters: The adapters that lie beside such routers, if they are to stay adapters; None merges them.

    Raises:
        UserError: It cannot be opened, some of its weights are missing, or routers alone belong to another one, or are
            not whole.
    """
    config = open_config(name)
    home = check_home(name, elsewhere)
    if home is not None:
        kept: Any = config.dtype
        return _open_elsewhere(name, home, elsewhere or home.name, dtype or kept, adapters)
    if name.endswith(".json"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    routed = open_memory(name) is not None
    _check_index(name)
    try:
        with _silent(routed):
            opened: Any = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=dtype or "auto",
                trust_remote_code=False,
                use_safetensors=routed or None,  # where routers are read from as well
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _cannot_open(name, error) from error
    backbone, told = opened
    if told["missing_keys"]:
        raise UserError(f"model.backbone: '{name}' lacks weights, among them '{min(told['missing_keys'])}'")
    return backbone


def _open_elsewhere(
    name: str, home: Home, elsewhere: str, dtype: torch.dtype, adapters: LoRA | None
) -> PreTrainedModel:
    beside = open_adapters(name)
    backbone = open_backbone(elsewhere, dtype)
    home.check_weights(backbone, _place(name, elsewhere))
    fit_vocabulary(backbone, open_config(name).vocab_size)
    file = weight_files(name)[0]
    restore_rows(backbone, home, file)
    restore_adapters(file, backbone, adapters or beside)
    if beside is not None and adapters is None:
        merge(backbone)
    return backbone


def check_home(name: str, elsewhere: str | None = None) -> Home | None:
    """The backbone that a folder of routers alone needs, its sizes checked; no weight is read.

    Args:
        name: As for `open_backbone`.
        elsewhere: As there.

    Returns:
        None where a name has its weights itself.

    Raises:
        UserError: The backbone cannot be opened, or is of other sizes; or none is needed, and one is given.
    """
    home = open_home(name)
    if home is None:
        if elsewhere is not None:
            raise UserError(
                f"'{name}' is not routers alone: it has a backbone, and '{elsewhere}' cannot take its place"
            )
        return None
    found = elsewhere or home.name
    try:
        if open_home(found) is not None:
            raise UserError(f"'{found}' is routers alone too")
        home.check_sizes(open_config(name), open_config(found), _place(name, found))
    except UserError as error:
        raise UserError(f"{error}; say where that backbone is (docs/export.md, Routers alone)") from error
    return home


def _place(name: str, elsewhere: str) -> str:
    return f"'{elsewhere}', the backbone of the routers in '{name}'"


def open_home(name: str) -> Home | None:
    """The backbone that a folder of routers alone names; None where a name has its weights itself.

    Args:
        name: As for `open_backbone`.

    Raises:
        UserError: It cannot be opened, or names its backbone incompletely.
    """
    return Home.read(_read_config(name).get(OURS), f"'{name}'")


def open_adapters(name: str) -> LoRA | None:
    """The adapters that lie beside routers alone; None where there are none.

    Args:
        name: As for `open_backbone`.

    Raises:
        UserError: It cannot be opened, or says nothing readable of them.
    """
    if open_home(name) is None:
        return None
    try:
        return LoRA.of(_read_config(name)[OURS].get(ADAPTERS), f"'{name}'")
    except UserError as error:
        raise UserError(f"{error}; export the routers again") from error


def check_adapters_beside(name: str, backbone: PreTrainedModel) -> None:
    """Holds the adapters beside routers alone against their backbone; no weight is read.

    Args:
        name: As for `open_backbone`.
        backbone: The decoder, on any device.

    Raises:
        UserError: They are missing, or of other layers or sizes; or peft is missing.
    """
    if open_home(name) is not None:
        check_adapters_in(weight_files(name)[0], backbone, open_adapters(name))


def open_config(name: str) -> PreTrainedConfig:
    """The backbone's config alone, from the same kinds of names; no weight is read."""
    values = _read_config(name)
    try:
        if MEMORY not in values:
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
        model_type = "qwen3" if values["model_type"] == PUBLISHED else values["model_type"]
        plain = {key: value for key, value in values.items() if key not in (MEMORY, OURS, "model_type", "auto_map")}
        return CONFIG_MAPPING[model_type].from_dict(plain)
    except Exception as error:  # of a damaged config the libraries below raise whatever they stumble over
        raise _cannot_open(name, error) from error


def open_memory(name: str) -> MSAConfig | None:
    """The memory that a backbone's routers were trained for; None where it has no routers.

    Args:
        name: As for `open_backbone`.

    Raises:
        UserError: They were trained for something else than this library computes.
    """
    values = _read_config(name)
    given = values.get(MEMORY)
    if given is None:
        return None
    place = f"model.backbone: '{name}': {MEMORY}"
    if not isinstance(given, dict):
        raise UserError(f"{place} is no mapping: restore config.json as it was published")
    wrong = [
        f"{key} is {found!r}, supported is {value!r}"
        for key, value in COMPUTED.items()
        if (found := given.get(key, WHEN_MISSING[key])) != value
    ]
    if COSINE not in str(given.get("aux_loss_method", COSINE)):
        wrong.append(f"aux_loss_method is {given['aux_loss_method']!r}, supported are {COSINE} and its variants")
    if wrong:
        raise UserError(f"{place}: {'; '.join(wrong)}. Its weights were trained for that: start from others")
    layers = given.get("router_layer_idx", "all")
    try:
        numbers = range(values["num_hidden_layers"]) if layers == "all" else map(int, layers.split(","))
        return MSAConfig(
            chunk_size=index(given.get("pooling_kernel_size", 64)),
            top_k=index(given.get("top_k_docs", 16)),
            routed_layers=tuple(numbers),
        )
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{place} cannot be read ({error}): restore config.json as it was published") from error


def published_memory(msa: MSAConfig, layers: tuple[int, ...], temperature: float) -> dict[str, Any]:
    """A memory as `msa_config`, which `open_memory` reads back.

    Args:
        msa: The memory's sizes.
        layers: Layers that read it.
        temperature: Of the routing loss.
    """
    return {
        "top_k_docs": msa.top_k,
        "pooling_kernel_size": msa.chunk_size,
        "router_layer_idx": ",".join(map(str, layers)),
        **COMPUTED,
        # whatever the loss was: at inference, of all names only this one has the published code score by cosine
        "aux_loss_method": COSINE,
        "infonce_loss_temp": temperature,
    }


def weight_files(name: str) -> list[Path]:
    """The safetensors files of a folder or hub name; of routers alone, theirs.

    Raises:
        UserError: It has none.
    """
    apart = open_home(name) is not None
    _check_index(name)
    single = ROUTERS if apart else SAFE_WEIGHTS_NAME
    try:
        shards = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        files: Any = get_checkpoint_shard_files(name, shards)[0] if shards else [cached_file(name, single)]
    except (OSError, ValueError) as error:
        raise _cannot_open(name, error) from error
    return [Path(file) for file in files]


def fit_vocabulary(backbone: PreTrainedModel, tokens: int) -> int:
    """Grows the embeddings for a tokenizer that has more tokens than the model; returns how many were added.

    New rows are drawn from the old ones' distribution, which is Hugging Face's way.
    """
    embeddings: Any = backbone.get_input_embeddings()
    missing = tokens - int(embeddings.weight.shape[0])
    if missing > 0:
        backbone.resize_token_embeddings(tokens)
    return max(missing, 0)


def _read_config(name: str) -> dict[str, Any]:
    """A config.json as plain data."""
    if name.endswith(".json") and not Path(name).is_file():
        raise UserError(f"model.backbone: no such file '{name}'")
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
    except Exception as error:  # of a damaged file the libraries below raise whatever they stumble over
        raise _cannot_open(name, error) from error
    if not isinstance(values, dict):
        raise UserError(f"model.backbone: cannot open '{name}': its config.json is no mapping")
    return values


def _check_index(name: str) -> None:
    """Refuses a folder whose index names weights outside of it."""
    index_file = Path(name) / SAFE_WEIGHTS_INDEX_NAME
    if not index_file.is_file():
        return
    try:
        shards = set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values())
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index_file}: not an index of weights; copy or export them again") from error
    if outside:
        raise UserError(f"{index_file}: names '{outside[0]}', which is no file of its folder; export it again")


@contextmanager
def _silent(silent: bool) -> Iterator[None]:
    """Keeps transformers from reporting routers as weights that it does not know."""
    before = logging.get_verbosity()
    try:
        if silent:
            logging.set_verbosity_error()
        yield
    finally:
        logging.set_verbosity(before)


def _cannot_open(name: str, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0]
    return UserError(f"model.backbone: cannot open '{name}': {reason}")
