"""How well does the model edit? The judge reads whether a result is what was asked, all else kept.

    python notes/world/editbench.py                400 edits of unseen pictures, 400 with held-out
                                                   combinations
    python notes/world/editbench.py --quick        a quarter of them
    python notes/world/editbench.py --baselines    also the trivial ways: copy, regenerate, SDEdit;
                                                   and the right answers
    python notes/world/editbench.py --guidance 2 4 --image-guidance 1 1.5      a sweep

obeyed   what the instruction names is as it says: the new colour, the right object gone, the added
         one in its place
kept     background, other objects, and all that is unsaid about the changed one, are as they were;
         nothing is new
both     at once, in the same picture

An unreadable result is neither. The region that must not change is also compared pixel by pixel,
where the instruction was obeyed, beside what the PS-VAE alone makes of the source: no edit of
latents can be closer. Writes out/editbench.json, and out/editbench.png: failures, as source,
result, a right answer.
"""

import functools
import itertools
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from notes.world.geneval import brief, load, parser_of, phrase, save, summarise  # noqa: E402
from notes.world.judge import read, round_trip  # noqa: E402
from notes.world.world import (CANVAS, COLOURS, KINDS, LOOK, SHAPES, SIZES, STYLES,  # noqa: E402
                               WORDS, alike, draw, edit, listing, looks_like, relation, room)

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
    return dict(MEANS[word] for word in words.split() if word in MEANS)


def asked_to_add(instruction, source):
    """What is said about the new object: its attributes, and (relation, the object it is seen from)
    or None."""
    for where in ("left", "right", "above", "below"):
        for wording in WORDS[where]:
            new, found, anchor = instruction.partition(f" {wording} the ")
            if found:
                said = attributes(anchor).items()           # the world refers to just one
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

