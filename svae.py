"""svae.py - stage 1, the Semantic VAE:
a compact, KL-regularised latent space for the features of a frozen encoder.

The features f of a DINOv2 are made to classify, not to be drawn: they fill a thin sheet of a space of 1024
dimensions, and a diffusion model trained there falls beside the sheet (the guide's Problem 1). S-VAE squeezes
every feature vector into z, 96 numbers kept near N(0, 1), from which a decoder brings f back.

Eq. 4 to 11, as numbered in notes/equations.md; "the guide" is docs/architecture.md of Gaurav14cs17/PS-VAE.

    x (B,3,256,256) in [-1, 1] --E, frozen--> f (B,16,16,1024) --Projector--> mu, log_var (B,16,16,96)
                                              |                                    | z = mu + sigma * eps
                                              '---- MSE ---- f_hat <--SemanticDecoder'

    python svae.py                        the built-in world, tiny preset, 1.5 minutes on 2 CPU cores
    python svae.py --data ./imagenet      DINOv2-L on one CUDA GPU

Reads a folder of pictures. Writes out/svae.csv (every loss term, held-out ones too), out/svae.png (three
rows: pictures; their frozen features as colours; the features that come back from mu) and out/svae.pt
(config, model, optimizer, step, seed, losses not logged yet, the encoder's fingerprint, versions). Run again,
it goes on where it stopped, with the checkpoint's config: a flag that contradicts it, such as another
--batch, is refused.
Expect (tiny, seed 0): held-out semantic 0.0102, kl 58.9 after the 800 steps, which is 98 % of the variance of
the features; f and f_hat look the same.
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
    image_size: int = 256                   # pixels a side; the latent grid has image_size / 16 cells a side
    z_dim: int = 96                         # latent channels
    beta: float = 1e-4                      # weight of the KL term, Eq. 8
    steps: int = 50_000                     # optimisation steps
    batch: int = 256                        # pictures a step, over all processes
    micro_batches: int = 1                  # gradient accumulation: parts that a process cuts its batch into
    learning_rate: float = 3e-4             # peak, after warm-up; AdamW
    weight_decay: float = 0.01              # of AdamW
    warmup: int = 1000                      # steps of linear warm-up, before the cosine decay
    clip: float = 1.0                       # largest norm of the gradient
    precision: str = "bf16"                 # bf16 (autocast; losses in fp32) or fp32 (TF32 on CUDA)
    compile: bool = True                    # torch.compile, on CUDA
    device: str = "auto"                    # auto, cpu or cuda
    workers: int = 8                        # processes that read pictures
    count: int = 50_000                     # pictures of the built-in world, if it has to be drawn
    max_broken: float = 0.01                # largest tolerated fraction of unreadable pictures or rows
    log_every: int = 50                     # steps between rows of the log
    eval_every: int = 1000                  # steps between held-out losses and previews
    save_every: int = 1000                  # steps between checkpoints
    seed: int = 0                           # of everything random
    fresh: bool = False                     # move the old run aside and start over

    def __post_init__(self):
        data.check(self, image_size=(32, 4096), z_dim=(1, 65536), beta=(0, 1e6), steps=(1, 1e9),
                   batch=(1, 1e6), micro_batches=(1, 1e6), learning_rate=(0, 10), weight_decay=(0, 10),
                   warmup=(0, 1e9), clip=(1e-9, 1e9), workers=(0, 512), count=(10, 1e8), max_broken=(0, 1),
                   log_every=(1, 1e9), eval_every=(1, 1e9), save_every=(1, 1e9), seed=(0, 2**63 - 1))
        data.check_choice(self, precision=("bf16", "fp32"), device=("auto", "cpu", "cuda"))
        if self.image_size % 16:
            raise data.UserError(f"--image-size {self.image_size}: "
                                 f"allowed are multiples of 16 (one latent cell).")


PRESETS = {
    "full": {},
    "tiny": dict(encoder=data.TINY_IMAGE_ENCODER, image_size=64, z_dim=24, steps=800, batch=64,
                 learning_rate=2e-3, warmup=50, precision="fp32", compile=False, workers=0, log_every=10,
                 eval_every=200, save_every=200),
}


# ------------------------------------------------------------------------------------------------------------
# Architecture: 2. Semantic Projector (1., the frozen encoder, is data.ImageEncoder)
# ------------------------------------------------------------------------------------------------------------


class Projector(nn.Module):
    """Eq. 5: mu, log sigma^2 = Proj(f). f (..., d) -> mu, log_var (..., z_dim), in the type of f (fp32).

        f (d) -> Linear 512 -> LayerNorm -> GELU -> Linear 256 -> LayerNorm -> GELU -+-> Linear z_dim: mu
                                                                                     '-> Linear z_dim: log_var
    """

    def __init__(self, d: int, z_dim: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(d, 512), nn.LayerNorm(512), nn.GELU(),
                                  nn.Linear(512, 256), nn.LayerNorm(256), nn.GELU())
        self.mu = nn.Linear(256, z_dim)
        self.log_var = nn.Linear(256, z_dim)

    def forward(self, f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.body(f)                                                    # (..., 256)
        # Eq. 5: mu, log_var = Proj(f)
        mu, log_var = self.mu(h), self.log_var(h)                           # (..., z_dim)
        # Never reached in training; without it one wild log_var > 88 makes Eq. 11 infinite in fp32.
        return mu.to(f.dtype), log_var.to(f.dtype).clamp(-30, 20)


# ------------------------------------------------------------------------------------------------------------
# 3. Reparameterization Trick
# ------------------------------------------------------------------------------------------------------------


def reparameterize(mu: torch.Tensor, log_var: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Eq. 6: a sample of N(mu, sigma^2) that gradients pass through; eps ~ N(0, I). All of one shape."""
    # Eq. 6: z = mu + sigma * eps, sigma = exp(log sigma^2 / 2)
    return mu + torch.exp(0.5 * log_var) * eps


