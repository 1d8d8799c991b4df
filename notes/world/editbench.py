"""How well does the model edit? The judge reads whether a result is what was asked, all else kept.

    python notes/world/editbench.py                400 edits of unseen pictures, 400 with held-out
                                                   combinations
    python notes/world/editbench.py --quick        a quarter of them
    python notes/world/editbench.py --guidance 2 4 --image-guidance 1 1.5      a sweep

obeyed   what the instruction names is as it says: the new colour, the right object gone, the added
         one in its place
kept     background, other objects, and all that is unsaid about the changed one, are as they were;
         nothing is new
both     at once, in the same picture

An unreadable result is neither. The region that must not change is also compared pixel by pixel,
where the instruction was obeyed, and of these where all else was kept, beside what the PS-VAE alone
makes of the source: no edit of latents can be closer. Writes out/editbench.json, and
out/editbench.png: failures, as source, result, a right answer.
"""

import itertools
import re
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from notes.world.geneval import brief, load, parser_of, save, summarise  # noqa: E402
from notes.world.judge import read  # noqa: E402
from notes.world.world import (CANVAS, COLOURS, KINDS, LOOK, SHAPES, SIZES, STYLES,  # noqa: E402
                               WORDS, draw, edit, looks_like, relation, room)

NEAR = 3.0   # pixels within which an object counts as not moved
NAMED = {"recolour": ("colour",), "restyle": ("style",), "replace": ("shape", "colour"),
         "resize/move": ("size",)}


def triples(split, count):
    """The first edits of a split: [{"split", "kind", "instruction", "source", "target"}], with
    Scenes."""
    names = ("source", "instruction", "target", "kind")
    return [{"split": split, **dict(zip(names, edit(i, split)))} for i in range(count)]


# --- Obeyed? Kept? --------------------------------------------------------------------------------

KNOWN = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "style": STYLES}
MEANS = {word: (name, value) for name, values in KNOWN.items() for value in values
         for word in {value, *WORDS.get(value, ())}}


def attributes(words):
    """{"size": "large", "colour": "red", "shape": "star"} of 'a big red star'."""
    return dict(MEANS[word] for word in re.findall(r"\w+", words) if word in MEANS)


def asked_to_add(instruction, source):
    """What is said about the new object: its attributes, and (relation, the object it is seen from)
    or None."""
    for where in ("left", "right", "above", "below"):
        for wording in WORDS[where]:
            new, *anchor = re.split(f" {wording.replace('the ', '(?:the )?')} ", instruction)
            if anchor:
                said = attributes(anchor[0]).items()        # the world refers to just one
                seen_from = next(o for o in source.objects
                                 if all(getattr(o, k) == v for k, v in said))
                return attributes(new), (where, seen_from)
    return attributes(instruction), None


def distance(a, b):
    return float(np.hypot(a.x - b.x, a.y - b.y))


def errors(triple, t, r):
    """(named, unnamed) things that are wrong if r, of the result, stands for t, of the target."""
    source, kind = triple["source"], triple["kind"]
    wrong = [name for name in LOOK if getattr(t, name) != getattr(r, name)]
    if kind == "add" and t not in source.objects:   # what is not said about it is free
        said, seen_from = asked_to_add(triple["instruction"], source)
        misplaced = seen_from is not None and relation(r, seen_from[1], margin=1.0) != seen_from[0]
        return sum(name in said for name in wrong) + misplaced, 0
    wrong += ["place"] * (distance(t, r) > NEAR)
    if t in source.objects:
        return 0, len(wrong)
    old = source.objects[triple["target"].objects.index(t)]     # the other kinds keep the order
    named = ("place",) if (t.x, t.y) != (old.x, old.y) else NAMED[kind]
    if kind == "replace":               # "with a star" leaves the colour as it was
        new = re.split(" (?:with|into|to|for) ", triple["instruction"])[-1]
        named = [name for name in named if name == "shape" or name in attributes(new)]
    return sum(name in named for name in wrong), sum(name not in named for name in wrong)


