"""Checkpoint folders: whole or not there; what is damaged is found by name."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msa_train import folders
from msa_train.checkpoints import check_sound, find_checkpoint
from msa_train.errors import UserError
from msa_train.folder_files import FolderReader, FolderWriter
from msa_train.folders import ASIDE, FACTS, MANIFEST, TRAINER, WEIGHTS, folder_of, leftovers, verify
from msa_train.optimizer_state import plain_state, plain_state_dict

FACT = {"chunk_size": 4, "skipped_steps": 0.0, "tied": {"head": "body"}, "packs_per_step": 2}


def write(run: Path, step: int, seed: int = 0) -> Path:
    """A checkpoint of three weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(5, 7, generator=generator) for name in ("body", "arm")}
    folder = folder_of(run, step)
    writer = FolderWriter(folder.with_name(folder.name + ASIDE))
    writer.start()
    writer.weights(weights, {**FACT, "global_step": step})
    writer.trainer({"step": step, "rows": [1, 2]})
    writer.optimizer("moment/body", weights["body"] * 2, 0)
    writer.finish(0)
    writer.settle(folder)
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    files = {path.name for path in folder.iterdir()}
    assert files == {WEIGHTS, FACTS, TRAINER, MANIFEST, "optimizer-0-0.safetensors"}
    assert {name for name, _ in verify(folder)} == files - {MANIFEST}
    reader = FolderReader(folder)
    weights = reader.weights()
    assert set(weights) == {"body", "arm", "head"} and torch.equal(weights["head"], weights["body"])
    moment = reader.tensor("moment/body")
    assert moment is not None and torch.equal(moment, weights["body"] * 2)
    assert reader.tensor("moment/arm") is None and reader.trainer() == {"step": 7, "rows": [1, 2]}


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


@pytest.mark.parametrize("name", [WEIGHTS, FACTS, TRAINER, MANIFEST, "optimizer-0-0.safetensors"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(
    name: str, damage: Callable[[Path], Any], tmp_path: Path
) -> None:
    before, newest = write(tmp_path, 9), write(tmp_path, 10, seed=1)
    damage(newest / name)
    told: list[str] = []
    assert find_checkpoint(tmp_path, "last", told.append) == before
    assert len(told) == 1 and f"step=10.ckpt/{name}" in told[0]
    with pytest.raises(UserError, match=f"step=10.ckpt/{name}.*resume from another"):
        check_sound(newest)
    damage(before / name)
    with pytest.raises(UserError, match=f"step=10.ckpt/{name}"):
        find_checkpoint(tmp_path, "last", told.append)


def test_every_byte_of_a_manifest_matters(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    whole = (folder / MANIFEST).read_bytes()
    for place, letter in enumerate(whole):
        if chr(letter).isspace():
            continue  # between words of JSON, a space for a space changes nothing
        (folder / MANIFEST).write_bytes(whole[:place] + bytes([letter ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError):
            check_sound(folder)


def test_names_in_a_manifest_leave_no_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 1)
    (tmp_path / "secret").write_text("s")
    body = {"files": {"../../secret": {"bytes": 1, "sha256": "0"}}}
    (folder / MANIFEST).write_text(json.dumps({**body, "sha256": folders._digest(body)}))
    with pytest.raises(UserError, match="manifest.json: damaged"):
        check_sound(folder)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("allowed", range(12))
def test_a_killed_save_leaves_a_whole_checkpoint(
    allowed: int, replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may end at any change of the disk: the newest that is found is always whole."""
    write(tmp_path, 4)
    if replaced:
        flip(write(tmp_path, 5) / WEIGHTS)
    changes = 0
    rename, rmtree, text = Path.rename, shutil.rmtree, Path.write_text

    def counted(change: Callable[[], Any], half: Callable[[], Any]) -> None:
        nonlocal changes
        changes += 1
        if changes > allowed:
            half()
            raise KeyboardInterrupt
        change()

    def some(path: Path) -> None:
        next(Path(path).iterdir()).unlink()

    monkeypatch.setattr(Path, "rename", lambda path, to: counted(lambda: rename(path, to), lambda: None))
    monkeypatch.setattr(shutil, "rmtree", lambda path: counted(lambda: rmtree(path), lambda: some(path)))
    monkeypatch.setattr(
        Path, "write_text",
        lambda path, words, **kw: counted(lambda: text(path, words, **kw), lambda: text(path, words[:20], **kw)),
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):
        write(tmp_path, 5, seed=1)
    monkeypatch.undo()
    newest = find_checkpoint(tmp_path, "last", lambda text: None)
    assert newest is not None and newest.name in ("step=4.ckpt", "step=5.ckpt")
    if newest.name == "step=5.ckpt":
        wanted = FolderReader(write(tmp_path, 6, seed=1)).weight("arm")
        assert torch.equal(FolderReader(newest).weight("arm"), wanted), "the new one"
    if changes <= allowed:
        assert newest.name == "step=5.ckpt" and not leftovers(tmp_path)


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 4)
    for file in ("save_file", "torch.save"):

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(f"msa_train.folder_files.{file}", full)
        with pytest.warns(UserWarning, match=r"step=5.ckpt could not be saved \(No space left on device\): training"):
            write(tmp_path, 5)
        monkeypatch.undo()
        assert {path.name for path in tmp_path.iterdir()} == {"step=4.ckpt"}


def test_an_optimisers_state_comes_back_by_name_in_another_order() -> None:
    torch.manual_seed(0)
    weights = {name: torch.nn.Parameter(torch.randn(3, size)) for name, size in (("a", 2), ("b", 5), ("c", 4))}

    def made(order: str) -> torch.optim.AdamW:
        groups = [{"name": group, "params": [(name, weights[name]) for name in group]} for group in order.split()]
        return torch.optim.AdamW(groups, lr=0.1)

    first = made("ab c")
    for number in range(3):
        for name in ("a", "b", "c")[: 2 + (number > 0)]:  # c begins later, as a backbone after a warm-up does
            weights[name].grad = torch.randn_like(weights[name])
        first.step()
    tensors, kept = plain_state(first.state_dict())
    second = made("c ab")
    groups = [{**group, "params": list(zip(group["param_names"], group["params"], strict=True))}
              for group in second.param_groups]  # fmt: skip
    second.load_state_dict(plain_state_dict(tensors.get, kept, groups))
    for name, weight in weights.items():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(second.state[weight][key], first.state[weight][key]), (name, key)
    assert second.state[weights["c"]]["step"] == 2 and second.state[weights["a"]]["step"] == 3
