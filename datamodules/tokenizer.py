"""The run's tokenizer: any Hugging Face one, or a small byte-level BPE trained on the corpus in seconds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from datamodules.cache import writing
from msa_train.errors import UserError
from msa_train.protocol import CONTROL, END, add_control_tokens

PADDING = "<|endoftext|>"


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or a hub, with the protocol's control tokens added where it lacks them.

    Raises:
        UserError: There is none of that name, or it is not a fast one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of a damaged file the libraries below raise whatever they stumble over
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"data.tokenizer: cannot open '{name}': {reason}") from error
    if not tokenizer.is_fast:
        raise UserError(f"data.tokenizer: '{name}' is not a fast tokenizer (a tokenizer.json is needed)")
    add_control_tokens(tokenizer)
    return tokenizer


def train_tokenizer(texts: Sequence[str], vocab_size: int, cache: Path) -> PreTrainedTokenizerBase:
    """A byte-level BPE of `texts`, trained once and kept under `cache`. Digits stand alone: `[12]` is 4 tokens.

    Raises:
        UserError: The cache cannot be written.
    """
    digest = hashlib.sha256(repr((vocab_size, len(texts))).encode())
    for text in texts:
        digest.update(text.encode())
    folder = cache / f"bpe-{vocab_size}-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.Punctuation("isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        bpe.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=[PADDING, *CONTROL],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        fast = PreTrainedTokenizerFast(
            tokenizer_object=bpe, eos_token=END, pad_token=PADDING, additional_special_tokens=list(CONTROL)
        )
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        with writing(folder):
            unfinished.mkdir(parents=True, exist_ok=True)  # what is saved raises no OSError of its own
            fast.save_pretrained(unfinished)
            try:
                unfinished.rename(folder)
            except OSError:  # another process was faster, with the same result
                if not folder.is_dir():
                    raise
    return open_tokenizer(str(folder))
