"""`msa-train`: LightningCLI with a run folder, one-line errors, and nothing overwritten by accident.

Several --config files compose, later ones win, every key can be overridden on the command line, and --print_config
shows the result. A run lives in `{runs}/{name}/`: config.yaml, tokenizer/, backbone/config.json, TensorBoard events,
metrics.csv, step=N.ckpt.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

import lightning as L
import torch
import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from msa_train import __version__
from msa_train.checkpoints import check_resumable, find_checkpoint
from msa_train.commands import COMMANDS, add_arguments, run_command
from msa_train.environment import record
from msa_train.errors import UserError
from msa_train.evaluation import Task
from msa_train.folders import FACTS, WEIGHTS
from msa_train.guard import Guard
from msa_train.jobs import Trainer
from msa_train.loggers import ContinuedCSVLogger
from msa_train.module import MemorySparseModule, packs_per_step
from msa_train.printable import printable
from msa_train.runs import BACKBONE, TOKENIZER, save_recall
from msa_train.saving import Checkpoints
from msa_train.strategies import FolderIO, ZeRO, check_arguments, zero_arguments
from msa_train.trust import Loader, check_config, check_file, check_name, restrict_imports

# the jobs around training, and the arguments of theirs that are no options
JOBS = {
    "doctor": {"model", "datamodule", "config", "start", "callbacks"},
    "estimate": {"model", "config"},
    "pack": {"datamodule"},
    "mine": {"model", "datamodule", "checkpoint"},
}
PACKED_MEMORY = "datamodules.PackedMemory"  # by name: the library does not import it
# what the classes of a config may be
BASES = (
    L.LightningDataModule, L.Callback, Strategy, Logger, Profiler, Accelerator, Precision, ClusterEnvironment,
    CheckpointIO, LayerSync, Task,
)  # fmt: skip
DEBUG = "MSA_TRAIN_DEBUG"  # a variable, since the ranks of a run are processes of their own
SEEDS = 2**32  # numpy has so many
SECRET = re.compile(r"(.*[._])?(key|secret|password|(api|access|secret)_?key|(api|access|auth|hf)_?token)")
JUDGES_KEY = (
    "keys stand in no config and on no command line: put the judge's into the environment variable OPENAI_API_KEY "
    "(judge.key_variable may name another)"
)

# jsonargparse explains a value that fits no type of a union by all the types that it is not
NOISE = (
    "Subtypes:", "Errors:", "Given value", "Does not validate", "Expected a path", "Expected a <class 'NoneType'>",
    "Subclass types expect", "a class path", "a dict w", "Not a valid subclass",
)  # fmt: skip
SHAPES = {"tuple": "a list, like [a, b]", "list": "a list, like [a, b]", "dict": "a value for each name, like {a: 1}"}


class ConfigFile(ActionConfigFile):
    """Reads a config; what is wrong with the file itself is told with its name."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Looks at the file before jsonargparse does."""
        if not values.strip():
            raise UserError("--config: the name is empty: give a YAML file")
        if os.path.isfile(values):
            check_file(values)
        super().__call__(parser, cfg, values, option_string)


