"""svae.py - stage 1, the Semantic VAE: a compact, KL-regularised latent space for frozen features.

Features of a DINOv2 fill a thin sheet of a space of 1024 dimensions, and a diffusion model trained
there falls off the manifold (the guide's Problem 1). S-VAE squeezes each feature vector f into z,
96 numbers kept near N(0, 1), and decodes f from z.

Eq. 4 to 11, as numbered in notes/equations.md; "the guide" is docs/architecture.md of the public
repository Gaurav14cs17/PS-VAE.

    x (B,3,256,256) --E, frozen--> f (B,16,16,1024) --Projector--> mu, log_var (B,16,16,96)
                                   |                                    | z = mu + sigma * eps
                                   '---- MSE ---- f_hat <--SemanticDecoder'

    python svae.py                      the built-in world, tiny preset: 2 minutes on 2 CPU cores
    python svae.py --data ./imagenet    DINOv2-L on one CUDA GPU

Reads a folder of pictures. Writes out/svae.pt, out/svae.csv (every loss term, held-out ones too)
and out/svae.png (pictures; their frozen features as colours; the features that come back from mu).
Run again, it resumes with the checkpoint's flags; one that contradicts them is refused.
Expect (tiny, seed 0): held-out semantic 0.0121, kl 62.0 after the 800 steps, which is 99 % of the
variance of the features; f and f_hat look the same.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data


@dataclass(frozen=True)
class Config:
    data: str = ""                          # folder of images; empty: the built-in world
    out: str = "out"                        # folder for checkpoint, log and picture
    preset: str = ""                        # full or tiny; default: full with --data, tiny without
    encoder: str = "facebook/dinov2-large"  # a DINOv2, hub name or folder
    image_size: int = 256                   # pixels per side; the latent grid has a sixteenth
    z_dim: int = 96                         # latent channels
    beta: float = 1e-4                      # weight of the KL term, Eq. 8
    steps: int = 50_000                     # optimisation steps
    batch: int = 256                        # pictures a step, over all processes
    learning_rate: float = 3e-4             # peak, after warm-up; AdamW
    weight_decay: float = 0.01              # of AdamW
    warmup: int = 1000                      # steps of linear warm-up, before the cosine decay
    clip: float = 1.0                       # gradient clipping: maximum norm
    precision: str = "bf16"                 # bf16 (autocast; losses in fp32) or fp32 (TF32 on CUDA)
    compile: bool = True                    # torch.compile, on CUDA
    device: str = "auto"                    # auto, cpu or cuda
    workers: int = 8                        # processes that read pictures
    count: int = 75_000                     # of the built-in world: pictures that have words
    max_broken: float = 0.01                # largest tolerated share of unreadable pictures or rows
    log_every: int = 50                     # steps between rows of the log
    eval_every: int = 1000                  # steps between held-out losses and previews
    save_every: int = 1000                  # steps between checkpoints
    seed: int = 0                           # of everything random
    fresh: bool = False                     # move the old run aside and start over

    def __post_init__(self):
        data.check(self, image_size=(32, 4096), clip=(1e-9, 1e9), count=(10, 1e8),
                   max_broken=(0, 1))
        data.check_choice(self, precision=("bf16", "fp32"), device=("auto", "cpu", "cuda"))
        if self.image_size % 16:
            raise data.UserError(f"--image-size {self.image_size}: allowed are multiples of 16.")


PRESETS = {
    "full": {},
    "tiny": dict(encoder=data.TINY_IMAGE_ENCODER, image_size=64, z_dim=24, steps=800, batch=64,
                 learning_rate=2e-3, warmup=50, precision="fp32", compile=False, workers=0,
                 log_every=10, eval_every=200, save_every=200),
}
TERMS = ("loss", "semantic", "kl")


# === Architecture: 1. Frozen Representation Encoder ===============================================

@torch.no_grad()
def frozen_features(encoder: data.ImageEncoder, x: torch.Tensor) -> torch.Tensor:
    """x (B, 3, H, W) in [-1, 1] -> f (B, h, w, d), h = H / 16; the encoder gets no gradient."""
    # DEVIATION: the encoder sees x resized to 14 h: one patch of 14 px for 16 px of the picture, so
    # that a grid of 16 x 16 cells belongs to 256 px, as in the guide's other figures.
    # Eq. 4: f = E_frozen(x), f in R^(h x w x d)
    return encoder(x)


# --- 2. Semantic Projector (Encoder) --------------------------------------------------------------

class Projector(nn.Module):
    """The posterior of z: f (..., d) -> mu, log_var (..., z_dim), in the type of f (fp32)."""

    def __init__(self, d: int, z_dim: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(d, 512), nn.LayerNorm(512), nn.GELU(),
                                  nn.Linear(512, 256), nn.LayerNorm(256), nn.GELU())
        self.mu = nn.Linear(256, z_dim)
        self.log_var = nn.Linear(256, z_dim)

    def forward(self, f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.body(f)                                                    # (..., 256)
        # Eq. 5: mu, log sigma^2 = Proj(f)
        mu, log_var = self.mu(h), self.log_var(h)                           # (..., z_dim)
        # DEVIATION: clamped: one wild log_var > 88 would make Eq. 11 infinite; never reached.
        return mu.to(f.dtype), log_var.to(f.dtype).clamp(-30, 20)


# --- 3. Reparameterization Trick ------------------------------------------------------------------

def reparameterize(mu: torch.Tensor, log_var: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """A sample of N(mu, sigma^2) that gradients pass through. All of one shape."""
    # Eq. 6: z = mu + sigma * eps, sigma = exp(log sigma^2 / 2), eps ~ N(0, I)
    return mu + torch.exp(0.5 * log_var) * eps


# --- 4. Semantic Decoder --------------------------------------------------------------------------

class ResidualBlock(nn.Module):
    """h + Linear(GELU(Linear(LayerNorm(h)))), (..., d) -> (..., d)."""

    def __init__(self, d: int):
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.body(h)


class SemanticDecoder(nn.Module):
    """The features again: z (..., z_dim) -> f_hat (..., d)."""

    def __init__(self, d: int, z_dim: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(z_dim, 256), nn.LayerNorm(256), nn.GELU(),
                                  nn.Linear(256, 512), nn.LayerNorm(512), nn.GELU(),
                                  nn.Linear(512, d), ResidualBlock(d), ResidualBlock(d))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        # Eq. 7: f_hat = D_sem(z)
        return self.body(z)


class SVAE(nn.Module):
    """Projector and semantic decoder; the frozen encoder is no part of it."""

    def __init__(self, d: int, z_dim: int):
        super().__init__()
        self.projector = Projector(d, z_dim)
        self.semantic_decoder = SemanticDecoder(d, z_dim)

    def forward(self, f: torch.Tensor, eps: torch.Tensor):
        """f (B, h, w, d), eps (B, h, w, z_dim) -> f_hat like f, mu and log_var like eps."""
        mu, log_var = self.projector(f)
        z = reparameterize(mu, log_var, eps)
        return self.semantic_decoder(z), mu, log_var


# === S-VAE Loss Function ==========================================================================

def svae_loss(f_hat, f, mu, log_var, beta: float) -> dict[str, torch.Tensor]:
    """The loss and its terms, each a scalar in fp32."""
    semantic, kl = semantic_loss(f_hat, f), kl_divergence(mu, log_var)
    # Eq. 8: L_S-VAE = L_semantic + beta * L_KL
    loss = semantic + beta * kl
    return {"loss": loss, "semantic": semantic, "kl": kl}


def semantic_loss(f_hat: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """Both (B, h, w, d); the mean is over the batch, too."""
    # Eq. 9: L_semantic = 1/(hwd) sum_ijk ( f_hat_ijk - f_ijk )^2
    return F.mse_loss(f_hat.to(f.dtype), f)


def kl_divergence(mu: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """KL(N(mu, sigma^2) || N(0, I)) in nats: mu, log_var (B, h, w, z_dim) -> scalar."""
    # DEVIATION: the mean over batch and positions, but the sum over z_dim, as in the equation. The
    # guide's pseudo-code takes the mean there too: z_dim times less, and no KL divergence.
    # Eq. 10: L_KL = D_KL( q(z|x) || p(z) ), p(z) = N(0, I), which for Gaussians is
    # Eq. 11: L_KL = -1/2 sum_i ( 1 + log sigma_i^2 - mu_i^2 - sigma_i^2 )
    kl = -0.5 * (1 + log_var - mu ** 2 - torch.exp(log_var)).sum(-1)
    return kl.mean()


# === Training Procedures. Stage 1: Train S-VAE ====================================================
def set_up(cfg: Config, checkpoint: dict | None, run: data.Run):
    """The folder, the frozen encoder, the model and its optimizer, at the checkpoint's step."""
    folder, held_out = run.read_data(checkpoint)
    run.say(f"stage 1, {cfg.preset} preset on {run.device}: {len(folder.images):,} pictures, "
            f"captions from {folder.layout}, encoder {cfg.encoder}")

    # Freeze encoder
    encoder = data.load_image_encoder(cfg.encoder).to(run.device).requires_grad_(False)
    encoder_fingerprint = data.fingerprint(encoder)
    torch.manual_seed(cfg.seed)
    model = SVAE(encoder.dim, cfg.z_dim).to(run.device)
    # DEVIATION: the guide names no optimizer. The usual, so that no run diverges: AdamW with a
    # short second-moment average (beta_2 = 0.99), warm-up and cosine decay, gradient clipping.
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    if checkpoint:
        path = run.out / "svae.pt"
        with data.reading(path):
            data.check_encoder(encoder_fingerprint, checkpoint, cfg.encoder)
            data.load_weights(model, checkpoint["model"], path)
            optimizer.load_state_dict(checkpoint["optimizer"])
    if run.compile:
        encoder.compile()
        model.compile()

    x_held_out = run.held_out(held_out, cfg.image_size)
    run.start(checkpoint, TERMS, lambda picture: look(model, encoder, x_held_out, cfg, picture),
              lambda: dict(model=model.state_dict(), optimizer=optimizer.state_dict(),
                           encoder_fingerprint=encoder_fingerprint))
    return folder, encoder, model, optimizer


