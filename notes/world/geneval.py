"""GenEval for the built-in world: 553 prompts over its six tasks, four pictures of each, read by
the judge.

    python notes/world/geneval.py                      the model of sample.py: 2,212 pictures
    python notes/world/geneval.py --quick              139 prompts, a picture of each
    python notes/world/geneval.py --guidance 1 2 4 --steps 10 25 50    a sweep: quality against cost
    python notes/world/geneval.py --seed 0 1 2         the spread over sampling seeds

The proportions are GenEval's (Ghosh et al. 2023): 80 single object, 99 two objects, 80 counting, 94
colours, 100 position, 100 attribute binding; as there, "overall" is the mean of the six tasks. A
picture counts if the judge reads it and finds exactly what the prompt says: objects that nobody
asked for are errors. Prompts that name a (colour, shape) pair which no caption names are scored
apart, as held out, and beside them, as seen, the other prompts of the same four tasks. Intervals:
bootstrap over prompts, 95 %. Writes out/geneval.json, and out/geneval.png: failures, with what the
judge saw.
"""

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from notes.world.judge import check, read  # noqa: E402
from notes.world.world import (BACKGROUNDS, CANVAS, COLOURS, HELD_OUT, NUMBERS, PAIRS,  # noqa: E402
                               SHAPES, SIZES, STYLES, WORDS, Object, Scene, choose, draw,
                               generator, noun, pick_look, place, with_article)

TASKS = {"single": 80, "two": 99, "counting": 80, "colours": 94, "position": 100, "binding": 100}
HELD_OUT_SHARE = 0.2   # of the prompts of the four tasks that name colours
BOOTSTRAP = 1000       # times that the prompts are drawn again
SETTINGS = "guidance", "steps", "eta"


# --- Prompts --------------------------------------------------------------------------------------

class Plain:
    """Stands in for a random generator where the first of several wordings is wanted."""

    def random(self):
        return 0.0


def phrase(count=1, **said):
    """'three large red stars', in the plainest wording, of shape and maybe colour, size and
    style."""
    o = Object(**{"shape": "", "colour": "", "size": "", "style": "", **said})
    name = noun(o, said, Plain(), plural=count > 1)
    return f"{NUMBERS[count]} {name}" if count > 1 else with_article(name)


def _proposals(task):
    """Endless (text, requirement) for a task; the colours begin with each (colour, shape) once."""
    if task == "colours":
        for colour, shape in PAIRS:
            said = {"shape": shape, "colour": colour}
            yield phrase(**said), {"objects": [said]}
    rng = generator("geneval", task)
    extras = ({}, *({"size": size} for size in SIZES), *({"style": style} for style in STYLES))
    while True:
        shapes = [str(s) for s in rng.permutation(SHAPES)]   # none twice in a prompt
        colours = [str(c) for c in rng.permutation(list(COLOURS))]
        extra = [choose(rng, extras, p=(0.4, 0.15, 0.15, 0.15, 0.15)) for _ in range(2)]
        count = 1 if task in ("single", "counting", "colours") else 2
        objects, need = [{"shape": s} for s in shapes[:count]], {}
        join = "{} and {}" if count == 2 else "{}"
        if task in ("single", "two"):
            objects = [{**o, **e} for o, e in zip(objects, extra)]
        # Counting and position come with and without colours; colours and binding are about them.
        elif task in ("colours", "binding") or rng.random() < 0.7:
            objects = [{**o, "colour": c} for o, c in zip(objects, colours)]
        if task == "counting":
            objects[0]["count"] = int(rng.integers(2, 5))
        if task == "position":
            need["relation"] = choose(rng, ("left", "right", "above", "below"))
            join = f"{{}} {WORDS[need['relation']][0]} {{}}"
        text = join.format(*(phrase(**o) for o in objects))
        if task in ("single", "colours") and rng.random() < 0.4:
            need["background"] = choose(rng, BACKGROUNDS)
            text += f" on {with_article(need['background'])} background"
        yield text, {"objects": objects, **need}


