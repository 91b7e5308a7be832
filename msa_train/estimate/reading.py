"""Reading: an estimate's numbers from the configuration of a run, without its corpus.

The backbone is built on no device. How long documents, questions and answers are is not known without the corpus: it is
taken to be likely, and said. The invariant: every guess is in the notes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import AutoTokenizer

from msa_train.errors import UserError
from msa_train.estimate.sizes import CARDS, Card, Model, Pack, Precision, Setup, Strategy
from msa_train.module import MemorySparseModule
from msa_train.protocol import add_control_tokens

# tokens, where the corpus is not looked at
QUESTION, PROMPT = 24, 36  # a question; the words around it, and the numbers that it is answered with
ANSWER, REPEATED = 32, 20  # an answer; the words around it and around the repeated question
NUMBERS = 6  # labelled tokens of a retrieval step


@dataclass(frozen=True)
class Read:
    """A run, as the estimate takes it.

    Args:
        model: Its model.
        packed: Its pack of so many document tokens.
        tokens: The document tokens of its packs.
        setup: How it computes.
        notes: What was guessed, or could not be looked at.
    """

    model: Model
    packed: Callable[[int], Pack]
    tokens: int
    setup: Setup
    notes: tuple[str, ...]


def read(module: MemorySparseModule, config: Any, ranks: int) -> Read:
    """Everything of a run.

    Args:
        module: The run's module, not built.
        config: The run's configuration: its `trainer` and `data` settings by name.
        ranks: GPUs.

    Raises:
        UserError: The backbone cannot be opened, the data has no sizes, or the strategy is not one that is known here.
    """
    data = config.data.get("init_args") or {}
    if "document_tokens" not in data:
        raise UserError(f"data: estimate takes sizes from data.document_tokens, which {config.data.class_path} has not")
    given = data["document_tokens"]
    tokens = max(given.values()) if isinstance(given, Mapping) else int(given)
    vocabulary, note = _vocabulary(data)
    net = module.blueprint.blank(vocabulary)
    phases, msa = module.timeline.phases, module.msa
    share, document = data.get("answer_share", 0.25), max(data.get("max_document_tokens", 1024) // 2, 1)
    read = document * (1 + data.get("distractors", 0) / 2)
    answered = round(share * (read + REPEATED + QUESTION + ANSWER))

    def packed(tokens: int) -> Pack:
        return Pack.likely(
            tokens, document, data.get("queries_per_pack", 16), PROMPT + QUESTION + answered, QUESTION,
            NUMBERS + round(share * ANSWER), msa.chunk_size, max(phase.top_k or msa.top_k for phase in phases),
            data.get("document_parallel", 1),
        )  # fmt: skip

    guess = f"documents are taken to have {document:,} tokens, half of data.max_document_tokens; questions {QUESTION}"
    guess += f" and answers {ANSWER}" if share else ""
    setup = _setup(module, config.trainer, ranks)
    padded = "float32 attention pads documents to the longest, which is not counted" * (setup.precision == "32-true")
    adapted = module.blueprint.lora is not None
    lora = "adapters: time and activations are counted as if the whole backbone were trained" * adapted
    return Read(Model.of(net), packed, tokens, setup, tuple(filter(None, (guess, note, padded, lora))))


def card_of(name: str, gib: float | None) -> tuple[str, Card]:
    """A card by its name, in whatever case, with another memory where that is given; and what it is called.

    Raises:
        UserError: No such card, or no memory.
    """
    called = next((known for known in CARDS if known.lower() == name.lower()), None)
    if called is None:
        raise UserError(f"--card {name} is not known: give the nearest of {', '.join(CARDS)}, and --card_gib")
    if gib is not None and gib <= 0:
        raise UserError(f"--card_gib is {gib:g}: give the card's memory in GiB, above 0")
    return called, CARDS[called] if gib is None else replace(CARDS[called], gib=gib)


def _vocabulary(data: Any) -> tuple[int | None, str]:
    """Tokens of the run's tokenizer, and a note where it cannot be asked: nothing is downloaded for it."""
    name = data.get("tokenizer")
    if name is None:
        return data.get("vocab_size"), ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return None, f"the tokenizer '{name}' is not on this machine: the vocabulary is the backbone's own"
    add_control_tokens(tokenizer)
    return len(tokenizer), ""


def _setup(module: MemorySparseModule, trainer: Any, ranks: int) -> Setup:
    strategy, arguments = _strategy(trainer.strategy, ranks)
    setup = Setup(
        precision=_precision(str(trainer.precision), module.blueprint.weights),
        recompute=module.blueprint.recompute,
        kept_layers=module.blueprint.kept_layers,
        fused=module.blueprint.kernels.elementwise != "plain",
        trains_backbone=any(phase.trainable == "all" for phase in module.timeline.phases),
        freezes=module.timeline.freezes_for_a_while,
        ranks=ranks,
        accumulated=int(trainer.accumulate_grad_batches),
        strategy=strategy,
        bucket_view=bool(arguments.get("gradient_as_bucket_view", False)),
    )
    if strategy != "zero":
        return setup
    return replace(
        setup,
        precision="bf16-true",  # whatever is given: DeepSpeed's weights are bfloat16
        stage=arguments.get("stage", setup.stage),
        offload_optimizer=bool(arguments.get("offload_optimizer", False)),
        offload_parameters=bool(arguments.get("offload_parameters", False)),
        gradient_bytes=2 if arguments.get("gradients") == "bfloat16" else 4,
        reduce_bucket=arguments.get("reduce_bucket_size", setup.reduce_bucket),
        prefetch=arguments.get("prefetch_bucket_size", setup.prefetch),
        live=arguments.get("max_live_parameters", setup.live),
    )


def _strategy(given: Any, ranks: int) -> tuple[Strategy, Any]:
    """What kind it is, and its arguments; no package of it is imported."""
    path = given if isinstance(given, str) else given.get("class_path", "")
    name, arguments = path.rpartition(".")[2].lower(), {} if isinstance(given, str) else given.get("init_args") or {}
    if name == "zero":
        return "zero", arguments
    if name.startswith("ddp"):
        return "ddp", arguments
    if name in ("auto", "singledevicestrategy"):
        return "ddp" if ranks > 1 else "single", arguments
    raise UserError(f"trainer.strategy is {path}: estimate knows auto, ddp and msa_train.strategies.ZeRO")


def _precision(given: str, weights: str) -> Precision:
    """What weights and products are in. Lightning converts weights for the `true` precisions alone."""
    if given in ("bf16-true", "16-true") or (weights == "bfloat16" and given not in ("64", "64-true")):
        return "bf16-true"
    if given in ("bf16-mixed", "16-mixed", "bf16", "16"):
        return "bf16-mixed"
    if given in ("32", "32-true", "None"):
        return "32-true"
    raise UserError(f"trainer.precision is {given}: estimate knows bf16-true, bf16-mixed and 32-true")