def evaluate(edit, triples, seed=0, batch=128, round_trip=None, keep=48):
    """Scores `edit(sources uint8 (N, 64, 64, 3), texts, seed) -> uint8`; picture k from noise of
    seed + k. round_trip maps pictures to what the PS-VAE alone makes of them.

    A triple's "prompt", if it has one, is given in place of its instruction. Returns {"seen",
    "heldout", "kinds": {kind: …}: each {"obeyed", "kept", "both": {"score", "interval",
    "prompts"}, "edits"}, "unreadable", "seconds", "seed", "untouched": {"result", "round_trip"}
    in dB, "failures": [(text, [source, result, target], what is wrong)]}.
    """
    good, unreadable, failures, squares, began = [], 0, [], [], time.perf_counter()
    for start in range(0, len(triples), batch):
        some = triples[start:start + batch]
        sources = np.stack([draw(t["source"]) for t in some])
        texts = [t.get("prompt", t["instruction"]) for t in some]
        results = edit(sources, texts, seed * 1_000_003 + start)
        trips = round_trip(sources) if round_trip else sources
        for t, source, result, trip in zip(some, sources, results, trips):
            facts = read(result)
            obeyed, kept = judge_edit(t, facts)
            good.append((obeyed, kept, obeyed and kept))
            unreadable += facts is None
            mask = untouched(t, facts) if obeyed else None
            if mask is not None:
                squares.append([np.mean(np.subtract(p, source, dtype=float)[mask] ** 2)
                                for p in (result, trip)])
            if not (obeyed and kept):
                wrong = " and ".join(["not obeyed"] * (not obeyed) + ["not kept"] * (not kept))
                pictures = [source, result, draw(t["target"])]
                failures.append((f"[{t['kind']}] {t['instruction']}", pictures,
                                 f"{wrong}: {brief(facts)}"))
    good = np.array(good, float)

    def part(which):
        chosen = [i for i, t in enumerate(triples) if which(t)]
        columns = zip(("obeyed", "kept", "both"), good[chosen].T)
        return {**{name: summarise([""] * len(chosen), column) for name, column in columns},
                "edits": len(chosen)}

    mse = np.maximum(np.mean(squares, axis=0), 1e-3) if squares else None
    decibel = (None, None) if mse is None else (10 * np.log10(255 ** 2 / mse)).tolist()
    return {"seen": part(lambda t: t["split"] != "heldout"),
            "heldout": part(lambda t: t["split"] == "heldout"),
            "kinds": {kind: part(lambda t: t["kind"] == kind) for kind in KINDS},
            "unreadable": unreadable / len(triples), "seconds": time.perf_counter() - began,
            "seed": seed,
            "untouched": dict(zip(("result", "round_trip"), decibel)),
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
    region = result["untouched"]
    if region["result"] is not None:
        lines.append(f"what must not change, where obeyed: {region['result']:.1f} dB; "
                     f"the PS-VAE's round trip: {region['round_trip']:.1f} dB")
    return "\n".join([*lines, f"unreadable: {result['unreadable']:.1%} of the pictures; "
                              f"{result['seconds']:.0f} s"])


# --- The trivial ways -----------------------------------------------------------------------------

def full_caption(scene):
    """Everything about a scene that a caption of the world can say."""
    groups = alike(scene.objects)
    names = [phrase(len(g), **{name: getattr(g[0], name) for name in LOOK}) for g in groups]
    text = listing(names)
    if len(scene.objects) == len(groups) == 2 and relation(*scene.objects):
        text = f"{names[0]} {WORDS[relation(*scene.objects)][0]} {names[1]}"
    return f"{text} on a {scene.background} background"


def sdedit(pipeline, sources, texts, seeds, strength, steps, guidance):
    """SDEdit (Meng et al. 2022): the source's latents, noised up to strength * T, are denoised with
    another text."""
    import data
    import sample
    import torch
    from dit import normalise
    with torch.no_grad():
        x = data.to_float(torch.from_numpy(sources).permute(0, 3, 1, 2), pipeline.device)
        z_0 = normalise(pipeline.psvae.encode(x)[0], pipeline.mean, pipeline.variance)
        times = sample.sampling_times(pipeline.config["T"], steps)
        times = times[min(steps - 1, round((1 - strength) * steps)):]
        alpha_bar = pipeline.alpha_bar[times[0]].item()
        eps = sample.draw([data.generator(seed, "sample", 0, "z_T") for seed in seeds], z_0)
        z_t = alpha_bar ** 0.5 * z_0 + (1 - alpha_bar) ** 0.5 * eps
        c, mask = pipeline.text_encoder([*texts, *[""] * len(texts)])
        z_0 = sample.ddim(pipeline.dit, z_t, c, mask, pipeline.alpha_bar, times, guidance)
        return pipeline.decode(z_0)


def numbered(first, texts):
    return [first + i for i in range(len(texts))]


def baselines(pipeline, trip, asked, own):
    """[(name, triples, edit)]: what an edit model must beat, and the best that it could reach."""
    targets = iter([draw(t["target"]) for t in asked])
    captioned = [{**t, "prompt": full_caption(t["target"])} for t in asked]
    how = {name: own[name] for name in ("steps", "guidance")}

    def from_noised(strength):
        return lambda sources, texts, first: sdedit(
            pipeline, sources, texts, numbered(first, texts), strength, **how)

    return [("the right answers, after a PS-VAE round trip", asked,
             lambda sources, texts, first: trip([next(targets) for _ in texts])),
            ("copy the source", asked, lambda sources, texts, first: sources),
            ("regenerate from a full caption", captioned,
             lambda sources, texts, first: pipeline(texts, numbered(first, texts), **how)),
            *((f"SDEdit, strength {s}", captioned, from_noised(s)) for s in (0.3, 0.5, 0.7, 0.9))]


def main():
    names = ("guidance", "image_guidance", "steps", "eta")
    parser = parser_of(__doc__, names, "out/editbench.json")
    parser.add_argument("--count", type=int, default=400, help="edits of each split (400)")
    parser.add_argument("--baselines", action="store_true", help="also score the trivial ways")
    args = parser.parse_args()
    count = args.count // 4 if args.quick else args.count
    asked = triples("val", count) + triples("heldout", count)
    pipeline, name, own = load(args)
    if not pipeline.edits:
        parser.error(f"the model ({name}) was trained without edits")

    def model(how):
        return lambda sources, texts, first: pipeline(texts, numbered(first, texts), sources, **how)

    contenders, trip = [], functools.partial(round_trip, pipeline.psvae, device=pipeline.device)
    grid = [getattr(args, name) or [own[name]] for name in names]
    for *values, seed in itertools.product(*grid, args.seed):
        s, s_image, steps, eta = values
        title = (f"guidance {s:g}, image guidance {s_image:g}, {steps} steps, eta {eta:g}, "
                 f"seed {seed}")
        contenders.append((title, asked, model(dict(zip(names, values))), seed))
    if args.baselines:
        contenders += [(*baseline, 0) for baseline in baselines(pipeline, trip, asked, own)]
    results, shown = [], None
    for title, rows, apply, seed in contenders:
        result = evaluate(apply, rows, seed, args.batch, trip)
        failures = result.pop("failures")
        shown = failures if shown is None else shown
        print(f"\n{name}: {title}\n{report(result)}", flush=True)
        results.append({"model": name, "title": title, **result})
    save(results, shown, args.out)


if __name__ == "__main__":
    main()