class Parser(LightningArgumentParser):
    """A parser whose errors are one line: what is wrong, where, and the nearest valid key."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # --trainer.max_step must not quietly mean max_steps
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises the mistake as one line, where argparse would print a page and exit."""
        raise UserError(self._short(str(ex) if ex is not None else message))

    def _short(self, message: str) -> str:
        lines = [line.strip(" -") for line in message.splitlines()]
        told = [line for line in lines if line and not line.startswith(NOISE)]
        text = " ".join(dict.fromkeys(told[:4])) or "invalid arguments"
        denied = re.search(r"Importing '([\w.]+)' is not allowed", text)
        if denied:
            place = re.match(r'Parser key "[\w.]+"', text)
            return f"{place[0] if place else 'config'}: '{denied[1]}' may not be named: give a class of its kind"
        unknown = re.search(r"(?:option '|arguments: --|Option '|Key ')([\w.]+)", text)
        if unknown and SECRET.fullmatch(unknown[1]):  # what was given for it is not repeated
            return f"'{unknown[1]}' is unknown, and {JUDGES_KEY}"
        if re.search(r'key "([\w.]+\.)?judge"', text):
            return f"judge: give its model and base_url; {JUDGES_KEY}"
        wanted = re.search(r"Expected a <class '(tuple|list|dict)'>", text)
        if wanted and SHAPES[wanted[1]] not in text:  # a nested parser has said it
            text += f"; give {SHAPES[wanted[1]]}"
        if unknown and "did you mean" not in text:
            command = re.search(r"Subcommand '(\w+)'", text)
            parser = self._subcommands_action.choices[command[1]] if command and self._subcommands_action else self
            near = parser._nearest(unknown[1])
            text += f"; did you mean {near}?" if near else ""
        return text

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

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's, whose --config becomes one that names its file."""
        parser = super().init_parser(**kwargs)
        for action in parser._actions:
            if type(action) is ActionConfigFile:
                action.__class__ = ConfigFile
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what Lightning does not have: the run folder, its checkpoints, and links between model and data."""
        parser.add_argument("--name", type=str, default="run", help="Name of the run's folder.")
        parser.add_argument("--runs", type=str, default="checkpoints", help="Folder of all runs.")
        parser.add_argument("--overwrite", type=bool, default=False, help="Delete an existing run of that name first.")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(Guard, "guard")
        parser.link_arguments(("runs", "name"), "checkpoint.dirpath", compute_fn=os.path.join)
        parser.link_arguments(("runs", "name"), "trainer.default_root_dir", compute_fn=os.path.join)
        parser.link_arguments("model.msa.chunk_size", "data.init_args.chunk_size")
        parser.link_arguments("model.routing_words", "data.init_args.routing_words")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's four, and the jobs around them."""
        return {
            **LightningCLI.subcommands(),
            **JOBS,
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and looks at all that was given before anything is made of it."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        if self.config.subcommand in COMMANDS:
            raise UserError(f"'{self.config.subcommand}' takes no --config: give the command first, then its options")
        check_name(config.name)
        check_config(config, BASES)
        seed = config.seed_everything
        if not isinstance(seed, bool) and seed is not None and not 0 <= seed < SEEDS:
            raise UserError(f"seed_everything is {seed}: give a number from 0 below 2^32")

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        words = f"Before the command: show where an error comes from, not its one line alone. As {DEBUG}=1."
        parser.add_argument("--debug", action="store_true", help=words)
        super()._add_subcommands(parser, **kwargs)
        assert parser._subcommands_action is not None
        for name in COMMANDS:  # that the help may list them; `build` runs them without all of this
            command = _command_parser(name)
            parser._subcommands_action.add_subcommand(name, command, help=command.description)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in JOBS:  # a run's own config.yaml has all that `fit` has
            words = argparse.SUPPRESS if subcommand == "pack" else "As in `fit`: `last`, or a checkpoint's path."
            parser.add_argument("--ckpt_path", type=str | None, default=None, help=words)
            parser.add_argument("--weights_only", type=bool | None, default=None, help=argparse.SUPPRESS)
        if subcommand in ("fit", "doctor", "pack"):
            parser.epilog = f"What data takes, its class says: msa-train {subcommand} --data.help {PACKED_MEMORY}"
        hidden = ["optimizer", "lr_scheduler"]  # phases say both; options they remain for configs that runs have kept
        if subcommand == "pack":  # of a whole run's config the data alone is looked at, and it alone is needed
            nothing = [{"name": "none", "steps": 1}]
            parser.set_defaults({"data": PACKED_MEMORY, "model.backbone": "none", "model.phases": nothing})
            hidden += ["trainer", "model", "checkpoint", "seed_everything"]
        for action in parser._actions:
            if action.dest.partition(".")[0] in hidden:
                action.help = argparse.SUPPRESS
            if hasattr(action, "_typehint"):
                action._typehint = _whole_first(action._typehint)
        return parser

    def instantiate_classes(self) -> None:
        """Makes what the subcommand needs: the jobs have no trainer, so none of its devices need be there."""
        if self.subcommand not in JOBS:
            with _constructing():
                super().instantiate_classes()
            return
        trainer = self.config[self.subcommand].get("trainer")
        strategy = trainer.strategy if trainer is not None else "auto"
        if trainer is not None:  # nor need the strategy's packages: the doctor tells what is missing
            trainer.strategy = "auto"
        with _constructing():
            self.config_init = self.parser.instantiate_classes(self.config)
        if trainer is not None:
            trainer.strategy = strategy
        self.datamodule, self.model = self._get(self.config_init, "data"), self._get(self.config_init, "model")

    def _run_job(self, subcommand: str) -> None:
        config = self.config[subcommand]
        folder = Path(config.runs) / config.name
        if subcommand == "pack":
            Trainer.pack(self.datamodule)
            return
        if subcommand == "doctor":
            callbacks = self._get(self.config_init, "trainer").callbacks or []
            start = partial(self._starting_point, folder)
            Trainer.doctor(self.model, self.datamodule, config, start, callbacks)
            return
        if subcommand == "estimate":
            Trainer.estimate(self.model, config, config.card, config.card_gib)
            return
        checkpoint = find_checkpoint(folder, config.ckpt_path, _tell, (WEIGHTS, FACTS))
        if checkpoint is None:
            raise UserError("mine needs --ckpt_path: `last` for the run's own, or a checkpoint's path")
        self.datamodule.setup("mine")
        Trainer.mine(self.model, self.datamodule, checkpoint, config.out, config.pool_tokens)

    def _starts_anew(self) -> bool:
        config = self.config[self.subcommand]
        training = self.subcommand in ("fit", "doctor")
        return training and config.get("ckpt_path") is None and not config.trainer.fast_dev_run

    def _starting_point(self, folder: Path) -> Path | None:
        """The checkpoint to resume from; None for a run that starts, whose folder must then be free."""
        config = self.config[self.subcommand]
        if self._starts_anew() and _first_rank():
            _check_vacant(folder, config.overwrite)
        needed = None if self.subcommand in ("fit", "doctor") else (WEIGHTS, FACTS)
        return find_checkpoint(folder, config.get("ckpt_path"), _tell, needed)

    def _parse_ckpt_path(self) -> None:
        """Nothing: the command line wins over what a checkpoint remembers, for files and folders alike; and a strange
        file is not opened before `preflight` looks at it."""

    def before_instantiate_classes(self) -> None:
        """Takes the run's length from its phases, unless steps are given."""
        if self.subcommand == "pack":
            return
        trainer = self.config[self.subcommand].trainer
        zero = zero_arguments(trainer.strategy)
        if zero is not None and self.subcommand not in JOBS:  # of what a strategy's constructor says no word comes back
            check_arguments(zero.stage, zero.offload_parameters)
        if trainer.max_epochs not in (None, 1, -1):
            raise UserError(
                f"trainer.max_epochs is {trainer.max_epochs}: a run is as long as its phases; "
                "change their steps, or give --trainer.max_steps"
            )
        if trainer.accumulate_grad_batches < 1:
            raise UserError(f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}: give at least 1")
        trainer.max_epochs = -1  # Lightning counts steps alone; epochs of the data follow one another inside
        if trainer.max_steps == -1:
            trainer.max_steps = sum(phase.steps for phase in self.config[self.subcommand].model.phases)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A trainer that logs into the run folder."""
        config = self._get(self.config_init, "trainer")
        folder = str(config.default_root_dir)
        if config.logger in (None, True):
            # what is measured beside training does not belong into the training's own curves
            fitting = self.subcommand == "fit"
            board = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
            kwargs["logger"] = [board, ContinuedCSVLogger(folder)] if fitting else False
        callbacks = list(config.callbacks or [])
        if config.enable_progress_bar is not False and not any(isinstance(item, ProgressBar) for item in callbacks):
            kwargs["callbacks"] = [*callbacks, _Progress()]
        trainer = super().instantiate_trainer(**kwargs)
        if not isinstance(trainer.strategy, ZeRO):
            trainer.strategy.checkpoint_io = FolderIO()
        trainer.callbacks.sort(  # type: ignore[attr-defined]
            key=lambda one: not isinstance(one, Guard)
        )  # it watches steps, not what others do there
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Checks all that can be known, then makes room for the run, then runs."""
        if subcommand in JOBS:
            self._run_job(subcommand)
            return
        config = self.config[subcommand]
        folder = Path(config.runs) / config.name
        self.model.check_strategy(self.trainer.strategy, subcommand == "fit")
        checkpoint = self._starting_point(folder)
        self.datamodule.prepare_data()
        self.datamodule.setup(subcommand)
        tokenizer = getattr(self.datamodule, "tokenizer", None)
        self.model.preflight(None if tokenizer is None else len(tokenizer), checkpoint)
        if checkpoint is not None:
            self._open(checkpoint, subcommand)
        if _first_rank() and hasattr(self.datamodule, "describe"):
            print(f"msa-train: {folder}: {self.datamodule.describe()}")
        if self._starts_anew() and _first_rank() and folder.is_dir():
            shutil.rmtree(folder)
        try:
            super()._run_subcommand(subcommand)
        except torch.OutOfMemoryError as error:
            raise UserError(self.model.out_of_memory()) from error

    def _open(self, checkpoint: Path, subcommand: str) -> None:
        """Has Lightning resume a run; weights to be evaluated the model opens by itself, under any strategy."""
        given = self.config_init[subcommand]
        if subcommand == "fit":
            check_resumable(checkpoint, packs_per_step(self.trainer, self.datamodule))
            given.ckpt_path = str(checkpoint)
        else:
            self.model.open_for_evaluation(checkpoint)
            given.ckpt_path = None


def _command_parser(name: str) -> Parser:
    parser = Parser(prog=f"msa-train {name}", description=(COMMANDS[name].__doc__ or "").partition("\n")[0])
    add_arguments(parser, name)
    return parser


class SaveConfig(SaveConfigCallback):
    """Keeps of what trains all that it takes to ask it later (see runs.py); testing a run leaves that alone."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Saves config.yaml when fitting."""
        if stage == "fit" and trainer.loggers:
            # the file repeats the run elsewhere; it must neither delete this one nor resume it
            self.config = self.config.clone()
            self.config.overwrite, self.config.ckpt_path = False, None
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves tokenizer/ and backbone/config.json beside it, now that there is a model: with them the run's folder
        can be moved, and needs neither its corpus nor its backbone's folder."""
        assert isinstance(pl_module, MemorySparseModule)
        if not trainer.loggers:
            return
        folder = Path(trainer.log_dir or "")  # asked for by every rank: the first one tells the others
        if trainer.is_global_zero:
            tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / TOKENIZER)
            pl_module.net.backbone.config.save_pretrained(folder / BACKBONE)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records what this start runs with."""
        if trainer.loggers and trainer.is_global_zero:
            data = trainer.datamodule  # type: ignore[attr-defined]
            record(
                Path(trainer.default_root_dir), step=trainer.global_step, ranks=trainer.world_size,
                strategy=type(trainer.strategy).__name__, precision=str(trainer.precision),
                data=data.fingerprint() if hasattr(data, "fingerprint") else None,
            )  # fmt: skip

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves how well each routed layer retrieves, by which asking weighs them. A file of its own, since Lightning
        saves a checkpoint before it validates at the same step."""
        assert isinstance(pl_module, MemorySparseModule)
        if not trainer.loggers or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        folder = Path(trainer.log_dir or "")
        if trainer.is_global_zero and pl_module.layer_recall:
            save_recall(folder, trainer.global_step, pl_module.layer_recall)


