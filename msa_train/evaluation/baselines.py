"""Baselines: the plain decoder with the whole memory in its window, and with what a retriever finds in it.

They answer the same questions over the same memories as the model, in the prompt form that serves a decoder best: its
own chat template, the answer begun where the task begins it. All run on the first rank. The invariant: nothing is cut
out of a memory to make it fit; a decoder that cannot take it says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from msa_train.evaluation.methods import Beyond, Method, Ranking, Reply
from msa_train.evaluation.prompts import flat_prompt
from msa_train.evaluation.ranks import Ranks
from msa_train.evaluation.retrieval import Retriever
from msa_train.evaluation.task import Asked, Memory, Task
from msa_train.protocol import Protocol, restore

ENDLESS = 1 << 62  # positions
INSTRUCTION = (  # where a task has no words of its own: RULER's for question answering
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


class Backbone:
    """A plain decoder that goes on with prompts, the likeliest token first.

    Args:
        model: The decoder, in evaluation mode.
        protocol: Writes prompts; its tokenizer is the model's.
        max_new_tokens: Tokens of an answer, at most.
        batch_tokens: Tokens of a batch of prompts, at most; a longer prompt is a batch of its own.
        beyond: Whether prompts may go past the positions that the model knows, as rotary ones go on for ever.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        protocol: Protocol,
        max_new_tokens: int,
        batch_tokens: int = 65_536,
        beyond: bool = False,
    ) -> None:
        self.model, self.protocol, self.batch_tokens = model, protocol, batch_tokens
        self.positions = ENDLESS if beyond else getattr(model.config, "max_position_embeddings", ENDLESS)
        tokenizer = protocol.tokenizer
        ends = {protocol.end, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
        self.padding = protocol.end
        self.settings = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(ends), pad_token_id=self.padding
        )
        self.max_new_tokens = max_new_tokens
        model.generation_config = self.settings  # a checkpoint's own would add its penalties to what is not set here

    def prompt(self, task: Task, asked: Asked, texts: Sequence[str]) -> list[int]:
        """Token ids of a question with these documents before it."""
        preamble = asked.preamble or INSTRUCTION
        return flat_prompt(self.protocol, preamble, texts, task.separator, asked.text, asked.lead)

    def complete(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """What the decoder writes behind each prompt.

        Raises:
            Beyond: A prompt and its answer need more positions, or more memory, than there is.
        """
        longest = max(map(len, prompts), default=0)
        if longest + self.max_new_tokens > self.positions:
            raise Beyond(f"the backbone has {self.positions:,} positions, the prompt and its answer need "
                         f"{longest + self.max_new_tokens:,}")  # fmt: skip
        answers: list[str] = []
        batch: list[Sequence[int]] = []
        for prompt in prompts:
            if batch and max(len(prompt), *map(len, batch)) * (len(batch) + 1) > self.batch_tokens:
                answers += self._batch(batch)
                batch = []
            batch.append(prompt)
        return answers + (self._batch(batch) if batch else [])

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        width = max(map(len, prompts))
        device = self.model.device
        tokens_QT = torch.tensor([[self.padding] * (width - len(p)) + list(p) for p in prompts], device=device)
        real_QT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        try:
            generate: Any = self.model.generate
            whole_QT = generate(tokens_QT, attention_mask=real_QT, generation_config=self.settings)
        except torch.OutOfMemoryError as error:
            size = torch.cuda.get_device_properties(device).total_memory / 2**30
            raise Beyond(f"a prompt of {width:,} tokens does not fit on the card ({size:.0f} GiB)") from error
        words: list[Any] = self.protocol.tokenizer.batch_decode(whole_QT[:, width:], skip_special_tokens=True)
        return [restore(answer).strip() for answer in words]


class FullAttention(Method):
    """The backbone with the whole memory in its window.

    Args:
        backbone: The backbone, on the rank that works; None where no task wants answers.
        ranks: Who takes part; the first works.
        name: Names it in tables.
    """

    growth = 2.0

    def __init__(self, backbone: Backbone | None, ranks: Ranks = Ranks(), name: str = "full attention") -> None:
        self.backbone, self.ranks, self.name = backbone, ranks, name
        self.limit = None if backbone is None or backbone.positions == ENDLESS else backbone.positions

    def rank(self, task: Task, memories: Sequence[Memory], k: int) -> Ranking:
        """It reads all and ranks nothing."""
        raise Beyond("reads the whole memory and ranks no documents")

    def answer(self, task: Task, memories: Sequence[Memory]) -> list[list[Reply]]:
        """Reads everything."""
        if self.ranks.rank > 0:
            return []
        assert self.backbone is not None, "no task wants answers"
        prompts = [[self.backbone.prompt(task, asked, memory.texts()) for asked in memory.trial.asked]
                   for memory in memories]  # fmt: skip
        answers = iter(self.backbone.complete([prompt for row in prompts for prompt in row]))
        return [[Reply(next(answers), None) for _ in row] for row in prompts]


class Retrieving(Method):
    """A retriever, and the backbone that reads what it finds.

    Args:
        retriever: Finds documents.
        backbone: Reads them; None where no task wants answers.
        documents: Documents in front of the backbone.
        ranks: Who takes part; the first works.
    """

    def __init__(self, retriever: Retriever, backbone: Backbone | None, documents: int, ranks: Ranks = Ranks()) -> None:
        self.retriever, self.backbone, self.documents, self.ranks = retriever, backbone, documents, ranks
        self.name = retriever.name

    def rank(self, task: Task, memories: Sequence[Memory], k: int) -> Ranking:
        """By the retriever's scores, the question's words alone."""
        if self.ranks.rank > 0:
            return []
        ranking = []
        for memory in memories:
            numbers, index = memory.numbers, self.retriever.index(memory.texts())
            found = [index.best(asked.text, k) for asked in memory.trial.asked]
            ranking.append([[numbers[place] for place in places] for places in found])
        return ranking

    def answer(self, task: Task, memories: Sequence[Memory]) -> list[list[Reply]]:
        """Reads the documents that it found, the best first."""
        if self.ranks.rank > 0:
            return []
        assert self.backbone is not None, "no task wants answers"
        found = [
            (asked, numbers, [memory.passage(number).text for number in numbers])
            for memory, rows in zip(memories, self.rank(task, memories, self.documents), strict=True)
            for asked, numbers in zip(memory.trial.asked, rows, strict=True)
        ]
        answers = self.backbone.complete([self.backbone.prompt(task, asked, texts) for asked, _, texts in found])
        replies = iter([Reply(answer, tuple(numbers)) for answer, (_, numbers, _) in zip(answers, found, strict=True)])
        return [[next(replies) for _ in memory.trial.asked] for memory in memories]