def prompts():
    """The 553, always the same: [{"task", "text", "requirement", "heldout"}], no text twice."""
    rows = []
    for task, count in TASKS.items():
        unseen = 0 if task in ("single", "two") else round(HELD_OUT_SHARE * count)
        room, texts = {True: unseen, False: count - unseen}, set()
        for text, need in _proposals(task):
            heldout = any((o.get("colour"), o["shape"]) in HELD_OUT for o in need["objects"])
            if text not in texts and room[heldout]:
                texts.add(text)
                room[heldout] -= 1
                rows.append({"task": task, "text": text, "requirement": need, "heldout": heldout})
            if not any(room.values()):
                break
    return rows


def true_picture(requirement, rng):
    """A picture that meets a requirement, with all else as scenes of the world have it."""
    while True:
        objects = []
        for wanted in requirement["objects"]:
            colour, shape = pick_look(rng, "train", wanted.get("colour"), wanted["shape"])
            look = {"size": wanted.get("size") or choose(rng, SIZES),
                    "style": wanted.get("style") or choose(rng, STYLES, (0.65, 0.35))}
            objects += [Object(shape, colour, **look)] * wanted.get("count", 1)
        placed = place(objects, rng)
        scene = Scene(requirement.get("background") or choose(rng, BACKGROUNDS), placed or ())
        if placed and check(scene, requirement):
            return draw(scene)


# --- Scores ---------------------------------------------------------------------------------------

def summarise(tasks, scores):
    """The mean over tasks of the mean over prompts, and its 95 % interval (bootstrap)."""
    rng, scores, tasks = generator("bootstrap"), np.asarray(scores, float), np.asarray(tasks)
    groups = [scores[tasks == task] for task in dict.fromkeys(tasks.tolist())]
    if not groups:
        return {"score": float("nan"), "interval": (float("nan"), float("nan")), "prompts": 0}
    again = np.mean([g[rng.integers(len(g), size=(BOOTSTRAP, len(g)))].mean(1) for g in groups], 0)
    return {"score": float(np.mean([g.mean() for g in groups])),
            "interval": tuple(np.percentile(again, (2.5, 97.5)).tolist()), "prompts": len(scores)}