def judge_edit(triple, facts):
    """(obeyed, kept) of a result that was read as `facts`, a Scene or None."""
    source, target, kind = triple["source"], triple["target"], triple["kind"]
    if facts is None:
        return False, False
    changed = [t for t in target.objects if t not in source.objects]
    gone = [o for o in source.objects if o not in target.objects] if kind == "remove" else []
    # Which object of the result stands for which one wanted: the assignment with the fewest errors,
    # then the nearest. An object that was not changed as told is still that object, so errors in
    # what is named weigh least. What should be gone takes the objects that are still like it. An
    # index behind the last object means: it is not there.
    slots, found, cost = [*target.objects, *gone], {}, {}
    for (i, t), (j, r) in itertools.product(enumerate(slots), enumerate(facts.objects)):
        if t in gone:
            cost[i, j] = 1.5 if looks_like(t, r, LOOK) and distance(t, r) <= NEAR else 50.0
        else:
            named, unnamed = found[i, j] = errors(triple, t, r)
            anywhere = kind == "add" and t in changed
            cost[i, j] = named + 3 * unnamed + (0 if anywhere else distance(t, r) / CANVAS)
    absent = [5.0 if t in gone else 9.0 if t in changed else 12.0 for t in slots]
    best = min(itertools.permutations(range(len(facts.objects) + len(slots)), len(slots)),
               key=lambda order: sum(cost.get((i, j), absent[i]) for i, j in enumerate(order)))

    obeyed = kind != "background" or facts.background == target.background
    kept = kind == "background" or facts.background == source.background
    for i, (t, j) in enumerate(zip(slots, best)):
        present = j < len(facts.objects)
        if t in gone:
            obeyed = obeyed and not present
        elif present:
            obeyed, kept = obeyed and found[i, j][0] == 0, kept and found[i, j][1] == 0
        else:
            obeyed, kept = obeyed and t not in changed, kept and t in changed
    return obeyed, kept and all(j in best for j in range(len(facts.objects)))   # and nothing is new


def untouched(triple, facts):
    """Pixels that must not change, bool (64, 64): 3 or more away from all that was; or None."""
    source, target = triple["source"].objects, triple["target"].objects
    if triple["kind"] == "background":
        return None
    mask = np.ones((CANVAS, CANVAS), bool)
    kept = [o for o in source if o in target]
    changed = [o for o in (*source, *target) if o not in kept]
    changed += [r for r in facts.objects if all(distance(r, o) > NEAR for o in kept)]   # added
    for o in changed:
        reach = room(o.shape, o.size)[-1] + 3
        rows, columns = (slice(max(0, int(c - reach)), int(c + reach) + 1) for c in (o.y, o.x))
        mask[rows, columns] = False
    return mask if mask.any() else None


# --- Scores ---------------------------------------------------------------------------------------

