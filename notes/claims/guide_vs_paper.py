"""Where the guide departs from the paper, and what three of the paper's choices change here.

    python notes/claims/guide_vs_paper.py                              a core: see notes/claims/guide_vs_paper.md
    python notes/claims/guide_vs_paper.py --scale gpu --seeds 0,1,2    one CUDA GPU, about a minute a row and seed

The guide's PS-VAE with 24 channels (on a CPU stage 1 alone: S-VAE and its features), and one change a row:

    transformer    projector and semantic decoder are three transformer blocks instead of MLPs
    l2 + cosine    the semantic loss is the guide's MSE plus 1 - cosine of f_hat and the target
    flow           stage 3 on the same latents is rectified flow: v = noise - z_0, logit-normal t, shifted by
                   sqrt(C P^2 / 16) (C channels, patch P = 1), and Euler steps instead of DDIM
    plain head     stage 3 as the guide has it to the letter: the DiT's head gives eps itself, not v
    weighted       Eq. 32 with t weighted by min(1 / alpha_bar_t, 20), as in the tiny preset of dit.py

Every field of the full comparison is in notes/claims/guide_vs_paper.md.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data                                                                                      # noqa: E402
from dit import add_noise, dit_loss                                                              # noqa: E402
from notes.claims import lab as laboratory                                                              # noqa: E402
from notes.claims.kl import latent_table, line_figure, measure, of_study                                # noqa: E402
from notes.claims.ladder import generation_table                                                        # noqa: E402
from notes.claims.lab import Diffusion, Lab, Space, T, figure_path, publish, read_config                # noqa: E402
from psvae import semantic_loss                                                                  # noqa: E402

Z_DIM, GRID, BLOCKS = 24, 4, 3


class Blocks(nn.Module):
    """Three pre-norm transformer blocks over the cells of the grid; (B, h, w, d) -> the same."""

    def __init__(self, d: int):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, GRID * GRID, d) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(d, d // 32, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(BLOCKS))

    def forward(self, h):
        h, shape = h.flatten(1, 2) + self.position, h.shape
        for block in self.blocks:
            h = block(h)
        return h.view(shape)


class TransformerProjector(nn.Module):
    def __init__(self, d: int, z_dim: int):
        super().__init__()
        self.blocks, self.head = Blocks(d), nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * z_dim))

    def forward(self, f):
        mu, log_var = self.head(self.blocks(f)).chunk(2, -1)
        return mu, log_var.clamp(-30, 20)


class TransformerDecoder(nn.Module):
    def __init__(self, d: int, z_dim: int):
        super().__init__()
        self.stem, self.blocks = nn.Linear(z_dim, d), Blocks(d)
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d))

    def forward(self, z):
        return self.head(self.blocks(self.stem(z)))


def l2_and_cosine(f_hat, f):
    return semantic_loss(f_hat, f) + (1 - F.cosine_similarity(f_hat, f, dim=-1)).mean()


class PlainHead(Diffusion):
    GIVES_V = False


class Weighted(Diffusion):
    @staticmethod
    def loss(lab, model, z_0, eps, c, mask, g):
        t = torch.randint(1, T + 1, (len(z_0),), generator=g).to(z_0.device)
        weight = (1 / lab.alpha_bar[t]).clamp(max=20).float()
        return dit_loss(eps, model(add_noise(z_0, t, eps, lab.alpha_bar), t, c, mask), weight)


class Flow:
    """Rectified flow: z_t = (1 - t) z_0 + t eps, t in 0 .. 1; the network, told T t, predicts eps - z_0."""

    GIVES_V = False

    @staticmethod
    def shifted(t, channels):
        shift = math.sqrt(channels / 16)    # sqrt(C P^2 / 16), P = 1: more numbers need more noise
        return shift * t / (1 + (shift - 1) * t)

    @staticmethod
    def loss(lab, model, z_0, eps, c, mask, g):
        t = Flow.shifted(torch.sigmoid(torch.randn(len(z_0), generator=g)), z_0.shape[-1]).to(z_0.device)
        at = t.view(-1, 1, 1, 1)
        return F.mse_loss(model((1 - at) * z_0 + at * eps, T * t, c, mask), eps - z_0)

    @staticmethod
    def sample(lab, model, z_T, c, mask):
        steps, guidance = lab.scale.sampler
        times = Flow.shifted(torch.linspace(1, 0, steps + 1), z_T.shape[-1]).tolist()
        z = z_T
        for t, t_next in zip(times, times[1:]):
            at = torch.full((2 * len(z),), T * t, device=z.device)
            v_c, v_null = model(torch.cat([z, z]), at, c, mask).chunk(2)
            z = z + (t_next - t) * (v_null + guidance * (v_c - v_null))
        return z


laboratory.BODIES["transformer"] = (TransformerProjector, TransformerDecoder)
laboratory.SEMANTIC["l2+cosine"] = l2_and_cosine
STAGE_3 = {"flow": Flow, "plain head": PlainHead, "weighted": Weighted}
laboratory.OBJECTIVES.update(STAGE_3)
ROWS = {"guide": Space(z_dim=Z_DIM), "transformer": Space(z_dim=Z_DIM, body="transformer"),
        "l2 + cosine": Space(z_dim=Z_DIM, semantic="l2+cosine")}


@data.program
def main(argv: list[str] | None = None):
    cfg = read_config(argv, __doc__)
    lab = Lab(cfg)
    rows = {name: space for name, space in ROWS.items() if not cfg.only or name in cfg.only}
    latents, generations = measure(lab, rows)
    for name in STAGE_3:
        if not cfg.only or name in cfg.only:
            generations[name] = [lab.generation(of_study(ROWS["guide"], cfg, seed), name)
                                 for seed in cfg.seeds]
    tables = [latent_table(latents, "variant")] if latents else []
    publish(lab, "guide_vs_paper", *tables, generation_table(generations, "variant"))
    line_figure(latents, generations, figure_path(cfg, "guide_vs_paper"), "", line="")


if __name__ == "__main__":
    sys.exit(main())