@torch.no_grad()
def look(model: SVAE, encoder, x: torch.Tensor, cfg: Config, picture: Path | None):
    """The held-out loss terms, {name: value}, with the same noise at every call.

    `picture`, if any, gets three rows: x, f as PCA colours, and f_hat from mu in the same colours.
    """
    f = frozen_features(encoder, x)
    if picture:
        f_hat = model.semantic_decoder(model.projector(f[:8])[0])
        rows = [data.to_uint8(x[:8]), *data.pca_colours(f[:8], f_hat, size=x.shape[-1])]
        names = [["picture"], ["f, frozen"], ["f_hat, from mu"]]
        data.save_picture(data.grid(rows, names), picture)
    g = data.generator(cfg.seed, "svae", 0, "held out", x.device)
    eps = torch.randn(*f.shape[:-1], cfg.z_dim, generator=g, device=x.device)
    f_hat, mu, log_var = model(f, eps)
    losses = svae_loss(f_hat, f, mu, log_var, cfg.beta)
    return {name: value.item() for name, value in losses.items()}


def train(cfg: Config, checkpoint: dict | None):
    with data.Run(cfg, "svae", terms=(*TERMS, "grad_norm")) as run:
        folder, encoder, model, optimizer = set_up(cfg, checkpoint, run)
        svae, side = run.distribute(model), cfg.image_size // 16

        # DEVIATION: folders are augmented with crops and flips, for a few more effective pictures.
        # The built-in world is not: there, left means left.
        for step, x in run.pictures(folder, cfg.image_size, augment=bool(cfg.data)):
            run.set_rate(optimizer, step)
            eps = run.randn(step, "eps", side, side, cfg.z_dim)             # (B, h, w, z_dim)

            with run.autocast():
                f = frozen_features(encoder, x)                             # (B, h, w, d)
                f_hat, mu, log_var = svae(f, eps)
            losses = svae_loss(f_hat, f, mu, log_var, cfg.beta)

            losses["loss"].backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            run.add(losses)
            run.after_step(step, grad_norm)             # log, preview, save, stop


@data.program
def main(argv: list[str] | None = None):
    typed = data.read_flags(Config, argv, __doc__, PRESETS)
    out = Path(typed.get("out", "out"))
    resumes = (out / "svae.pt").exists() and not typed.get("fresh")
    checkpoint = data.load(out / "svae.pt", "svae") if resumes else None
    cfg = data.configure(Config, PRESETS, typed, saved=checkpoint and checkpoint["config"])
    if cfg.fresh:
        data.set_aside(out, "svae.pt", "svae.csv", "svae.png")
    if not (checkpoint and data.is_finished(checkpoint, cfg, out / "svae.pt")):
        train(cfg, checkpoint)
    data.say(f"Next: {data.command('psvae.py', out=out)}")


if __name__ == "__main__":
    sys.exit(main())
