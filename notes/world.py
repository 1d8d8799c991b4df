"""The built-in world: coloured shapes on a plain background, captions that are true, edits that change one thing.

A picture of this world can be checked against its prompt by geometry instead of by opinion (judge.py does), needs no download,
and is the same on every machine: everything is a function of (seed, split, index).

    python notes/world.py                        draws out/world (50,000 pictures, about half a minute on two cores)
    python notes/world.py --sheet sheet.png      only a contact sheet, to look at

What is written is an ordinary folder of images with a metadata.jsonl, as data.py reads any other:

    out/world/train/metadata.jsonl   {"file_name", "text", "scene"}              a caption: one for every picture
                                     {"file_name", "text", "source", "kind", …}  an edit: source + instruction -> picture
    out/world/val/                   unseen pictures of the same world
    out/world/heldout/               pictures that each hold a (colour, shape) pair which training never shows
    out/world/world.json             written last: version, count, size, seed

Pictures come in blocks of five: three scenes, then two edits of these. So a small world is the beginning of a large one.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

VERSION = 1   # goes up whenever the same index would draw another picture
SEED = 0
CANVAS = 64   # positions and sizes are in units of this canvas, whatever the size in pixels

# Objects are vivid and backgrounds muted. No background, and no average of any two colours, comes closer than 30 (in RGB)
# to another palette colour: so a half-blended picture can not pass for a clean one.
COLOURS = {"red": (214, 40, 40), "orange": (255, 136, 20), "yellow": (255, 217, 30), "green": (30, 150, 60),
           "blue": (30, 85, 220), "purple": (130, 45, 165), "black": (16, 16, 18), "white": (250, 250, 250)}
BACKGROUNDS = {"gray": (142, 146, 148), "beige": (228, 218, 160), "pink": (224, 158, 172),
               "teal": (86, 182, 180), "brown": (110, 78, 48), "lavender": (164, 144, 222)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = {"small": 7.5, "large": 11.0}   # radius of the circle; the other shapes have the same area, so they look as large
STYLES = ("filled", "outline")
STROKE = 2.75                           # width of an outline: leaves even the small star and cross a visible hole
GAP, MARGIN = 2.5, 2.0                  # least distance between two objects, and to the picture's border

# One pair for every shape, six of the eight colours: each shape is still seen in seven colours, each colour on five shapes.
HELD_OUT = frozenset({("purple", "circle"), ("orange", "square"), ("blue", "triangle"),
                      ("green", "diamond"), ("yellow", "cross"), ("red", "star")})
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
SPLITS = ("train", "val", "heldout")
KINDS = ("add", "remove", "replace", "recolour", "resize/move", "background", "restyle")


@dataclass(frozen=True)
class Object:
    shape: str
    colour: str
    size: str
    style: str
    x: float = 0.0   # centre of mass; x to the right, y down
    y: float = 0.0


@dataclass(frozen=True)
class Scene:
    background: str
    objects: tuple   # of Object, back to front (they never overlap)


def generator(*key):
    """A Generator of its own for every key: no order of calls and no number of workers can change a picture."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "big"))


def choose(rng, options, p=None):
    options = tuple(options)
    if p is None:
        return options[int(rng.integers(len(options)))]
    return options[int(np.searchsorted(np.cumsum(p), rng.random() * sum(p)))]


# --- Geometry -----------------------------------------------------------------------------------------------------------

def _unit(shape):
    """Corners of a shape, clockwise on the screen, in no particular scale."""
    if shape == "cross":
        a, b = 1.0, 0.55   # thick arms: thinner ones would close up as an outline
        return np.array([(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b),
                         (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)])
    corners, turn, inner = {"circle": (64, 0, 1), "square": (4, 45, 1), "diamond": (4, 0, 1),
                            "triangle": (3, 0, 1), "star": (10, 0, 0.5)}[shape]
    angle = np.radians(turn + 360 / corners * np.arange(corners))
    radius = np.where(np.arange(corners) % 2, inner, 1.0) if shape == "star" else np.ones(corners)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


