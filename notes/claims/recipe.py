"""What made the tiny setting learn: stage 3 with one part of its recipe left out at a time.

    python notes/claims/recipe.py --model out --steps 1000 --seeds 0,1,2 --page

Needs what the three stages leave in --model. Each row of the table is a DiT from nothing, trained by
dit.py's own loop on the latents and texts there; a run that was stopped resumes.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import dit  # noqa: E402
import sample  # noqa: E402
from notes.claims.claims import into_page, spread, table  # noqa: E402
from notes.world import swaps  # noqa: E402

VARIANTS = {"all of it": [], "predicts eps": ["--predict", "eps"],
            "text not whitened": ["--no-whiten-text"], "position starts as noise": [],
            "short captions only": []}
SHOWN = (400, 600, 800)         # of swaps.TIMES: the errors; what a wrong word costs is at the last


@dataclass(frozen=True)
class Config:
    model: str = "out"                  # folder with psvae.pt, latents/ and text/
    steps: int = 1000                   # of each DiT
    seeds: tuple[int, ...] = (0,)       # of initialisation, order and noise
    count: int = 200                    # unseen pictures for each exchanged word
    out: str = "out/recipe"             # the DiTs
    page: bool = False                  # the table goes into recipe.md, too

    def __post_init__(self):
        data.check(self, seeds=(0, 2**31))


def without(variant: str, rows: list[dict]) -> dict:
    """What of dit.py a variant replaces."""
    def noise(grid, width):             # the usual start of a learnable position
        return 0.02 * torch.randn(1, grid ** 2, width)

    def short(step, cfg, captions, edits):
        return keys(step, cfg, loose, edits)

    keys, seen, loose = dit.keys_of_step, {}, []
    for number, row in enumerate(rows):                 # two complete ones of each picture, first
        if "source" not in row and not row.get("held_out"):
            seen[row["image"]] = seen.get(row["image"], 0) + 1
            loose += [number] if seen[row["image"]] > 2 else []
    return {"position starts as noise": {"sine_cosine": noise},
            "short captions only": {"keys_of_step": short}}.get(variant, {})


def trained(cfg: Config, variant: str, seed: int) -> Path:
    """The folder of one DiT, trained unless it is there."""
    model = Path(cfg.model).absolute()
    out = Path(cfg.out) / f"{'-'.join(variant.split())}-{seed}-{cfg.steps}"
    out.mkdir(parents=True, exist_ok=True)
    for name in ("psvae.pt", "latents", "text"):
        if (model / name).exists() and not (out / name).exists():
            os.symlink(model / name, out / name)
    with open(out / "latents/rows.jsonl", encoding="utf-8") as lines:
        parts = without(variant, [json.loads(line) for line in lines])
    before = {name: getattr(dit, name) for name in parts}
    try:
        vars(dit).update(parts)
        if code := dit.main(["--out", str(out), "--steps", str(cfg.steps), "--seed", str(seed),
                             *VARIANTS[variant]]):
            sys.exit(code)
    finally:
        vars(dit).update(before)
    return out


def measured(cfg: Config, variant: str, seed: int) -> list[float]:
    """Errors of v at the times SHOWN, then what each wrong word adds at the last of them."""
    path = trained(cfg, variant, seed) / f"words-{cfg.count}.json"
    if not path.exists():
        pipeline, found = sample.Pipeline(path.parent, data.pick_device("auto")), []
        for edit, swap in swaps.SWAPS.values():
            if not edit:
                found.append(swaps.measure(pipeline, edit, swap, cfg.count))
        path.write_text(json.dumps(found))
    found = np.array(json.loads(path.read_text()))      # (words, times, 3)
    at = [swaps.TIMES.index(t) for t in SHOWN]
    return [*found[:, at, 0].mean(0), *found[:, at[-1], 1]]


@data.program
def main(argv: list[str] | None = None):
    cfg = Config(**data.read_flags(Config, argv, __doc__))
    data.read_meta(Path(cfg.model) / "latents")
    rows = {variant: [] for variant in VARIANTS}
    for seed in cfg.seeds:              # one after the other: what is there is a whole table
        for variant, runs in rows.items():
            runs.append(measured(cfg, variant, seed))
            print(f"{variant}, seed {seed}: {' '.join(f'{v:.3f}' for v in runs[-1])}", flush=True)
    words = [name.split(":")[0] for name, (edit, _) in swaps.SWAPS.items() if not edit]
    lines = [[variant, *(spread(values, "{:.3f}") for values in zip(*runs))]
             for variant, runs in rows.items()]
    text = table([f"{cfg.steps:,} steps", *(f"t = {t}" for t in SHOWN), *words], lines)
    print(text)
    if cfg.page:
        into_page(Path(__file__).with_suffix(".md"), text)


if __name__ == "__main__":
    sys.exit(main())
