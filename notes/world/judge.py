"""Reads a picture of the built-in world back into facts, by geometry, or says that it can not.

    python notes/world/judge.py                how often it is right, or rightly refuses: a minute
    python notes/world/judge.py --model out    also on pictures out of the PS-VAE of that folder
    python notes/world/judge.py a.png b.png    what it sees there

It knows the palette and the outlines of the shapes, nothing else. Each connected region that is not
background is compared with 24 templates (6 shapes x 2 sizes x 2 styles) at its centre of mass. A
picture counts only if every region is clean: one palette colour, one shape that fits and fits
clearly best; and nothing may be left over. All else is unreadable, which counts as wrong.
"""

import argparse
import functools
import itertools
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from notes.world.world import (BACKGROUNDS, CANVAS, COLOURS, LOOK, SHAPES, SIZES,  # noqa: E402
                               STROKE, STYLES, Object, Scene, draw, generator, looks_like,
                               polygon, relation, scene)

BACKGROUND_RGB = np.array(list(BACKGROUNDS.values()), np.float32)
OBJECT_RGB = np.array(list(COLOURS.values()), np.float32)
PALETTE = np.concatenate([BACKGROUND_RGB, OBJECT_RGB])

# Tolerances in RGB distance: palette colours are 60 or more apart, averages with a background
# stay 30 away, a decoder errs by 5.
BACKGROUND_OFF = 18.0   # of the background's median from its palette colour
COLOUR_OFF = 24.0       # of an object's colour, fitted through its template, from the palette's
FLATNESS = 11.0         # RMS of whatever the reading leaves unexplained, edges of objects left out
GHOST = 28.0            # the same, averaged over any 5 x 5 pixels
# Tolerances of shape.
SPECK = 5               # pixels: a smaller region is no object (but may be a ghost)
MISFIT = 0.055          # squared difference of coverage, per pixel of edge: deformed beyond this
RIVAL = 1.5             # the second best shape must fit this many times worse
# Sigma in pixels: no decoder's edges are quite sharp, but what the last one fits best is blurred.
SOFTNESS = (0.0, 0.6, 0.95, 1.3, 2.0)

TEMPLATES = list(itertools.product(SHAPES, SIZES, STYLES))
HALF = 19               # half a template's width: the large triangle reaches 16.4 from its centre
WIDTH = 2 * HALF