@functools.lru_cache(maxsize=None)
def polygon(shape, size, inset=0.0):
    """(corners, 2) around (0, 0), its edges moved inwards by `inset`."""
    points = _unit(shape)
    x, y = points.T
    area = 0.5 * np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))
    points = points * np.sqrt(np.pi * SIZES[size] ** 2 / area)
    edge = np.roll(points, -1, axis=0) - points
    normal = np.stack([edge[:, 1], -edge[:, 0]], axis=1) / np.linalg.norm(edge, axis=1, keepdims=True)
    before = np.roll(normal, 1, axis=0)
    # A corner moves along the sum of its edges' normals n, m, as far as brings both edges inwards by 1: (n + m) / (1 + n·m).
    return points - inset * (before + normal) / (1 + np.sum(before * normal, axis=1, keepdims=True))


@functools.lru_cache(maxsize=None)
def room(shape, size):
    """(left, top, right, bottom, reach): where its centre may be, and the radius of the circle around it."""
    corners = polygon(shape, size)
    low, high = np.ceil(100 * (MARGIN - corners.min(0))) / 100, np.floor(100 * (CANVAS - MARGIN - corners.max(0))) / 100
    return (*low.tolist(), *high.tolist(), float(np.linalg.norm(corners, axis=1).max()))


def fits(o, others):
    """Whether o lies inside the picture and clear of all others (by the circles around them: simple, and roomy)."""
    left, top, right, bottom, reach = room(o.shape, o.size)
    return left <= o.x <= right and top <= o.y <= bottom and all(
        math.hypot(o.x - b.x, o.y - b.y) >= reach + room(b.shape, b.size)[-1] + GAP for b in others)


def place(objects, rng, fixed=(), tries=60):
    """Puts `objects` at free positions, uniformly, beside those already `fixed`; None where there is no room."""
    done = list(fixed)
    for o in objects:
        left, top, right, bottom, _ = room(o.shape, o.size)
        spots = rng.uniform((left, top), (right, bottom), (tries, 2)).tolist()
        found = next((moved for x, y in spots if fits(moved := replace(o, x=round(x, 2), y=round(y, 2)), done)), None)
        if found is None:
            return None
        done.append(found)
    return tuple(done)


def relation(a, b, margin=1.4):
    """Where a is as seen from b, or None where that could be argued about (within 10 degrees of the diagonal)."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > margin * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > margin * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def draw(scene, size=CANVAS):
    """The picture, uint8 (size, size, 3): drawn four times as large and averaged, which softens every edge by one pixel."""
    scale = 4 * size / CANVAS
    image = Image.new("RGB", (4 * size, 4 * size), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)
    for o in scene.objects:
        for inset, colour in ((0.0, COLOURS[o.colour]), (STROKE, BACKGROUNDS[scene.background])):
            corners = (polygon(o.shape, o.size, inset) + (o.x, o.y)) * scale
            pen.polygon([tuple(corner) for corner in corners.tolist()], fill=colour)
            if o.style == "filled":
                break
    return np.asarray(image.reduce(4))


# --- Scenes -------------------------------------------------------------------------------------------------------------

def legal(objects):
    return all(fits(o, objects[:i]) for i, o in enumerate(objects))


def holds_out(objects):
    return any((o.colour, o.shape) in HELD_OUT for o in objects)


def pick_look(rng, split, colour=None, shape=None):
    """A (colour, shape) that the split allows, as far as it is not given; "heldout" takes a held-out one half of the time."""
    pairs = [p for p in PAIRS if colour in (None, p[0]) and shape in (None, p[1])]
    seen, unseen = [p for p in pairs if p not in HELD_OUT], [p for p in pairs if p in HELD_OUT]
    return choose(rng, unseen if split == "heldout" and unseen and rng.random() < 0.5 else seen or pairs)


@functools.lru_cache(maxsize=16)   # the edits of a block ask for its scenes again
def scene(index, split="train", seed=SEED):
    """Scene number `index` of a split: one to four objects, with GenEval's tasks in mind."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: allowed are {', '.join(SPLITS)}")
    rng = generator("scene", seed, split, index)
    count, alike = choose(rng, [(1, False), (2, False), (2, True), (3, True), (4, True), (3, False), (4, False)],
                          p=[0.28, 0.38, 0.08, 0.08, 0.08, 0.06, 0.04])
    background = choose(rng, BACKGROUNDS)
    same = {name: alike and rng.random() < 0.75 for name in ("colour", "size", "style")}   # "three stars" need not be equal
    while True:
        objects = []
        for _ in range(count):
            first = objects[0] if objects else None
            colour, shape = pick_look(rng, split, colour=first.colour if first and same["colour"] else None,
                                      shape=first.shape if first and alike else None)
            size = choose(rng, SIZES, p=(0.5, 0.5) if count < 3 else (0.8, 0.2))
            style = choose(rng, STYLES, p=(0.65, 0.35))
            objects.append(Object(shape, colour, first.size if first and same["size"] else size,
                                  first.style if first and same["style"] else style))
        if holds_out(objects) == (split == "heldout"):
            placed = place(objects, rng)
            if placed:
                return Scene(background, placed)


