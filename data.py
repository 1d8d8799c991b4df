"""data.py - everything a stage needs that the guide does not define: no mathematics of the paper.

    1 folders of images and captions     read_folder -> Folder, Pictures, batches
    2 pretrained networks                load_image_encoder, load_text_encoder, load_lpips
    3 the randomness of a step           generator, order
    4 checkpoints and files              save, load, load_weights, fingerprint
    5 a run                              Run: device, precision, ranks, lock, signals, log
    6 the command line                   read_flags, configure, program
    7 pictures for people                grid, pca_colours, save_picture
    8 datasets of latents and texts      Latents, Texts

    python data.py [--data DIR]       counts, sizes, captions, what is broken; out/data.png, a sheet

The stages (svae.py, psvae.py, dit.py) share this file and nothing else. Images are uint8 (3, S, S)
when they leave the loader and float in [-1, 1] from then on; features and latents are
(B, h, w, channels), as the guide writes them.
"""

import argparse
import ast                                             # lists that Python printed into a table
import contextlib
import csv
import errno
import functools
import hashlib
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import os
import posixpath                                       # names have "/" on Windows, too
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import unicodedata
import warnings
import zlib                                            # crc32: alike in every run, unlike hash()
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import filelock                                        # released when its process dies
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from tqdm import tqdm

HERE = Path(__file__).resolve().parent                 # the clone, wherever the command is typed
FORMAT = 1                     # of checkpoints; another number is refused, never guessed at


class UserError(Exception):
    """Wrong input, told in one line: what, the value, what is allowed, the next command."""


# --------------------------------------------------------------------------------------------------
# 1 Folders of images and captions
#
# Four rules read every folder. Names: NFC, "/" between folders, suffixes in any case, none with a
# dot in front. Split: train/ beside val/. Text: a table, else a .txt beside the picture, else the
# folders that tell pictures apart, else file names. What no rule understands is counted and named.
# --------------------------------------------------------------------------------------------------

Image.init()                   # Pillow goes by content: an EPS called 0.png would start a program
FORMATS = [kind for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
           if kind in Image.OPEN]
warnings.filterwarnings("ignore", module="PIL")        # corrupt EXIF: ImageNet has many
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
LARGEST = 100_000_000          # pixels: a file of some KB can hold a picture that fills the memory
HELD_OUT = 50                  # without a val/ folder, one picture in so many, by its name's hash
PATIENCE = 300                 # seconds until worker processes that bring no batch are given up
TRAIN, VAL = ("train", "training"), ("val", "valid", "validation", "test", "heldout")
TABLES = [f"{name}.{kind}" for name in ("metadata", "captions") for kind in ("jsonl", "csv", "tsv")]
IMAGENET = ("LOC_synset_mapping.txt", "LOC_val_solution.csv")         # class names in Kaggle's tree
COLUMNS = {                    # of a table, by what they mean; the first there is, is read
    "file_name": ("file_name", "filename", "edited_image", "edited_img", "target_image", "image",
                  "image_path", "img", "path", "file"),
    "text": ("text", "edit_prompt", "edited_prompt_list", "instruction", "caption", "prompt",
             "description", "captions", "texts"),
    "source": ("source", "input_image", "source_image", "original_image", "src_img")}


@dataclass
class Folder:
    """Pictures, and rows (image, text, source) that refer to them by index into `images`.
    source is -1 for a caption. For an edit it is the picture to be edited, `text` is the
    instruction and `image` the result."""

    root: Path                                         # what paths in `images` start from
    layout: str                                       # metadata | text files | classes | file names
    images: list[str] = field(default_factory=list)   # paths relative to root
    rows: list[tuple[int, str, int]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # "name: reason" of what cannot be used
    own: int | None = None                            # so many are on this side alone; None: all

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.images[index])


def read_folder(name: str, max_broken: float | None = 0.01, out: str = "out",
                count: int = 75_000) -> tuple[Folder, Folder]:
    """A folder's training and held-out pictures; README.md says which folders are understood. An
    empty name is the built-in world, drawn on first use with `count` pictures that have words. What
    is not used is said; unusable rows stand in the first's `skipped`. Raises UserError: no such
    folder, or (unless max_broken is None) no images in it, or more than max_broken of its rows
    unusable."""
    top = Path(name or f"{out}/world").expanduser()    # "~" is the home folder
    if not name:
        _draw_world(top, count)
    if not top.is_dir():
        why = " is a file; a folder of images is needed" if top.exists() else ": no such folder"
        raise UserError(f"--data {name}{why}. Without --data it is the built-in world.")
    # sides: (train, val) or ("",). Of our own world nothing is said
    whole, sides = _read(top, say if name else lambda _: None)
    # By the hash of its name a picture keeps its side when the folder grows
    held = [name.startswith(sides[1]) if sides[1:] else zlib.crc32(
                name[len(sides[0]):].encode("utf-8", "surrogateescape")) % HELD_OUT == 0
            for name in whole.images]
    train, held_out = _part(whole, held, False, sides[0]), _part(whole, held, True, sides[-1])
    if not sides[1:] and not train.images:             # a few pictures, all with that hash
        train, held_out = held_out, train
    if train.images and not held_out.images:
        say(f"{top}: too few pictures to hold any out; training pictures stand in for them")
        held_out = train
    elif not sides[1:] and held_out.own < 8:           # they may all be broken: some to stand in
        held_out.images += train.images[:8]
    train.skipped = whole.skipped
    if train.skipped:
        say(f"{top}: {len(train.skipped)} rows are left out (`python data.py --data …` lists "
            f"them all): {'; '.join(train.skipped[:3])}")
    if max_broken is not None:
        accept(name, train, held_out, max_broken)
    return train, held_out


def accept(name: str, train: Folder, held_out: Folder, max_broken: float):
    """Raises UserError for a folder that nothing can be trained on."""
    rows = len(train.rows) + len(held_out.rows) * (held_out is not train)
    tolerate(train.skipped, len(train.skipped) + rows, max_broken, f"rows of {name or train.root}")
    if not train.rows:
        raise UserError(f"--data {name}: no images in it ({', '.join(sorted(SUFFIXES))}).")


def tolerate(broken: list[str], total: int, max_broken: float, what: str, least: int = 1):
    """Raises UserError when more than max_broken of `total`, and than `least`, are broken."""
    if len(broken) > (max_broken and max(least, max_broken * total)):  # 0 means none at all
        raise UserError(f"{len(broken)} of {total} {what} are unusable, more than --max-broken "
                        f"{max_broken} allows. The first: {printable('; '.join(broken[:3]))}. "
                        f"`python data.py --data …` lists them all.")


def digest(folder: Folder) -> str:
    """sha256 over names and rows, not pixels: the same where a folder moved."""
    return digest_of([folder.images, folder.rows])     # no root: a folder may move


def printable(text: str) -> str:
    """A name or caption for the terminal: control characters and lone surrogates escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(text: str):
    """One line for people, above the progress bar if there is one; once, not once a process."""
    if torchrun()[0] == 0:
        tqdm.write(printable(text))                    # else the bar would be drawn through it
        sys.stdout.flush()                             # a log file shows it at once


def unicode(text: str) -> str:
    """Lone surrogates ("\\ud800" in JSON, a file name that is not UTF-8) become "?"."""
    return text.encode("utf-8", "replace").decode()


def _draw_world(top: Path, count: int):
    """Draws the built-in world unless it is there; of two programs at once, one is refused."""
    there = read_json(top / "world.json").get("count")  # written last: then it is whole
    if there and there != count != 75_000:
        say(f"{top} is there, with {there} pictures: --count {count} does nothing")
    if not there and torchrun()[0] == 0:
        from notes.world import world                  # the one thing the stages call in notes/
        say(f"no --data: drawing the built-in world, {count:,} pictures with words, into {top}")
        try:
            with take_lock(top.parent, "world"):
                world.write(top, count=count)
        except (OSError, RuntimeError) as error:       # no room, or another folder of that name
            raise UserError(f"the built-in world could not be drawn into {top} "
                            f"({_first_line(error)}). Make room, or choose another --out.")
    if torch.distributed.is_initialized():             # wait for the rank that draws
        torch.distributed.barrier()


def _plain(name: str) -> str:
    """One spelling for a path: macOS takes letters apart, Windows writes \\, cameras write .JPG."""
    stem, suffix = os.path.splitext(unicodedata.normalize("NFC", name.replace("\\", "/")))
    return stem + suffix.lower()


_kind = lambda name: os.path.splitext(name)[1].lower()


def _read(top: Path, say) -> tuple[Folder, tuple[str, ...]]:
    """All pictures and rows below top, and the prefixes of training (and held-out) pictures."""
    whole = Folder(top, "metadata")
    found = _listing(top, whole.skipped)
    sides = _split(found["images"])
    images = [name for name in found["images"] if name.startswith(sides)]
    texts = {_plain(name): name for name in found["texts"]}            # cat.TXT, too
    texts = {name: texts.get(os.path.splitext(_plain(name))[0] + ".txt") for name in images}
    rank = lambda name: -TABLES.index(posixpath.basename(name).lower())
    # One table in each folder, the first of TABLES: what comes last here stays
    tables = {posixpath.dirname(name): name for name in sorted(found["tables"], key=rank)}
    if tables:
        index, numbers, texts = {_plain(name): name for name in found["images"]}, {}, {}
        index |= {name: name for name in found["images"]}              # as it is spelt, first
        for table in sorted(tables.values()):
            _from_table(whole, table, index, numbers, sides)
        whole.images = list(numbers)                   # in the order in which rows name them
    elif any(texts.values()):                          # one is enough: the others are then missing
        _from_texts(whole, texts)
    else:
        _from_names(whole, images, sides)
    known = {*tables.values(), *texts.values(), *IMAGENET}
    for what, names in (
            ("links to folders that are read already", found["again"]),
            (f"pictures outside {' and '.join(sides)}", {*found["images"]}.difference(images)),
            ("pictures that no table names", tables and {*images}.difference(whole.images)),
            (f"files that are no picture, no .txt beside one, and none of {', '.join(TABLES)}",
             {*found["tables"], *found["texts"], *found["others"]} - known)):
        kinds = [sorted(kind) for _, kind in itertools.groupby(sorted(names, key=_kind), _kind)]
        if kinds:                                      # rare kinds first: they say more
            kinds = [f"{len(kind)} like {kind[0]!r}" for kind in sorted(kinds, key=len)[:8]]
            say(f"{top}: not read are {len(names)} {what}: {', '.join(kinds)}")
    return whole, sides


def _listing(top: Path, broken: list[str]) -> dict[str, list[str]]:
    """Every file below top, by kind; what is broken is added to `broken`. Links are followed:
    whoever made the folder put them there. Each folder is read once, rather by its own name than by
    a link's, so that neither loops nor copies ("again") arise."""
    found = {kind: [] for kind in ("images", "texts", "tables", "others", "again")}
    seen, stack = set(), [""]
    while stack:
        folder = stack.pop()
        here = os.stat(os.path.join(top, folder))
        if (here.st_dev, here.st_ino) in seen:         # whatever the way there was called
            found["again"].append(folder)
            continue
        seen.add((here.st_dev, here.st_ino))
        for entry in os.scandir(os.path.join(top, folder)):
            name, kind = posixpath.join(folder, entry.name), _kind(entry.name)
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue                               # no person put it there
            link = entry.is_symlink()                  # of all others scandir knows what they are
            if os.path.isdir(entry.path) if link else entry.is_dir():
                stack.insert(0 if link else len(stack), name)          # links wait at the bottom
                continue
            if not (os.path.isfile(entry.path) if link else entry.is_file()):
                broken.append(f"{name!r}: no file (a broken link, or a pipe)")
                continue
            if not kind:                               # a picture all the same?
                with contextlib.suppress(Exception), Image.open(entry.path, formats=FORMATS):
                    kind = ".png"
            found["images" if kind in SUFFIXES else "tables" if entry.name.lower() in TABLES
                  else "texts" if kind == ".txt" else "others"].append(name)
    return {kind: sorted(names) for kind, names in found.items()}      # no file system's order


