"""Writes the metadata.jsonl that data.py reads, for pictures whose texts stand in .json files.

    python notes/convert.py --src SRC                  then: python data.py --data SRC

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

What of the table cannot be used is named and counted.
"""

import json
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import data  # noqa: E402


@dataclass(frozen=True)
class Config:
    src: str = ""                   # the folder with pictures; the table is written into it

    def __post_init__(self):
        if not self.src or not Path(self.src).is_dir():
            raise data.UserError(f"--src {self.src}: no such folder.")


def rows(src: Path):
    """The columns of each sample, pictures by their paths from src."""
    for folder, folders, names in os.walk(src):
        folders.sort()
        folder, pictures = Path(folder), defaultdict(dict)
        for path in map(folder.joinpath, names):        # 0001.jpg, 0001.src_img.jpg
            key, _, column = path.stem.partition(".")
            if path.suffix.lower() in data.SUFFIXES:
                pictures[key][column or "file_name"] = path.relative_to(src).as_posix()
        if "prompt.json" in names:
            text = data.read_json(folder / "prompt.json").get("edit")
            for key in sorted(key for key in pictures if key.endswith("_0")):
                yield {"source": pictures[key].get("file_name"), "text": text,
                       "file_name": pictures.get(f"{key[:-2]}_1", {}).get("file_name")}
            continue
        for key, suffix in sorted(map(os.path.splitext, names)):
            columns = data.read_json(folder / f"{key}.json") if suffix == ".json" else {}
            edit = {"edit_prompt", "edited_prompt_list"} & columns.keys()
            if suffix == ".json" and (key in pictures or edit or "caption" in columns):
                columns |= pictures.get(key, {})
                if edit and not columns.keys() & {"src_img", "original_image"}:
                    columns["source"] = f"the source of {key}"      # missing, data.py will say
                yield columns


@data.program
def main(argv: list[str] | None = None):
    cfg = Config(**data.read_flags(Config, argv, __doc__))
    src, table = Path(cfg.src), Path(cfg.src) / "metadata.jsonl"
    if any((src / name).exists() for name in data.TABLES):
        raise data.UserError(f"{src} has a table already: try python data.py --data {src}")
    lines = [json.dumps(columns) + "\n" for columns in rows(src)]
    if not lines:
        raise data.UserError(f"--src {src}: not one picture with a text in a .json beside it. "
                             f"`python notes/convert.py --help` says what is read; parquet has to "
                             f"be exported first.")
    with data.atomic(table) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
    print(f"wrote {table}: {len(lines):,} samples")
    data.read_folder(cfg.src, max_broken=None)         # says what it cannot use


if __name__ == "__main__":
    sys.exit(main())