# --- Words --------------------------------------------------------------------------------------------------------------

WORDS = {"small": ("small", "little"), "large": ("large", "big"), "filled": ("filled", "solid"),
         "outline": ("outlined", "hollow"),
         "left": ("to the left of", "left of"), "right": ("to the right of", "right of"),
         "above": ("above", "over"), "below": ("below", "under")}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
FRAMES = ("a picture of {}", "an image of {}", "a drawing of {}")


def noun(o, told, rng, plural=False):
    """'large red star': the attributes in `told`, in the order in which English has them."""
    adjectives = [choose(rng, WORDS.get(getattr(o, name), (getattr(o, name),)))
                  for name in ("size", "style", "colour") if name in told]
    ending = ("es" if o.shape == "cross" else "s") if plural else ""
    return " ".join([*adjectives, o.shape + ending])


def with_article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def pick_told(rng, colour, size, style):
    """Which attributes are mentioned, each with its own probability."""
    return tuple(name for name, p in (("colour", colour), ("size", size), ("style", style)) if rng.random() < p)


def looks_like(a, b, told):
    return a.shape == b.shape and all(getattr(a, name) == getattr(b, name) for name in told)


def caption(scene, rng):
    """What is in the picture: every object is mentioned, attributes may be left unsaid, and nothing said is false."""
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    told = pick_told(rng, colour=0.75, size=0.3, style=0.3)
    groups = []   # objects that the same words describe are counted, in words
    for o in objects:
        group = next((g for g in groups if looks_like(g[0], o, told)), None)
        group.append(o) if group else groups.append([o])
    shapes_differ = len({g[0].shape for g in groups}) == len(groups)
    phrases = []
    for group in groups:
        # "a red circle and a star": only where the shape alone tells them apart, or it would sound as if it meant another.
        drop = shapes_differ and len(groups) > 1 and rng.random() < 0.15
        name = noun(group[0], () if drop else told, rng, plural=len(group) > 1)
        phrases.append(f"{NUMBERS[len(group)]} {name}" if len(group) > 1 else with_article(name))
    text = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    if len(objects) == len(groups) == 2:
        where = relation(*objects)
        if where and rng.random() < 0.6:
            text = f"{phrases[0]} {choose(rng, WORDS[where])} {phrases[1]}"
    if rng.random() < 0.2:
        text = choose(rng, FRAMES).format(text)
    if rng.random() < 0.3:
        text += f" on {with_article(scene.background)} background"
    return text


# --- Edits --------------------------------------------------------------------------------------------------------------

