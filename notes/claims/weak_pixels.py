"""Eq. 3, Problem 2: frozen features do not give the picture back, x != D(E(x)); training the encoder does.

    python notes/claims/weak_pixels.py                           a core, minutes: see notes/claims/weak_pixels.md
    python notes/claims/weak_pixels.py --scale gpu --seeds 0,1,2 one CUDA GPU, about a minute a row and seed

The same pixel decoder, steps and pictures on (a) the frozen features themselves (RAE), (b) latents of an
S-VAE, detached, (c) the latents of a PS-VAE, whose encoder learns from the pixels. Measured on held-out
pictures: pixels (PSNR of the whole picture, within 3 px of an edge, and elsewhere; SSIM) and meaning (what a
linear map reads out of mu, how much of the frozen features' variance is left).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data                                                                                      # noqa: E402
from notes.claims.lab import KINDS, Lab, Space, figure_path, publish, read_config, spread, table        # noqa: E402

ROWS = ("rae", "svae", "psvae")


def z_dim(lab: Lab, kind: str) -> int:
    """24 channels; the RAE's latents are the features, and the standard VAE has 16: see ladder.md."""
    return {"rae": lab.encoder.dim, "vae": 16}.get(kind, 24)


def latent_rows(lab: Lab, kinds, seeds):
    """{kind: [measurements of each seed]}, in the order of kinds."""
    out = {}
    for seed in seeds:
        for kind in kinds:
            space = Space(kind, z_dim(lab, kind), seed=seed)
            out.setdefault(kind, []).append(lab.pixels(space) | {
                "meaning": lab.semantics(space)})
    return out


def latent_tables(results) -> tuple[str, str]:
    pixel_lines, meaning_lines = [], []
    for kind, runs in results.items():
        column = lambda name, form="{:.2f}": spread([run[name] for run in runs], form)
        meaning = lambda name, form="{:.1f}", scale=100: spread(
            [scale * run["meaning"][name] if name in run["meaning"] else None for run in runs], form)
        pixel_lines.append([KINDS[kind], column("psnr"), column("edge"), column("flat"),
                            column("ssim", "{:.3f}"), column("seconds", "{:.0f}")])
        meaning_lines.append([KINDS[kind], meaning("background"), meaning("colour"), meaning("shape"),
                              meaning("size"), meaning("linear"), meaning("semantic"),
                              meaning("rate", "{:.2f}", 1)])
    return table(["latents", "PSNR dB", "near edges", "elsewhere", "SSIM", "stage 2, s"], pixel_lines), \
        table(["latents", "background %", "colour %", "shape %", "size %", "features, linear %",
               "features, D_sem %", "rate, nats a channel"], meaning_lines)


def picture_sheet(lab: Lab, kinds, seed: int, path, count: int = 10):
    """Held-out pictures, and what each row gives back of them."""
    first = slice(lab.test.start, lab.test.start + count)
    rows, names = [data.to_uint8(lab.x(first))], ["true"]
    for kind in kinds:
        space = Space(kind, z_dim(lab, kind), seed=seed)
        rows.append(data.to_uint8(lab.decode(space, lab.posterior(space, first)[0])))
        names.append(f"{KINDS[kind]}, {lab.pixels(space)['psnr']:.1f} dB")
    captions = [[name] + [""] * (count - 1) for name in names]
    data.save_png(data.grid([list(row) for row in rows], captions), path)
    print(f"wrote {path}")


@data.program
def main(argv: list[str] | None = None):
    cfg = read_config(argv, __doc__)
    lab = Lab(cfg)
    kinds = [kind for kind in ROWS if not cfg.only or kind in cfg.only]
    publish(lab, "weak_pixels", *latent_tables(latent_rows(lab, kinds, cfg.seeds)))
    picture_sheet(lab, kinds, cfg.seeds[0], figure_path(cfg, "weak_pixels"))


if __name__ == "__main__":
    sys.exit(main())
