"""How many latent channels? (The paper's Fig. 11: 32 to 256; the guide has 96, our tiny preset 24.)

    python notes/claims/channels.py                              a core: see notes/claims/channels.md for minutes
    python notes/claims/channels.py --scale gpu --seeds 0,1,2    one CUDA GPU; several at once on one card:
    for c in 16 24 32 64 96 192; do python notes/claims/channels.py --scale gpu --seeds 0,1,2 --only $c & done; wait

16 to 192 channels on the same grid, and on each the same DiT for the same steps: what comes back, and how
soon it draws what the captions say. PS-VAE, or on a CPU stage 1 alone (S-VAE and its features, no pixels).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data                                                                                      # noqa: E402
from notes.claims.kl import latent_table, line_figure, measure                                          # noqa: E402
from notes.claims.ladder import generation_table                                                        # noqa: E402
from notes.claims.lab import Lab, Space, figure_path, publish, read_config                              # noqa: E402

ROWS = {str(count): Space(z_dim=count) for count in (16, 24, 32, 64, 96, 192)}


@data.program
def main(argv: list[str] | None = None):
    cfg = read_config(argv, __doc__)
    rows = {name: space for name, space in ROWS.items() if not cfg.only or name in cfg.only}
    lab = Lab(cfg)
    latents, generations = measure(lab, rows)
    publish(lab, "channels", latent_table(latents, "channels"), generation_table(generations, "channels"))
    line_figure(latents, generations, figure_path(cfg, "channels"), "channels")


if __name__ == "__main__":
    sys.exit(main())