def evaluate(generate, prompts, n=4, seed=0, batch=128, keep=96):
    """Scores `generate(texts, seed) -> uint8 (N, 64, 64, 3)`; picture k from noise of seed + k.

    Returns {"overall", "seen", "heldout", "tasks": {task: …}: each {"score", "interval",
    "prompts"}, "unreadable", "seconds", "scores": of each prompt, "failures": [(text, picture, what
    the judge read)], "n", "seed"}.
    """
    jobs = [row for row in prompts for _ in range(n)]
    good, unreadable, failures, began = [], 0, [], time.perf_counter()
    for start in range(0, len(jobs), batch):
        some = jobs[start:start + batch]
        drawn = generate([row["text"] for row in some], seed * 1_000_003 + start)
        for row, picture in zip(some, drawn):
            facts = read(picture)
            good.append(check(facts, row["requirement"]))
            unreadable += facts is None
            if not good[-1]:
                failures.append((row["text"], picture, facts))
    scores = np.array(good, float).reshape(-1, n).mean(1)

    def part(which):
        chosen = [i for i, row in enumerate(prompts) if which(row)]
        return summarise([prompts[i]["task"] for i in chosen], scores[chosen])

    both = {row["task"] for row in prompts if row["heldout"]}
    return {"overall": part(lambda row: True),
            "seen": part(lambda row: row["task"] in both and not row["heldout"]),
            "heldout": part(lambda row: row["heldout"]),
            "tasks": {task: part(lambda row: row["task"] == task) for task in TASKS},
            "unreadable": unreadable / len(jobs), "seconds": time.perf_counter() - began,
            "scores": scores.tolist(),
            "failures": failures[::max(1, -(-len(failures) // keep))],   # evenly over the tasks
            "n": n, "seed": seed}


def report(result):
    """The table that is printed, and quoted."""
    lines = [f"{'':<14}{'score':>7}   95 % interval  prompts"]
    parts = {"overall": result["overall"], "seen": result["seen"], "held out": result["heldout"],
             **result["tasks"]}
    for name, s in parts.items():
        if s["prompts"]:
            low, high = s["interval"]
            lines.append(f"{name:<14}{s['score']:>7.1%}   {low:>6.1%} – {high:<6.1%}"
                         f"{s['prompts']:>8}")
    return "\n".join([*lines, f"unreadable: {result['unreadable']:.1%} of the pictures; "
                              f"{result['seconds']:.0f} s"])


# --- What a person looks at -----------------------------------------------------------------------

def brief(facts):
    """What the judge saw, in few words: 'filled' and 'small' go without saying."""
    if facts is None:
        return "unreadable"
    names = Counter()
    for o in facts.objects:
        large, hollow = "large " * (o.size == "large"), "hollow " * (o.style == "outline")
        names[f"{large}{hollow}{o.colour} {o.shape}"] += 1
    return ", ".join(f"{k} x {name}" if k > 1 else name for name, k in names.items()) or "nothing"


# --- The model that sample.py would take ----------------------------------------------------------

def parser_of(doc, settings, out):
    """The flags of both benches; each of `settings` takes one value or several."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder of the model (out, else the shipped)")
    for name in settings:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int if name == "steps" else float,
                            nargs="+", help="one or several (the preset's)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several (0)")
    parser.add_argument("--batch", type=int, default=128, help="pictures drawn at once (128)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="less work: see above")
    parser.add_argument("--out", default=out, help="results; failures go to the .png beside it")
    return parser


def load(args, edit=False):
    """(pipeline, its name, the settings that sample.py would use with it, for edits or not)."""
    import data
    import sample
    folder = sample.find_model(args.model)
    try:
        pipeline = sample.Pipeline(folder, data.pick_device(args.device))
        if pipeline.size != CANVAS:
            raise data.UserError(f"{folder} draws pictures of {pipeline.size} px; "
                                 f"the judge reads those of {CANVAS}.")
    except data.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    settings = {"steps": sample.Config.steps, **pipeline.defaults[edit]}
    return pipeline, f"{folder}, step {pipeline.step:,}", settings


def save(results, failures, out, heads=None):
    """The numbers as JSON; the failures, [([picture, …], [text under it, …])], as a sheet beside
    it."""
    import data
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {out}")
    if failures:
        data.save_picture(data.grid(*map(list, zip(*failures)), heads, least=2 * CANVAS),
                      out.with_suffix(".png"))


def sweep(results) -> str:
    """Markdown: a line for each setting, in per cent, mean ± standard deviation over the seeds."""
    lines = ["| guidance | steps | eta | right | held out | single | unreadable | seconds |",
             "|---" * 8 + "|"]
    for setting in dict.fromkeys(tuple(run[key] for key in SETTINGS) for run in results):
        runs = [run for run in results if tuple(run[key] for key in SETTINGS) == setting]
        columns = np.array([[run["overall"]["score"], run["heldout"]["score"],
                             run["tasks"]["single"]["score"], run["unreadable"]] for run in runs])
        cells = [f"{100 * c.mean():.1f}" + (f" ± {100 * c.std(ddof=1):.1f}" if c[1:].size else "")
                 for c in columns.T]
        seconds = np.mean([run["seconds"] for run in runs])
        lines.append(f"| {' | '.join([f'{v:g}' for v in setting] + cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def main():
    parser = parser_of(__doc__, SETTINGS, "out/geneval.json")
    parser.add_argument("--n", type=int, default=4, help="pictures of each prompt (4)")
    args = parser.parse_args()
    asked = prompts()
    if args.quick:
        asked, args.n = asked[::4], 1
    pipeline, name, own = load(args)
    results = []
    grid = [getattr(args, key) or [own[key]] for key in SETTINGS]
    for guidance, steps, eta, seed in itertools.product(*grid, args.seed):
        def generate(texts, first):
            seeds = [first + i for i in range(len(texts))]
            return pipeline(texts, seeds, steps=steps, guidance=guidance, eta=eta)

        result = evaluate(generate, asked, args.n, seed, args.batch)
        failures = result.pop("failures")
        print(f"\n{name}: guidance {guidance:g}, {steps} steps, eta {eta:g}, seed {seed}\n"
              f"{report(result)}", flush=True)
        results.append({"model": name, "guidance": guidance, "steps": steps, "eta": eta, **result})
    if len(results) > 1:
        print("\n" + sweep(results))
    cells = [(picture, f"{text}. Seen: {brief(facts)}") for text, picture, facts in failures]
    save(results, [tuple(zip(*cells[i:i + 8])) for i in range(0, len(cells), 8)], args.out)


if __name__ == "__main__":
    main()
