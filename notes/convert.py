"""Turns archives that other people have into a folder that data.py reads.

    python notes/convert.py --src SRC --out DIR        then: python data.py --data DIR

    SRC holds                                    what becomes a row
    *.tar (img2dataset, WebDataset)              key.jpg with key.txt, or with "caption" in key.json
    the same with key.src_img.jpg and so on      an edit: src_img, edited_prompt_list, edited_img
                                                 (OmniEdit; each wording is a row), or
                                                 original_image, edit_prompt, edited_image
    */prompt.json beside <seed>_0.jpg, _1.jpg    an edit: InstructPix2Pix's own download (its
                                                 seeds.json is not needed)

A table with paths of pictures needs none of this: called metadata.jsonl or metadata.csv, data.py
reads it with the columns above. What the hub has as parquet is not read: save its pictures and
such a table by the library `datasets`.

A tar that was cut short gives what stands before the cut. Whatever is left out is counted and
named; more than --max-broken of it is an error. Nothing outside SRC is read, no name out of a tar
is used as a path, and DIR is whole or not there. Pictures are not opened here (data.py tells which
are broken).
"""

import json
import lzma
import os
import posixpath
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


# --- Samples: (name, columns); a picture is (suffix, content) -------------------------------------

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
    inside = lambda path: path.resolve().is_relative_to(src.resolve()) and path.is_file()
    for prompt in sorted(src.glob("*/prompt.json")):
        fields = data.read_json(prompt) if inside(prompt) else {}
        for before in sorted(prompt.parent.glob("*_0.jpg")):
            name = str(before.relative_to(src))
            after = before.with_name(before.name.removesuffix("_0.jpg") + "_1.jpg")
            if inside(before) and inside(after):
                yield name, {"original_image": (".jpg", before.read_bytes()),
                             "edit_prompt": fields.get("edit"),
                             "edited_image": (".jpg", after.read_bytes())}
            else:
                skipped.append(f"{name} or {after.name} is no file, or leaves the folder")


# --- Rows -----------------------------------------------------------------------------------------

def rows_of(columns: dict) -> list[tuple]:
    """(column of the picture, text, column of the source or None) of a sample. Raises ValueError
    where something is missing."""
    for before, text, after in EDITS:
        if before in columns or after in columns:
            wordings = columns.get(text)
            rows = [(after, wording, before)
                    for wording in (wordings if isinstance(wordings, list) else [wordings])]
            break
    else:
        rows = [("image", columns.get("caption"), None)]
    for image, text, source in rows:
        if not isinstance(text, str):
            raise ValueError("no text")
        if not all(isinstance(columns.get(name), tuple) for name in (image, source) if name):
            raise ValueError("no picture")
    return rows


def samples(src: Path, skipped: list[str]):
    tars = sorted(src.rglob("*.tar"))
    if not tars and next(src.glob("*/prompt.json"), None) is None:
        raise data.UserError(f"--src {src} has no .tar and no */prompt.json. Tables are read by "
                             f"data.py itself; parquet has to be exported first (`python "
                             f"notes/convert.py --help` says how).")
    for path in tars:
        if path.is_file() and path.resolve().is_relative_to(src.resolve()):
            yield from from_tar(path, skipped)
        else:
            skipped.append(f"{path.name}: no file, or a link that leaves the folder")
    yield from from_prompts(src, skipped)


def write(work: Path, number: int, columns: dict, table) -> int:
    """The pictures of a sample, each once, under its number; its rows; how many."""
    rows, names = rows_of(columns), {}
    for column in {name for image, _, source in rows for name in (image, source) if name}:
        suffix, content = columns[column]
        names[column] = f"{number // 10_000:05d}/{number:09d}.{column}{suffix}"
        (work / names[column]).parent.mkdir(exist_ok=True)
        (work / names[column]).write_bytes(content)
    for image, text, source in rows:
        row = {"file_name": names[image], "text": data.unicode(text)}
        row |= {"source": names[source]} if source else {}
        table.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(rows)


@data.program
def main(argv: list[str] | None = None):
    cfg = Config(**data.read_flags(Config, argv, __doc__))
    src, out, skipped = Path(cfg.src), Path(cfg.out), []
    work = out.with_name(out.name + ".partial")
    data.remove_folder(work)                           # of a run that was killed
    rows = 0
    try:
        work.mkdir(parents=True)
        with open(work / "metadata.jsonl", "w", encoding="utf-8") as table:
            for number, (name, columns) in enumerate(samples(src, skipped)):
                try:
                    rows += write(work, number, columns, table)
                except ValueError as error:
                    skipped.append(f"{name}: {error}")
        data.tolerate(skipped, len(skipped) + rows, cfg.max_broken, f"rows of {src}",
                      least=0)                         # one may be the rest of a tar
        if not rows:
            raise data.UserError(f"--src {src}: not one row in it.")
        os.replace(work, out)
    finally:
        data.remove_folder(work)
    print(f"wrote {out}: {rows:,} rows; {len(skipped)} left out"
          + "".join(f"\n    {line}" for line in skipped))


if __name__ == "__main__":
    sys.exit(main())
