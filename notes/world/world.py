"""The built-in world: coloured shapes on a plain background, true captions, edits that change one
thing.

A picture of this world can be checked against its prompt by geometry instead of by opinion
(judge.py does), needs no download, and is the same on every machine: everything is a function of
(seed, split, index).

    python notes/world/world.py          draws out/world, 90,000 training pictures, in two minutes
    python data.py --data out/world      a contact sheet of it, to look at

What is written is an ordinary folder of images with a metadata.jsonl, as data.py reads any other:

    train/metadata.jsonl   {"file_name", "text"[, "scene"]}           captions: four a picture
                           {"file_name", "text", "source", "kind"}    edits: source, text -> picture
                           {"file_name", "text": ""}                  pictures without a word
    val/                   unseen pictures of the same world
    heldout/               pictures that each hold a (colour, shape) pair which no caption of
                           training names, and no edit shows: it is seen without words alone
    world.json             written last: version, count, size, seed

Pictures come in blocks of five: two scenes, then three edits of these, so that the words, not the
source, tell what to do. A small world is the beginning of a large one. For every five there is one
without words, behind all the others.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

VERSION = 7   # goes up whenever the same index would draw or say something else
SEED = 0
CANVAS = 64   # positions and sizes are in units of this canvas, whatever the size in pixels

# Objects are vivid and backgrounds muted. Neither the average of two backgrounds nor that of an
# object and a background comes closer than 30 (in RGB) to a palette colour: a half-blended picture
# can not pass for a clean one.
COLOURS = {"red": (214, 40, 40), "orange": (255, 136, 20), "yellow": (255, 217, 30),
           "green": (30, 150, 60), "blue": (30, 85, 220), "purple": (130, 45, 165),
           "black": (16, 16, 18), "white": (250, 250, 250)}
BACKGROUNDS = {"gray": (142, 146, 148), "beige": (228, 218, 160), "pink": (224, 158, 172),
               "teal": (86, 182, 180), "brown": (110, 78, 48), "lavender": (164, 144, 222)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = {"small": 8.0, "large": 10.5}  # radius of the circle; the other shapes have the same area
STYLES = ("filled", "outline")
LOOK = ("shape", "colour", "size", "style")   # all that is to say of an object but its place
STROKE = 2.75            # width of an outline: leaves even the small star and cross a visible hole
MARGIN = 1.2             # least distance to the picture's border
# Centres are multiples of this, the side of a latent cell. So an object covers the two by two cells
# round a corner, and a cell holds a quarter of one object or nothing: few things, each seen often
# (decisions.md).
LATTICE = 16

# One pair for every shape: words name it in seven colours, and each colour on five shapes or all
# six. Autoencoders see pictures of these pairs, too, but nobody says what they are (decisions.md).
HELD_OUT = frozenset({("purple", "circle"), ("orange", "square"), ("blue", "triangle"),
                      ("green", "diamond"), ("yellow", "cross"), ("red", "star")})
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
SPLITS = ("train", "val", "heldout")
WORDLESS = "wordless"   # scenes like those of heldout, among the training pictures
CAPTIONS = (True, True, False, False)   # of each picture: two complete, two that leave things out
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
    """A Generator of its own for every key: no order, no number of workers changes a picture."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def choose(rng, options, p=None):
    options = tuple(options)
    if p is None:
        return options[int(rng.integers(len(options)))]
    return options[int(np.searchsorted(np.cumsum(p), rng.random() * sum(p)))]


# --- Geometry -------------------------------------------------------------------------------------

# Corners, degrees by which the first is turned from the top, radius of every second one.
CORNERS = {"circle": (64, 0, 1.0), "square": (4, 45, 1.0), "diamond": (4, 0, 1.0),
           "triangle": (3, 0, 1.0), "star": (10, 0, 0.5)}
ARM = 0.42   # half the width of a cross's arm, by its length: wider, and a soft cross is a circle


def _normals(points):
    """Each edge's outward normal, for corners that go round clockwise on the screen (y down)."""
    edge = np.roll(points, -1, axis=0) - points
    return np.stack([edge[:, 1], -edge[:, 0]], axis=1) / np.linalg.norm(edge, axis=1, keepdims=True)


