"""Public-domain and free texts out of Debian packages, as lists of documents for train.py.

A document is a list of units (paragraphs, verses, entries, declarations) and the string that joins
them. Packages are fetched with `apt-get download` and unpacked into a folder of their own; nothing
is installed and nothing here trains. What each text is and its licence: README.md.
"""

import gzip
import pathlib
import random
import re
import struct
import subprocess
import zlib

PACKAGES = ["bible-kjv", "bible-kjv-text", "dict-devil", "dict-gcide", "dict-jargon", "miscfiles",
            "r-cran-janeaustenr", "golang-1.19-src"]
GO_FOLDERS = ["bufio", "bytes", "container", "encoding", "errors", "flag", "fmt", "hash", "io",
              "log", "os", "path", "sort", "strconv", "strings", "sync", "text", "unicode"]


def unpack(folder):
    """Fetches and unpacks every package that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        to = folder / package
        if to.exists():
            continue
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        deb = next(folder.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", deb, to], check=True)


def paragraphs(text):
    """Paragraphs with their hard line breaks undone."""
    units = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [unit for unit in units if unit]


def dictionary(root, name):
    path = root / f"dict-{name}/usr/share/dictd/{name}.dict.dz"
    return gzip.decompress(path.read_bytes()).decode("utf-8", "replace")


def long_string_vectors(rdb):
    """String vectors of an R lazy-load database: blobs of a length and a zlib stream."""
    at = 0
    while at < len(rdb):
        inflater = zlib.decompressobj()
        blob = inflater.decompress(rdb[at + 4:])
        at = len(rdb) - len(inflater.unused_data)
        for found in re.finditer(rb"\x00\x00[\x00-\x04]\x10(....)(?=\x00[\x00-\x0f][\x00-\xff]\x09)",
                                 blob, re.S):
            count, cursor, lines = struct.unpack(">I", found.group(1))[0], found.end(), []
            if not 1000 < count < 100000:
                continue
            for _ in range(count):
                length = struct.unpack(">I", blob[cursor + 4:cursor + 8])[0]
                lines.append(blob[cursor + 8:cursor + 8 + length].decode("utf-8"))
                cursor += 8 + length
            yield lines


def austen(root):
    path = root / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    documents = []
    for lines in long_string_vectors(path.read_bytes()):
        for chapter in re.split(r"\n(?=CHAPTER |Chapter )", "\n".join(lines)):
            documents.append((paragraphs(chapter.replace("_", "")), "\n\n"))
    return documents


def opticks(root):
    path = root / "golang-1.19-src/usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt"
    text = path.read_text()
    text = text[text.index("SIR ISAAC NEWTON'S ADVERTISEMENTS"):].replace("_", "")
    units = [unit for unit in paragraphs(text) if len(unit) > 60]
    return [(units[i:i + 20], "\n\n") for i in range(0, len(units), 20)]


def kjv(root):
    # The program finds its data in the current folder and takes no absolute path.
    said = subprocess.run([(root / "bible-kjv/usr/bin/bible").resolve(), "-f", "gen1:1-rev22:21"],
                          cwd=root / "bible-kjv-text/usr/lib", check=True, capture_output=True,
                          stdin=subprocess.DEVNULL, text=True).stdout
    chapters = {}
    for line in said.splitlines():
        found = re.match(r"(\d?[A-Za-z]+)(\d+):(\d+) (.*)", line)
        book, chapter, verse, text = found.groups()
        chapters.setdefault((book, chapter), []).append(f"{chapter}:{verse} {text}")
    return [(verses, "\n") for verses in chapters.values()]


def devil(root):
    text = dictionary(root, "devil")
    entries = re.split(r"\n(?=[A-Z][A-Z' -]+, [a-z.]+)", text)[1:]
    documents = []
    for entry in entries:
        prose, *verses = re.split(r"\n\s*\n", entry.strip())
        units = [" ".join(prose.split())]
        units += ["\n".join(line.strip() for line in verse.splitlines()) for verse in verses]
        documents.append((["\n\n".join(units)], "\n\n"))
    return documents


def webster(root):
    """Entries that come whole from the dictionary of 1913 (tagged so), one paragraph each."""
    text = dictionary(root, "gcide")
    documents = []
    for entry in re.split(r"\n(?=[A-Z][^\n\\]* \\)", text)[1:]:
        tags = set(re.findall(r"\[([^\]]*(?:Webster|PJC|WordNet|Suppl)[^\]]*)\]", entry))
        if tags != {"1913 Webster"} or len(entry) > 1500:
            continue
        entry = " ".join(entry.replace("[1913 Webster]", "").split())
        documents.append(([entry], "\n\n"))
    return random.Random(1913).sample(documents, 9000)


def jargon(root):
    text = dictionary(root, "jargon")
    documents = []
    for entry in re.split(r"\n(?=\S)", text):
        head, *rest = entry.split("\n", 1)
        units = paragraphs(rest[0]) if rest else []
        if len(units) < 2 or head.startswith("00") or len(units[0]) > 60:
            continue
        documents.append(([f"{head} {units[0]}"] + units[1:], "\n\n"))
    return documents


def law(root):
    documents = []
    for name in ["us-constitution", "us-declaration"]:
        path = root / f"miscfiles/usr/share/state/{name}.gz"
        documents.append((paragraphs(gzip.decompress(path.read_bytes()).decode("latin-1")), "\n\n"))
    return [(units[i:i + 6], joint) for units, joint in documents for i in range(0, len(units), 6)]


def gopher(root):
    source = root / "golang-1.19-src/usr/share/go-1.19/src"
    documents = []
    for folder in GO_FOLDERS:
        for path in sorted((source / folder).rglob("*.go")):
            text = path.read_text()
            if path.name.endswith("_test.go") or "testdata" in path.parts or len(text) > 60000:
                continue
            text = re.sub(r"\A(//[^\n]*\n)+\n*", "", text)
            documents.append(([unit for unit in text.strip().split("\n\n") if unit], "\n\n"))
    return documents


def spell(root):
    """A task instead of a style: words, then their letters."""
    words = gzip.open(root / "miscfiles/usr/share/dict/web2a.gz", "rt").read().lower()
    words = sorted(set(re.findall(r"\b[a-z]{3,9}\b", words)))
    rng = random.Random(26)
    rng.shuffle(words)
    lines = [f"{word}: {'-'.join(word)}" for word in words]
    return [(lines[i:i + 20], "\n") for i in range(0, len(lines), 20)]


def caps(root):
    return [([unit.upper() for unit in units], joint) for units, joint in austen(root)]


READERS = {"austen": austen, "opticks": opticks, "kjv": kjv, "devil": devil, "webster": webster,
           "jargon": jargon, "law": law, "gopher": gopher, "spell": spell, "caps": caps}


def read_all(root):
    """{name: (training documents, held-out documents)}: of every 12 documents one is held out."""
    split = {}
    for name, reader in READERS.items():
        documents = reader(root)
        held = [d for i, d in enumerate(documents) if i % 12 == 7]
        split[name] = ([d for i, d in enumerate(documents) if i % 12 != 7], held)
    return split