def _split(images: list[str]) -> tuple[str, ...]:
    """What the names of training pictures begin with, and those of held-out ones if they have a
    folder. One called train is a split only where all beside it are split names, else a class."""
    base = ""
    while True:
        paths = [name[len(base):].split("/") for name in images if name.startswith(base)]
        below = sorted({path[0] for path in paths if len(path) > 1})
        train, val = ([f"{base}{name}/" for known in side for name in below
                       if name.lower() == known] for side in (TRAIN, VAL))
        if train and len(train) + len(val) == len(below):
            return train[0], *val[:1]
        if len(below) != 1:
            return ("",)                               # no split: every name begins with ""
        base += f"{below[0]}/"                         # the only folder: look inside


def _open(path: Path):
    """A text file in UTF-8, or UTF-16 with a BOM; undecodable bytes become lone surrogates."""
    with open(path, "rb") as file:
        code = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return open(path, encoding=code, errors="surrogateescape", newline="")


def _text(text) -> str:
    if not isinstance(text, str):
        raise ValueError(f"a text or path is missing, or {type(text).__name__}")
    if re.search("[\0\udc80-\udcff]", text):           # cp1252, say, or UTF-16 without a BOM
        raise ValueError("neither UTF-8 nor UTF-16 with a byte order mark")
    return unicode(text.strip())


def _words(name: str) -> str:
    return unicode(" ".join(re.split(r"[\s_\-]+", name)).strip())


def _from_texts(whole: Folder, texts: dict[str, str | None]):
    """A caption from the .txt beside each picture."""
    whole.layout = "text files"
    for name, text in texts.items():
        try:
            if not text:
                raise ValueError("no .txt beside it")
            with _open(whole.root / text) as file:
                whole.rows.append((len(whole.images), _text(file.read()), -1))
            whole.images.append(name)
        except (OSError, ValueError) as error:
            whole.skipped.append(f"{text or name!r}: {error}")


def _from_names(whole: Folder, images: list[str], sides: tuple[str, ...]):
    """A caption from the deepest level of folders that tells pictures apart, else from file names.
    Words go before numbers: in cat/0/1.png, cat/1/2.png, dog/0/3.png the classes are cat and
    dog."""
    titles, levels = _titles(whole.root), {}           # level: has it words?
    paths = [name[len(sides[-1] if name.startswith(sides[-1]) else sides[0]):].split("/")
             for name in images]
    for level in range(max(map(len, paths), default=1) - 1):
        names = {path[level] for path in paths if len(path) > level + 1}
        if len(names) > 1 or names & titles.keys():    # one class of ImageNet is a class as well
            levels[level] = any(map(str.isalpha, "".join(names)))
    level = max(levels, key=lambda level: (levels[level], level), default=None)
    whole.layout, whole.images = "file names" if level is None else "classes", images
    for i, path in enumerate(paths):
        key = (os.path.splitext(path[-1])[0] if level is None or len(path) == 1
               else path[min(level, len(path) - 2)])   # a picture above that level: its own folder
        whole.rows.append((i, titles.get(key, _words(key)), -1))


def _titles(top: Path) -> dict[str, str]:
    """ImageNet's wnid -> first name; where Kaggle keeps val/ flat, picture -> name of its class."""
    path, val = (top / name for name in IMAGENET)
    with _open(path if path.is_file() else HERE / "notes/imagenet_names.txt") as lines:
        titles = {wnid: names.split(",")[0].strip()    # n01440764 tench, Tinca tinca
                  for wnid, _, names in (line.partition(" ") for line in lines) if names}
    if val.is_file():
        with _open(val) as lines:                      # picture,wnid x y x y ...
            titles |= {picture: titles.get(wnid.split(" ")[0], "")
                       for picture, _, wnid in (line.partition(",") for line in lines)}
    return titles


def _from_table(whole: Folder, table: str, index: dict[str, str], numbers: dict[str, int], sides):
    """Rows of a .jsonl, or of a .csv with commas, semicolons, bars or tabs. Whatever a path in it
    says, it is looked up among the pictures there are (`index`): none can leave."""
    tops = [_plain(f"{top}/") for top in (os.path.abspath(whole.root), os.path.realpath(whole.root),
                                          whole.root.name)]

    def find(value) -> str:
        name = _plain(_text(value))
        for path in (value, name, *(name.removeprefix(top) for top in tops)):
            for base in (posixpath.dirname(table), ""):                # seen from the table, or top
                if (inside := posixpath.normpath(posixpath.join(base, path))) in index:
                    return index[inside]
        leaves = posixpath.normpath(name).startswith(("/", ".."))
        raise ValueError(f"{value!r} {'leaves the folder' if leaves else 'is no picture there'}")

    with _open(whole.root / table) as lines:
        if _kind(table) == ".jsonl":                   # blank lines are none
            mark, rows = None, map(json.loads, filter(str.strip, lines))
        else:
            csv.field_size_limit(2**31 - 1)            # a caption may be long
            head = lines.readline()
            mark = max(",;\t|", key=head.count)        # whatever splits the head most
            names = next(csv.reader([head], delimiter=mark), [])
            rows = csv.DictReader(lines, names, delimiter=mark, strict=True)
        for number in itertools.count(1):              # one broken row does not end the table
            try:
                if not isinstance(row := next(rows), dict):
                    raise ValueError("no columns")
                if any(row.get(None) or ()):
                    raise ValueError("more cells than columns: a text with a comma wants quotes")
                if mark == "\t" and any({"\t", "\n"} <= set(str(cell)) for cell in row.values()):
                    raise ValueError("a cell holds whole rows: a quote was never closed")
                row = {"_".join(str(key).lower().split()): row[key] for key in row}
                found = {what: [row[name] for name in names if row.get(name) is not None]
                         for what, names in COLUMNS.items()}
                for what in ("file_name", "text"):
                    if not found[what]:
                        raise ValueError(f"no {what} in its columns {', '.join(row)}; needed is "
                                         f"one of {', '.join(COLUMNS[what])}")
                texts = found["text"][0]
                for parse in (json.loads, ast.literal_eval):           # a list in a cell
                    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                        if isinstance(texts, str) and texts.startswith("["):
                            texts = parse(texts)
                texts = texts if isinstance(texts, list) and texts else [texts]  # a row for each
                texts = [_text(text) for text in texts]
                paths = [find(path) for path in (*filter(None, found["source"][:1]),
                                                 found["file_name"][0])]
                if paths[-1].startswith(sides):        # else it is of a split that is not read
                    ids = [numbers.setdefault(path, len(numbers)) for path in paths]
                    whole.rows += [(ids[-1], text, ids[0] if ids[1:] else -1) for text in texts]
            except StopIteration:
                break
            except (ValueError, RecursionError, csv.Error) as error:
                whole.skipped.append(f"{table} row {number}: {error}")


def _part(whole: Folder, held: list[bool], side: bool, prefix: str) -> Folder:
    """One side, with names relative to its folder. An edit with either picture held out is held
    out; its other picture then stands on both sides, and in the held-out folder behind those that
    are its own."""
    rows = [row for row in whole.rows if (held[row[0]] or (row[2] >= 0 and held[row[2]])) == side]
    used = {i for image, _, source in rows for i in (image, source) if i >= 0}
    used = sorted(used, key=lambda i: (held[i] != side, i))            # its own first
    index = {i: number for number, i in enumerate(used)} | {-1: -1}    # no source stays none
    rows = [(index[image], text, index[source]) for image, text, source in rows]
    names, root = [whole.images[i] for i in used], whole.root
    if all(name.startswith(prefix) for name in names):                 # no edit across both sides
        names, root = [name[len(prefix):] for name in names], root / prefix
    return Folder(root, whole.layout, names, rows, own=sum(held[i] == side for i in used))


def joined(folders: tuple[Folder, ...] | list[Folder]) -> Folder:
    """Several folders as one: paths from their common parent, a picture in two of them once."""
    whole = Folder(Path(os.path.commonpath([folder.root for folder in folders])), folders[0].layout)
    index = {}                                         # path from the common parent: its place
    for folder in folders:
        prefix = Path(os.path.relpath(folder.root, whole.root)).as_posix()
        ids = [index.setdefault(posixpath.normpath(posixpath.join(prefix, name)), len(index))
               for name in folder.images]
        whole.rows += [(ids[image], text, ids[source] if source >= 0 else -1)
                       for image, text, source in folder.rows]
    whole.images = list(index)
    return whole