@functools.lru_cache(maxsize=None)
def polygon(shape, size, inset=0.0):
    """(corners, 2) around (0, 0), its edges moved inwards by `inset`."""
    if shape == "cross":
        arm = np.array([(-ARM, -1.0), (ARM, -1.0), (ARM, -ARM)])   # turned four times
        turns = [np.array([(c, s), (-s, c)]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        points = np.concatenate([arm @ turn for turn in turns])
    else:
        corners, turn, inner = CORNERS[shape]
        angle = np.radians(turn + 360 / corners * np.arange(corners))
        radius = np.where(np.arange(corners) % 2, inner, 1.0)
        points = np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)
    x, y = points.T
    area = 0.5 * np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))
    points = points * np.sqrt(np.pi * SIZES[size] ** 2 / area)
    # A corner moves along the sum of its edges' normals, as far as brings both inwards by 1:
    # (n + m) / (1 + n·m).
    n = _normals(points)
    m = np.roll(n, 1, axis=0)
    return points - inset * (n + m) / (1 + np.sum(n * m, axis=1, keepdims=True))


@functools.lru_cache(maxsize=None)
def room(shape, size):
    """(left, top, right, bottom, reach): the outermost points of the lattice where its centre may
    be, and the radius of the circle around it."""
    corners = polygon(shape, size)
    low = LATTICE * np.ceil((MARGIN - corners.min(0)) / LATTICE)
    high = LATTICE * np.floor((CANVAS - MARGIN - corners.max(0)) / LATTICE)
    return (*low.tolist(), *high.tolist(), float(np.linalg.norm(corners, axis=1).max()))


def fits(o, others):
    """Whether o lies inside the picture and shares no cell with any other."""
    left, top, right, bottom, _ = room(o.shape, o.size)
    return left <= o.x <= right and top <= o.y <= bottom and all(
        max(abs(o.x - b.x), abs(o.y - b.y)) >= 2 * LATTICE for b in others)


def place(objects, rng, fixed=(), tries=20):
    """Puts `objects` at free points of the lattice beside those already `fixed`; None if there is
    no room."""
    for _ in range(tries):   # four objects fit in one way only, the four corners
        done = list(fixed)
        for o in objects:
            left, top, right, bottom, _ = room(o.shape, o.size)
            spots = [replace(o, x=x, y=y) for x in np.arange(left, right + 1, LATTICE).tolist()
                     for y in np.arange(top, bottom + 1, LATTICE).tolist()]
            spots = [spot for spot in spots if fits(spot, done)]
            if spots:
                done.append(choose(rng, spots))
        if len(done) == len(fixed) + len(objects):
            return tuple(done)
    return None