def build(args: Sequence[str] | None = None, run: bool = True) -> MemoryCLI | None:
    """The command line over `args` (sys.argv by default); `run=False` stops before the subcommand's work.

    The memory's commands need no trainer; they are run as they are, and None comes back.
    """
    cli_class = MemoryCLI if run else _Instantiate
    restrict_imports()
    given = sys.argv[1:] if args is None else list(args)
    try:
        if given and given[0] in COMMANDS and run:
            run_command(given[0], _command_parser(given[0]).parse_args(given[1:]))
            return None
        return cli_class(
            MemorySparseModule,
            L.LightningDataModule,
            trainer_class=Trainer,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            parser_kwargs={"prog": "msa-train", "version": __version__, "description": __doc__},
            trainer_defaults={
                "use_distributed_sampler": False, "check_val_every_n_epoch": None, "log_every_n_steps": 10,
            },
            seed_everything_default=0,
            load_from_checkpoint_support=False,
            args=list(args) if args is not None else None,
        )  # fmt: skip
    except ValueError as error:
        # jsonargparse wraps what a constructor says about its arguments
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, UserError):
            inner = inner.__cause__
        if inner is None or inner is error:
            raise
        raise inner from None


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    _quieten()
    if sys.argv[1:2] == ["--debug"]:
        sys.argv.pop(1)
        os.environ[DEBUG] = "1"
    try:
        build()
    except (UserError, MisconfigurationException) as error:
        # Lightning's own word for a mistake in the trainer's arguments
        if os.environ.get(DEBUG) == "1":
            traceback.print_exception(error)
        print(f"msa-train: error: {' '.join(printable(str(error)).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nmsa-train: broken off", file=sys.stderr)
        sys.exit(130)