def open_image(path: str, draft: int = 0) -> Image.Image:
    """Any picture as RGB: first frame, turned as EXIF says, transparency on white, 16 bit as 8.
    draft > 0 lets the JPEG decoder skip detail down to that many pixels a side (three times faster
    at 500 px). Raises whatever Pillow raises, and ValueError above LARGEST."""
    with Image.open(path, formats=FORMATS) as image:
        if draft:
            image.draft("RGB", (draft, draft))         # formats other than JPEG ignore it
        if image.width * image.height > LARGEST:
            raise ValueError(f"{image.width:,} x {image.height:,} pixels; {LARGEST:,} are the most")
        image.load()                                   # only now pixels are decoded
        with contextlib.suppress(Exception):           # an unreadable rotation is no rotation
            image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("its pixels are fractions; 8 or 16 bits are read")
        if image.mode.startswith("I"):                 # .convert would clip 16 bit at 255
            values = np.asarray(image)
            deep = image.mode != "I" or values.max(initial=0) > 255    # "I" does not say its range
            image = Image.fromarray((values // (256 if deep else 1)).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def square(image: Image.Image, size: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """A square of `size`: the centre, or with rng a random crop, half the time flipped."""
    width, height = image.size
    if rng is None:
        side = min(width, height)
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    else:                                              # of half or more, 3:4 to 4:3, cut to fit
        area = width * height * rng.uniform(0.5, 1)
        ratio = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
        left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
        box = (left, top, left + w, top + h)
    if image.size != (size, size) or box != (0, 0, size, size):        # else taken as it is
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = np.array(image)                           # a copy: Pillow's is read-only
    return pixels[:, ::-1].copy() if rng is not None and rng.random() < 0.5 else pixels


def user_image(name: str, size: int) -> np.ndarray:
    """A picture that a person named, cropped: uint8 (size, size, 3). Raises UserError."""
    if not Path(name).is_file():
        raise UserError(f"{printable(name)}: no such file.")
    try:
        image = open_image(name)
    except Exception as error:                         # decoders raise nearly anything on rubbish
        raise UserError(f"{printable(name)} cannot be read as an image ({_first_line(error)}).")
    if image.width != image.height:
        say(f"{name} is {image.width} x {image.height}: its middle is used, a square")
    return square(image, size)


class Pictures(torch.utils.data.Dataset):
    """Pictures of a folder, uint8 (3, size, size). A key is (index, seed); seed None: centre crop.
    A picture that cannot be read is replaced by the next one that can, so that the order of a run
    does not depend on it; `collate` returns the names beside the batch, and Run.count_broken ends
    the run when they are too many."""

    def __init__(self, folder: Folder, size: int):
        self.folder, self.size = folder, size

    def __len__(self):
        return len(self.folder.images)

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[torch.Tensor, list]:
        broken = []
        for index in range(key[0], key[0] + min(len(self), 1000)):
            try:
                pixels = self.read(index % len(self), key[1])          # round the end
                return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), broken
            except Exception as error:                 # decoders raise nearly anything on rubbish
                broken.append((index % len(self), _first_line(error)))
        raise UserError(f"{len(broken)} pictures in a row cannot be read, from "
                        f"{self.folder.images[key[0]]!r} ({broken[0][1]}) on.")

    def read(self, index: int, seed: int | None = None) -> np.ndarray:
        image = open_image(self.folder.path(index), draft=2 * self.size)
        return square(image, self.size, None if seed is None else np.random.default_rng(seed))

    @staticmethod
    def collate(items):
        return torch.stack([image for image, _ in items]), sum((broken for _, broken in items), [])


def batches(dataset, keys_of_step, start: int, stop: int, workers: int = 0, pin: bool = False):
    """Yields dataset.collate([dataset[k] for k in keys_of_step(s)]) for s in start .. stop - 1.
    Worker processes that die, or bring nothing for PATIENCE seconds, end the run (see
    _one_line)."""
    yield from torch.utils.data.DataLoader(
        dataset, batch_sampler=(keys_of_step(step) for step in range(start, stop)),
        collate_fn=dataset.collate, num_workers=workers, pin_memory=pin,
        prefetch_factor=4 if workers else None, timeout=PATIENCE if workers else 0,
        generator=torch.Generator(),                   # else it draws from the global one
        worker_init_fn=_quiet_worker)


def _quiet_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # Ctrl-C is for the run, which ends workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)                           # workers share the cores with each other


def to_float(images: torch.Tensor, device) -> torch.Tensor:
    """uint8 (B, 3, S, S) -> float32 in [-1, 1] on the device."""
    return images.to(device, non_blocking=True).float() / 127.5 - 1


# --------------------------------------------------------------------------------------------------
# 2 Pretrained networks
# --------------------------------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ARCHITECTURE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
                "mlp_ratio", "hidden_act", "image_size", "patch_size", "num_channels", "qkv_bias",
                "layer_norm_eps", "layerscale_value", "use_swiglu_ffn", "num_register_tokens")
TINY_IMAGE_ENCODER = "notes/tiny/image_encoder"
TINY_TEXT_ENCODER = "notes/tiny/text_encoder"


class ImageEncoder(nn.Module):
    """A DINOv2, with or without registers: x (B, 3, H, W) in [-1, 1] -> f (B, h, w, d) in fp32. H =
    W = 16 h: the picture is resized to 14 h, so that a 14 px patch corresponds to a 16 px cell. f
    is last_hidden_state, after the final LayerNorm, without CLS and register tokens. Always in eval
    mode."""

    def __init__(self, network):
        super().__init__()
        self.network = network.eval()
        self.network.embeddings.mask_token.requires_grad_(False)       # unused: it has no gradient
        self.dim, self.patch = network.config.hidden_size, network.config.patch_size
        self.extra_tokens = 1 + getattr(network.config, "num_register_tokens", 0)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True):
        super().train(False)                           # no dropout; recomputation wants training
        for module in self.network.modules():
            module.training = mode and getattr(module, "gradient_checkpointing", False)
        return self

    def recompute_activations(self):
        """Gradient checkpointing: one more forward saves memory; effective at the next train()."""
        getattr(self.network, "activation_checkpointing_enable",       # since transformers 5.23
                self.network.gradient_checkpointing_enable)()

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens, CLS first: (B, extra_tokens + h w, d)."""
        size = x.shape[-1] // 16 * self.patch
        x = F.interpolate(x.float(), (size, size), mode="bicubic", antialias=True,
                          align_corners=False)
        x = ((x + 1) / 2 - self.mean) / self.std       # as it was trained on ImageNet
        return self.network(pixel_values=x).last_hidden_state.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = x.shape[-1] // 16                       # h = w
        f = self.tokens(x)[:, self.extra_tokens:]
        assert f.shape[1] == side * side, f"{f.shape[1]} patch tokens, a grid of {side} x {side}"
        return f.unflatten(1, (side, side))            # row by row

    @property
    def description(self) -> dict:
        """The architecture as plain types, for build_image_encoder; alike in every transformers."""
        config = self.network.config.to_dict()
        return {name: config[name] for name in ARCHITECTURE if name in config}


def load_image_encoder(name: str) -> ImageEncoder:
    """A DINOv2 by hub name or local folder, in fp32. Raises UserError."""
    from transformers import AutoModel                 # slow to import: only where it is needed
    types = ("dinov2", "dinov2_with_registers")
    return ImageEncoder(_load_network(AutoModel, name, types, torch.float32))


def build_image_encoder(description: dict) -> ImageEncoder:
    """The same architecture without its weights, for a checkpoint that brings them."""
    from transformers import AutoConfig, AutoModel
    settings = {name: description[name] for name in ARCHITECTURE if name in description}
    config = AutoConfig.for_model(**settings)
    return ImageEncoder(AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False))


class TextEncoder:
    """A frozen T5 encoder with its tokenizer: captions -> (B, L, d) float32, mask (B, L). L is the
    longest caption of the call, in tokens; what is longer than max_tokens is cut. The mask is True
    at tokens. "" is the single token </s>."""

    def __init__(self, network, tokenizer, max_tokens: int):
        self.network, self.tokenizer = network.eval().requires_grad_(False), tokenizer
        self.max_tokens, self.dim = max_tokens, network.config.d_model

    def tokenize(self, captions: list[str]):
        return self.tokenizer(list(map(unicode, captions)), return_tensors="pt", padding=True,
                              truncation=True, max_length=self.max_tokens)

    def lengths(self, captions: list[str]) -> list[int]:
        """Tokens of each caption, before any is cut."""
        return [len(ids) for ids in self.tokenizer(list(map(unicode, captions)))["input_ids"]]

    def fingerprint(self) -> str:
        """sha256 over the beginning of every weight, in bf16: alike on every device, and quick."""
        digest = hashlib.sha256()
        for value in self.network.state_dict().values():       # whatever their names
            head = value.flatten()[:1024].bfloat16().view(torch.int16).cpu()
            digest.update(f"{tuple(value.shape)}".encode())
            digest.update(head.numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tokenize(captions).to(next(self.network.parameters()).device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        out = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
        return out.float(), mask.bool()


def load_text_encoder(name: str, max_tokens: int = 120, device="cpu") -> TextEncoder:
    """A T5 by hub name or local folder: bf16 on CUDA (fp16 overflows in it), fp32 on a CPU."""
    from transformers import AutoModelForTextEncoding, AutoTokenizer
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    network = _load_network(AutoModelForTextEncoding, name, ("t5", "mt5", "umt5"), dtype)
    tokenizer = _from_pretrained(AutoTokenizer, name)
    known = [i for i in tokenizer("a red circle")["input_ids"] if i != tokenizer.unk_token_id]
    if len(tokenizer) < 200 or len(known) < 3:         # transformers makes an empty one up
        raise UserError(f"the tokenizer of {name} has lost its vocabulary ({len(tokenizer)} "
                        f"tokens): its folder needs tokenizer.json or spiece.model.")
    return TextEncoder(network.to(device), tokenizer, max_tokens)


def _local(name: str) -> str:
    """A folder as typed, or in this clone (the shipped encoders), or a name for the hub."""
    for path in (Path(name).expanduser(), HERE / name):
        if path.is_dir():
            return str(path)
    return name


def absolute(name: str) -> str:
    """A folder's name that is understood from any folder; anything else as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name and path.is_dir() and not (HERE / name).is_dir() else name