def relation(a, b, margin=1.4):
    """Where a is as seen from b, or None where that could be argued about: near the diagonal."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > margin * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > margin * abs(dx):
        return "above" if dy < 0 else "below"
    return None


@functools.lru_cache(maxsize=None)
def _edges(shape, size, inset):
    """The directions of its corners, increasing, and each edge's normal and distance from the
    centre."""
    corners = polygon(shape, size, inset)
    angles = np.arctan2(corners[:, 1], corners[:, 0])
    corners = np.roll(corners, -int(angles.argmin()), axis=0)
    normal = _normals(corners)
    return np.sort(angles), normal, (normal * corners).sum(1)


def coverage(shape, size, x, y, inset=0.0, scale=1.0):
    """How much of each pixel at (x, y) from the centre a shape covers, 0 to 1; `scale` pixels to
    the unit.

    All shapes are star-shaped: in every direction from the centre there is just one edge, and
    within half a pixel of it the cover falls from 1 to 0. That is an antialiased polygon, with
    neither supersampling nor a loop.
    """
    angles, normal, offset = _edges(shape, size, inset)
    k = np.searchsorted(angles, np.arctan2(y, x)) - 1   # -1, before corner 0: the edge ending there
    return np.clip(0.5 - scale * (normal[k, 0] * x + normal[k, 1] * y - offset[k]), 0, 1)


def draw(scene, size=CANVAS):
    """The picture, uint8 (size, size, 3)."""
    scale = size / CANVAS
    picture = np.empty((size, size, 3))
    picture[:] = BACKGROUNDS[scene.background]
    for o in scene.objects:
        reach = room(o.shape, o.size)[-1] + 1 / scale
        rows, columns = (slice(max(0, int(scale * (c - reach))), int(scale * (c + reach)) + 1)
                         for c in (o.y, o.x))
        at = (np.arange(size) + 0.5) / scale
        x, y = np.meshgrid(at[columns] - o.x, at[rows] - o.y)
        alpha = coverage(o.shape, o.size, x, y, scale=scale)
        if o.style == "outline":
            alpha = alpha - coverage(o.shape, o.size, x, y, STROKE, scale)
        under = picture[rows, columns]
        under += alpha[..., None] * (np.array(COLOURS[o.colour]) - under)
    return picture.round().astype(np.uint8)


# --- Scenes ---------------------------------------------------------------------------------------

def legal(objects):
    return all(fits(o, objects[:i]) for i, o in enumerate(objects))


def holds_out(objects):
    return any((o.colour, o.shape) in HELD_OUT for o in objects)


def pick_look(rng, split, colour=None, shape=None):
    """A (colour, shape) that the split allows, as far as it is not given;
    for "heldout" and WORDLESS every other is held out."""
    pairs = [p for p in PAIRS if colour in (None, p[0]) and shape in (None, p[1])]
    seen, unseen = [p for p in pairs if p not in HELD_OUT], [p for p in pairs if p in HELD_OUT]
    held_out = split in ("heldout", WORDLESS) and unseen and rng.random() < 0.5
    return choose(rng, unseen if held_out else seen or pairs)


@functools.lru_cache(maxsize=16)   # the edits of a block ask for its scenes again
def scene(index, split="train"):
    """Scene number `index` of a split: one to four objects, with GenEval's tasks in mind."""
    rng = generator("scene", SEED, split, index)
    count, alike = choose(rng, [(1, False), (2, False), (2, True), (3, True), (4, True), (3, False),
                                (4, False)], p=[0.26, 0.34, 0.08, 0.10, 0.10, 0.08, 0.04])
    background = choose(rng, BACKGROUNDS)
    # "three stars" have the shape in common, and only maybe the rest.
    same = {name: alike and rng.random() < 0.85 for name in ("colour", "size", "style")}
    while True:
        objects = []
        for _ in range(count):
            first = objects[0] if objects else None
            colour = first.colour if first and same["colour"] else None
            colour, shape = pick_look(rng, split, colour, first.shape if first and alike else None)
            size = choose(rng, SIZES, p=(0.5, 0.5) if count < 3 else (0.8, 0.2))
            style = choose(rng, STYLES, p=(0.65, 0.35))
            objects.append(Object(shape, colour, first.size if first and same["size"] else size,
                                  first.style if first and same["style"] else style))
        if holds_out(objects) == (split in ("heldout", WORDLESS)):
            placed = place(objects, rng)
            if placed:
                return Scene(background, placed)


# --- Words ----------------------------------------------------------------------------------------

WORDS = {   # the plainest first: it is said three times as often as any other
    "small": ("small", "little"), "large": ("large", "big"), "filled": ("filled", "solid"),
    "outline": ("outlined", "hollow"),
    "red": ("red", "crimson"), "orange": ("orange", "tangerine"), "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"), "blue": ("blue", "navy"), "purple": ("purple", "violet"),
    "gray": ("gray", "grey"),
    "circle": ("circle", "disc"), "square": ("square", "box"), "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus"),
    "left": ("to the left of", "left of"), "right": ("to the right of", "right of"),
    "above": ("above", "over"), "below": ("below", "under")}
NUMBERS = {2: "two", 3: "three", 4: "four"}
FRAMES = ("a picture of {}", "an image of {}", "a drawing of {}")
PLACES = {(x, y): " ".join((vertical + horizontal).split()) or "center"
          for y, vertical in ((1, "top "), (2, ""), (3, "bottom "))
          for x, horizontal in ((1, "left"), (2, ""), (3, "right"))}


def say(name, rng):
    words = WORDS.get(name, (name,))
    return choose(rng, words, p=(3,) + (1,) * (len(words) - 1))


def noun(o, told, rng, plural=False):
    """'large red star': the attributes in `told`, in the order in which English has them."""
    adjectives = [say(getattr(o, name), rng) for name in ("size", "style", "colour")
                  if name in told]
    word = say(o.shape, rng)
    if plural:
        word += "es" if word.endswith(("s", "x")) else "s"
    return " ".join([*adjectives, word])


