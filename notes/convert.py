"""Turns what other people have into a folder that data.py reads: pictures and a metadata.jsonl.

    python notes/convert.py --src SRC --out DIR        then: python data.py --data DIR

    SRC holds                                    what becomes a row
    *.tar (img2dataset, WebDataset)              key.jpg with key.txt, or with "caption" in key.json
    the same with key.src_img.jpg and so on      an edit, columns as below
    */prompt.json beside <seed>_0.jpg, _1.jpg    an edit: InstructPix2Pix's own download (its
                                                 seeds.json is not needed)
    *.jsonl or *.csv with paths of pictures      an edit: original_image, edit_prompt, edited_image
                                                 (InstructPix2Pix) or src_img, edited_prompt_list,
                                                 edited_img (OmniEdit; each wording is a row); else
                                                 image or file_name, and caption or text

What the hub has as parquet (OmniEdit) is not read: save its pictures and a rows.jsonl with the
columns above by the library `datasets`.

A tar that was cut short gives what stands before the cut. Whatever is left out is counted and
named; more than --max-broken of it is an error. Nothing outside SRC is read, no name out of a tar
is used as a path, and DIR is whole or not there. Pictures are not opened here (data.py tells which
are broken); those of a folder are linked where the file system can (hard links: they take no room),
else copied.
"""

import csv
import itertools
import json
import lzma
import os
import posixpath
import shutil
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import data  # noqa: E402

EDITS = (("original_image", "edit_prompt", "edited_image"),
         ("src_img", "edited_prompt_list", "edited_img"))
CAPTIONS = tuple((image, text) for image in ("image", "file_name") for text in ("caption", "text"))
LARGEST = 2**28                 # bytes of a tar's member that are read


@dataclass(frozen=True)
class Config:
    src: str = ""                   # the folder to read
    out: str = ""                   # the folder to make; it must not be there yet
    max_broken: float = 0.01        # largest tolerated fraction of rows left out

    def __post_init__(self):
        data.check(self, max_broken=(0, 1))
        if not Path(self.src).is_dir() or not self.src:
            raise data.UserError(f"--src {self.src}: no such folder.")
        if not self.out or os.path.lexists(self.out):
            raise data.UserError(f"--out {self.out}: give the name of a folder that is not there "
                                 f"yet.")


def is_inside(path: Path, folder: Path) -> bool:
    return (os.path.realpath(path) + os.sep).startswith(os.path.realpath(folder) + os.sep)


# --- Samples: (name, columns); a picture is (suffix, bytes of a tar's member or path of a file) -

def from_tar(path: Path, skipped: list[str]):
    """Neighbours of one key are a sample: 0001.jpg, 0001.txt, 0001.json; 0001.src_img.jpg has its
    column."""
    key, columns = None, {}
    try:
        with open(path, "rb") as file:
            plain = file.read(512)[257:262] == b"ustar"
            file.seek(max(0, path.stat().st_size - 1024))
            cut = plain and any(file.read())           # a whole tar ends in two empty blocks
        with tarfile.open(path) as tar:
            for member in tar:
                folder, name = posixpath.split(member.name)
                stem, _, suffix = name.partition(".")
                if not member.isfile() or not stem:    # links and devices, too
                    if not member.isdir():
                        skipped.append(f"{path.name}: {member.name!r} is no file")
                    continue
                if (folder, stem) != key:
                    if columns:
                        yield f"{path.name}: {key[1]!r}", columns
                    key, columns = (folder, stem), {}
                if member.size > LARGEST:
                    skipped.append(f"{path.name}: {member.name!r} is too large: "
                                   f"{data.human(member.size)}")
                elif not keep(columns, suffix.lower(), tar.extractfile(member).read()):
                    skipped.append(f"{path.name}: {member.name!r} cannot be read as JSON")
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError) as error:
        after = repr(key[1]) if key else "nothing"
        skipped.append(f"{path.name} is cut short or damaged after {after} ({error})")
        return                              # what came before is kept, the sample at the cut is not
    if cut:
        skipped.append(f"{path.name} is cut short after {repr(key[1]) if key else 'nothing'}")
    if columns:
        yield f"{path.name}: {key[1]!r}", columns


def keep(columns: dict, suffix: str, content: bytes) -> bool:
    column, _, kind = suffix.rpartition(".")
    if f".{kind}" in data.SUFFIXES:
        columns[column or "image"] = (f".{kind}", content)
    elif kind == "txt":
        columns[column or "caption"] = content.decode("utf-8", "replace")
    elif kind == "json":
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            return False
        if isinstance(fields, dict):                   # a picture or a .txt beside it goes before
            for name, value in fields.items():
                columns.setdefault(name, value)
    return True


def from_prompts(src: Path, skipped: list[str]):
    """InstructPix2Pix's own tree: <name>/prompt.json {"edit"}, <name>/<seed>_0.jpg ->
    <seed>_1.jpg."""
    for prompt in sorted(src.glob("*/prompt.json")):
        fields = data.read_json(prompt) if is_inside(prompt, src) else {}
        for before in sorted(prompt.parent.glob("*_0.jpg")):
            yield str(before.relative_to(src)), {
                "original_image": str(before.relative_to(src)), "edit_prompt": fields.get("edit"),
                "edited_image": str(before.with_name(before.name[:-6] + "_1.jpg").relative_to(src))}


