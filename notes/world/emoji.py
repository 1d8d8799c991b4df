"""A real captioned set with edits, to try the project on: Microsoft's Fluent Emoji in 3D, 256 px,
on white.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0     fetches two packages, 16 MB
    python notes/world/emoji.py --out emoji                              makes a folder of them
    python svae.py --data emoji --preset tiny --out out_emoji --z-dim 48 --steps 300
    python psvae.py --out out_emoji --beta 3e-4 --steps 3000
    python dit.py --out out_emoji --edit-fraction 0.75 --steps 2200      all: 50 minutes on a core
    python notes/world/emoji.py --page notes/world/emoji.png --model out_emoji      held-out edits

Pictures: @lobehub/fluent-emoji-3d (MIT); names: unicode-emoji-json (MIT). A caption for every
picture that has a name; an edit (source, instruction, result) for every pair that differs in skin
tone alone, in gender alone or in hair alone. What is written is a folder with a metadata.jsonl, as
data.py reads any other. emoji.png is of 2026-11-23, by the code of that day.
"""

import argparse
import itertools
import json
import re
import sys
import tarfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

TONES = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark",
         "1f3ff": "dark"}
PEOPLE = {"1f468": "man", "1f469": "woman", "1f9d1": "person"}
SIGNS = {"2642": "man", "2640": "woman"}
HAIR = {"1f9b0": "make the hair red", "1f9b1": "make the hair curly",
        "1f9b3": "make the hair white", "1f9b2": "remove the hair"}


def package(name: str) -> tarfile.TarFile:
    if not Path(name).is_file():
        sys.exit(f"error: {name} is not there. `npm pack` writes it (see --help).")
    return tarfile.open(name)


def parts(stem: str) -> dict:
    """What a sequence of code points says: its tones, gender, hair, and what is left without each
    of them."""
    points = [p for p in stem.split("-") if p not in ("fe0f", "200d")]
    people = [p for p in points if p in PEOPLE]
    sign = next((SIGNS[p] for p in points if p in SIGNS), None)
    gender = sign or (PEOPLE[people[0]] if len(people) == 1 else "person")
    role = (tuple("person" if p in PEOPLE else p for p in points if p not in SIGNS)
            if len(people) < 2 else None)
    return {"points": tuple(points), "tones": sorted({p for p in points if p in TONES}),
            "name": tuple(p for p in points if p not in TONES), "gender": gender, "role": role,
            "hair": next((p for p in points if p in HAIR), None),
            "bald": tuple(p for p in points if p not in HAIR)}


def rows_of(stems: list[str], names: dict[tuple, str]) -> list[dict]:
    """Captions, then edits. names: code points without joiners -> name."""
    known = {stem: parts(stem) for stem in stems}
    known = {stem: p for stem, p in known.items() if p["name"] in names}
    rows = []
    for stem, p in known.items():
        tone = f", {' and '.join(TONES[t] for t in p['tones'])} skin tone" if p["tones"] else ""
        rows.append({"file_name": f"{stem}.webp", "text": names[p["name"]] + tone})

    def edits(key, instruction):
        groups = defaultdict(list)
        for stem, p in known.items():
            if key(p) is not None:
                groups[key(p)].append((stem, p))
        for group in groups.values():
            for (a, p), (b, q) in itertools.permutations(group, 2):
                if text := instruction(p, q):
                    rows.append({"file_name": f"{b}.webp", "source": f"{a}.webp", "text": text})

    edits(lambda p: p["name"] if len(p["tones"]) < 2 else None,
          lambda p, q: f"change the skin tone to {TONES[q['tones'][0]]}" if q["tones"] else None)
    edits(lambda p: p["role"],
          lambda p, q: f"make it a {q['gender']}" if p["gender"] != q["gender"] else None)
    edits(lambda p: p["bald"] if set(p["name"]) - set(HAIR) <= set(PEOPLE) else None,
          lambda p, q: HAIR[q["hair"]] if q["hair"] else None)
    return rows


def build(out: Path):
    table = package("unicode-emoji-json-0.9.0.tgz")
    table = table.extractfile("package/data-by-emoji.json")
    names = {tuple(f"{ord(c):04x}" for c in emoji if c not in "\ufe0f\u200d"): entry["name"].lower()
             for emoji, entry in json.load(table).items()}
    out.mkdir(parents=True, exist_ok=True)
    stems = []
    with package("lobehub-fluent-emoji-3d-1.1.0.tgz") as archive:
        for member in archive:
            found = re.fullmatch(r"package/assets/([0-9a-f_-]+)\.webp", member.name)
            if found and member.isfile():
                (out / f"{found[1]}.webp").write_bytes(archive.extractfile(member).read())
                stems.append(found[1])
    rows = rows_of(sorted(stems), names)
    with open(out / "metadata.jsonl", "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    edits = sum("source" in row for row in rows)
    print(f"{out}: {len(stems):,} pictures, {len(rows) - edits:,} captions, {edits:,} edits")


def page(path: Path, model: str, folder: str, count: int = 16):
    """Source | two results | the true picture, for edits of which neither picture was seen in
    training."""
    import numpy as np
    import data
    from sample import Pipeline
    pipeline = Pipeline(Path(model), data.pick_device("auto"))
    _, held_out = data.read_folder(folder)
    edits = [row for row in held_out.rows if row[2] >= 0]
    by_text = defaultdict(list)
    for row in edits:
        by_text[row[1]].append(row)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_text.values()))
    chosen = [row for row in turns if row][:count]
    read = lambda i: data.user_image(held_out.path(i), pipeline.size)
    sources = np.stack([read(source) for _, _, source in chosen])
    texts = [text for _, text, _ in chosen]
    results = [pipeline(texts, [seed + i for i in range(len(chosen))], sources, guidance=2.0)
               for seed in (0, 1000)]
    truths = [read(image) for image, _, _ in chosen]
    rows = [list(row) for row in zip(sources, *results, truths)]
    heads = ["source", "result", "another seed", "true picture"]
    data.save_picture(data.grid(rows, [[text, "", "", ""] for text in texts], heads, least=128), path)
    print(f"wrote {path}: {len(chosen)} edits of held-out pictures, none left out")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="emoji", help="folder to write (emoji)")
    parser.add_argument("--page", default="", help="write a page of edits by a model instead")
    parser.add_argument("--model", default="out", help="folder of the model, for --page (out)")
    args = parser.parse_args()
    if args.page:
        page(Path(args.page), args.model, args.out)
    else:
        build(Path(args.out))