def refer(objects, rng):
    """Points at one object, or at all those of its kind: ('the red circles', their indices, one of them)."""
    anchor, told = choose(rng, objects), pick_told(rng, colour=0.5, size=0.2, style=0.15)
    chosen = [i for i, o in enumerate(objects) if looks_like(anchor, o, told)]
    count = f"{NUMBERS[len(chosen)]} " if len(chosen) > 1 and rng.random() < 0.5 else ""
    return f"the {count}{noun(anchor, told, rng, plural=len(chosen) > 1)}", chosen, anchor


def _change(kind, before, split, rng):
    """One try at an edit: (instruction, target Scene), or None where it does not suit this picture."""
    objects = before.objects
    the, chosen, anchor = refer(objects, rng)

    def changed(**attributes):   # the objects that are meant get these attributes; all else stays the same object
        return tuple(replace(o, **attributes) if i in chosen else o for i, o in enumerate(objects))

    if kind == "background":
        colour = choose(rng, [b for b in BACKGROUNDS if b != before.background])
        text = choose(rng, ("change the background to {}", "make the background {}", "paint the background {}",
                            "put it on {} background"))
        name = with_article(colour) if text.startswith("put") else colour
        return text.format(name), Scene(colour, objects)

    if kind == "add":
        colour, shape = pick_look(rng, split)
        new = Object(shape, colour, choose(rng, SIZES), choose(rng, STYLES, p=(0.65, 0.35)))
        after = place([new], rng, fixed=objects) if len(objects) < 4 else None
        if after is None:
            return None
        where = relation(after[-1], anchor) if len(chosen) == 1 and rng.random() < 0.75 else None
        text = f"{choose(rng, ('add', 'draw', 'insert'))} {with_article(noun(new, ('colour', *pick_told(rng, 0, 0.35, 0.35)), rng))}"
        return text + (f" {choose(rng, WORDS[where])} {the}" if where else ""), Scene(before.background, after)

    if kind == "remove":
        after = tuple(o for i, o in enumerate(objects) if i not in chosen)
        text = choose(rng, ("remove {}", "delete {}", "erase {}", "take {} away"))
        return (text.format(the), Scene(before.background, after)) if after else None

    if kind == "replace":
        new_colour = rng.random() < 0.4
        shared = {objects[i].colour for i in chosen}
        colour, shape = pick_look(rng, split, colour=None if new_colour or len(shared) > 1 else anchor.colour)
        if shape == anchor.shape:
            return None
        after = changed(shape=shape, **({"colour": colour} if new_colour else {}))
        many = len(chosen) > 1
        name = noun(Object(shape, colour, "", ""), ("colour",) if new_colour else (), rng, plural=many)
        text = choose(rng, ("replace {} with {}", "turn {} into {}", "change {} to {}", "swap {} for {}"))
        return text.format(the, name if many else with_article(name)), Scene(before.background, after)

    if kind == "recolour":
        colour, _ = pick_look(rng, split, shape=anchor.shape)
        if any(objects[i].colour == colour for i in chosen):
            return None
        text = choose(rng, ("make {} {}", "paint {} {}", "color {} {}", "turn {} {}", "change the color of {} to {}"))
        return text.format(the, colour), Scene(before.background, changed(colour=colour))

    if kind == "restyle":
        style = choose(rng, STYLES)
        if any(objects[i].style == style for i in chosen):
            return None
        text = choose(rng, ("fill {}", "fill in {}", "make {} filled", "make {} solid") if style == "filled" else
                      ("outline {}", "hollow out {}", "make {} outlined", "make {} hollow"))
        return text.format(the), Scene(before.background, changed(style=style))

    if rng.random() < 0.5:   # resize, about the same centre
        size = choose(rng, SIZES)
        if any(objects[i].size == size for i in chosen):
            return None
        text = choose(rng, ("make {} larger", "make {} bigger", "enlarge {}", "make {} large") if size == "large" else
                      ("make {} smaller", "shrink {}", "make {} small"))
        return text.format(the), Scene(before.background, changed(size=size))

    # move: straight towards one border, up to the margin, so that there is just one right answer
    side = choose(rng, ("left", "right", "top", "bottom"))
    axis = "x" if side in ("left", "right") else "y"
    left, top, right, bottom, _ = room(anchor.shape, anchor.size)
    value = {"left": left, "right": right, "top": top, "bottom": bottom}[side]
    if len(chosen) > 1 or abs(getattr(anchor, axis) - value) < 8:
        return None
    text = choose(rng, ("move {} to the {}", "push {} to the {}", "move {} to the {} edge", "shift {} to the {}"))
    return text.format(the, side), Scene(before.background, changed(**{axis: value}))