def where_is(o):
    """'at the top left'"""
    name = PLACES[round(o.x / LATTICE), round(o.y / LATTICE)]
    return f"{'in' if name == 'center' else 'at'} the {name}"


def with_article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def pick_told(rng, colour, size, style):
    """Which attributes are mentioned, each with its own probability."""
    chances = {"colour": colour, "size": size, "style": style}
    return tuple(name for name, p in chances.items() if rng.random() < p)


def looks_like(a, b, told):
    return a.shape == b.shape and all(getattr(a, name) == getattr(b, name) for name in told)


def alike(objects, told=LOOK):
    """[[objects that the same words describe], …], which captions count in words."""
    groups = {}
    for o in objects:
        groups.setdefault((o.shape, *(getattr(o, name) for name in told)), []).append(o)
    return list(groups.values())


def listing(phrases):
    """'a, b and c'"""
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]][len(phrases) < 2:])


def caption(scene, rng, complete=False):
    """What is in the picture: every object is mentioned, nothing said is false.

    A complete one leaves nothing of an object's look unsaid, nor the background, and mostly not
    where things stand. Others leave out at random. Vague captions alone teach slowly: at high noise
    a picture is mostly chance to them, and the little that their words explain drowns (LOG.md).
    """
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    told = LOOK[1:] if complete else pick_told(rng, colour=0.75, size=0.25, style=0.25)
    groups = alike(objects, told)
    shapes_differ = len({g[0].shape for g in groups}) == len(groups)
    places = rng.random() < (0.6 if complete else 0.1)
    phrases = []
    for group in groups:
        # "a red circle and a star": only where the shape alone tells them apart.
        drop = not complete and shapes_differ and len(groups) > 1 and rng.random() < 0.15
        name = noun(group[0], () if drop else told, rng, plural=len(group) > 1)
        name = f"{NUMBERS[len(group)]} {name}" if len(group) > 1 else with_article(name)
        phrases.append(name + (f" {where_is(group[0])}" if places and len(group) == 1 else ""))
    text = listing(phrases)
    if len(objects) == len(groups) == 2 and not places:
        where = relation(*objects)
        if where and (complete or rng.random() < 0.8):
            text = f"{phrases[0]} {say(where, rng)} {phrases[1]}"
    if rng.random() < 0.15:
        text = choose(rng, FRAMES).format(text)
    if complete or rng.random() < 0.25:
        text += f" on {with_article(say(scene.background, rng))} background"
    return as_typed(text, rng)


def as_typed(text, rng, begin=("there is", "there are")):
    """People leave out articles, or write a sentence. (The tokenizer has no capitals.)"""
    way = rng.random()
    if way < 0.15:
        return re.sub(r"\b(an?|the) ", "", text)
    if way < 0.25 and begin:
        return f"{begin[text.startswith(tuple(NUMBERS.values()))]} {text}."
    return text + "." if way < 0.35 else text


# --- Edits ----------------------------------------------------------------------------------------

ASK = {   # several wordings for each kind of edit
    "add": ("add {}", "draw {}", "insert {}"),
    "remove": ("remove {}", "delete {}", "erase {}", "take {} away"),
    "replace": ("replace {} with {}", "turn {} into {}", "change {} to {}", "swap {} for {}"),
    "recolour": ("make {} {}", "paint {} {}", "color {} {}", "turn {} {}",
                 "change the color of {} to {}"),
    "filled": ("fill {}", "fill in {}", "make {} filled", "make {} solid"),
    "outline": ("outline {}", "hollow out {}", "make {} outlined", "make {} hollow"),
    "large": ("make {} larger", "make {} bigger", "enlarge {}", "make {} large"),
    "small": ("make {} smaller", "shrink {}", "make {} small"),
    "move": ("move {} to the {}", "push {} to the {}", "move {} to the {} edge",
             "shift {} to the {}"),
    "background": ("change the background to {}", "make the background {}",
                   "paint the background {}", "put it on a {} background"),
}


def refer(objects, rng):
    """Points at one object, or at all those of its kind: ('the red circles', their indices, one of
    them)."""
    anchor, told = choose(rng, objects), pick_told(rng, colour=0.5, size=0.2, style=0.15)
    chosen = [i for i, o in enumerate(objects) if looks_like(anchor, o, told)]
    count = f"{NUMBERS[len(chosen)]} " if len(chosen) > 1 and rng.random() < 0.5 else ""
    return f"the {count}{noun(anchor, told, rng, plural=len(chosen) > 1)}", chosen, anchor