def evaluate(edit, triples, seed=0, batch=128, trip=lambda pictures: pictures, keep=48):
    """Scores `edit(sources uint8 (N, 64, 64, 3), texts, seed) -> uint8`; picture k from noise of
    seed + k. trip maps pictures to what the PS-VAE alone makes of them.

    Returns {"seen", "heldout", "kinds": {kind: …}: each {"obeyed", "kept", "both": {"score",
    "interval", "prompts"}, "edits"}, "unreadable", "seconds", "seed", "untouched": {"obeyed",
    "both", "round_trip"} in dB, "failures": [([source, result, target], [the instruction, what is
    wrong])]}.
    """
    good, unreadable, failures, began = [], 0, [], time.perf_counter()
    squares = {"obeyed": [], "both": [], "round_trip": []}
    for start in range(0, len(triples), batch):
        some = triples[start:start + batch]
        sources = np.stack([draw(t["source"]) for t in some])
        results = edit(sources, [t["instruction"] for t in some], seed * 1_000_003 + start)
        for t, source, result, back in zip(some, sources, results, trip(sources)):
            facts = read(result)
            obeyed, kept = judge_edit(t, facts)
            good.append((obeyed, kept, obeyed and kept))
            unreadable += facts is None
            mask = untouched(t, facts) if obeyed else None
            if mask is not None:
                error, least = (np.mean(np.subtract(picture, source, dtype=float)[mask] ** 2)
                                for picture in (result, back))
                squares["obeyed"].append(error)
                squares["round_trip"].append(least)
                if kept:
                    squares["both"].append(error)
            if not (obeyed and kept):
                wrong = " and ".join(["not obeyed"] * (not obeyed) + ["not kept"] * (not kept))
                pictures = [source, result, draw(t["target"])]
                failures.append((pictures, [t["instruction"], f"{wrong}: {brief(facts)}"]))
    good = np.array(good, float)

    def part(which):
        chosen = [i for i, t in enumerate(triples) if which(t)]
        columns = zip(("obeyed", "kept", "both"), good[chosen].T)
        return {**{name: summarise([""] * len(chosen), column) for name, column in columns},
                "edits": len(chosen)}

    return {"seen": part(lambda t: t["split"] != "heldout"),
            "heldout": part(lambda t: t["split"] == "heldout"),
            "kinds": {kind: part(lambda t: t["kind"] == kind) for kind in KINDS},
            "unreadable": unreadable / len(triples), "seconds": time.perf_counter() - began,
            "seed": seed,
            "untouched": {name: float(10 * np.log10(255 ** 2 / max(1e-3, np.mean(errors))))
                          for name, errors in squares.items() if errors},
            "failures": failures[::max(1, -(-len(failures) // keep))]}


def report(result):
    """The table that is printed, and quoted."""
    lines = [f"{'':<14}{'obeyed':>8}{'kept':>8}{'both':>8}   95 % interval   edits"]
    parts = {"seen": result["seen"], "held out": result["heldout"], **result["kinds"]}
    for name, s in parts.items():
        if s["edits"]:
            shares = "".join(f"{s[k]['score']:>8.1%}" for k in ("obeyed", "kept", "both"))
            low, high = s["both"]["interval"]
            lines.append(f"{name:<14}{shares}   {low:>6.1%} – {high:<6.1%}{s['edits']:>6}")
    if "both" in result["untouched"]:
        lines.append("what must not change: {obeyed:.1f} dB where obeyed, {both:.1f} where kept as "
                     "well; round trip {round_trip:.1f}".format_map(result["untouched"]))
    return "\n".join([*lines, f"unreadable: {result['unreadable']:.1%} of the pictures; "
                              f"{result['seconds']:.0f} s"])


def main():
    names = ("guidance", "image_guidance", "steps", "eta")
    parser = parser_of(__doc__, names, "out/editbench.json")
    parser.add_argument("--count", type=int, default=400, help="edits of each split (400)")
    args = parser.parse_args()
    count = args.count // 4 if args.quick else args.count
    asked = triples("val", count) + triples("heldout", count)
    pipeline, name, own = load(args, edit=True)
    if not pipeline.edits:
        parser.error(f"the model ({name}) was trained without edits")
    results, shown = [], None
    grid = [getattr(args, key) or [own[key]] for key in names]
    for *values, seed in itertools.product(*grid, args.seed):
        def apply(sources, texts, first):
            seeds = [first + i for i in range(len(texts))]
            return pipeline(texts, seeds, sources, **dict(zip(names, values)))

        s, s_image, steps, eta = values
        trip = lambda pictures: pipeline.decode(pipeline.encode(pictures))
        result = evaluate(apply, asked, seed, args.batch, trip)
        failures = result.pop("failures")
        shown = failures if shown is None else shown
        title = (f"guidance {s:g}, image guidance {s_image:g}, {steps} steps, eta {eta:g}, "
                 f"seed {seed}")
        print(f"\n{name}: {title}\n{report(result)}", flush=True)
        results.append({"model": name, "title": title, **result})
    save(results, shown, args.out, ["source", "result", "a right answer"])


if __name__ == "__main__":
    main()