def triple(index, split="train", seed=SEED):
    """Edit number `index`: (index of the source scene, source, instruction, target, kind), from the scenes of its own block."""
    rng = generator("edit", seed, split, index)
    sources = [(i, scene(i, split, seed)) for i in range(3 * (index // 2), 3 * (index // 2) + 3)]
    first = index % len(KINDS)   # the kinds take turns; the next one stands in where none of the three scenes allows this one
    for kind in KINDS[first:] + KINDS[:first]:
        for _ in range(30):
            number, before = choose(rng, sources)
            made = _change(kind, before, split, rng)
            if made is None:
                continue
            text, after = made
            if after != before and legal(after.objects) and holds_out(after.objects) == (split == "heldout"):
                return number, before, text, after, kind
    raise AssertionError(f"no edit for index {index} of {split}: every scene allows at least another background")


def edit(index, split="train", seed=SEED):
    """Edit number `index` of a split: (source Scene, instruction, target Scene, kind). All else stays exactly as it was."""
    return triple(index, split, seed)[1:]


# --- A folder of it -----------------------------------------------------------------------------------------------------

def counts(count):
    """Pictures per split: beside `count` for training, 2 % of that for each of the others, at most 1,000."""
    return {"train": count, "val": min(1000, max(5, count // 50)), "heldout": min(1000, max(5, count // 50))}


def rows(split, start, stop, seed=SEED, edits=True):
    """For each picture of a split: its Scene and its rows of metadata."""
    for number in range(start, stop):
        block, place_ = divmod(number, 5) if edits else (0, number)
        name, extra = f"{number:06d}.png", []
        if edits and place_ >= 3:
            source, _, text, content, kind = triple(2 * block + place_ - 3, split, seed)
            extra = [{"text": text, "source": f"{5 * (source // 3) + source % 3:06d}.png", "kind": kind}]
        else:
            content = scene(3 * block + place_ if edits else number, split, seed)
        text = caption(content, generator("caption", seed, split, number))
        facts = dataclasses.asdict(content)
        yield content, [{"file_name": name, **row, "scene": facts} for row in [{"text": text}, *extra]]


def _write_part(folder, part, parts, count, size, seed, edits):
    """Draws one of `parts` equal shares of every split."""
    for split, total in counts(count).items():
        start, stop = total * part // parts, total * (part + 1) // parts
        with open(folder / split / f"part{part:03d}.jsonl", "w", encoding="utf-8") as file:
            for content, described in rows(split, start, stop, seed, edits):
                Image.fromarray(draw(content, size)).save(folder / split / described[0]["file_name"], compress_level=1)
                file.writelines(json.dumps(row) + "\n" for row in described)


def finished(folder):
    """What world.json says, or None where no finished world is there."""
    try:
        return json.loads((Path(folder) / "world.json").read_text())
    except (OSError, ValueError):
        return None


def write(folder="out/world", count=50_000, edits=True, size=CANVAS, seed=SEED, workers=None):
    """Draws the world into `folder`. A killed run leaves only `folder`.partial, so what bears the name is always whole."""
    folder = Path(folder)
    about = {"version": VERSION, "count": count, "size": size, "seed": seed, "edits": bool(edits)}
    if folder.exists():
        if finished(folder) == about:
            return folder
        raise FileExistsError(f"{folder} exists and is not this world (there: {finished(folder)}, asked: {about}); "
                              f"move it away, or write to another --out")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split in SPLITS:
        (partial / split).mkdir(parents=True)
    workers = max(1, min(workers or os.cpu_count() or 1, count // 500))
    settings = (count, size, seed, int(bool(edits)))
    if workers == 1:
        _write_part(partial, 0, 1, *settings)
    else:
        # Whole processes of this file: they never import the caller's main module again, as multiprocessing would.
        job = [sys.executable, str(Path(__file__).resolve()), "--part", str(partial)]
        running = [subprocess.Popen([*job, *map(str, (part, workers, *settings))]) for part in range(workers)]
        failed = [process.args[4] for process in running if process.wait()]
        if failed:
            raise RuntimeError(f"drawing the world failed in part {', '.join(failed)} of {workers} (the reason is above)")
    for split in SPLITS:
        parts = sorted((partial / split).glob("part*.jsonl"))
        (partial / split / "metadata.jsonl").write_bytes(b"".join(part.read_bytes() for part in parts))
        for part in parts:
            part.unlink()
    (partial / "world.json").write_text(json.dumps(about) + "\n")
    os.replace(partial, folder)
    return folder


# --- To look at ---------------------------------------------------------------------------------------------------------

def sheet(columns=4, lines=8, split="train", seed=SEED, zoom=2):
    """A contact sheet: scenes with their captions, then edits as source | target with their instructions."""
    cell, text_height = CANVAS * zoom, 44
    width, height = 2 * cell + 24, cell + text_height
    page = Image.new("RGB", (columns * width, lines * height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)

    def show(content, x, y):
        page.paste(Image.fromarray(draw(content)).resize((cell, cell), Image.NEAREST), (x, y))

    def write_lines(text, x, y, room):
        line = ""
        for word in text.split():
            if pen.textlength(f"{line} {word}", font=font) > room and line:
                pen.text((x, y), line, fill="black", font=font)
                line, y = word, y + 14
            else:
                line = f"{line} {word}".strip()
        pen.text((x, y), line, fill="black", font=font)

    for number in range(columns * lines):
        x, y = number % columns * width + 8, number // columns * height + 4
        if number < columns * lines // 2:
            for i in range(2):
                content = scene(2 * number + i, split, seed)
                show(content, x + i * (cell + 4), y)
                words = caption(content, generator("caption", seed, split, number, i))
                write_lines(words, x + i * (cell + 4), y + cell, cell - 2)
        else:
            before, text, after, kind = edit(number - columns * lines // 2, split, seed)
            show(before, x, y), show(after, x + cell + 4, y)
            write_lines(f"[{kind}] {text}", x, y + cell, 2 * cell)
    return page


def main():
    if sys.argv[1:2] == ["--part"]:   # a worker of write()
        folder, *numbers = sys.argv[2:]
        return _write_part(Path(folder), *map(int, numbers))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/world", help="folder to write (out/world)")
    parser.add_argument("--count", type=int, default=50_000, help="training pictures (50000)")
    parser.add_argument("--no-edits", action="store_true", help="captioned pictures only")
    parser.add_argument("--size", type=int, default=CANVAS, help="pixels along an edge (64)")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=int, default=None, help="processes (one per core)")
    parser.add_argument("--split", default="train", choices=SPLITS, help="which split --sheet shows")
    parser.add_argument("--sheet", metavar="PNG", help="write only a contact sheet, to look at")
    args = parser.parse_args()
    if args.sheet:
        sheet(split=args.split, seed=args.seed).save(args.sheet)
        return print(f"a contact sheet: {args.sheet}")
    if args.count < 1 or args.size < 8:
        parser.error(f"--count {args.count} --size {args.size}: count must be at least 1, size at least 8")
    try:
        folder = write(args.out, args.count, not args.no_edits, args.size, args.seed, args.workers)
    except FileExistsError as error:
        parser.error(str(error))
    print(f"{folder}: " + ", ".join(f"{split} {total:,}" for split, total in counts(args.count).items()) + " pictures")


if __name__ == "__main__":
    main()
