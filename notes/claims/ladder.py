"""The guide's table "Latent Space Comparison" (the paper's Table 4): which latent is easy to draw in?

    python notes/claims/ladder.py                              a core: see notes/claims/ladder.md for minutes
    python notes/claims/ladder.py --scale gpu --seeds 0,1,2    one CUDA GPU; several at once on one card:
    for k in vae rae svae pvae psvae; do
      python notes/claims/ladder.py --scale gpu --seeds 0,1,2 --only $k & done; wait; and once more without --only

Five latent spaces on the same 4 x 4 grid with the same pixel decoder, and on each the same DiT, pictures,
steps and noise:

    Standard VAE   a small convolutional encoder, KL, 16 channels: as many numbers as 4 channels on 8 x 8
    RAE            the frozen features themselves, 128 channels, no KL
    S-VAE          24 channels from frozen features, KL, semantic loss; the pixel decoder looks on
    P-VAE          as PS-VAE with alpha = 0: the encoder learns from pixels alone
    PS-VAE         24 channels, encoder trained on semantic, pixel and KL terms

Reconstruction, semantics, and pictures generated from held-out captions after a half and all of the DiT's
steps (on a GPU after a quarter as well). Run again, it goes on where it stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data                                                                                      # noqa: E402
from notes.claims.lab import (KINDS, Lab, Space, figure_path, publish, pyplot, read_config,             # noqa: E402
                       spread, table)
from notes.claims.weak_pixels import latent_rows, latent_tables, z_dim                                  # noqa: E402

ROWS = ("vae", "rae", "svae", "pvae", "psvae")


def generation_lines(results: dict[str, list[dict]]) -> list[list[str]]:
    """One line for each row of a table: name -> [Lab.generation of each seed]."""
    lines = []
    for name, runs in results.items():
        marks = [mark for mark in runs[0] if mark.isdigit()]
        part = lambda mark, score, form="{:.1f}", scale=100: spread(
            [scale * run[mark][score] if score in run[mark] else None for run in runs], form)
        lines.append([name, part("mu", "mean"), *(part(mark, "mean") for mark in marks),
                      *(part(marks[-1], name) for name in ("background", "colour", "shape", "size", "all")),
                      part("mu", "fd", "{:.2f}", 1), *(part(mark, "fd", "{:.2f}", 1) for mark in marks),
                      part(marks[-1], "judge"), spread([run["seconds"] for run in runs], "{:.0f}")])
    return lines


def generation_table(results, first="latents") -> str:
    marks = [mark for mark in next(iter(results.values()))[0] if mark.isdigit()]
    return table([first, "attributes %, from mu", *(f"step {mark}" for mark in marks), "background %",
                  "colour %", "shape %", "size %", "all four %", "FD, from mu",
                  *(f"step {mark}" for mark in marks), "judge %", "stage 3, s"], generation_lines(results))


def figure(lab: Lab, latents, generations, seed, path, count=8):
    """Left: reconstruction against generation. Middle: convergence. Right: what is drawn."""
    plt = pyplot()
    if plt is None:
        return
    fig, axes = plt.subplots(1, 3, figsize=(15, 4.6), width_ratios=(1, 1, 1.5), layout="constrained")
    pictures = []
    for kind, runs in generations.items():
        marks = [mark for mark in runs[0] if mark.isdigit()]
        for run, latent in zip(runs, latents[kind]):
            label = KINDS[kind] if run is runs[0] else None
            dots = axes[0].plot(latent["psnr"], run[marks[-1]]["fd"], "o", label=label,
                                color=f"C{ROWS.index(kind)}")
            axes[1].plot([int(mark) for mark in marks], [100 * run[mark]["mean"] for mark in marks], "o-",
                         label=label, color=dots[0].get_color())
        space = Space(kind, z_dim(lab, kind), seed=seed)
        pictures.append(list(data.to_uint8(lab.decode(space, lab.generate(space, count=count)))))
    axes[0].set(xlabel="PSNR of reconstructions, dB (right is better)",
                ylabel="FD of generated pictures (low is better)", title="what it keeps, what it lets draw")
    axes[1].set(xlabel="steps of the DiT", ylabel="attributes right, %", title="convergence")
    axes[1].legend(fontsize=8)
    prompts = list(data.to_uint8(lab.x(slice(lab.test.start, lab.test.start + count))))
    axes[2].imshow(data.grid([prompts, *pictures]))
    size = axes[2].images[0].get_array().shape[0] / (len(pictures) + 1)
    axes[2].set(xticks=[], yticks=[(i + 0.5) * size for i in range(len(pictures) + 1)],
                yticklabels=["true", *(KINDS[kind] for kind in generations)],
                title="held-out captions: the true picture, and what each draws")
    fig.savefig(path, dpi=110)
    print(f"wrote {path}")


@data.program
def main(argv: list[str] | None = None):
    cfg = read_config(argv, __doc__)
    lab = Lab(cfg)
    kinds = [kind for kind in ROWS if not cfg.only or kind in cfg.only]
    latents, generations = {}, {}
    for seed in cfg.seeds:                  # a seed after the other: what is there is a whole table
        for kind in kinds:
            for name, runs in latent_rows(lab, [kind], [seed]).items():
                latents.setdefault(name, []).extend(runs)
            generations.setdefault(kind, []).append(lab.generation(Space(kind, z_dim(lab, kind), seed=seed)))
    publish(lab, "ladder", *latent_tables(latents),
            generation_table({KINDS[kind]: runs for kind, runs in generations.items()}),
            f"FD of the prompts' true pictures: {generations[kinds[0]][0]['floor']:.2f}.")
    figure(lab, latents, generations, cfg.seeds[0], figure_path(cfg, "ladder"))


if __name__ == "__main__":
    sys.exit(main())