def _change(kind, before, split, rng):
    """One try at an edit: (instruction, target Scene), or None where it does not suit this
    picture."""
    objects = before.objects
    the, chosen, anchor = refer(objects, rng)

    def result(ask, *names, **attributes):   # those meant get these attributes, all else stays
        already = any(getattr(objects[i], name) == value for i in chosen
                      for name, value in attributes.items())
        if already and kind != "replace":
            return None
        after = tuple(replace(o, **attributes) if i in chosen else o for i, o in enumerate(objects))
        words = names if ask == "move" else [say(n, rng) for n in names]   # "left": no relation
        return choose(rng, ASK[ask]).format(the, *words), replace(before, objects=after)

    if kind == "background":
        colour = choose(rng, [b for b in BACKGROUNDS if b != before.background])
        ask = choose(rng, ASK[kind])
        return ask.format(say(colour, rng)), replace(before, background=colour)

    if kind == "add":
        colour, shape = pick_look(rng, split)
        new = Object(shape, colour, choose(rng, SIZES), choose(rng, STYLES, p=(0.65, 0.35)))
        after = place([new], rng, fixed=objects) if len(objects) < 4 else None
        if after is None:
            return None
        where = relation(after[-1], anchor) if len(chosen) == 1 and rng.random() < 0.75 else None
        ask, told = choose(rng, ASK[kind]), ("colour", *pick_told(rng, 0, 0.35, 0.35))
        text = ask.format(with_article(noun(new, told, rng)))
        return text + (f" {say(where, rng)} {the}" if where else ""), replace(before, objects=after)

    if kind == "remove":
        after = tuple(o for i, o in enumerate(objects) if i not in chosen)
        text = choose(rng, ASK[kind]).format(the)
        return (text, replace(before, objects=after)) if after else None

    if kind == "replace":
        named = ("colour",) if rng.random() < 0.4 else ()
        mixed = len({objects[i].colour for i in chosen}) > 1
        colour, shape = pick_look(rng, split, colour=None if named or mixed else anchor.colour)
        if shape == anchor.shape:
            return None
        name = noun(Object(shape, colour, "", ""), named, rng, plural=len(chosen) > 1)
        name = name if len(chosen) > 1 else with_article(name)
        return result("replace", name, shape=shape, **({"colour": colour} if named else {}))

    if kind == "recolour":
        colour, _ = pick_look(rng, split, shape=anchor.shape)
        return result("recolour", colour, colour=colour)

    if kind == "restyle":
        style = choose(rng, STYLES)
        return result(style, style=style)

    if rng.random() < 0.5:   # resize, about the same centre
        size = choose(rng, SIZES)
        return result(size, size=size)

    # move: straight towards one border, up to the margin, so that there is just one right answer
    side = choose(rng, ("left", "right", "top", "bottom"))
    axis = "x" if side in ("left", "right") else "y"
    value = room(anchor.shape, anchor.size)[("left", "top", "right", "bottom").index(side)]
    if len(chosen) > 1 or abs(getattr(anchor, axis) - value) < 8:
        return None
    return result("move", side, **{axis: value})


