"""The guide's claims, measured on small latent spaces: one row of spaces and one page for each.

    python notes/claims/claims.py weak_pixels --seeds 0,1,2 --page          a CPU core
    python notes/claims/claims.py ladder --scale gpu --seeds 0,1,2 --page   one CUDA GPU

    weak_pixels     Eq. 3: what a decoder gets back from frozen features, S-VAE, PS-VAE
    ladder          the guide's table "Latent Space Comparison" (the paper's Table 4)
    kl, channels    Eq. 11: sum or mean, and beta; 8 to 96 channels
    guide_vs_paper  v, eps, t from the middle, rectified flow

Killed, a row resumes; one row takes over what another has trained. A claim counts as measured where
its best variant draws: 30 dB from the decoder, and 70 % of the prompts right by the judge. With
--page the tables, and a sheet of what each variant draws, go into the claim's page.
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
from notes.claims.lab import SCALES, Lab, Space  # noqa: E402

HERE = Path(__file__).resolve().parent
DECODES, DRAWS = 30, 0.7        # dB, share of prompts: below, a claim is not tested
QUARTERS = "¼ of the steps", "½", "¾"
# z_dim 0: as many as the features have. Without the semantic loss 3e-3 leaves 5 nats and no
# picture; 1e-4 is the guide's own.
SPACES = {"Standard VAE": Space("vae", beta=1e-4), "RAE": Space("rae", z_dim=0),
          "S-VAE": Space("svae"), "P-VAE": Space("pvae", beta=1e-4), "PS-VAE": Space()}
CLAIMS = {                      # {row: {variant: (latent space, what its DiT predicts)}}
    "weak_pixels": {name: (SPACES[name], "v") for name in ("RAE", "S-VAE", "PS-VAE")}
                   | {f"{name}, blind encoder": (replace(SPACES[name], blind=True), "v")
                      for name in ("RAE", "PS-VAE")},
    "ladder": {name: (space, "v") for name, space in SPACES.items()},
    "kl": {"0": (Space(beta=0.0), "v"), "1e-4, mean": (Space(beta=1e-4 / 24), "v"),
           **{beta: (Space(beta=float(beta)), "v") for beta in ("1e-4", "1e-3", "3e-3", "1e-2")}},
    "channels": {str(z_dim): (Space(z_dim=z_dim), "v") for z_dim in (8, 16, 24, 48, 96)},
    "guide_vs_paper": {name: (Space(), predict) for name, predict in (
        ("v", "v"), ("eps", "eps"), ("v, t from the middle", "middle"), ("flow", "flow"))},
}


@dataclass(frozen=True)
class Config:
    scale: str = "cpu"                  # how big: cpu (one core), gpu, or quick (a test)
    quick: bool = False                 # the same as --scale quick
    seeds: tuple[int, ...] = (0,)       # of initialisation, order and noise
    out: str = "out/lab"                # trained parts and measurements, shared by all rows
    page: bool = False                  # tables and pictures go into notes/claims/ too
    device: str = "auto"                # auto, cpu or cuda

    def __post_init__(self):
        data.check_choice(self, scale=tuple(SCALES), device=("auto", "cpu", "cuda"))
        data.check(self, seeds=(0, 2**31))


# --- Tables ---------------------------------------------------------------------------------------

def spread(values, form="{:.2f}") -> str:
    """mean ± standard deviation over seeds (N - 1), or the one value there is."""
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    mean = form.format(float(np.mean(values)))
    return f"{mean} ± {form.format(float(np.std(values, ddof=1)))}" if len(values) > 1 else mean


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown, without the columns in which no line has a value."""
    keep = [i for i in range(len(head)) if any(line[i] != "–" for line in lines)]
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row[i] for i in keep) + " |" for row in rows)


def column(runs: list[dict], name: str, form="{:.1f}", scale=100) -> str:
    return spread([scale * run[name] if name in run else None for run in runs], form)


def on_the_way(runs: list[dict], form: str, scale: float) -> list[str]:
    """What was measured after one, two and three quarters of the steps."""
    return [spread([scale * run["curve"][i] for run in runs], form) for i in range(len(QUARTERS))]


def space_tables(found: dict[str, dict]) -> list[str]:
    if len({row["of"][0] for row in found.values()}) == 1:      # one space for all that is drawn
        found = {"all": next(iter(found.values()))}
    pixels, meaning = [], []
    read = ("colour", "shape", "size", "features")
    for name, row in found.items():
        p, m = row["pixels"], row["meaning"]
        decibels = (column(p, part, "{:.2f}", 1) for part in ("psnr", "edge", "elsewhere"))
        pixels.append([name, *on_the_way(p, "{:.2f}", 1), *decibels,
                       column(p, "seconds", "{:.1f}", 1 / 60)])
        meaning.append([name, *(column(m, part) for part in read), column(m, "rate", "{:.1f}", 1),
                        column(m, "sigma", "{:.3f}", 1)])
    return [table(["PSNR, dB", *QUARTERS, "all", "near edges", "elsewhere", "minutes"], pixels),
            table(["read from mu, %", *read, "nats a position", "sigma"], meaning)]


