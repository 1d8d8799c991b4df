"""Eq. 11 sums over channels, the guide's pseudo-code averages; and how strong should beta be?

    python notes/claims/kl.py                              a core: see notes/claims/kl.md for minutes
    python notes/claims/kl.py --scale gpu --seeds 0,1,2    one CUDA GPU; several at once on one card:
    for b in 0 4.2e-6 1e-4 1e-3 1e-2; do python notes/claims/kl.py --scale gpu --seeds 0,1,2 --only $b & done; wait

24 channels and beta from 0 to 1e-2: PS-VAE, or on a CPU stage 1 alone (S-VAE and its features, no pixels).
The mean over channels is the sum with beta / 24, so both reductions lie on one axis: the guide's beta = 1e-4
with .mean() is 4.2e-6 here. For each: the rate (KL in
nats a channel), active units (channels whose mu varies by more than 0.01), the width sigma of the posterior,
what comes back, and what a DiT draws.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data                                                                                      # noqa: E402
from notes.claims.ladder import generation_table                                                        # noqa: E402
from notes.claims.lab import (STUDY_KIND, Lab, Space, figure_path, publish, pyplot, read_config,        # noqa: E402
                       spread, table)

Z_DIM = 24
ROWS = {            # beta as Eq. 11's sum counts it -> the space; the second one is the pseudo-code's own
    "0": Space(z_dim=Z_DIM, beta=0.0),
    "4.2e-6": Space(z_dim=Z_DIM, beta=1e-4, reduction="mean"),
    "1e-4": Space(z_dim=Z_DIM, beta=1e-4),
    "1e-3": Space(z_dim=Z_DIM, beta=1e-3),
    "1e-2": Space(z_dim=Z_DIM, beta=1e-2),
}
NOTES = {"4.2e-6": " (1e-4, mean)", "1e-4": " (1e-4, sum)"}


def of_study(space: Space, cfg, seed: int) -> Space:
    """The row for a seed: PS-VAE, or features only where pixels would take too long."""
    return replace(space, kind=STUDY_KIND[cfg.scale], seed=seed)


def latent_table(rows: dict[str, list[dict]], first: str) -> str:
    """rows: name -> [Lab.semantics (| Lab.pixels) of each seed]."""
    lines = []
    for name, runs in rows.items():
        part = lambda key, form="{:.2f}", scale=1: spread(
            [scale * run[key] if key in run else None for run in runs], form)
        lines.append([name, part("rate", "{:.2f}"), part("active", "{:.0f}", 100), part("sigma", "{:.3f}"),
                      part("psnr"), part("edge"), *(part(key, "{:.1f}", 100)
                                                    for key in ("semantic", "noisy", "shape", "mean"))])
    return table([first, "rate, nats a channel", "active %", "sigma", "PSNR dB", "near edges",
                  "features from mu %", "from z %", "shape read from mu %", "four attributes %"], lines)


def measure(lab: Lab, rows: dict[str, Space]):
    """({name: [latent measures]}, {name: [generation measures]}) of every row and seed."""
    latents, generations = {}, {}
    for seed in lab.cfg.seeds:
        for name, space in rows.items():
            space = of_study(space, lab.cfg, seed)
            pixels = lab.pixels(space) if space.kind != "semantic" else {}
            latents.setdefault(name, []).append(pixels | lab.semantics(space))
            generations.setdefault(name, []).append(lab.generation(space))
    return latents, generations


def line_figure(latents, generations, path, xlabel, line="-"):
    """What comes back, and attributes and FD of what is drawn, along the rows of a table; a dot is a seed."""
    plt = pyplot()
    if plt is None:
        return
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    last = max((mark for mark in next(iter(generations.values()))[0] if mark.isdigit()), key=int)
    panels = [("attributes right of what is drawn, %", generations, lambda run: 100 * run[last]["mean"]),
              ("FD of what is drawn (low is better)", generations, lambda run: run[last]["fd"])]
    if any("psnr" in run for runs in latents.values() for run in runs):
        panels.insert(0, ("PSNR of reconstructions, dB", latents, lambda run: run["psnr"]))
    else:
        panels.insert(0, ("variance of f that comes back from z, %", latents, lambda run: 100 * run["noisy"]))
    for axis, (title, rows, value) in zip(axes, panels):
        values = [[value(run) for run in runs] for runs in rows.values()]
        axis.plot(list(rows), [sum(v) / len(v) for v in values], linestyle=line, color="C0")
        for name, v in zip(rows, values):
            axis.plot([name] * len(v), v, "o", color="C0")
        axis.set(title=title, xlabel=xlabel)
    fig.savefig(path, dpi=110)
    print(f"wrote {path}")


@data.program
def main(argv: list[str] | None = None):
    cfg = read_config(argv, __doc__)
    rows = {name: space for name, space in ROWS.items() if not cfg.only or name in cfg.only}
    lab = Lab(cfg)
    latents, generations = measure(lab, rows)
    named = lambda part: {name + NOTES.get(name, ""): runs for name, runs in part.items()}
    publish(lab, "kl", latent_table(named(latents), "beta"), generation_table(named(generations), "beta"))
    line_figure(latents, generations, figure_path(cfg, "kl"), "beta (Eq. 11's sum)")


if __name__ == "__main__":
    sys.exit(main())