@functools.lru_cache(maxsize=1)
def templates():
    """Coverage of all templates, in each softness, for centres at quarters of a pixel.

    Returns coverage (4, 4, 24 * 5, WIDTH, WIDTH), its squared norms (4, 4, 24 * 5),
    lengths of edge (24 * 5,).
    """
    fine = 8
    masks = np.zeros((len(TEMPLATES), fine * WIDTH, fine * WIDTH), np.float32)
    edges = np.zeros(len(TEMPLATES))
    for k, (shape, size, style) in enumerate(TEMPLATES):
        image = Image.new("L", masks[k].shape)
        for inset, value in ((0.0, 1), (STROKE, 0))[:1 + (style == "outline")]:
            corners = polygon(shape, size, inset)
            ImageDraw.Draw(image).polygon(((corners + HALF) * fine).ravel().tolist(), fill=value)
            edges[k] += np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1).sum()
        masks[k] = np.asarray(image)
    out = np.zeros((4, 4, len(TEMPLATES), len(SOFTNESS), WIDTH, WIDTH), np.float32)
    at = np.arange(WIDTH)
    for j, i in itertools.product(range(4), range(4)):   # at the border are zeros: they roll over
        moved = np.roll(masks, (j * fine // 4, i * fine // 4), axis=(1, 2))
        sharp = moved.reshape(len(TEMPLATES), WIDTH, fine, WIDTH, fine).mean((2, 4))
        for level, sigma in enumerate(SOFTNESS):
            blur = np.exp(-0.5 * ((at[:, None] - at) / max(sigma, 1e-3)) ** 2)
            blur = (blur / blur.sum(1, keepdims=True)).astype(np.float32)
            out[j, i, :, level] = blur @ sharp @ blur.T
    out = out.reshape(4, 4, -1, WIDTH, WIDTH)
    return out, (out ** 2).sum((3, 4)), np.repeat(edges, len(SOFTNESS))


EIGHT = np.ones((3, 3), bool)   # a pixel's neighbours, diagonals included


def read(picture):
    """A picture, uint8 (64, 64, 3) -> a Scene with the objects' centres, or None: unreadable."""
    picture = np.asarray(picture)
    if picture.shape != (CANVAS, CANVAS, 3):
        raise ValueError(f"the judge reads pictures of 64 x 64 x 3, not {picture.shape}")
    rgb = picture.astype(np.float32)
    # Squared distances from the palette, less the pixel's own |p|^2, which all have in common.
    distance = (PALETTE ** 2).sum(1) - 2 * (rgb @ PALETTE.T)
    nearest = distance.argmin(-1)
    back = int(np.bincount(nearest.ravel(), minlength=len(PALETTE))[:len(BACKGROUND_RGB)].argmax())
    if not np.any(nearest == back):
        return None
    base = np.median(rgb[nearest == back], axis=0)
    if np.linalg.norm(base - BACKGROUND_RGB[back]) > BACKGROUND_OFF:
        return None
    # On an edge the wrong colour may be nearest:
    # it only counts whether any object's colour beats this background.
    labels, count = ndimage.label(
        distance[:, :, len(BACKGROUND_RGB):].min(-1) < distance[:, :, back], EIGHT)
    objects, edges, rest = [], np.zeros(labels.shape, bool), rgb - base
    for label in range(1, count + 1):
        if np.count_nonzero(labels == label) < SPECK:
            continue
        found = _match(rgb - base, base, labels, label)
        if found is None or len(objects) == 4:
            return None
        o, colour, window, coverage = found
        objects.append(o)
        rest[window] -= coverage[..., None] * colour
        edges[window] |= ndimage.binary_dilation((coverage > 0.02) & (coverage < 0.98), EIGHT, 2)
    # What is left unexplained: noise all over, or a ghost in one place.
    rest *= ~edges[..., None]
    if np.sqrt((rest ** 2).sum() / max(1, 3 * np.count_nonzero(~edges))) > FLATNESS:
        return None
    sums = np.pad(rest.cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
    mean = (sums[5:, 5:] - sums[:-5, 5:] - sums[5:, :-5] + sums[:-5, :-5]) / 25
    if np.linalg.norm(mean, axis=-1).max() > GHOST:
        return None
    return Scene(list(BACKGROUNDS)[back], tuple(objects))


def _colour(rgb, base, mask):
    """Index of the palette colour that a region's strongest part shows,
    and the way to it from the background."""
    contrast = np.linalg.norm(rgb, axis=-1) * mask
    seen = np.median(rgb[contrast >= 0.85 * np.quantile(contrast[mask], 0.9)], axis=0)
    ways = OBJECT_RGB - base
    # A soft edge makes all of a stroke paler, by up to a third:
    # the direction decides, and then how far it got.
    along = np.clip((ways @ seen) / (ways ** 2).sum(1), 0.65, 1)[:, None]
    best = int(np.linalg.norm(along * ways - seen, axis=1).argmin())
    return best, ways[best]


def misfits(alpha, y, x):
    """How badly each template, centred at (x, y) to a quarter of a pixel, fits coverage alpha
    (64, 64), per pixel of its edge; k -> template k's coverage in the window; that window."""
    quarter_y, quarter_x = round(4 * y), round(4 * x)
    top, left = quarter_y // 4 - HALF, quarter_x // 4 - HALF
    window = (slice(max(0, top), top + WIDTH), slice(max(0, left), left + WIDTH))
    inside = (slice(max(0, -top), CANVAS - top), slice(max(0, -left), CANVAS - left))
    stack, norms, edge = templates()
    stack, norms = stack[quarter_y % 4, quarter_x % 4], norms[quarter_y % 4, quarter_x % 4]
    cut = np.zeros((WIDTH, WIDTH), np.float32)
    cut[inside] = alpha[window]
    # |T - alpha|^2 = |T|^2 - 2 T.alpha + |alpha|^2
    error = (norms - 2 * (stack.reshape(len(stack), -1) @ cut.ravel()) + (alpha ** 2).sum()) / edge
    return error, lambda k: stack[k][inside], window


def _match(rgb, base, labels, label):
    """One region of a picture whose background `base` was subtracted, or None: no clean object.

    Returns the Object, its colour (less the background's too), the window of its template and the
    coverage there.
    """
    mask = labels == label
    ys, xs = np.nonzero(mask)
    if max(np.ptp(ys), np.ptp(xs)) >= WIDTH:
        return None
    colour, way = _colour(rgb, base, mask)
    # Coverage: how far each pixel is on the way from the background to that colour.
    # Other regions are left out.
    near = (slice(max(0, ys.min() - 3), ys.max() + 4), slice(max(0, xs.min() - 3), xs.max() + 4))
    others = (ndimage.binary_dilation((labels > 0) & ~mask, EIGHT, 2)
              & ~ndimage.binary_dilation(mask, EIGHT))
    alpha = np.zeros(labels.shape, np.float32)
    alpha[near] = ((rgb @ way) / (way @ way) * ~others)[near]
    middle, total = np.arange(CANVAS) + 0.5, max(float(alpha.sum()), 1e-6)
    y, x = float(alpha.sum(1) @ middle) / total, float(alpha.sum(0) @ middle) / total
    if not (ys.min() <= y <= ys.max() + 1 and xs.min() <= x <= xs.max() + 1):
        return None
    error, coverages, window = misfits(alpha, y, x)
    best = int(error.argmin())
    coverage = coverages(best)
    rival = np.partition(error.reshape(len(SHAPES), -1).min(1), 1)[1]
    blurred = best % len(SOFTNESS) == len(SOFTNESS) - 1
    if blurred or error[best] > MISFIT or rival < RIVAL * error[best]:
        return None
    # The colour that explains the region best, given the coverage:
    # strokes that a soft edge made paler included.
    weight = coverage * ~others[window]
    fitted = np.tensordot(weight, rgb[window], 2) / (weight ** 2).sum()
    if np.linalg.norm(fitted - way) > COLOUR_OFF:
        return None
    o = Object(TEMPLATES[best // len(SOFTNESS)][0], list(COLOURS)[colour],
               *TEMPLATES[best // len(SOFTNESS)][1:], round(x, 2), round(y, 2))
    return o, fitted, window, coverage


def check(facts, requirement):
    """Whether a reading meets a requirement; extra objects, or an unreadable picture, do not.

    requirement: {"objects": [{"shape": "circle", "colour": "red", "count": 2}, …], "relation":
    "above", "background": "gray"}; each attribute of an object, "count" (1), "relation" (of the
    first object to the second) and "background" may be left out.
    """
    if facts is None or requirement.get("background", facts.background) != facts.background:
        return False
    wanted = [w for w in requirement["objects"] for _ in range(w.get("count", 1))]
    if len(wanted) != len(facts.objects):
        return False
    where = requirement.get("relation")
    return any(all(name == "count" or getattr(o, name) == value
                   for o, w in zip(order, wanted) for name, value in w.items())
               and (where is None or relation(order[0], order[1], margin=1.0) == where)
               for order in itertools.permutations(facts.objects))


# --- How good is the judge? -----------------------------------------------------------------------

START = 10 ** 6   # its pictures lie far behind any that a world on disk holds


def right(picture, truth):
    """Whether the reading of a picture is its scene: each object as it is, in its place."""
    facts = read(picture)
    return (facts is not None and facts.background == truth.background
            and len(facts.objects) == len(truth.objects)
            and all(any(looks_like(o, p, LOOK) and np.hypot(o.x - p.x, o.y - p.y) < 0.5
                        for p in facts.objects) for o in truth.objects))


def blurred(picture, sigma):
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)))


def to_bytes(picture):
    return np.clip(picture, 0, 255).astype(np.uint8)


def spoil(kind, index, rng):
    """A picture that must not pass for a clean scene."""
    truth = scene(index, "val")
    picture = draw(truth)
    if kind == "blurred":
        return blurred(picture, float(rng.uniform(2, 5)))
    if kind == "half-blended":
        share = rng.uniform(0.35, 0.65)
        return to_bytes((share * picture + (1 - share) * draw(scene(index + 1, "val"))).round())
    if kind == "off-palette":   # the background's colour, or one object's, is on no palette
        colours = [BACKGROUNDS[truth.background], *(COLOURS[o.colour] for o in truth.objects)]
        old, new = colours[int(rng.integers(len(colours)))], PALETTE[0]
        while np.linalg.norm(PALETTE - new, axis=1).min() < 45:
            new = rng.integers(0, 256, 3)
        same = np.abs(np.subtract(picture, old, dtype=int)).sum(-1, keepdims=True) < 12
        return np.where(same, new, picture).astype(np.uint8)
    if index % 3 == 0:   # noise: pure, coarse, or over a picture
        return rng.integers(0, 256, picture.shape, dtype=np.uint8)
    if index % 3 == 1:
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((CANVAS, CANVAS), Image.BICUBIC))
    return to_bytes(picture + rng.normal(0, rng.uniform(30, 90), picture.shape))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*",
                        help="pictures to read, 64 x 64; without any, the judge is measured")
    parser.add_argument("--count", type=int, default=5000, help="true pictures to measure with")
    parser.add_argument("--model", default="", help="folder with a psvae.pt")
    args = parser.parse_args()
    for name in args.pictures:
        picture = Image.open(name).convert("RGB")
        if picture.size != (CANVAS, CANVAS):
            parser.error(f"{name} is {picture.width} x {picture.height}: only 64 x 64 can be read")
        print(name, read(np.asarray(picture)) or "unreadable")
    if args.pictures:
        return
    truths = [scene(START + i, ("train", "heldout")[i % 2]) for i in range(args.count)]
    pictures, rng = [draw(truth) for truth in truths], generator("judge")
    print(f"{args.count} true pictures: {np.mean([*map(right, pictures, truths)]):.2%} read right")
    if args.model:
        import torch
        import data
        from psvae import load_psvae
        model, back = load_psvae(Path(args.model) / "psvae.pt")[0], []
        with torch.no_grad():
            for x in torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).split(250):
                back += list(data.to_uint8(model.decode(model.encode(data.to_float(x, "cpu"))[0])))
        for name, which in (("of combinations that training shows", slice(0, None, 2)),
                            ("with a held-out combination", slice(1, None, 2))):
            errors = np.square(np.subtract(back[which], pictures[which], dtype=float))
            psnr = np.mean(10 * np.log10(255 ** 2 / errors.mean((1, 2, 3))))
            found = [*map(right, back[which], truths[which])]
            print(f"through the PS-VAE of {args.model}, {len(found)} {name}: {np.mean(found):.2%} "
                  f"read right, {psnr:.1f} dB")
    for kind in ("blurred", "half-blended", "off-palette", "noise"):
        refused = [read(spoil(kind, START + i, rng)) is None for i in range(args.count // 5 or 1)]
        print(f"{kind:>12}: {np.mean(refused):.2%} of {len(refused)} unreadable")


if __name__ == "__main__":
    main()