def drawn_tables(found: dict[str, dict]) -> list[str]:
    right, beside = [], []
    for name, row in found.items():
        runs = row["drawn"]
        right.append([name, column([run["mu"] for run in runs], "right"),
                      *on_the_way(runs, "{:.1f}", 100), column(runs, "right"),
                      column(runs, "unreadable")])
        beside.append([name, column(runs, "fd", "{:.2f}", 1), column(runs, "beside", "{:.3f}", 1),
                       column(runs, "off", "{:.3f}", 1), column(runs, "seconds", "{:.1f}", 1 / 60)])
    return [table(["right by the judge, %", "true ones", *QUARTERS, "all", "unreadable"], right),
            table(["drawn", "FD", "beside", "off", "minutes"], beside)]


def paired(found: dict[str, dict]) -> str:
    """Of each variant less the first, paired by prompt and seed, with a 95 % interval over
    prompts."""
    (first, base), *others = [(name, row["drawn"]) for name, row in found.items()]
    lines = []
    for name, runs in others:
        less = np.mean([np.subtract(a["each"], b["each"], dtype=float)
                        for a, b in zip(runs, base)], axis=0)
        half = 196 * less.std(ddof=1) / len(less) ** 0.5
        lines.append(f"{name} {100 * less.mean():+.1f} ± {half:.1f}")
    return (f"drawn, points less than {first}, paired by prompt (± is a 95 % interval): "
            + ", ".join(lines) + ".")


def verdict(found: dict[str, dict]) -> str:
    decodes = max(np.mean([run["psnr"] for run in row["pixels"]]) for row in found.values())
    draws = max((np.mean([run["right"] for run in row["drawn"]])
                 for row in found.values() if "drawn" in row), default=None)
    tested = decodes >= DECODES and (draws is None or draws >= DRAWS)
    return (f"{'Measured' if tested else 'Not tested'} at this size: the best decoder gives "
            f"{decodes:.1f} dB (wanted: {DECODES})"
            + (f", the best DiT draws {draws:.0%} of the prompts right ({DRAWS:.0%})"
               if draws is not None else "") + ".")


def into_page(page: Path, text: str):
    """Replaces what stands between the page's two marks."""
    begin, end = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}\n{text}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")
    print(f"wrote {page}")


def figure(lab: Lab, found: dict[str, dict], path: Path, count=8):
    """The first held-out pictures, and what each variant draws for their prompts (or, where there
    is no DiT, gives back of them)."""
    first = slice(lab.pictures.test.start, lab.pictures.test.start + count)
    rows, said = [list(data.to_uint8(lab.pictures.x(first)))], ["true"]
    for name, row in found.items():
        space, predict = row["of"]
        z = (lab.dit(space, predict)[0](count) if "drawn" in row
             else lab.posterior(space, first)[0])
        rows.append(list(data.to_uint8(lab.decode(space, z))))
        said.append(name)
    data.save_picture(data.grid(rows, [[name] for name in said]), path)
    print(f"wrote {path}")


# --- A row ----------------------------------------------------------------------------------------

def measure(lab: Lab, claim: str, seeds) -> dict[str, dict]:
    """{variant: {"pixels", "meaning", "drawn": a dict for each seed, "of": (space, predict)}}"""
    found = {}
    for seed in seeds:          # one after the other: what is there is a whole table
        for name, (space, predict) in CLAIMS[claim].items():
            space = replace(space, seed=seed, z_dim=space.z_dim or lab.encoder.dim)
            row = found.setdefault(name, {"pixels": [], "meaning": [], "of": (space, predict)})
            row["pixels"].append(lab.pixels(space))
            row["meaning"].append(lab.meaning(space))
            if claim != "weak_pixels":
                row.setdefault("drawn", []).append(lab.drawn(space, predict))
    return found


@data.program
def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    claim = argv[0] if argv and argv[0] in CLAIMS else ""
    cfg = Config(**data.read_flags(Config, argv[1:] if claim else argv, __doc__))
    if not claim:
        raise data.UserError(f"name a row first: {', '.join(CLAIMS)}")
    if cfg.quick:
        cfg = Config(**asdict(cfg) | {"scale": "quick", "quick": False})
    page = cfg.page and cfg.scale != "quick"
    lab = Lab(cfg.scale, cfg.out, cfg.device)
    found = measure(lab, claim, cfg.seeds)
    where = torch.cuda.get_device_name() if lab.device.type == "cuda" else "one CPU core"
    parts = [verdict(found), *space_tables(found)]
    if claim != "weak_pixels":
        parts += [*drawn_tables(found), paired(found)]
    parts.append(f"Seeds {', '.join(map(str, cfg.seeds))}; `--scale {cfg.scale}`: "
                 f"{lab.scale.pictures:,} pictures, {lab.scale.held_out} held out, "
                 f"{lab.scale.prompts} prompts; minutes are those of {where}, torch "
                 f"{torch.__version__}.")
    text = "\n\n".join(parts)
    print(text + "\n", flush=True)
    if page:
        into_page(HERE / f"{claim}.md", text)
    figure(lab, found, HERE / f"{claim}.png" if page else Path(cfg.out) / f"{claim}.png")


if __name__ == "__main__":
    sys.exit(main())