# ------------------------------------------------------------------------------------------------------------
# 4. Semantic Decoder
# ------------------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """h + Linear(GELU(Linear(LayerNorm(h)))), (..., d) -> (..., d)."""

    def __init__(self, d: int):
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.body(h)


class SemanticDecoder(nn.Module):
    """Eq. 7: f_hat = D_sem(z). z (..., z_dim) -> f_hat (..., d).

        z -> Linear 256 -> LayerNorm -> GELU -> Linear 512 -> LayerNorm -> GELU
          -> Linear d -> ResidualBlock x 2
    """

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
        """f (B, h, w, d), eps (B, h, w, z_dim) -> f_hat (B, h, w, d), mu, log_var (B, h, w, z_dim)."""
        mu, log_var = self.projector(f)
        z = reparameterize(mu, log_var, eps)
        return self.semantic_decoder(z), mu, log_var


# ------------------------------------------------------------------------------------------------------------
# S-VAE Loss Function
# ------------------------------------------------------------------------------------------------------------


def svae_loss(f_hat, f, mu, log_var, beta: float) -> dict[str, torch.Tensor]:
    """Eq. 8 and its terms, each a scalar in fp32."""
    semantic, kl = semantic_loss(f_hat, f), kl_divergence(mu, log_var)
    # Eq. 8: L_S-VAE = L_semantic + beta * L_KL
    return {"loss": semantic + beta * kl, "semantic": semantic, "kl": kl}