def _from_pretrained(kind, name: str, **settings):
    """kind.from_pretrained: of a folder or the hub's cache, else from the hub. No code that comes
    with the weights is run. Raises UserError."""
    path = _local(name)
    if name.startswith((".", "/", "~")) and not os.path.isdir(path):
        raise UserError(f"no such folder: {name} (an encoder is a folder saved by save_pretrained, "
                        f"or a hub name such as facebook/dinov2-large).")
    for offline in (True, False):                      # what is there needs no network
        try:
            return kind.from_pretrained(path, local_files_only=offline, trust_remote_code=False,
                                        **settings)
        except Exception as error:                     # OSError, ValueError, SafetensorError, ...
            if not offline or os.path.isdir(path):
                raise UserError(f"{name} cannot be loaded by {kind.__name__}: {_first_line(error)}."
                                f" A hub name is downloaded once, which needs the network.")
            say(f"downloading {name}")


def _load_network(kind, name: str, model_types: tuple[str, ...], dtype):
    """A network of one of these types, and all of it: transformers fills what is missing at
    random. Raises UserError."""
    from transformers import AutoConfig
    from transformers.utils import logging
    config = _from_pretrained(AutoConfig, name)
    if config.model_type not in model_types:           # before GBs are read
        raise UserError(f"{name} is a {config.model_type!r} model; "
                        f"needed: {' or '.join(model_types)}.")
    logging.disable_progress_bar()                     # the run has its own
    logging.set_verbosity_error()                      # what is missing or unexpected is told below
    network, info = _from_pretrained(kind, name, dtype=dtype, output_loading_info=True)
    wrong = [key for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
             for key in sorted(map(str, info[what])) if "position_ids" not in key
             and not key.startswith(("lm_head.", "decoder."))]         # the other half of a T5
    if wrong:
        raise UserError(f"{name} does not fit its architecture: {len(wrong)} weights missing or "
                        f"unexpected, the first {wrong[0]}.")
    return network


def _first_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def load_lpips(device) -> nn.Module:
    """LPIPS with VGG16 (Zhang et al. 2018), frozen: pairs (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1).
    Raises UserError where the package, torchvision or VGG's weights (553 MB) cannot be had."""
    try:
        import lpips
        lpips.normalize_tensor = _unit_normalize       # see below
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            network = lpips.LPIPS(net="vgg", verbose=False)
    except Exception as error:                         # ImportError, URLError, RuntimeError, ...
        raise UserError(f"the perceptual loss needs lpips, torchvision and VGG16's weights "
                        f"({_first_line(error)}). Go without it: --lpips-weight 0.")
    return network.eval().requires_grad_(False).to(device)


def _unit_normalize(features: torch.Tensor, eps: float = 1e-10) -> torch.Tensor:
    """lpips' own form has sqrt(0) where all features are zero (flat regions): a gradient of NaN."""
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + eps ** 2)


# --------------------------------------------------------------------------------------------------
# 3 The randomness of a step
# --------------------------------------------------------------------------------------------------


def generator(seed: int, stage: str, step: int, what: str, device="cpu") -> torch.Generator:
    """The generator for one purpose in one step. It depends on nothing else: a resumed run needs no
    state of a generator."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}/{what}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@functools.lru_cache(maxsize=4)                        # ImageNet's takes 10 MB
def _permutation(seed: int, stage: str, count: int, epoch: int) -> np.ndarray:
    return torch.randperm(count, generator=generator(seed, stage, epoch, "order")).numpy()


def order(seed: int, stage: str, count: int, batch: int, step: int) -> np.ndarray:
    """Indices (batch,) of a step's global batch: permutation after permutation, without a gap."""
    positions = np.arange(step * batch, (step + 1) * batch)  # an epoch may end inside a batch
    return np.array([_permutation(seed, stage, count, int(p) // count)[p % count]
                     for p in positions])


# --------------------------------------------------------------------------------------------------
# 4 Checkpoints and files
# --------------------------------------------------------------------------------------------------

RESTORE = "Restore it, or start over with --fresh."


@contextlib.contextmanager
def atomic(path: Path):
    """Yields a temporary path, moved to `path` when the block ends well: never half a file. A link
    is followed to its file."""
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.partial")  # beside it: a move inside one disk is atomic
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "ab") as file:              # flushed before the move; Windows wants "a"
            os.fsync(file.fileno())
        os.replace(partial, path)                      # old or new, whenever power fails
    except BaseException as error:                     # Ctrl-C, too
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, (OSError, RuntimeError)): # torch.save: a full disk is a RuntimeError
            raise UserError(f"{path} could not be written ({_first_line(error)}); what stood there "
                            f"before is whole. Make room, or choose another --out.")
        raise


@contextlib.contextmanager
def reading(path: Path, then: str = RESTORE):
    """Whatever goes wrong while a file of ours is read is one line, which ends in what to do."""
    try:
        yield
    except (UserError, MemoryError, torch.cuda.OutOfMemoryError):      # no fault of the file
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged or of another version ({_first_line(error)}). {then}")


def save(path: Path, stage: str, cfg, **parts):
    """Writes a checkpoint: one dict of plain types and tensors, see load."""
    versions = {name: importlib.metadata.version(name) for name in (*NEEDED, "numpy")}
    checkpoint = {"format": FORMAT, "stage": stage, "config": plain(cfg), "versions": versions}
    with atomic(path) as partial:
        torch.save(checkpoint | parts, partial)


