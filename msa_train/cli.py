"""`msa-train`: LightningCLI with a run folder, one-line errors, and nothing overwritten by accident.

Several --config files compose, later ones win, every key can be overridden on the command line, and --print_config
shows the result. A run lives in `{runs}/{name}/`: config.yaml, TensorBoard events, metrics.csv, last.ckpt.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from msa_train import __version__
from msa_train.errors import UserError
from msa_train.loggers import ContinuedCSVLogger
from msa_train.module import MemorySparseModule


class Parser(LightningArgumentParser):
    """A parser whose errors are one line: what is wrong, where, and the nearest valid key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the line and exits with code 2."""
        raise UserError(self._short(str(ex) if ex is not None else message))

    def _short(self, message: str) -> str:
        own = [line.strip(" -") for line in message.splitlines() if line.strip()]
        unknown = re.search(r"(?:Key|Option|Unrecognized arguments:|key) '?(?:--)?([\w.@]+)'?", message)
        line = own[0] if own else "invalid arguments"
        # the deepest line of a union's wall of reasons is the one that names the value
        inner = [text for text in own[1:] if "Expected" in text or "expected" in text or "is " in text]
        if inner and inner[-1] not in line:
            line = f"{line} {inner[-1]}"
        if unknown and any(word in message for word in ("not expected", "nrecognized", "not accepted", "No action for")):
            near = self._nearest(unknown[1])
            line = f"{line}{f'; did you mean {near}?' if near else ''}"
        return line

    def _nearest(self, key: str) -> str | None:
        known = {name for name in self.get_defaults(skip_validation=True).keys(branches=True)}
        leaves: dict[str, str] = {}
        for name in known:
            leaves.setdefault(name.rpartition(".")[2], name)
        found = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.75)
        if found:
            return found[0]
        found = difflib.get_close_matches(key.rpartition(".")[2], sorted(leaves), n=1, cutoff=0.7)
        return leaves[found[0]] if found else None


class MemoryCLI(LightningCLI):
    """The command line of one model class and any data module."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what Lightning does not have: the run folder, its checkpoints, and links between model and data."""
        parser.add_argument("--name", type=str, default="run", help="Name of the run's folder.")
        parser.add_argument("--runs", type=str, default="checkpoints", help="Folder of all runs.")
        parser.add_argument("--overwrite", type=bool, default=False, help="Delete an existing run of that name first.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {"checkpoint.save_last": True, "checkpoint.save_top_k": 0, "checkpoint.every_n_train_steps": 100}
        )
        parser.link_arguments(("runs", "name"), "checkpoint.dirpath", compute_fn=os.path.join)
        parser.link_arguments(("runs", "name"), "trainer.default_root_dir", compute_fn=os.path.join)
        parser.link_arguments("model.msa.chunk_size", "data.init_args.chunk_size")
        parser.link_arguments("model.routing_words", "data.init_args.routing_words")

    def before_instantiate_classes(self) -> None:
        """Checks the run folder before anything is built."""
        config = self.config[self.subcommand]
        folder = Path(config.runs) / config.name
        if config.trainer.max_steps == -1 and config.trainer.max_epochs is None:
            config.trainer.max_steps = sum(phase.steps for phase in config.model.phases)
        if int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0))) == 0:
            _check_folder(folder, self.subcommand, config)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A trainer that logs into the run folder."""
        config = self._get(self.config_init, "trainer")
        folder = str(config.default_root_dir)
        if config.logger in (None, True):
            kwargs["logger"] = [
                TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
                ContinuedCSVLogger(folder),
            ]
        return super().instantiate_trainer(**kwargs)


class SaveConfig(SaveConfigCallback):
    """Keeps config.yaml of what trains; testing a run leaves it alone."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Saves when fitting."""
        if stage == "fit" and trainer.logger is not None and not getattr(trainer, "fast_dev_run", False):
            super().setup(trainer, pl_module, stage)


def build(args: Sequence[str] | None = None, run: bool = True) -> MemoryCLI:
    """The command line over `args` (sys.argv by default); `run=False` stops before the subcommand's work."""
    cli_class = MemoryCLI if run else _Instantiate
    return cli_class(
        MemorySparseModule,
        L.LightningDataModule,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        parser_class=Parser,
        parser_kwargs={"prog": "msa-train", "version": __version__, "description": __doc__},
        trainer_defaults={"use_distributed_sampler": False, "check_val_every_n_epoch": None, "log_every_n_steps": 10},
        seed_everything_default=0,
        # the command line wins over what a checkpoint remembers, for files and folders alike
        load_from_checkpoint_support=False,
        args=list(args) if args is not None else None,
    )


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    sys.path.insert(0, os.getcwd())  # configs may name classes of the folder that one works in
    try:
        build()
    except UserError as error:
        print(f"msa-train: error: {error}", file=sys.stderr)
        sys.exit(2)


class _Instantiate(MemoryCLI):
    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: the caller looks at what was built."""


def _check_folder(folder: Path, subcommand: str, config: Any) -> None:
    checkpoint = config.get("ckpt_path")
    if checkpoint == "last" and not any(folder.glob("last*.ckpt")):
        raise UserError(f"--ckpt_path last: {folder} has no checkpoint yet; leave --ckpt_path out to start")
    if checkpoint not in (None, "last", "best", "hpc") and not Path(checkpoint).exists():
        raise UserError(f"--ckpt_path: no such checkpoint '{checkpoint}'")
    if subcommand != "fit" or checkpoint is not None or config.trainer.fast_dev_run:
        return
    if folder.is_dir() and any(folder.iterdir()):
        if not config.overwrite:
            raise UserError(
                f"{folder} holds a run already: --ckpt_path last goes on with it, --name gives another folder, "
                "--overwrite true deletes it"
            )
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder} is no run of msa-train (no config.yaml), so --overwrite leaves it alone")
        shutil.rmtree(folder)
