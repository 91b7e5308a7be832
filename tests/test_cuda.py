"""What only a GPU can show: the fast kernels agree with the reference, and no layer makes the host wait."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from msa_train.config import MSAConfig
from msa_train.evaluation import Asked, Memory, Task, Trial
from msa_train.evaluation.methods import Routed
from msa_train.generation import AskConfig
from msa_train.losses import routing_loss
from msa_train.model import MemorySparseModel, Recompute
from msa_train.module import SkippingAdamW
from msa_train.pack import MemoryPack
from tests.conftest import ANIMALS, COLOURS, tiny_backbone, tiny_pack
from tests.memory.conftest import model_for, passages, protocol_with

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def model_on(device: str, dtype: torch.dtype, recompute: Recompute = "none") -> MemorySparseModel:
    torch.manual_seed(1)
    backbone = tiny_backbone("qwen3", **WIDE)
    return MemorySparseModel(backbone, MSAConfig(chunk_size=4, top_k=2), recompute=recompute).to(device, dtype).train()


def pack_of(device: str) -> MemoryPack:
    """The second query must not select three of the documents, the last is an instruction."""
    pack = tiny_pack(lengths=(33, 3, 64, 1, 17, 50), contexts=((5, 4), (20, 6), (7, 1), (3, 9)))
    excluded, positive = torch.zeros_like(pack.positive_QD), pack.positive_QD.clone()
    excluded[1, [0, 2, 5]] = True
    excluded[3], positive[3] = True, False
    return replace(pack, excluded_QD=excluded, positive_QD=positive, asked=3).to(device)


def losses(model: MemorySparseModel, pack: MemoryPack) -> torch.Tensor:
    output = model(pack)
    return model.label_loss(output, pack.contexts) / 20 + routing_loss(output.doc_score_LQD, pack.positive_QD).mean()


def test_cuda_equals_cpu_in_float32() -> None:
    results = []
    for device in ("cpu", "cuda"):
        model, pack = model_on(device, torch.float32), pack_of(device)
        loss = losses(model, pack)
        loss.backward()
        gradients = {name: weight.grad.cpu() for name, weight in model.named_parameters() if weight.grad is not None}
        results.append((loss.detach().cpu(), gradients))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    assert len(results[0][1]) > 40
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(
            results[1][1][name], gradient, rtol=2e-2, atol=2e-4 * float(gradient.abs().max() + 1)
        )


def test_varlen_kernels_in_bf16_stay_near_float32() -> None:
    wanted = losses(model_on("cuda", torch.float32), pack_of("cuda"))
    found = losses(model_on("cuda", torch.bfloat16), pack_of("cuda"))
    assert abs(float(found.detach() / wanted.detach()) - 1) < 0.05


@pytest.mark.parametrize("recompute", ["none", "layers", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_layer_makes_the_host_wait(dtype: torch.dtype, recompute: Recompute) -> None:
    """Forward, both losses and backward, with every synchronising call turned into an error."""
    model, pack = model_on("cuda", dtype, recompute), pack_of("cuda")
    losses(model, pack).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses(model, pack).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_fused_step_skips_a_broken_gradient_without_looking() -> None:
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = SkippingAdamW([weight], lr=0.1, fused=True)
    for broken in (0.0, 1.0, 0.0):
        weight.grad = torch.full((3,), torch.nan if broken else 1.0, device="cuda")
        optimizer.found_inf = torch.tensor(broken, device="cuda")  # type: ignore[attr-defined]
        before = weight.detach().clone()
        optimizer.step()
        assert torch.equal(before, weight) == bool(broken)
    assert torch.isfinite(weight).all() and float(optimizer.state[weight]["step"]) == 2


def test_an_evaluation_on_a_gpu_finds_what_one_on_a_cpu_does_and_leaves_its_memory(tmp_path: Path) -> None:
    protocol = protocol_with("question", tmp_path)
    documents = [*passages(protocol, range(60))]
    asked = tuple(
        Asked(f"q{n}", f"Where does the {COLOURS[n % 8]} {ANIMALS[n // 8]} live?", (n + 1,)) for n in range(9)
    )
    trials = [
        Trial(45, {4: documents[50], 47: documents[51]}, asked[:5], 1000),
        Trial(30, {60: documents[52]}, asked[5:], 700),
    ]
    memories = [Memory(documents, trial) for trial in trials]
    task = cast(Task, SimpleNamespace(pool_name="pool", pool=lambda length: documents, name="task"))
    found = {}
    for device in ("cpu", "cuda"):
        model = model_for(protocol, **WIDE).to(device)
        before = torch.cuda.memory_allocated()
        method = Routed("router", model, protocol, AskConfig(max_new_tokens=5, max_steps=2), keys="float32")
        method.prepare(task, 1000)
        found[device] = method.rank(task, memories, 10), method.answer(task, memories)
        method.close()
        del method
        gc.collect()
        assert torch.cuda.memory_allocated() == before
    assert found["cpu"] == found["cuda"] and sum(map(len, found["cpu"][0])) == 9