def triple(index, split="train"):
    """Edit number `index`, of the scenes of its own block:
    (source's index, source, instruction, target, kind)."""
    rng = generator("edit", SEED, split, index)
    sources = [(i, scene(i, split)) for i in range(2 * (index // 3), 2 * (index // 3) + 2)]
    first = index % len(KINDS)   # kinds take turns; where no scene allows one, the next stands in
    for kind in KINDS[first:] + KINDS[:first]:
        for _ in range(30):
            number, before = choose(rng, sources)
            text, after = _change(kind, before, split, rng) or ("", None)
            if after and legal(after.objects) and holds_out(after.objects) == (split == "heldout"):
                return number, before, as_typed(text, rng, begin=()), after, kind
    raise AssertionError(f"no edit {index} of {split}, though each allows another background")


def edit(index, split="train"):
    """Edit number `index` of a split: (source Scene, instruction, target Scene, kind).
    All else stays as it was."""
    return triple(index, split)[1:]


# --- A folder of it -------------------------------------------------------------------------------

def counts(count):
    """Pictures per split: `count` with words for training, a fifth as many without, and of each
    other 2 %, at most 1,000."""
    few = min(1000, max(5, count // 50))
    return {"train": count, WORDLESS: count // 5, "val": few, "heldout": few}


def rows(split, start, stop):
    """For each picture of a split: its Scene and its rows of metadata."""
    for number in range(start, stop):
        if split == WORDLESS:
            name = f"{WORDLESS}{number:06d}.png"
            yield scene(number, split), [{"file_name": name, "text": ""}]
            continue
        block, place_in_block = divmod(number, 5)
        name, extra = f"{number:06d}.png", []
        if place_in_block >= 2:
            source, _, text, content, kind = triple(3 * block + place_in_block - 2, split)
            source = f"{5 * (source // 2) + source % 2:06d}.png"
            extra = [{"text": text, "source": source, "kind": kind}]
        else:
            content = scene(2 * block + place_in_block, split)
        rng = generator("caption", SEED, split, number)
        texts = dict.fromkeys(caption(content, rng, complete) for complete in CAPTIONS)
        captions = [{"text": text} for text in texts]
        captions[0]["scene"] = dataclasses.asdict(content)
        yield content, [{"file_name": name, **row} for row in [*captions, *extra]]


def _write_part(folder, part, parts, count, size):
    """Draws one of `parts` equal shares of every split."""
    for split, total in counts(count).items():
        start, stop = total * part // parts, total * (part + 1) // parts
        to = folder / ("train" if split == WORDLESS else split)
        with open(to / f"{split}{part:03d}.jsonl", "w", encoding="utf-8") as file:
            for content, described in rows(split, start, stop):
                picture = Image.fromarray(draw(content, size))
                picture.save(to / described[0]["file_name"], compress_level=1)
                file.writelines(json.dumps(row) + "\n" for row in described)


def finished(folder):
    """What world.json says, or None where no finished world is there."""
    try:
        return json.loads((Path(folder) / "world.json").read_text())
    except (OSError, ValueError):
        return None


def write(folder="out/world", count=75_000, size=CANVAS, workers=None):
    """Draws the world into `folder`. A killed run leaves only `folder`.partial."""
    folder = Path(folder)
    about = {"version": VERSION, "count": count, "size": size, "seed": SEED}
    if folder.exists():
        if finished(folder) == about:
            return folder
        raise FileExistsError(f"{folder} exists and is not this world (there: {finished(folder)}, "
                              f"asked: {about}); move it away, or write to another --out")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split in SPLITS:
        (partial / split).mkdir(parents=True)
    workers = max(1, min(workers or os.cpu_count() or 1, count // 500))
    if workers == 1:
        _write_part(partial, 0, 1, count, size)
    else:
        # Whole processes of this file: they never import the caller's main module again, as
        # multiprocessing would, and they end with this one, whose end of the pipe is then closed.
        job = [sys.executable, str(Path(__file__).resolve()), "--part", str(partial)]
        running = [subprocess.Popen([*job, *map(str, (part, workers, count, size))],
                                    stdin=subprocess.PIPE) for part in range(workers)]
        failed = [process.args[4] for process in running if process.wait()]
        if failed:
            raise RuntimeError(f"drawing the world failed in part {', '.join(failed)} "
                               f"of {workers} (see above)")
    for split in SPLITS:
        parts = sorted((partial / split).glob("*.jsonl"))   # train000 … before wordless000 …
        rows_of_all = b"".join(part.read_bytes() for part in parts)
        (partial / split / "metadata.jsonl").write_bytes(rows_of_all)
        for part in parts:
            part.unlink()
    (partial / "world.json").write_text(json.dumps(about) + "\n")
    os.replace(partial, folder)
    return folder


def main():
    if sys.argv[1:2] == ["--part"]:   # a worker of write()
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
        folder, *numbers = sys.argv[2:]
        return _write_part(Path(folder), *map(int, numbers))
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/world", help="folder to write (out/world)")
    parser.add_argument("--count", type=int, default=75_000,
                        help="training pictures that have words (75000)")
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"--count {args.count}: at least 1")
    try:
        folder = write(args.out, args.count)
    except OSError as error:                          # another world is there; no room
        parser.error(str(error))
    said = ", ".join(f"{split} {n:,}" for split, n in counts(args.count).items())
    print(f"{folder}: pictures: {said}")


if __name__ == "__main__":
    main()