class _Progress(RichProgressBar):
    """Lightning's bar, which counts epochs; a run has steps."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"


class _Instantiate(MemoryCLI):
    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: the caller looks at what was built."""


def _whole_first(kind: Any) -> Any:
    """The type of an option, whose whole numbers are tried before broken ones: else the 1 of `limit_val_batches: 1`
    would be 1.0, which is all batches. typing hands out unions in the order of whoever asked for one first, be it
    another library (Lightning issue 21259)."""
    kinds = get_args(kind)
    mixed = get_origin(kind) in (Union, UnionType) and int in kinds and float in kinds
    return reduce(or_, (int, *(one for one in kinds if one is not int))) if mixed else kind


def _first_rank() -> bool:
    return (getattr(rank_zero_only, "rank", 0) or 0) == 0


@contextmanager
def _constructing() -> Iterator[None]:
    """Tells what a class of the config says about its arguments, which jsonargparse wraps, or Lightning about its."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        root: BaseException = error
        while root.__cause__ is not None and not isinstance(root, UserError):
            root = root.__cause__
        if isinstance(root, UserError):
            raise root from None
        raise UserError(f"config: a class refuses its arguments ({root}); `msa-train --debug` says which") from error


def _check_vacant(folder: Path, overwrite: bool) -> None:
    if folder.is_symlink():  # of a link, not even --overwrite would know what it may delete
        raise UserError(f"{folder} is a link: give another --name, or the folder that it leads to as --runs and --name")
    standing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not standing.is_dir():
        raise UserError(f"{folder} cannot be made: {standing} is a file; give another --runs or --name")
    if not os.access(standing, os.W_OK):
        raise UserError(f"{folder} cannot be written: {standing} is read-only; give another --runs")
    # TensorBoard's file alone is what a start leaves that a callback refused
    if not folder.is_dir() or all(file.name.startswith("events.out.tfevents") for file in folder.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"{folder} holds a run already: --ckpt_path last goes on with it, --name gives another folder, "
            "--overwrite true deletes it"
        )
    if not _is_run(folder):
        raise UserError(
            f"{folder} is no run of msa-train (no config.yaml with model and data), so --overwrite leaves it alone: "
            "give another --name"
        )


def _is_run(folder: Path) -> bool:
    try:
        values = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), Loader)
    except Exception:  # PyYAML raises far more than its own errors
        return False
    return isinstance(values, dict) and {"model", "data"} <= values.keys()


def _tell(text: str) -> None:
    if _first_rank():
        print(f"msa-train: {text}", file=sys.stderr)


def _quieten() -> None:
    """Keeps other libraries' advertisements and notes to their own developers off the user's terminal."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)