def semantic_loss(f_hat: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """Eq. 9: the mean squared error over batch, positions and channels; both (B, h, w, d)."""
    # Eq. 9: L_semantic = 1/(hwd) sum_ijk ( f_hat_ijk - f_ijk )^2
    return F.mse_loss(f_hat.to(f.dtype), f)


def kl_divergence(mu: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """Eq. 10, 11: KL(N(mu, sigma^2) || N(0, I)) in nats, mu, log_var (B, h, w, z_dim) -> scalar.

    Summed over z_dim, averaged over batch and positions. The guide's pseudo-code averages over z_dim too,
    which is z_dim times less; its equation sums, and only the sum is a KL divergence (notes/decisions.md).
    """
    # Eq. 10: L_KL = D_KL( q(z|x) || p(z) ), p(z) = N(0, I)
    # Eq. 11: L_KL = -1/2 sum_i ( 1 + log sigma_i^2 - mu_i^2 - sigma_i^2 )
    kl = -0.5 * (1 + log_var - mu ** 2 - torch.exp(log_var)).sum(-1)
    return kl.mean()


# ------------------------------------------------------------------------------------------------------------
# Held-out losses and preview
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_losses(model: SVAE, encoder, x: torch.Tensor, cfg: Config) -> dict[str, float]:
    """The loss terms on held-out pictures, with noise that is the same at every call."""
    f = encoder(x)
    g = data.generator(cfg.seed, "svae", 0, "held out", x.device)
    f_hat, mu, log_var = model(f, torch.randn(*f.shape[:-1], cfg.z_dim, generator=g, device=x.device))
    return {name: value.item() for name, value in svae_loss(f_hat, f, mu, log_var, cfg.beta).items()}


@torch.no_grad()
def preview(model: SVAE, encoder, x: torch.Tensor, path: Path):
    """Three rows: pictures, their frozen features as PCA colours, and the features that come back from mu."""
    f = encoder(x)
    f_hat = model.semantic_decoder(model.projector(f)[0])
    size = x.shape[-1]
    colours, colours_hat = data.pca_colours(f, f_hat, size=size)
    rows = [list(data.to_uint8(x)), list(colours), list(colours_hat)]
    captions = [[name] + [""] * (len(x) - 1) for name in ("picture", "f, frozen", "f_hat, from mu")]
    data.save_png(data.grid(rows, captions), path)


# ------------------------------------------------------------------------------------------------------------
# Training Procedures. Stage 1: Train S-VAE
# ------------------------------------------------------------------------------------------------------------


def train(cfg: Config, checkpoint: dict | None):
    with data.Run(cfg, "svae", terms=("loss", "semantic", "kl", "grad_norm")) as run:
        folder, held_out = data.read_folder(cfg.data, cfg.max_broken, cfg.out, cfg.count)
        run.say(f"stage 1, {cfg.preset} preset on {run.device}: {len(folder.images):,} pictures, "
                f"captions from {folder.layout}, encoder {cfg.encoder}")

        # Freeze encoder
        encoder = data.load_image_encoder(cfg.encoder).to(run.device).requires_grad_(False)
        encoder_fingerprint = data.fingerprint(encoder)
        torch.manual_seed(cfg.seed)
        model = SVAE(encoder.dim, cfg.z_dim).to(run.device)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=cfg.weight_decay,
                                      fused=True)
        start = 0
        if checkpoint:
            start = checkpoint["step"]
            data.check_encoder(encoder_fingerprint, checkpoint, cfg.encoder)
            data.load_weights(model, checkpoint["model"], run.out / "svae.pt")
            data.load_optimizer(optimizer, checkpoint["optimizer"], run.out / "svae.pt")
        one = torch.zeros(1, 3, cfg.image_size, cfg.image_size, device=run.device)
        run.count_flops(model, lambda: model(encoder(one), one.new_zeros(()))[0].sum())
        if cfg.compile and run.device.type == "cuda":
            encoder.compile()
            model.compile()
        run.open_log(start, checkpoint and checkpoint["pending"], held_out=("loss", "semantic", "kl"))
        x_held_out = run.held_out(held_out, cfg.image_size)

        # Training loop; the built-in world is not augmented: there, left means left
        for step, x in run.pictures(folder, cfg.image_size, start, augment=bool(cfg.data)):
            # linear warm-up from peak / warmup, then a cosine to a hundredth of the peak
            rate = data.learning_rate(step, cfg.steps, cfg.warmup, cfg.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            side = cfg.image_size // 16
            eps = run.randn(step, "eps", side, side, cfg.z_dim)             # (B, h, w, z_dim), by seed, step

            total = {}
            for x_part, eps_part in zip(x.chunk(cfg.micro_batches), eps.chunk(cfg.micro_batches)):
                with run.autocast():
                    with torch.no_grad():
                        # Eq. 4: f = E_frozen(x), f in R^(h x w x d)
                        f = encoder(x_part)                                 # (B, h, w, d)
                    f_hat, mu, log_var = model(f, eps_part)
                losses = svae_loss(f_hat, f, mu, log_var, cfg.beta)
                (losses["loss"] / cfg.micro_batches).backward()
                total = {name: total.get(name, 0) + value.detach() / cfg.micro_batches
                         for name, value in losses.items()}
            run.average([p.grad for p in model.parameters()])
            total["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # Diagnostics: what is logged, looked at and kept
            run.record(total)
            done = step + 1
            last, stopping = done == cfg.steps, run.stopping(done)
            if done % cfg.eval_every == 0 or last:
                run.log(done, rate, held_out_losses(model, encoder, x_held_out, cfg))
                if run.main:
                    preview(model, encoder, x_held_out[:8], run.out / "svae.png")
            elif done % cfg.log_every == 0:
                run.log(done, rate)
            if done % cfg.save_every == 0 or last or stopping:
                run.save(done, rate, model=model.state_dict(), optimizer=optimizer.state_dict(),
                         encoder_fingerprint=encoder_fingerprint)
            if stopping and not last:
                raise data.Stopped(run.stop)
        run.say(f"finished: {run.out / 'svae.pt'}, {run.out / 'svae.csv'}, {run.out / 'svae.png'}")


@data.program
def main(argv: list[str] | None = None):
    typed = data.read_flags(Config, argv, __doc__, PRESETS)
    out = Path(typed.get("out", "out"))
    checkpoint = (data.load(out / "svae.pt", "svae")
                  if (out / "svae.pt").exists() and not typed.get("fresh") else None)
    cfg = data.configure(Config, PRESETS, typed, saved=checkpoint and checkpoint["config"])
    if cfg.fresh:
        data.set_aside(out, "svae.pt", "svae.csv", "svae.png")
    if checkpoint and data.is_finished(checkpoint, cfg, out / "svae.pt"):
        return
    train(cfg, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