def from_table(path: Path, skipped: list[str]):
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as lines:
        csv.field_size_limit(2**31 - 1)
        is_csv = path.suffix == ".csv"
        rows = csv.DictReader(lines, strict=True) if is_csv else filter(str.strip, lines)
        for number in itertools.count(1):
            try:
                line = next(rows)
                columns = line if is_csv else json.loads(line)
                if not isinstance(columns, dict):
                    raise ValueError("no row")
            except StopIteration:
                return
            except (ValueError, RecursionError, csv.Error) as error:
                skipped.append(f"{path.name} row {number}: {error}")
                continue
            yield f"{path.name} row {number}", columns


# --- Rows -----------------------------------------------------------------------------------------

def rows_of(columns: dict) -> list[tuple]:
    """(picture, text, source or None) of a sample. Raises ValueError where something is missing."""
    for before, text, after in EDITS:
        if before in columns or after in columns:
            wordings = columns.get(text)
            if isinstance(wordings, str) and wordings.startswith("["):
                wordings = json.loads(wordings)        # a list, in a CSV
            wordings = wordings if isinstance(wordings, list) else [wordings]
            if not columns.get(before) or not columns.get(after) or not wordings:
                raise ValueError(f"an edit needs {before}, {text} and {after}")
            return [(columns[after], wording, columns[before]) for wording in wordings]
    for image, text in CAPTIONS:
        if columns.get(image) and text in columns:
            return [(columns[image], columns[text], None)]
    raise ValueError("no picture with a text")


class Writer:
    """Puts pictures into DIR.partial under numbers, each once, and rows into its metadata.jsonl."""

    def __init__(self, src: Path, work: Path):
        self.src, self.work, self.names, self.count, self.rows = src, work, {}, 0, 0
        work.mkdir(parents=True)
        self.table = open(work / "metadata.jsonl", "w", encoding="utf-8")

    def picture(self, value) -> str:
        if isinstance(value, str):                     # a path of a folder's file
            path = self.src / value
            suffix = path.suffix.lower()
            if suffix not in data.SUFFIXES or "\0" in value or not is_inside(path, self.src) \
                    or not path.is_file():
                raise ValueError(f"{value[:200]!r} is not there, no picture, or leaves the folder")
        elif isinstance(value, tuple):
            (suffix, path), value = value, None
        else:
            raise ValueError(f"a picture is {type(value).__name__}, no path")
        if value in self.names:
            return self.names[value]
        name = f"{self.count // 10_000:05d}/{self.count:09d}{suffix}"
        (self.work / name).parent.mkdir(exist_ok=True)
        if value is None:
            (self.work / name).write_bytes(path)
        else:
            try:
                os.link(os.path.realpath(path), self.work / name)
            except OSError:                            # another file system
                shutil.copyfile(path, self.work / name)
            self.names[value] = name
        self.count += 1
        return name

    def row(self, image, text, source):
        if not isinstance(text, str):
            raise ValueError("no text")
        row = {"file_name": self.picture(image), "text": data.unicode(text)}
        row |= {"source": self.picture(source)} if source is not None else {}
        self.table.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows += 1


def samples(src: Path, skipped: list[str]):
    tars = sorted(src.rglob("*.tar"))
    tables = [*sorted(src.glob("*.jsonl")), *sorted(src.glob("*.csv"))]
    if not tars and not tables and next(src.glob("*/prompt.json"), None) is None:
        parquet = next(src.rglob("*.parquet"), None)
        raise data.UserError(f"--src {src} has no .tar, .jsonl, .csv or */prompt.json"
                             + (f", but {parquet.name}: parquet has to be exported first (`python "
                                f"notes/convert.py --help` says how)." if parquet else "."))
    for path in (*tars, *tables):
        if not path.is_file() or not is_inside(path, src):
            skipped.append(f"{path.name}: no file, or a link that leaves the folder")
        else:
            yield from (from_tar if path.suffix == ".tar" else from_table)(path, skipped)
    yield from from_prompts(src, skipped)


@data.program
def main(argv: list[str] | None = None):
    cfg = Config(**data.read_flags(Config, argv, __doc__))
    src, out, skipped = Path(cfg.src), Path(cfg.out), []
    work = out.with_name(out.name + ".partial")
    data.remove_folder(work)                           # of a run that was killed
    try:
        writer = Writer(src, work)
        for name, columns in samples(src, skipped):
            try:
                for row in rows_of(columns):
                    writer.row(*row)
            except ValueError as error:
                skipped.append(f"{name}: {error}")
        writer.table.close()
        data.tolerate(skipped, len(skipped) + writer.rows, cfg.max_broken, f"rows of {src}",
                      least=0)                         # one may be the rest of a tar
        if not writer.rows:
            raise data.UserError(f"--src {src}: not one row in it.")
        os.replace(work, out)
    finally:
        data.remove_folder(work)
    print(f"wrote {out}: {writer.rows:,} rows, {writer.count:,} pictures; {len(skipped)} left out"
          + "".join(f"\n    {line}" for line in skipped))


if __name__ == "__main__":
    sys.exit(main())