def load(path: Path, stage: str, before: str = "") -> dict:
    """Reads a checkpoint of a stage onto the CPU; nothing in it is executed (weights_only). Keys:
    format, stage, config, versions, model, step, seed, and what the stage adds (ema, optimizer,
    fingerprint, ...). `before` is the command that makes it. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not there{f'; first run: {before}' if before else ''}.")
    with reading(path):
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
        for key, needed in (("format", FORMAT), ("stage", stage)):
            if checkpoint[key] != needed:
                raise ValueError(f"{key} {checkpoint[key]!r}; needed: {needed!r}")
    return checkpoint


def load_weights(module: nn.Module, state: dict, path: Path):
    """Copies weights into the module's own storage: all of them, of the right shapes, finite.
    transformers renames parts of its networks at times (Dinov2's attention between 5.17 and 5.24);
    their order stays."""
    with reading(path):
        own = module.state_dict()
        others = [pair for pair in zip(own, state) if pair[0] != pair[1]]
        if own.keys() != state.keys() and len(own) == len(state) and all(
                "network." in name for pair in others for name in pair):
            state = dict(zip(own, state.values()))
        module.load_state_dict(state)
        for name, value in module.state_dict().items():  # else NaN would spread silently
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} holds NaN or infinite values")


def rebuild(make, state: dict, path: Path) -> nn.Module:
    """make() with the weights of a checkpoint, in eval mode."""
    module = make()
    load_weights(module, state, path)
    return module.eval().requires_grad_(False)


def check_encoder(found: str, checkpoint: dict, name: str):
    """Raises UserError where an encoder is no longer the one that a checkpoint was trained with."""
    if checkpoint.get("encoder_fingerprint") != found:
        raise UserError(f"the weights of {name} are not those that the checkpoint was trained "
                        f"with. Bring them back, or start over with --fresh.")


def check_data(train: Folder, cfg, checkpoint: dict | None, path: Path) -> dict:
    """What a checkpoint keeps of its pictures. Raises UserError where another folder is named, with
    other pictures than it learned from; other contents of the same folder are said."""
    own = {"digest": digest(train), "pictures": len(train.images)}
    with reading(path):
        then = (checkpoint or {}).get("data", own)
        if then["digest"] != own["digest"]:
            what = (f"{train.root} holds other pictures or captions than {path.name} learned from: "
                    f"{own['pictures']:,} pictures, {then['pictures']:,} then")
            if checkpoint["config"]["data"] != cfg.data:               # another folder was named
                raise UserError(f"{what}. Another data set needs a folder of its own, --out other; "
                                f"or start over with --fresh.")
            say(f"{what}. The run resumes with them")
    return own


def fingerprint(*parts: nn.Module | dict, extra: dict | None = None) -> str:
    """sha256 over types, shapes and bytes of all weights, and a description; not names: renamed."""
    digest = hashlib.sha256(json.dumps(extra or {}, sort_keys=True).encode())
    for part in parts:
        for value in (part if isinstance(part, dict) else part.state_dict()).values():
            value = value.detach().cpu().contiguous()
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def plain(cfg) -> dict:
    """A Config as plain types."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(cfg).items()}


def digest_of(value) -> str:
    """sha256 of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def stamp(name: str) -> str:
    """Which model a name stands for: itself, or for a folder the sizes and times of its files."""
    folder = Path(_local(name))
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return digest_of([folder.name if files else name, *stats])


def free_space(path: Path, needed: int, what: str):
    """Says how large a file will be; raises UserError before the first byte of one too large."""
    path.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path).free
    print(f"{what}: {human(needed)} in {path} ({human(free)} free)", flush=True)
    if needed > free:
        raise UserError(f"{what} need {human(needed)}, {path} has {human(free)} free.")


def unfinished(final: Path, mark: dict) -> Path:
    """<final>.partial, to be filled file by file; what a run of the same mark left stays."""
    work = final.with_name(final.name + ".partial")
    if read_json(work / "mark.json") != mark:          # made of something else: begin again
        shutil.rmtree(work, ignore_errors=True)
        write_json(work / "mark.json", mark)
    return work


def finish(work: Path, final: Path, meta: dict):
    """Writes meta.json and puts the folder in its place: it is whole, or not there."""
    write_json(work / "meta.json", meta)
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)             # of a run that was killed right here
    if final.exists():
        os.replace(final, old)
    os.replace(work, final)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: dict):
    with atomic(path) as partial:
        partial.write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_json(path: Path) -> dict:
    """A small file of our own, {} where it is missing or damaged: then it is made again."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def human(size: float) -> str:
    """1.2e9 -> "1.2 GB"."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.{0 if unit in ('B', 'KB') else 1}f} {unit}"
        size /= 1000


# --------------------------------------------------------------------------------------------------
# 5 A run
# --------------------------------------------------------------------------------------------------

LOCK_WAIT = 6                  # seconds: workers outlive a killed run by 5, and hold its lock
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; the step was finished and saved."""


class Run:
    """What a training run is besides mathematics: device, precision, ranks, lock, signals, log.

    Under torchrun each rank takes its slice of every global batch; what is drawn at random is drawn
    for the whole batch and then sliced, so that neither data nor noise depends on the number of
    processes. `also` are further stages whose files are read: they may not be rewritten meanwhile.
    """

    say = staticmethod(say)

    def __init__(self, cfg, stage: str, terms: tuple[str, ...] = (), also: tuple[str, ...] = ()):
        self.cfg, self.stage, self.terms, self.out = cfg, stage, terms, Path(cfg.out)
        self.rank, self.world, local = torchrun()
        self.main, self.parts = self.rank == 0, getattr(cfg, "micro_batches", 1)
        self.device = pick_device(cfg.device, local)
        if self.world > 1 and not torch.distributed.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, timeout=timedelta(hours=12))
        if cfg.batch % (self.world * self.parts):
            raise UserError(f"--batch {cfg.batch} is not divisible by {self.world} processes x "
                            f"--micro-batches {self.parts}.")
        torch.set_float32_matmul_precision("high")     # TF32 where the card has it
        self.half = cfg.precision == "bf16"
        if self.half and self.device.type == "cuda" and not has_bf16(self.device):
            self.say("this card has no bf16 (it came with Ampere): fp32 is taken instead")
            self.half = False
        self.compile = cfg.compile and self.device.type == "cuda"
        self.pending, self.sums, self.broken = [], {}, {}
        self.stop, self.stepping = 0, False            # a signal's number; does it wait for a step?
        self.open = contextlib.ExitStack()             # what is closed at the end: locks, log, bar
        for name in (stage, *also) if self.main else ():
            self.open.enter_context(take_lock(self.out, name))
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):      # not in the main thread: a caller's business
                signal.signal(number, self._signal)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open.close()

    def autocast(self):
        """bf16 with --precision bf16; around networks only: losses are in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    # -- ranks

    def mine(self, rows):
        """This rank's slice of a global batch (tensor, array or list)."""
        size = len(rows) // self.world                 # it divides: see __init__
        return rows[self.rank * size:(self.rank + 1) * size]

    def _draw(self, step: int, what: str, draw, *args) -> torch.Tensor:
        g = generator(self.cfg.seed, self.stage, step, what, self.device)
        return self.mine(draw(*args, generator=g, device=self.device))

    def randn(self, step: int, what: str, *shape: int) -> torch.Tensor:
        """N(0, 1) for this rank's rows, drawn for the global batch."""
        return self._draw(step, what, torch.randn, (self.cfg.batch, *shape))

    def randint(self, step: int, what: str, low: int, high: int) -> torch.Tensor:
        """Integers in low .. high - 1 for this rank's rows, drawn for the global batch."""
        return self._draw(step, what, torch.randint, low, high, (self.cfg.batch,))

    def to_device(self, tensors):
        return [None if t is None else t.to(self.device, non_blocking=True) for t in tensors]

    def distribute(self, model: nn.Module, unused: bool = False) -> nn.Module:
        """The handle to call in training: it averages gradients over ranks. Keep the bare one, too.
        unused: some parameters take no part in some steps."""
        if self.world == 1:
            return model
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False, find_unused_parameters=unused)    # constants: alike everywhere

    def micro_batches(self, model: nn.Module, *tensors):
        """Yields the batch in --micro-batches parts; ranks exchange gradients at the last."""
        cut = [[None] * self.parts if t is None else t.chunk(self.parts) for t in tensors]
        for number, part in enumerate(zip(*cut), 1):
            wait = self.world > 1 and number < self.parts
            with model.no_sync() if wait else contextlib.nullcontext():
                yield part

    def barrier(self):
        if self.world > 1:
            torch.distributed.barrier()

    # -- the training data

    def read_data(self, checkpoint: dict | None) -> tuple[Folder, Folder]:
        """Training and held-out pictures. A folder may move; other contents are said or refused."""
        cfg = self.cfg
        train, held_out = read_folder(cfg.data, cfg.max_broken, cfg.out, cfg.count)
        self.data = check_data(train, cfg, checkpoint, self.out / f"{self.stage}.pt")
        return train, held_out

    def pictures(self, folder: Folder, size: int, augment: bool):
        """Yields (step, x) with x float (B / ranks, 3, size, size) in [-1, 1], to the last step."""
        cfg, self.folder = self.cfg, folder

        def keys(step):                                # a seed for each picture's crop and flip
            rows = order(cfg.seed, self.stage, len(folder.images), cfg.batch, step)
            seed = int(generator(cfg.seed, self.stage, step, "augment").initial_seed())
            return self.mine([(int(row), seed + i if augment else None)
                              for i, row in enumerate(rows)])

        for step, (images, broken) in self.batches(Pictures(folder, size), keys):
            self.count_broken(broken)
            yield step, to_float(images, self.device)

    def batches(self, dataset, keys):
        """Yields (step, batch) from the first step that is still to be done."""
        pin = self.device.type == "cuda"               # copies to the card run beside the step
        return enumerate(batches(dataset, keys, self.first, self.cfg.steps, self.cfg.workers, pin),
                         self.first)

    def held_out(self, folder: Folder, size: int, most: int = 64) -> torch.Tensor:
        """Held-out pictures from all over the folder: (N, 3, size, size) in [-1, 1]."""
        pictures = Pictures(folder, size)
        own = folder.own or len(pictures)              # sorted: the first may be of one class
        count = min(most, own)
        keys = [(i * own // count, None) for i in range(count)]
        images, broken = pictures.collate([pictures[key] for key in keys])
        for index, reason in sorted(set(broken)):
            self.say(f"cannot read {folder.images[index]!r}, held out: {reason}; "
                     f"the next picture takes its place")
        return to_float(images, self.device)

    def count_broken(self, broken: list[tuple[int, str]]):
        """Names each picture once. Raises UserError when they are more than --max-broken."""
        for index, reason in broken:
            if index not in self.broken:
                self.broken[index] = f"{self.folder.images[index]!r}: {reason}"
                tqdm.write(f"cannot read {printable(self.broken[index])}")     # every rank its own
        if broken:
            tolerate(list(self.broken.values()), len(self.folder.images), self.cfg.max_broken,
                     "pictures")

    # -- steps

    def start(self, checkpoint: dict | None, held_out: tuple[str, ...], look, parts):
        """Opens out/<stage>.csv, cut back to the checkpoint's step, and the progress bar. For
        after_step: look(path) returns the held-out losses, and draws the preview where there is a
        path; parts() is what the checkpoint holds of this stage."""
        self.look, self.checkpoint_parts, self.first = look, parts, 0
        self.columns = ("step", "learning_rate", *self.terms, *(f"held_out_{n}" for n in held_out))
        if checkpoint:
            with reading(self.out / f"{self.stage}.pt"):
                self.first = checkpoint["step"]        # terms since the last row of the log:
                pending = checkpoint["pending"].float().view(-1, len(self.terms))
                self.pending = list(pending.to(self.device))
        if self.main:
            self._open_log()
        self.stepping = True                           # from here on a signal waits for the step

    def _open_log(self):
        path, kept = self.out / f"{self.stage}.csv", []
        if path.exists() and self.first:               # a killed run may have logged further
            with reading(path, "Move it away; the run needs no old rows."), open(
                    path, newline="", encoding="utf-8") as lines:
                kept = [row for row in csv.DictReader(lines) if (row["step"] or "").isdigit()
                        and int(row["step"]) <= self.first and None not in row.values()]
        with atomic(path) as partial, open(partial, "w", newline="", encoding="utf-8") as lines:
            writer = self._writer(lines)
            writer.writeheader()
            writer.writerows(kept)
        self.csv = self.open.enter_context(open(path, "a", newline="", encoding="utf-8"))
        self.bar = self.open.enter_context(progress(self.cfg.steps, self.stage, self.first))

    def _writer(self, lines):
        return csv.DictWriter(lines, self.columns, restval="", extrasaction="ignore",
                              lineterminator="\n")

    def set_rate(self, optimizer: torch.optim.Optimizer, step: int):
        """A warm-up from peak / warmup, then a cosine; a group may have a `scale` of its own."""
        cfg = self.cfg
        self.rate = learning_rate(step, cfg.steps, cfg.warmup, cfg.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = self.rate * group.get("scale", 1.0)

    def add(self, losses: dict[str, torch.Tensor]):
        """The terms of a micro-batch. They stay on the device, and nothing waits for them yet."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach() / self.parts

    def after_step(self, step: int, grad_norm: torch.Tensor):
        """The tail of every step: what is logged, looked at and kept, and whether to stop."""
        self.record(self.sums | {"grad_norm": grad_norm})
        self.sums, cfg, done = {}, self.cfg, step + 1
        last, stopping = done == cfg.steps, self.stopping(done)
        if self.main:
            self.bar.update()
        if done % cfg.eval_every == 0 or last:
            self.log(done, self.out / f"{self.stage}.png")
        elif done % cfg.log_every == 0:
            self.log(done)
        if done % cfg.save_every == 0 or last or stopping:
            self.save(done)
        if stopping or last and self.stopping(0):      # a signal during that save; all ranks agree
            self.say(f"saved at step {done:,} of {cfg.steps:,}: {self.out / self.stage}.pt. The "
                     f"same command resumes there")
            raise Stopped(self.stop)
        if last:
            self.say("finished: " + ", ".join(f"{self.out / self.stage}.{kind}"
                                              for kind in ("pt", "csv", "png")))

    def record(self, losses: dict[str, torch.Tensor]):
        assert tuple(losses) == self.terms, f"{tuple(losses)} logged, {self.terms} expected"
        self.pending.append(torch.stack([value.detach().float() for value in losses.values()]))

    def examine(self, step: int) -> torch.Tensor:
        """The terms since the last log, averaged over ranks; one not finite ends the run."""
        values = (torch.stack(self.pending) if self.pending
                  else torch.zeros(0, len(self.terms), device=self.device))
        if self.world > 1:
            torch.distributed.all_reduce(values)
            values /= self.world
        values = values.cpu()                          # waits for the device; most steps do not
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            row, last = bad[0, 0].item(), self.out / f"{self.stage}.pt"
            terms = ", ".join(f"{name} is {value}"
                              for name, value in zip(self.terms, values[row].tolist())
                              if not math.isfinite(value))
            raise UserError(f"{terms} at step {step - len(values) + row + 1}, learning rate "
                            f"{self.rate:.3g}. Run again with --fresh and a lower --learning-rate; "
                            f"the last good checkpoint is {last if last.exists() else 'none'}.")
        return values

    def log(self, step: int, picture: Path | None = None):
        """Writes the mean of the terms since the last log as a row of the CSV and into the bar.
        With a picture's path held-out losses are taken, and rank 0 draws the preview."""
        terms = dict(zip(self.terms, self.examine(step).double().mean(0).tolist()))
        self.pending = []
        held_out = self.look(picture if self.main else None) if picture else {}
        if not self.main:
            return
        row = {"learning_rate": self.rate} | terms
        row |= {f"held_out_{name}": value for name, value in held_out.items()}
        self._writer(self.csv).writerow({"step": step} | {n: f"{v:.6g}" for n, v in row.items()})
        self.csv.flush()                               # to be followed while it runs
        shown = " ".join(f"{name} {value:.4g}" for name, value in terms.items())
        self.bar.set_postfix_str(shown, refresh=False)

    def save(self, step: int):
        """Writes out/<stage>.pt after examining every loss so far; only rank 0 writes."""
        pending = self.examine(step)
        if self.main:
            os.fsync(self.csv.fileno())                # the log never lags behind the checkpoint
            save(self.out / f"{self.stage}.pt", self.stage, self.cfg, step=step, seed=self.cfg.seed,
                 pending=pending, data=self.data, **self.checkpoint_parts())

    # -- how it ends

    def stopping(self, step: int) -> bool:
        """True after a signal. Ranks agree at every tenth step, so that none waits alone."""
        if self.world > 1 and step % 10 == 0:
            flag = torch.tensor([float(self.stop)], device=self.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.stop = int(flag.item())               # the largest number: 0 is no signal
        return bool(self.stop) and (self.world == 1 or step % 10 == 0)

    def _signal(self, number, _):
        waits, self.stop = self.stepping and not self.stop, number
        if not waits:                                  # a second one, or one before the first step;
            raise KeyboardInterrupt(number)            # where a __del__ eats it: at the next
        print(f"\n{signal.Signals(number).name}: saving at the end of this step", file=sys.stderr,
              flush=True)


def torchrun() -> tuple[int, int, int]:
    """Rank, number of processes, rank on this machine: as torchrun says, or 0, 1, 0 without it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK") if "WORLD_SIZE" in os.environ else ()
    return tuple(int(os.environ.get(name, 0)) for name in names) or (0, 1, 0)


@contextlib.contextmanager
def take_lock(out: Path, stage: str):
    """Keeps other runs of a stage out of `out`; released if the process dies. Raises UserError."""
    lock = filelock.FileLock(out / f".{stage}.lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_WAIT)
    except filelock.Timeout:
        raise UserError(f"{out} is in use by another run ({stage}). Wait for it, or choose another "
                        f"--out.")
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise UserError(f"--out {out} cannot be written: {error.strerror}.")
        print(f"warning: {out} is on a file system without locks ({_first_line(error)}): "
              f"let no second run work in it", flush=True)
    try:
        yield
    finally:
        lock.release()


def progress(total: int, what: str, first: int = 0) -> tqdm:
    """A progress bar; in a log file, a line every 30 seconds."""
    return tqdm(total=total, initial=first, desc=what, dynamic_ncols=True, smoothing=0.05,
                mininterval=0.5 if sys.stderr.isatty() else 30, disable=torchrun()[0] > 0)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; --device cpu works everywhere.")
    torch.cuda.set_device(local_rank)                  # what is allocated by default goes there
    return torch.device("cuda", local_rank)


def has_bf16(device: torch.device) -> bool:
    """Volta and Turing only emulate it, many times slower than fp32."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then a cosine to a hundredth of the peak at the last."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)                # 0 to 1
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def muon_step(matrices: list[nn.Parameter], momenta: list[torch.Tensor], rate: float,
              weight_decay: float):
    """Muon (Jordan et al. 2024): a matrix takes a step along its momentum with all singular values
    made about 1, so that what pictures show rarely is learned as fast as what they show often.

    matrices (m, n), or convolutions (m, k, 3, 3), with gradients, and momenta of the same shapes;
    both change in place.
    """
    for p, momentum in zip(matrices, momenta):
        momentum.lerp_(p.grad, 0.05)
        x = p.grad.lerp(momentum, 0.95).flatten(1)     # Nesterov's; a convolution: (c_out, 9 c_in)
        tall = x.shape[0] > x.shape[1]
        x = (x.T if tall else x) / (x.norm() + 1e-20)  # all zeros stay zeros
        for _ in range(4):                             # Newton and Schulz's iteration
            y = x @ x.T
            x = 3.4445 * x + (2.0315 * y @ y - 4.775 * y) @ x
        p.mul_(1 - rate * weight_decay)
        # x has entries of 1 / sqrt(longer side), AdamW's steps of 0.2 or so: the rate serves both
        p.sub_((x.T if tall else x).reshape(p.shape), alpha=rate * 0.2 * max(x.shape) ** 0.5)


# --------------------------------------------------------------------------------------------------
# 6 The command line
# --------------------------------------------------------------------------------------------------

MAY_CHANGE = {"data", "steps", "workers", "save_every", "log_every", "eval_every", "micro_batches",
              "device", "compile", "checkpointing", "max_broken", "out", "fresh", "latents",
              "encode_only", "reconstruct"}
MADE_FOR = {"preset", "image_size", "z_dim", "widths"}  # what a model's weights are made for
MAY_BE_0 = {"workers", "warmup"}                        # and what is 0 by default
NEEDED = {"torch": (2, 6), "transformers": (5, 17)}


def flag(name: str) -> str:
    """A field of a Config as it is typed: --image-size, -n."""
    return "-" * (1 + (len(name) > 1)) + name.replace("_", "-")


def command(script: str, **flags) -> str:
    """A command to paste; out and model are left out where they are "out", as they are by
    default."""
    words = [word for name, value in flags.items()
             if name not in ("out", "model") or str(value) != "out"
             for word in (flag(name), str(value))]
    return " ".join(["python", script, *map(shlex.quote, map(printable, words))])


class _Parser(argparse.ArgumentParser):
    def error(self, message):                          # in one line, without the usage
        raise UserError(f"{message}. `python {self.prog} --help` lists every flag.")


def read_flags(Config, argv: list[str] | None, description: str,
               presets: dict[str, dict] = {}) -> dict:
    """What was typed, as {field: value}: each field is a flag, its comment the help."""
    parser = _Parser(description=description, argument_default=argparse.SUPPRESS,
                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    help_of = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    for f in fields(Config):
        defaults = [f"{f.default}", *(f"{name}: {preset[f.name]}"
                                      for name, preset in presets.items() if f.name in preset)]
        text = f"{help_of.get(f.name, '')} [{'; '.join(defaults)}]".replace("%", "%%")
        settings = (
            dict(action=argparse.BooleanOptionalAction) if f.type is bool else
            dict(type=lambda s: tuple(map(int, s.split(","))), metavar="N,N,…")
            if f.type == tuple[int, ...] else
            dict(action="extend", nargs="+") if f.type == tuple[str, ...] else
            dict(type=f.type, metavar=f.type.__name__.upper()))
        parser.add_argument(flag(f.name), help=text, **settings)
    typed = vars(parser.parse_args(argv))              # SUPPRESS: only what was typed
    for name in ("data", "encoder", "text_encoder"):   # understood from any folder, later on
        typed |= {name: absolute(typed[name])} if name in typed else {}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in typed.items()}


def configure(Config, presets: dict[str, dict], typed: dict, inherited: dict | None = None,
              saved: dict | None = None, strict: bool = True):
    """The Config of a run: typed over inherited over preset over defaults; or the saved one. Raises
    UserError where a typed value contradicts the checkpoint, unless the flag is in MAY_CHANGE, or
    nothing is to be trained (strict=False) and the flag not in MADE_FOR. --out is never taken from
    the checkpoint: it may have been moved."""
    if saved is not None:
        saved = {f.name: tuple(v) if isinstance(v := saved[f.name], list) else v    # see plain
                 for f in fields(Config) if f.name in saved and f.name != "out"}
        for name, value in typed.items():
            fixed = name not in MAY_CHANGE if strict else name in MADE_FOR
            if fixed and name in saved and saved[name] != value:
                raise UserError(f"{flag(name)} {value} contradicts the checkpoint, which has "
                                f"{flag(name)} {saved[name]}. Leave the flag out to resume, "
                                f"start over with --fresh, or work in another folder: --out other.")
        return Config(**saved | typed | {"fresh": False})
    values = (inherited or {}) | typed
    preset = values.get("preset") or ("full" if values.get("data") else "tiny")
    if preset not in presets:
        raise UserError(f"--preset {preset}: allowed are {', '.join(presets)}.")
    if "preset" not in values and preset == "full" and not torch.cuda.is_available():
        say("no CUDA device: the full preset (DINOv2-L at 256 px) takes weeks on a CPU; "
            "--preset tiny takes hours")
    return Config(**presets[preset] | values | {"preset": preset})     # the last one wins


def check(cfg, **ranges: tuple[float, float]):
    """Raises UserError for a number that is negative or not finite, an integer below 1 that may not
    be 0, or a number outside its given range (lowest, highest)."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        for v in value if isinstance(value, tuple) else (value,):
            if isinstance(v, (int, float)) and not isinstance(v, bool):
                least = int(f.type is int and f.default != 0 and f.name not in MAY_BE_0)
                low, high = ranges.get(f.name, (least, 2**63 - 1))
                if not low <= v <= high:               # NaN is in no range
                    top = f" to {high:g}" if f.name in ranges else " or more"
                    raise UserError(f"{flag(f.name)} {value}: allowed is {low:g}{top}.")


def check_choice(cfg, **choices: tuple[str, ...]):
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            raise UserError(f"{flag(name)} {getattr(cfg, name)}: allowed are {', '.join(allowed)}.")


def inherit(parent: dict | None, names: tuple[str, ...], typed: dict, path: Path) -> dict:
    """What a stage takes from the config of the one before it, unless typed; said in one line."""
    taken = {n: parent[n] for n in names if n not in typed and n in parent} if parent else {}
    if taken:
        shown = ", ".join(f"{name} {value if value != '' else 'built-in world'}"
                          for name, value in taken.items())
        say(f"from {path}: {shown}")
    return taken


def is_finished(checkpoint: dict, cfg, path: Path) -> bool:
    """Says where a run resumes, or that there is nothing left to do. Raises UserError where another
    folder is named than that of a finished run."""
    step, before = checkpoint["step"], checkpoint["config"].get("steps", cfg.steps)
    if step >= cfg.steps:
        if getattr(cfg, "data", "") != checkpoint["config"].get("data", ""):
            train, _ = read_folder(cfg.data, None, cfg.out, cfg.count)
            check_data(train, cfg, checkpoint, path)
        say(f"{path} is finished: {step:,} steps. A larger --steps resumes, --fresh starts over.")
        return True
    decay = f"; --steps was {before:,}, the decay of the learning rate follows"
    say(f"{path}: resuming from step {step:,} of {cfg.steps:,}"
        f"{decay if before != cfg.steps else ''}")
    return False


def set_aside(out: Path, *names: str):
    """--fresh: moves the old run into out/old-<n>/, the checkpoint (named first) last: until it is
    gone, the old run is the run. Refused while that is still running."""
    present = [out / name for name in names if (out / name).exists()]
    if present and torchrun()[0] == 0:
        with take_lock(out, Path(names[0]).stem):
            aside = next(path for n in itertools.count(1)
                         if not (path := out / f"old-{n}").exists())
            aside.mkdir()
            for path in reversed(present):
                os.replace(path, aside / path.name)
        say(f"--fresh: the old run is in {aside}")


def program(main):
    """main(argv) as a program: exit code 0, 2 with one line for a UserError, 130 or 143 after a
    signal."""
    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
        with contextlib.suppress(AttributeError):      # what the terminal cannot show is no error
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            for name, needed in NEEDED.items():
                there = importlib.metadata.version(name)
                if tuple(map(int, re.findall(r"\d+", there)[:2])) < needed:
                    raise UserError(f"{name} {there} is installed; needed is "
                                    f"{'.'.join(map(str, needed))} or newer: "
                                    f"pip install -r requirements.txt")
            main(argv)
            return 0
        except KeyboardInterrupt as interrupt:
            if not isinstance(interrupt, Stopped):
                print("stopped before anything more was saved", file=sys.stderr, flush=True)
            return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
        except Exception as error:
            if not (line := _one_line(error)):
                raise                                  # a fault of ours: with its traceback
            print(f"error: {line}", file=sys.stderr, flush=True)
            return 2
        finally:
            with contextlib.suppress(ValueError, TypeError):           # a caller's own thread
                for number, handler in handlers:
                    signal.signal(number, handler)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return wrapped


def _one_line(error: Exception) -> str:
    """What a person is told of an error that is not the program's own; "" for all others."""
    text, first = str(error), _first_line(error)
    if re.search("DataLoader (worker|timed out)", text):               # torch adds its traceback
        why = printable(text.strip().splitlines()[-1])[:200]
        return (f"a process that loads data has failed ({why}). It may lack memory, room in "
                f"/dev/shm, or file handles: --workers 0 does without such processes.")
    if isinstance(error, UserError):
        return text
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "allocate memory" in text:
        return (f"out of memory ({first}). A smaller --batch, more --micro-batches, "
                f"--checkpointing or a smaller model make it fit.")
    if isinstance(error, OSError):                     # a full disk, no permission, no disk
        return first
    if torch.distributed.is_initialized() and re.search("peer|gloo|NCCL|[Tt]imed out", text):
        return (f"another process of this run has ended ({first}). The same command resumes from "
                f"the last checkpoint.")
    return ""


# --------------------------------------------------------------------------------------------------
# 7 Pictures for people
# --------------------------------------------------------------------------------------------------

# The first that a system has is taken: those with more alphabets stand before the others
FONTS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msgothic.ttc", "DejaVuSans.ttf")
WRITTEN = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Images (..., 3, H, W) in [-1, 1] -> uint8 (..., H, W, 3)."""
    x = (x.detach().float().clamp(-1, 1) + 1) * 127.5  # no wrap-around at 256
    return x.round().byte().movedim(-3, -1).cpu().numpy()


def pca_colours(*maps: torch.Tensor, size: int = 64) -> list[np.ndarray]:
    """Feature maps (B, h, w, c) as colours: the first three principal components of the first."""
    first = maps[0].detach().double().cpu().flatten(0, 2)
    mean = first.mean(0)
    _, _, axes = torch.linalg.svd(first - mean, full_matrices=False)
    axes = F.pad(axes, (0, 0, 0, max(0, 3 - len(axes))))[:3]           # fewer than 3: no blue
    axes = axes * torch.where(axes.sum(1, keepdim=True) < 0, -1, 1)    # the sign of an axis is free
    low, high = torch.quantile((first - mean) @ axes.T, torch.tensor([0.02, 0.98]).double(), dim=0)
    out = []
    for one in maps:
        colours = ((one.detach().double().cpu() - mean) @ axes.T - low) / (high - low + 1e-9)
        pixels = (colours.clamp(0, 1) * 255).round().byte()
        for side in (1, 2):                            # each cell a square, not blurred
            pixels = pixels.repeat_interleave(max(1, size // one.shape[side]), side)
        out.append(pixels.numpy())
    return out


def grid(rows: list[list[np.ndarray]], captions: list[list[str]] | None = None,
         heads: list[str] | None = None, gap: int = 4, least: int = 96) -> Image.Image:
    """Rows of uint8 pictures on white, captions under them; small ones are enlarged to `least`."""
    scale = max(1, -(-least // rows[0][0].shape[0]))   # whole pixels: nothing is blurred
    width = max(picture.shape[1] for row in rows for picture in row) * scale
    height = max(picture.shape[0] for row in rows for picture in row) * scale
    wrap = lambda text: textwrap.wrap(text, width // 6, max_lines=4)               # of 6 px each
    cells = [[wrap(text) for text in row] for row in captions or [[]] * len(rows)]
    tails = [13 * max(map(len, row), default=0) + 3 * bool(captions) for row in cells]
    y = gap + 16 * bool(heads)
    sheet = Image.new("RGB", (max(map(len, rows)) * (width + gap) + gap,
                              y + sum(height + gap + tail for tail in tails)), "white")
    pen, x = ImageDraw.Draw(sheet), lambda i: gap + i * (width + gap)
    for i, text in enumerate(heads or []):
        pen.text((x(i), 2), text, "black", _font())
    for row, texts, tail in zip(rows, cells, tails):
        for i, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture.repeat(scale, 0).repeat(scale, 1)), (x(i), y))
        for i, lines in enumerate(texts):
            for j, line in enumerate(lines):
                pen.text((x(i), y + height + 2 + 13 * j), line, "black", _font())
        y += height + gap + tail
    return sheet


@functools.cache
def _font():
    for name in FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, 11)
    return ImageFont.load_default(11)


def check_picture_path(path: Path) -> str:
    """The format for a picture to be written there, by its suffix. Raises UserError."""
    path = Path(path)
    if path.suffix.lower() not in WRITTEN:
        raise UserError(f"{printable(str(path))}: pictures are written as {', '.join(WRITTEN)}.")
    return WRITTEN[path.suffix.lower()]


def save_picture(image: Image.Image, path: Path, settings: dict | None = None):
    """Writes a picture in one move, with settings as text chunks of a PNG (Image.open(path).text),
    else as JSON in EXIF's ImageDescription. Raises UserError."""
    kind, info, exif = check_picture_path(path), PngImagePlugin.PngInfo(), Image.Exif()
    for name, value in (settings or {}).items():
        info.add_itxt(name, unicode(str(value)))
    exif[0x010E] = json.dumps(settings or {}, default=str)[:60_000]    # JPEG has room for 64 KB
    extra = {"pnginfo": info} if kind == "PNG" else {"exif": exif, "quality": 95}
    with atomic(path) as partial:
        image.save(partial, kind, **extra)


# --------------------------------------------------------------------------------------------------
# 8 Datasets of latents and texts
# --------------------------------------------------------------------------------------------------

LATENTS = 2                    # the format of out/latents/
SHARD = 2048                   # pictures in a file of out/latents/
BLOCK = 4096                   # captions in a file of out/text/


class Shards:
    """00000.npy, 00001.npy, ... of a folder, each opened on first use, by the process using it."""

    def __init__(self, folder: Path):
        self.folder, self.opened = folder, {}

    def __getitem__(self, number: int) -> np.ndarray:
        if number not in self.opened:
            if len(self.opened) >= 64:                 # a process has only so many file handles
                self.opened.clear()
            self.opened[number] = np.load(shard_path(self.folder, number), mmap_mode="r")
        return self.opened[number]

    def __getstate__(self):                            # a worker opens its own: maps are copied
        return {"folder": self.folder, "opened": {}}


def shard_path(folder: Path, number: int, kind: str = "") -> Path:
    return folder / f"{number:05d}{kind}.npy"


def save_array(path: Path, array: np.ndarray):
    with atomic(path) as partial:
        whole = io.BytesIO()                           # into a file np.save may turn a Ctrl-C into
        np.save(whole, array)                          # a TypeError, and to a name it adds .npy
        partial.write_bytes(whole.getbuffer())


class Latents(torch.utils.data.Dataset):
    """out/latents/ and out/text/ as rows; a key is (row, drop_text, drop_source).

    A shard is (n, 2, h, w, z_dim) float16, mu and log_var, or (n, 1, ...) with --latents mu. A
    batch is (mu, log_var, c, mask, source): (B, h, w, z_dim) twice, (B, L, d_text), (B, L), and mu
    of the sources or None; L is a multiple of 16. Rows of a batch agree in drop_source.
    """

    def __init__(self, folder: Path, rows: list[dict], texts: "Texts"):
        self.shards, self.texts, self.kinds = Shards(folder), texts, {}
        self.example = rows[0]["text"] if rows else ""
        # Arrays, not lists of dicts: workers would copy those, object by object
        self.image = np.array([row["image"] for row in rows])
        self.source = np.array([row.get("source", -1) for row in rows])
        self.text = np.array([texts.index[row["text"]] for row in rows])
        for number, row in enumerate(rows):
            kind = row.get("held_out", False), "source" in row
            self.kinds.setdefault(kind, []).append(number)

    def rows(self, held_out: bool, edits: bool) -> list[int]:
        return self.kinds.get((held_out, edits), [])

    def posterior(self, picture: int) -> torch.Tensor:
        return torch.from_numpy(self.shards[picture // SHARD][picture % SHARD].astype(np.float32))

    def __getitem__(self, key):
        row, drop_text, drop_source = key
        mu, *log_var = self.posterior(self.image[row])
        log_var = log_var[0] if log_var else torch.full_like(mu, -30)       # sigma = 3e-7
        source = -1 if drop_source else self.source[row]
        source_mu = self.posterior(source)[0] if source >= 0 else None
        return mu, log_var, self.texts[self.texts.null if drop_text else self.text[row]], source_mu

    def collate(self, items):
        mu, log_var, texts, sources = zip(*items)
        length = -(-max(map(len, texts)) // 16) * 16   # few lengths: few shapes to compile for
        c = torch.zeros(len(items), length, texts[0].shape[1])
        mask = torch.zeros(len(items), length, dtype=torch.bool)       # False at padding
        for i, text in enumerate(texts):
            c[i, :len(text)], mask[i, :len(text)] = text, True
        source = torch.stack(sources) if sources[0] is not None else None
        return torch.stack(mu), torch.stack(log_var), c, mask, source


def read_meta(folder: Path) -> dict:
    """meta.json of out/latents/. Raises UserError."""
    if not (folder / "meta.json").is_file():
        raise UserError(f"{folder} is not there; first run: "
                        f"{command('psvae.py', out=folder.parent)} (it writes latents at its end).")
    with _reading_latents(folder):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != LATENTS:
            raise ValueError(f"format {meta['format']}; needed: {LATENTS}")
        if not len(meta["mean"]) == len(meta["variance"]) == meta["z_dim"]:
            raise ValueError("no statistics of the channels")
        return meta


def read_rows(folder: Path, meta: dict) -> list[dict]:
    """rows.jsonl of out/latents/, after a look at every shard. Raises UserError."""
    with _reading_latents(folder):
        side = meta["grid"]
        shape = (1 + (meta["latents"] == "both"), side, side, meta["z_dim"])
        lengths = [len(Shards(folder)[i]) for i in range(-(-meta["pictures"] // SHARD))]
        if sum(lengths) != meta["pictures"] or Shards(folder)[0].shape[1:] != shape:
            raise ValueError("meta.json and the shards do not fit")
        with open(folder / "rows.jsonl", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]


def _reading_latents(folder: Path):
    make = command("psvae.py", out=folder.parent)
    return reading(folder, f"Write the latents again: {make} --encode-only")


class Texts:
    """Embeddings of distinct captions, float16, in blocks of out/text/; [i] -> (L, d_text)."""

    def __init__(self, folder: Path, captions: list[str]):
        with reading(folder, "Remove it: it is written again."):
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.fingerprint, self.dim = meta["fingerprint"], meta["d_text"]
            self.blocks, self.ends = Shards(folder), []
            for number in range(-(-len(captions) // BLOCK)):
                lengths = np.load(shard_path(folder, number, ".lengths"))
                self.ends.append(np.concatenate([[0], np.cumsum(lengths)]))
        self.index = {caption: i for i, caption in enumerate(captions)}
        self.null = self.index[""]                     # the condition of an unconditional pass

    def __getitem__(self, i: int) -> torch.Tensor:
        block, at = divmod(int(i), BLOCK)
        first, end = self.ends[block][at:at + 2]
        return torch.from_numpy(self.blocks[block][first:end].astype(np.float32))

    def whitening(self, most: int = 200_000) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (d_text,) of the tokens and the map (d_text, d_text) that gives them covariance I
        (PCA), from `most` of them; directions of little variance are not amplified."""
        starts = np.concatenate([[0], np.cumsum([ends[-1] for ends in self.ends])])
        every = max(1, starts[-1] // most)             # of all blocks alike
        tokens = np.concatenate([self.blocks[n][-start % every::every]
                                 for n, start in enumerate(starts[:-1])]).astype(np.float64)
        mean = tokens.mean(0)
        variance, axes = np.linalg.eigh((tokens - mean).T @ (tokens - mean) / len(tokens))
        scale = 1 / np.sqrt(variance.clip(0) + 1e-3 * variance.mean())
        return torch.from_numpy(mean).float(), torch.from_numpy(axes * scale).float()


def write_texts(final: Path, mark: dict, captions: list[str], encoder: TextEncoder, embed):
    """Embeds captions block by block into a folder; a block that is there is done. embed(captions)
    -> (B, L, d_text) and its mask (B, L)."""
    work, cut = unfinished(final, mark), 0
    with progress(len(captions), "texts") as bar:
        for number in range(-(-len(captions) // BLOCK)):
            block = captions[number * BLOCK:(number + 1) * BLOCK]
            if shard_path(work, number).exists():
                bar.update(len(block))
                continue
            lengths = encoder.lengths(block)
            cut += sum(n > encoder.max_tokens for n in lengths)
            if number == 0:                            # the others are about as long
                size = 2 * sum(min(n, encoder.max_tokens) for n in lengths) * encoder.dim
                free_space(work, size * len(captions) // len(block),
                           f"embeddings of {len(captions):,} captions, about")
            tokens = [None] * len(block)
            by_length = sorted(range(len(block)), key=lengths.__getitem__)  # little padding
            for start in range(0, len(block), 256):
                part = by_length[start:start + 256]
                c, mask = embed([block[i] for i in part])
                for i, own, keep in zip(part, c.half().cpu().numpy(), mask.cpu().numpy()):
                    tokens[i] = own[keep]
                bar.update(len(part))
            # The block last: where it is, its lengths are there as well
            save_array(shard_path(work, number, ".lengths"), np.array(list(map(len, tokens))))
            save_array(shard_path(work, number), np.concatenate(tokens))
    if cut:
        say(f"{cut:,} captions are longer than {encoder.max_tokens} tokens and were cut "
            f"(--max-tokens)")
    finish(work, final, mark | {"fingerprint": encoder.fingerprint(), "d_text": encoder.dim})


# --------------------------------------------------------------------------------------------------
# A look at a folder: python data.py
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    data: str = ""                  # folder of images; empty: the built-in world
    out: str = "out"                # where the contact sheet goes
    count: int = 75_000             # of the built-in world: pictures that have words
    image_size: int = 256           # size for which the reading speed is measured
    max_broken: float = 0.01        # largest fraction of unreadable pictures or rows in training

    def __post_init__(self):
        check(self, count=(1, 1e8), image_size=(16, 4096), max_broken=(0, 1))


@program
def main(argv: list[str] | None = None):
    cfg = Config(**read_flags(Config, argv, __doc__))
    train, held_out = read_folder(cfg.data, None, cfg.out, cfg.count)
    print(f"{train.root}: layout {train.layout}")
    for name, part in (("training", train), ("held out", held_out)):
        edits = sum(source >= 0 for _, _, source in part.rows)
        print(f"  {name:9s} {part.own:8,} pictures, {len(part.rows) - edits:8,} captions, "
              f"{edits:8,} edits")
    lengths = [len(text) for text in {text for _, text, _ in train.rows}] or [0]
    print(f"  captions: {len(lengths):,} distinct, of {np.mean(lengths):.0f} characters on average "
          f"and {max(lengths):,} at most")

    begin, broken, sizes = time.monotonic(), [], []
    parts = [train] if held_out is train else [held_out, train]
    every = [(part, index) for part in parts for index in range(part.own)]
    for part, index in every:
        try:
            Pictures(part, cfg.image_size).read(index)
            with Image.open(part.path(index), formats=FORMATS) as image:
                sizes.append(image.size)
        except Exception as error:                     # decoders raise nearly anything on rubbish
            broken.append(f"{part.images[index]!r}: {_first_line(error)}")
        if time.monotonic() - begin > 30:
            print(f"  (only the first {len(sizes) + len(broken):,} pictures were opened, in 30 s)")
            break
    if sizes:
        speed = len(sizes) / (time.monotonic() - begin)
        print(f"  sizes: {min(sizes)} to {max(sizes)}; {speed:.0f} pictures a second a process at "
              f"{cfg.image_size} px")
    say(f"  broken or skipped: {len(train.skipped + broken)}")
    for line in train.skipped + broken:
        say(f"    {line}")

    count, cells = len(train.rows), []
    for number in order(0, "sheet", count, min(24, count), 0) if count else ():
        image, text, _ = train.rows[number]
        with contextlib.suppress(Exception):           # broken, and named above
            cells.append((Pictures(train, 128).read(image), text))
    if cells:
        rows = [list(zip(*cells[i:i + 6])) for i in range(0, len(cells), 6)]
        save_picture(grid(*map(list, zip(*rows))), Path(cfg.out) / "data.png")
        print(f"  contact sheet: {Path(cfg.out) / 'data.png'}")
    accept(cfg.data, train, held_out, cfg.max_broken)  # what training will say
    tolerate(broken, len(every), cfg.max_broken, "pictures")


if __name__ == "__main__":
    sys.exit(main())
