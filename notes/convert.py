"""Turns pictures whose texts stand in .json files into a folder that data.py reads.

    python notes/convert.py --src SRC --out DIR        then: python data.py --data DIR

    SRC holds                                    what becomes a row
    key.jpg with "caption" in key.json           a caption
    key.src_img.jpg and so on, beside key.json   an edit: src_img, edited_prompt_list, edited_img
                                                 (OmniEdit; each wording is a row), or
                                                 original_image, edit_prompt, edited_image
    */prompt.json beside <seed>_0.jpg, _1.jpg    an edit: InstructPix2Pix's own download (its
                                                 seeds.json is not needed)

Tars (img2dataset, WebDataset) are unpacked first: `for t in *.tar; do tar xf $t -C SRC; done`; with
key.txt beside key.jpg data.py reads SRC as it is. It also reads a table with paths of pictures,
called metadata.jsonl or metadata.csv, with the columns above. What the hub has as parquet is not
read: save its pictures and such a table by the library `datasets`.

Whatever is left out is counted and named; more than --max-broken of it is an error. Nothing outside
SRC is read, and DIR is whole or not there. Pictures are not opened here (data.py tells which are
broken).
"""

import json
import os
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import data  # noqa: E402

EDITS = (("original_image", "edit_prompt", "edited_image"),
         ("src_img", "edited_prompt_list", "edited_img"))
TEXTS = {"caption", *(text for _, text, _ in EDITS)}


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


def is_inside(path: Path, src: Path) -> bool:
    return path.is_file() and path.resolve().is_relative_to(src.resolve())


def samples(src: Path):
    """(name, columns) of each sample; a picture is its path."""
    read = lambda path: data.read_json(path) if is_inside(path, src) else {}
    for folder, folders, names in os.walk(src):
        folders.sort()
        folder, pictures = Path(folder), defaultdict(dict)
        for name in names:                              # 0001.jpg, 0001.src_img.jpg
            path = folder / name
            key, _, column = path.stem.partition(".")
            if path.suffix.lower() in data.SUFFIXES:
                pictures[key][column or "image"] = path
        if "prompt.json" in names:
            text = read(folder / "prompt.json").get("edit")
            for key in sorted(key for key in pictures if key.endswith("_0")):
                yield str(folder / key), {
                    "original_image": pictures[key].get("image"), "edit_prompt": text,
                    "edited_image": pictures.get(f"{key[:-2]}_1", {}).get("image")}
            continue
        for name in sorted(names):
            key, suffix = os.path.splitext(name)
            columns = read(folder / name) if suffix == ".json" else {}
            if suffix == ".json" and (key in pictures or TEXTS & columns.keys()):
                yield str(folder / key), columns | pictures[key]


def rows_of(columns: dict, src: Path) -> list[tuple]:
    """(picture, text, source or None) of a sample. Raises ValueError where something is missing."""
    rows = [(columns.get("image"), columns.get("caption"), None)]
    for before, text, after in EDITS:
        if before in columns or after in columns:
            said = columns.get(text)
            rows = [(columns.get(after), wording, columns.get(before))
                    for wording in (said if isinstance(said, list) else [said])]
            if not isinstance(columns.get(before), Path):
                raise ValueError("an edit without its source")
    for image, text, source in rows:
        if not isinstance(text, str) or not isinstance(image, Path):
            raise ValueError("no text" if isinstance(image, Path) else "no picture")
        for path in (image, source):
            if path and not is_inside(path, src):
                raise ValueError(f"{path.name} is no file, or a link that leaves the folder")
    return rows


def write(work: Path, number: int, rows: list[tuple], table):
    """The pictures of a sample under its number, each once, and its rows."""
    names = {}
    for path in dict.fromkeys(path for row in rows for path in (row[0], row[2]) if path):
        name = f"{number // 10_000:05d}/{number:09d}_{len(names)}{path.suffix.lower()}"
        (work / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, work / name)
        names[path] = name
    for image, text, source in rows:
        row = {"file_name": names[image], "text": data.unicode(text)}
        row |= {"source": names[source]} if source else {}
        table.write(json.dumps(row, ensure_ascii=False) + "\n")


@data.program
def main(argv: list[str] | None = None):
    cfg = Config(**data.read_flags(Config, argv, __doc__))
    src, out, skipped, count = Path(cfg.src), Path(cfg.out), [], 0
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)            # of a run that was killed
    try:
        work.mkdir(parents=True)
        with open(work / "metadata.jsonl", "w", encoding="utf-8") as table:
            for number, (name, columns) in enumerate(samples(src)):
                try:
                    rows = rows_of(columns, src)
                except ValueError as error:
                    skipped.append(f"{name}: {error}")
                else:
                    write(work, number, rows, table)
                    count += len(rows)
        data.tolerate(skipped, len(skipped) + count, cfg.max_broken, f"rows of {src}")
        if not count:
            raise data.UserError(f"--src {src}: not one picture with a text in a .json beside it. "
                                 f"`python notes/convert.py --help` says what is read; parquet "
                                 f"has to be exported first.")
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"wrote {out}: {count:,} rows; {len(skipped)} left out"
          + "".join(f"\n    {line}" for line in skipped))


if __name__ == "__main__":
    sys.exit(main())
