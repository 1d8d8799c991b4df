"""psvae.py - stage 2, the Pixel-Semantic VAE:
the encoder learns to keep the pixels, without losing the meaning.

Frozen features have thrown away what a picture looks like up close (the guide's Problem 2). So the encoder is
trained too: a pixel decoder draws the picture from z, while the semantic decoder must still give back what a
frozen copy of the encoder says. At the end every picture of the folder is encoded once, for stage 3.

Eq. 12 to 19, as numbered in notes/equations.md; "the guide" is docs/architecture.md of Gaurav14cs17/PS-VAE.

    x (B,3,256,256) in [-1, 1] --E_train--> f (B,16,16,1024) --Projector--> mu, log_var (B,16,16,96)
    |                                                                  | z = mu + sigma * eps
    |--E_frozen--> f_target ----- MSE ----- f_hat <--SemanticDecoder---|
    '---------------------- L1, MSE, LPIPS --- x_hat <--PixelDecoder---'

    python psvae.py                       from out/svae.pt; tiny: half an hour on 2 CPU cores
    python psvae.py --data ./imagenet     the real thing, on one CUDA GPU
    python psvae.py --evaluate            PSNR, SSIM, LPIPS and FDD on the held-out pictures
    python psvae.py --reconstruct a.png   out/reconstruction.png: picture | its reconstruction
    python psvae.py --encode-only         writes out/latents/ again

Reads out/svae.pt (projector, semantic decoder) and the folder of pictures. Writes out/psvae.pt,
out/psvae.csv, out/psvae.png (pictures above, reconstructions below) and out/latents/ (mu.npy, with --latents
both log_var.npy, rows.jsonl, meta.json). Run again, it goes on where it stopped.
Expect (tiny, seed 0): held-out PSNR 23.3 dB after 400 steps; later steps were measured with --beta 1e-4 only:
24.4 after 400, 30.3 after 2,000, 33.8 after 4,000, 36.0 after 7,000. Shapes are blobs until 29 dB or so.
"""

import copy
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

import data


@dataclass(frozen=True)
class Config:
    data: str = ""                          # folder of images; empty: the built-in world
    out: str = "out"                        # folder for checkpoint, log, picture and latents
    preset: str = ""                        # full or tiny; default: that of svae.pt
    encoder: str = "facebook/dinov2-large"  # a DINOv2, hub name or folder
    image_size: int = 256                   # pixels a side; the latent grid has image_size / 16 cells a side
    z_dim: int = 96                         # latent channels
    widths: tuple[int, ...] = (512, 512, 256, 128)  # channels of the pixel decoder's four levels
    alpha: float = 1.0                      # weight of the semantic loss, Eq. 15
    gamma: float = 1.0                      # weight of the pixel loss
    lpips_weight: float = 0.1               # weight of the perceptual loss, the guide's lambda; 0: no VGG
    beta: float = 1e-4                      # weight of the KL term
    beta_warmup: float = 0.0                # share of the steps over which that weight grows from 0, linearly
    permute_colours: float = 0.0            # share of pictures whose colour channels are permuted at random,
    permute_steps: int = 0                  # in the first so many steps
    steps: int = 200_000                    # optimisation steps
    batch: int = 64                         # pictures a step, over all processes
    micro_batches: int = 1                  # gradient accumulation: parts that a process cuts its batch into
    learning_rate: float = 2e-4             # peak, after warm-up; AdamW
    encoder_lr_scale: float = 0.1           # the encoder's share of it, lest a fresh pixel decoder wreck it
    weight_decay: float = 0.01              # of AdamW
    warmup: int = 1000                      # steps of linear warm-up, before the cosine decay
    clip: float = 1.0                       # largest norm of the gradient
    precision: str = "bf16"                 # bf16 (autocast; losses in fp32) or fp32 (TF32 on CUDA)
    compile: bool = True                    # torch.compile, on CUDA
    checkpointing: bool = False             # recompute activations going back: less memory, a third slower
    device: str = "auto"                    # auto, cpu or cuda
    workers: int = 8                        # processes that read pictures
    count: int = 50_000                     # pictures of the built-in world, if it has to be drawn
    max_broken: float = 0.01                # largest tolerated fraction of unreadable pictures or rows
    log_every: int = 50                     # steps between rows of the log
    eval_every: int = 1000                  # steps between held-out losses and previews
    save_every: int = 1000                  # steps between checkpoints
    seed: int = 0                           # of everything random
    fresh: bool = False                     # move the old run aside and start over
    latents: str = "both"                   # written for stage 3: both (mu and log_var) or mu (half the size)
    encode_only: bool = False               # only write out/latents/ again
    evaluate: bool = False                  # only print PSNR, SSIM, LPIPS and FDD on held-out pictures
    reconstruct: tuple[str, ...] = ()       # only reconstruct these image files

    def __post_init__(self):
        data.check(self, image_size=(32, 4096), z_dim=(1, 65536), widths=(4, 65536), alpha=(0, 1e6),
                   gamma=(0, 1e6), lpips_weight=(0, 1e6), beta=(0, 1e6), beta_warmup=(0, 1), permute_colours=(0, 1),
                   permute_steps=(0, 1e9),
                   steps=(1, 1e9), batch=(1, 1e6),
                   micro_batches=(1, 1e6), learning_rate=(0, 10), encoder_lr_scale=(0, 10),
                   weight_decay=(0, 10), warmup=(0, 1e9), clip=(1e-9, 1e9), workers=(0, 512),
                   count=(10, 1e8), max_broken=(0, 1), log_every=(1, 1e9), eval_every=(1, 1e9),
                   save_every=(1, 1e9), seed=(0, 2**63 - 1))
        data.check_choice(self, precision=("bf16", "fp32"), device=("auto", "cpu", "cuda"),
                          latents=("both", "mu"))
        if self.image_size % 16:
            raise data.UserError(f"--image-size {self.image_size}: "
                                 f"allowed are multiples of 16 (one latent cell).")
        if len(self.widths) != 4 or any(width % 4 for width in self.widths):
            raise data.UserError(f"--widths {self.widths}: "
                                 f"four multiples of 4 are needed, one for each doubling.")


PRESETS = {
    "full": {},
    "tiny": dict(encoder=data.TINY_IMAGE_ENCODER, image_size=64, z_dim=24, widths=(96, 64, 32, 16),
                 lpips_weight=0.0, beta=3e-3, beta_warmup=0.7, permute_colours=0.25, permute_steps=1000,
                 steps=7000, batch=16, learning_rate=5e-4, encoder_lr_scale=1.0,
                 warmup=50, precision="fp32", compile=False, workers=0, log_every=20, eval_every=400,
                 save_every=400, latents="mu"),
}
INHERITED = ("preset", "data", "encoder", "image_size", "z_dim", "count")       # from svae.pt, unless typed


# ------------------------------------------------------------------------------------------------------------
# From stage 1: Projector, ResidualBlock, SemanticDecoder, reparameterize (and kl_divergence, below) are
# written out again, so that this file reads from end to end; a test holds the copies equal
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


def reparameterize(mu: torch.Tensor, log_var: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Eq. 6: a sample of N(mu, sigma^2) that gradients pass through; eps ~ N(0, I). All of one shape."""
    # Eq. 6: z = mu + sigma * eps, sigma = exp(log sigma^2 / 2)
    return mu + torch.exp(0.5 * log_var) * eps


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


# ------------------------------------------------------------------------------------------------------------
# Architecture: 3. Pixel Decoder
# ------------------------------------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """The pixel decoder's ResBlock:
    x + Conv(SiLU(GroupNorm(Conv(SiLU(GroupNorm(x)))))), (B, c, H, W) -> the same."""

    def __init__(self, c: int):
        super().__init__()
        self.body = nn.Sequential(group_norm(c), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1),
                                  group_norm(c), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1))
        nn.init.zeros_(self.body[-1].weight)                # a fresh block is the identity: a quicker start
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def group_norm(c: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(min(32, c // 4), c), c)  # 32 groups as usual, fewer where channels are few


class PixelDecoder(nn.Module):
    """Eq. 14: x_hat = D_pixel(z). z (B, h, w, z_dim) -> x_hat (B, 3, 16 h, 16 w), about [-1, 1], not clamped.

        z -> Conv z_dim, 512 -> GroupNorm -> SiLU
          -> for c_out in 512, 512, 256, 128:  ResBlock, ResBlock, Upsample x 2, Conv c_in, c_out
          -> GroupNorm -> SiLU -> Conv 128, 3
    """

    def __init__(self, z_dim: int, widths: tuple[int, ...], checkpointing: bool = False):
        super().__init__()
        self.checkpointing = checkpointing
        self.stem = nn.Sequential(nn.Conv2d(z_dim, widths[0], 3, padding=1), group_norm(widths[0]), nn.SiLU())
        self.levels = nn.ModuleList(
            nn.Sequential(ConvBlock(c_in), ConvBlock(c_in), nn.Upsample(scale_factor=2, mode="nearest"),
                          nn.Conv2d(c_in, c_out, 3, padding=1))
            for c_in, c_out in zip((widths[0], *widths), widths))
        self.head = nn.Sequential(group_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        # Eq. 14: x_hat = D_pixel(z)
        x = self.stem(z.permute(0, 3, 1, 2))                                # (B, 512, h, w)
        for level in self.levels:                                           # twice the side each time
            keep = self.checkpointing and self.training
            x = recompute(level, x, use_reentrant=False) if keep else level(x)
        return self.head(x)                                                 # (B, 3, 16 h, 16 w)


# ------------------------------------------------------------------------------------------------------------
# Architecture: 1. Trainable Representation Encoder (2., its frozen copy, is loaded in train)
# ------------------------------------------------------------------------------------------------------------


class PSVAE(nn.Module):
    """Eq. 12, 5, 7, 14: the trainable encoder, the projector and both decoders.
    The frozen copy is no part of it."""

    def __init__(self, encoder: data.ImageEncoder, z_dim: int, widths: tuple[int, ...],
                 checkpointing: bool = False):
        super().__init__()
        self.encoder = encoder
        self.projector = Projector(encoder.dim, z_dim)
        self.semantic_decoder = SemanticDecoder(encoder.dim, z_dim)
        self.pixel_decoder = PixelDecoder(z_dim, widths, checkpointing)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, 3, H, W) in [-1, 1] -> mu, log_var (B, h, w, z_dim)."""
        # Eq. 12: f = E_train(x)
        f = self.encoder(x)                                                 # (B, h, w, d)
        return self.projector(f)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """z (B, h, w, z_dim) -> x_hat (B, 3, H, W), in the type of z (fp32)."""
        return self.pixel_decoder(z).to(z.dtype)

    def forward(self, x: torch.Tensor, eps: torch.Tensor):
        """x (B, 3, H, W), eps (B, h, w, z_dim) -> x_hat (B, 3, H, W), f_hat (B, h, w, d), mu, log_var."""
        mu, log_var = self.encode(x)
        z = reparameterize(mu, log_var, eps)
        return self.decode(z), self.semantic_decoder(z), mu, log_var

    def fingerprint(self) -> str:
        """Of the weights that encode: latents belong to them, whatever becomes of the decoders."""
        return data.fingerprint(self.encoder, self.projector, extra=self.encoder.description)


def load_psvae(path: Path, device="cpu") -> tuple[PSVAE, dict]:
    """The model of a checkpoint, in eval mode, and the checkpoint."""
    checkpoint = data.load(path, "psvae", before="python psvae.py")
    cfg = data.configure(Config, PRESETS, {}, saved=checkpoint["config"])
    model = PSVAE(data.build_image_encoder(checkpoint["encoder_description"]), cfg.z_dim, cfg.widths)
    data.load_weights(model, checkpoint["model"], path)
    checkpoint["config"] = data.plain(cfg)             # whole and checked
    return model.eval().requires_grad_(False).to(device), checkpoint


# ------------------------------------------------------------------------------------------------------------
# PS-VAE Loss Function
# ------------------------------------------------------------------------------------------------------------
#
#     who gets a gradient    encoder   projector   semantic decoder   pixel decoder
#     semantic                  x          x              x
#     pixel, perceptual         x          x                                x
#     KL                        x          x
#
# The frozen copy and LPIPS never do.


def psvae_loss(x_hat, x, f_hat, f_target, mu, log_var, cfg: Config, lpips=None, warm: float = 1.0) -> dict[str, torch.Tensor]:
    """Eq. 15 and its terms, each a scalar in fp32; warm is the share of beta that is reached."""
    semantic, pixel = semantic_loss(f_hat, f_target), pixel_loss(x_hat, x)
    perceptual, kl = perceptual_loss(lpips, x_hat, x), kl_divergence(mu, log_var)
    # Eq. 15: L_PS-VAE = alpha * L_semantic + gamma * L_pixel + lambda * L_perceptual + beta * L_KL
    loss = cfg.alpha * semantic + cfg.gamma * pixel + cfg.lpips_weight * perceptual + warm * cfg.beta * kl
    return {"loss": loss, "semantic": semantic, "pixel": pixel, "perceptual": perceptual, "kl": kl}


def semantic_loss(f_hat: torch.Tensor, f_target: torch.Tensor) -> torch.Tensor:
    """Eq. 16: both (B, h, w, d). Against the encoder in training it could be made zero by meaning nothing."""
    # Eq. 16: L_semantic = MSE( D_sem(z), E_frozen(x) )
    return F.mse_loss(f_hat.to(f_target.dtype), f_target)


def pixel_loss(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Eq. 17: x_hat is not clamped, so that a value past white is still pulled back."""
    # Eq. 17: L_pixel = 1/2 L1(x_hat, x) + 1/2 MSE(x_hat, x)
    return 0.5 * l1(x_hat, x) + 0.5 * F.mse_loss(x_hat, x)


def l1(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Eq. 18: the mean absolute error over batch, height, width and channels."""
    # Eq. 18: L1(x_hat, x) = 1/(HWC) sum_ijc | x_hat_ijc - x_ijc |
    return (x_hat - x).abs().mean()


def perceptual_loss(lpips, x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Eq. 19: lpips is data.load_lpips(), or None where its weight is 0.
    Both pictures (B, 3, H, W) in [-1, 1].

    lpips' linear weights are the squares of the guide's w_l, and the features phi_l are of unit length.
    """
    # Eq. 19: LPIPS(x_hat, x) = sum_l 1/(H_l W_l) sum_hw || w_l * (phi_hat_l - phi_l) ||^2
    return lpips(x_hat, x).to(x.dtype).mean() if lpips is not None else x_hat.new_zeros(())


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
# Held-out losses, preview, evaluation
# ------------------------------------------------------------------------------------------------------------


def psnr(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture, in dB; (B, 3, H, W) in [-1, 1], x_hat clamped -> (B,)."""
    mse = (x_hat.clamp(-1, 1) - x).square().mean((1, 2, 3)) / 4             # pictures on a scale of 0 to 1
    return -10 * mse.clamp(min=1e-12).log10()


def ssim(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004), 11 x 11 Gaussian window of sigma 1.5;
    (B, 3, H, W) -> (B,)."""
    window = torch.exp(-(torch.arange(11, device=x.device) - 5.0) ** 2 / (2 * 1.5 ** 2))
    window = (window / window.sum()).expand(3, 1, 1, 11)

    def blur(image):
        return F.conv2d(F.conv2d(image, window, groups=3), window.transpose(2, 3), groups=3)

    a, b = (x_hat.clamp(-1, 1) + 1) / 2, (x + 1) / 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    return ((2 * mean_a * mean_b + c1) * (2 * cov + c2) /
            ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between Gaussians fitted to two sets of features (N, d); in DINOv2's space FDD (Stein et al. 2023)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()  # trace of (cov_a cov_b)^0.5
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


@torch.no_grad()
def held_out_losses(model: PSVAE, frozen_encoder, x: torch.Tensor, cfg: Config,
                    lpips=None) -> dict[str, float]:
    """The loss terms and PSNR on held-out pictures, with noise that is the same at every call.

    In parts of the size of a micro-batch: what can be trained can be evaluated.
    """
    side, part = x.shape[-1] // 16, max(1, cfg.batch // cfg.micro_batches)
    g = data.generator(cfg.seed, "psvae", 0, "held out", x.device)
    eps = torch.randn(len(x), side, side, cfg.z_dim, generator=g, device=x.device)
    model.eval()
    total = {}
    for x_part, eps_part in zip(x.split(part), eps.split(part)):
        x_hat, f_hat, mu, log_var = model(x_part, eps_part)
        losses = psvae_loss(x_hat, x_part, f_hat, frozen_encoder(x_part), mu, log_var, cfg, lpips)
        losses["psnr"] = psnr(x_hat, x_part).mean()
        for name, value in losses.items():
            total[name] = total.get(name, 0) + value.item() * len(x_part) / len(x)
    model.train()
    return total


@torch.no_grad()
def preview(model: PSVAE, x: torch.Tensor, path: Path):
    """Two rows: pictures, and what comes back from mu."""
    x_hat = model.decode(model.encode(x)[0])
    captions = [[name] + [""] * (len(x) - 1) for name in ("picture", "x_hat, from mu")]
    data.save_png(data.grid([list(data.to_uint8(x)), list(data.to_uint8(x_hat))], captions), path)


@torch.no_grad()
def evaluate(cfg: Config):
    """Prints PSNR, SSIM, LPIPS (where VGG can be had) and FDD of reconstructions from mu,
    on the held-out pictures."""
    device = data.pick_device(cfg.device)
    model, _ = load_psvae(Path(cfg.out) / "psvae.pt", device)
    frozen_encoder = data.load_image_encoder(cfg.encoder).to(device)
    _, folder = data.read_folder(cfg.data, cfg.max_broken, cfg.out, cfg.count)
    pictures, scores, real, fake = data.Pictures(folder, cfg.image_size), [], [], []
    try:
        lpips = data.load_lpips(device)
    except data.UserError as error:
        print(f"LPIPS is left out: {error}")
        lpips = None
    count = min(folder.own or len(pictures), 50_000)
    keys = lambda step: [(i, None) for i in range(step * cfg.batch, min(count, (step + 1) * cfg.batch))]
    broken = set()
    for images, unreadable in data.batches(pictures, keys, 0, -(-count // cfg.batch), cfg.workers):
        broken |= {index for index, _ in unreadable}
        x = data.to_float(images, device)
        x_hat = model.decode(model.encode(x)[0])
        perceptual = (lpips(x_hat.clamp(-1, 1), x).flatten() if lpips
                      else torch.full((len(x),), math.nan, device=device))
        scores.append(torch.stack([psnr(x_hat, x), ssim(x_hat, x), perceptual], 1).cpu())
        for features, picture in ((real, x), (fake, x_hat.clamp(-1, 1))):
            features.append(frozen_encoder.tokens(picture)[:, 0].cpu().numpy())     # CLS
    values = torch.cat(scores)
    mean, spread = values.mean(0).tolist(), values.std(0, correction=0).tolist()
    print(f"held-out pictures: N = {len(values)}, from {folder.root}"
          + (f"; {len(broken)} cannot be read, the next ones took their places" if broken else ""))
    for name, m, s in zip(("PSNR dB", "SSIM", "LPIPS"), mean, spread):
        if not math.isnan(m):
            print(f"  {name:8s} {m:8.3f}  (standard deviation over pictures {s:.3f})")
    if len(values) > 1:
        fdd = frechet_distance(np.concatenate(real), np.concatenate(fake))
        print(f"  FDD      {fdd:8.3f}  (encoder {cfg.encoder}; biased upward for small N)")


@torch.no_grad()
def reconstruct(cfg: Config):
    """Writes out/reconstruction.png:
    each file, cropped to the model's size, beside its reconstruction from mu."""
    device = data.pick_device(cfg.device)
    model, _ = load_psvae(Path(cfg.out) / "psvae.pt", device)
    rows, captions = [], []
    for name in cfg.reconstruct:
        pixels = data.user_image(name, cfg.image_size)
        x = data.to_float(torch.from_numpy(pixels).permute(2, 0, 1)[None], device)
        x_hat = model.decode(model.encode(x)[0])
        rows.append([pixels, data.to_uint8(x_hat)[0]])
        captions.append([Path(name).name, f"{psnr(x_hat, x).item():.1f} dB"])
        print(f"{name}: PSNR {psnr(x_hat, x).item():.2f} dB, SSIM {ssim(x_hat, x).item():.3f}")
    path = Path(cfg.out) / "reconstruction.png"
    data.save_png(data.grid(rows, captions), path)
    print(f"wrote {path}: picture | reconstruction")


# ------------------------------------------------------------------------------------------------------------
# Training Procedures. Stage 2: Train PS-VAE
# ------------------------------------------------------------------------------------------------------------


def permute_colours(x: torch.Tensor, who: torch.Tensor, how: torch.Tensor, share: float) -> torch.Tensor:
    """x (B, 3, H, W) with the channels of a share of the pictures in another order; who (B,), how (B, 3) are
    uniform in [0, 1). Every shape is seen in every colour, and no caption is involved: without it a third of
    the (colour, shape) pairs that the built-in world holds out do not survive the round trip."""
    channels = torch.where((who < share)[:, None], how.argsort(1), torch.arange(3, device=x.device))
    return x.gather(1, channels[:, :, None, None].expand_as(x))


def train(cfg: Config, checkpoint: dict | None, stage_1: dict | None):
    terms = ("loss", "semantic", "pixel", "perceptual", "kl")
    with data.Run(cfg, "psvae", terms=(*terms, "grad_norm")) as run:
        folder, held_out = data.read_folder(cfg.data, cfg.max_broken, cfg.out, cfg.count)
        run.say(f"stage 2, {cfg.preset} preset on {run.device}: {len(folder.images):,} pictures, "
                f"captions from {folder.layout}, encoder {cfg.encoder}")

        # Keep a frozen copy for the semantic target: the pretrained weights, loaded anew at every start
        frozen_encoder = data.load_image_encoder(cfg.encoder).to(run.device)
        encoder_fingerprint = data.fingerprint(frozen_encoder)
        lpips = data.load_lpips(run.device) if cfg.lpips_weight else None
        torch.manual_seed(cfg.seed)
        model = PSVAE(copy.deepcopy(frozen_encoder), cfg.z_dim, cfg.widths, cfg.checkpointing).to(run.device)
        frozen_encoder.requires_grad_(False)
        if cfg.checkpointing:
            model.encoder.recompute_activations()
        model.train()
        encoder_parameters = [p for p in model.encoder.parameters() if p.requires_grad]  # not the mask token
        other_parameters = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
        optimizer = torch.optim.AdamW([{"params": other_parameters, "scale": 1.0},
                                       {"params": encoder_parameters, "scale": cfg.encoder_lr_scale}],
                                      betas=(0.9, 0.99), weight_decay=cfg.weight_decay, fused=True)
        start = 0
        if checkpoint:
            start = checkpoint["step"]
            data.check_encoder(encoder_fingerprint, checkpoint, cfg.encoder)
            data.load_weights(model, checkpoint["model"], run.out / "psvae.pt")
            data.load_optimizer(optimizer, checkpoint["optimizer"], run.out / "psvae.pt")
        elif stage_1:
            data.check_encoder(encoder_fingerprint, stage_1, cfg.encoder)
            load_stage_1(model, stage_1, run)
        run.count_flops(model, lambda: loss_of_one_picture(model, frozen_encoder, cfg, lpips))
        model.pixel_decoder.to(memory_format=torch.channels_last)      # the faster layout, on a CPU too
        if cfg.compile and run.device.type == "cuda":
            for part in (frozen_encoder, model.encoder, model.pixel_decoder):
                part.compile()
        run.open_log(start, checkpoint and checkpoint["pending"], held_out=(*terms, "psnr"))
        x_held_out = run.held_out(held_out, cfg.image_size)

        # Training loop; the built-in world is not augmented: there, left means left
        for step, x in run.pictures(folder, cfg.image_size, start, augment=bool(cfg.data)):
            # linear warm-up from peak / warmup, then a cosine to a hundredth of the peak
            rate = data.learning_rate(step, cfg.steps, cfg.warmup, cfg.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            # beta grows from 0: a KL term at full weight from the first step costs a dB all the way
            warm = min(1.0, (step + 1) / (cfg.beta_warmup * cfg.steps)) if cfg.beta_warmup else 1.0
            # shapes meet all colours early on; then true pictures alone bring the last decibels
            if step < cfg.permute_steps:
                x = permute_colours(x, run.rand(step, "who"), run.rand(step, "how", 3), cfg.permute_colours)
            side = cfg.image_size // 16
            eps = run.randn(step, "eps", side, side, cfg.z_dim)             # (B, h, w, z_dim), by seed, step

            total = {}
            for x_part, eps_part in zip(x.chunk(cfg.micro_batches), eps.chunk(cfg.micro_batches)):
                with run.autocast():
                    with torch.no_grad():
                        # Eq. 13: f_target = E_frozen(x)
                        f_target = frozen_encoder(x_part)                   # (B, h, w, d)
                    x_hat, f_hat, mu, log_var = model(x_part, eps_part)
                    losses = psvae_loss(x_hat, x_part, f_hat, f_target, mu, log_var, cfg, lpips, warm)
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
                run.log(done, rate, held_out_losses(model, frozen_encoder, x_held_out, cfg, lpips))
                if run.main:
                    preview(model, x_held_out[:8], run.out / "psvae.png")
            elif done % cfg.log_every == 0:
                run.log(done, rate)
            if done % cfg.save_every == 0 or last or stopping:
                run.save(done, rate, model=model.state_dict(), optimizer=optimizer.state_dict(),
                         encoder_description=model.encoder.description,
                         encoder_fingerprint=encoder_fingerprint, fingerprint=model.fingerprint())
            if stopping or last and run.stopping(0):    # all ranks agree: the latents are still to come
                raise data.Stopped(run.stop)
        run.say(f"finished: {run.out / 'psvae.pt'}, {run.out / 'psvae.csv'}, {run.out / 'psvae.png'}")


def loss_of_one_picture(model: PSVAE, frozen_encoder, cfg: Config, lpips) -> torch.Tensor:
    """A blank one: only the FLOPs of its loss are of interest."""
    x = torch.zeros(1, 3, cfg.image_size, cfg.image_size, device=model.projector.mu.weight.device)
    x_hat, f_hat, mu, log_var = model(x, x.new_zeros(()))
    return psvae_loss(x_hat, x, f_hat, frozen_encoder(x), mu, log_var, cfg, lpips)["loss"]


def load_stage_1(model: PSVAE, stage_1: dict, run: data.Run):
    """Stage 2 starts from stage 1's projector and semantic decoder; the pixel decoder starts fresh."""
    for part in ("projector", "semantic_decoder"):
        state = {name.removeprefix(part + "."): value for name, value in stage_1["model"].items()
                 if name.startswith(part + ".")}
        data.load_weights(getattr(model, part), state, run.out / "svae.pt")
    run.say(f"projector and semantic decoder from {run.out / 'svae.pt'}, step {stage_1['step']:,}")


# ------------------------------------------------------------------------------------------------------------
# Latents for stage 3: z_0 = PS-VAE.encode(x), with a frozen PS-VAE, is worth computing once
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def write_latents(cfg: Config):
    """Encodes every picture of the folder into out/latents/:
    posteriors, not samples, so that stage 3 draws afresh.

    mu.npy and, with --latents both, log_var.npy are (count, h, w, z_dim) in float16; rows.jsonl has a line
    {"image", "text"[, "source"][, "held_out"]} for each caption or edit, with indices into them; meta.json
    has the statistics of every channel and the fingerprint of the model. Centre crops, no flip. Killed, it
    goes on; ranks take slices.
    """
    final, work = Path(cfg.out) / "latents", Path(cfg.out) / "latents.partial"
    with data.Run(cfg, "latents") as run:
        run.barrier()                                  # rank 0 may still be writing the last psvae.pt
        model, checkpoint = load_psvae(Path(cfg.out) / "psvae.pt", run.device)
        folders = data.read_folder(cfg.data, cfg.max_broken, cfg.out, cfg.count)
        folders = folders if folders[0] is not folders[1] else folders[:1]  # a tiny folder holds nothing out
        run.folder = data.joined(folders)
        mark = {"fingerprint": model.fingerprint(), "data": cfg.data, "latents": cfg.latents,
                "format": data.FORMAT, "rows": data.digest_of([run.folder.images, run.folder.rows])}
        meta = {} if cfg.encode_only else data.read_json(final / "meta.json")
        if all(meta.get(key) == value for key, value in mark.items()):
            return run.say(f"{final} is complete: {meta['count']:,} pictures. Next: python dit.py")
        count, side = len(run.folder.images), cfg.image_size // 16
        shape = (count, side, side, cfg.z_dim)
        names = ("mu", "log_var") if cfg.latents == "both" else ("mu",)
        if run.main:
            if data.read_json(work / "mark.json") != mark:
                data.remove_folder(work)
                data.free_space(work, len(names) * 2 * math.prod(shape), f"latents of {count:,} pictures")
                for name in names:
                    data.new_array(work / f"{name}.npy", shape).flush()
                with data.atomic(work / "mark.json") as partial:
                    partial.write_text(json.dumps(mark))
        run.barrier()
        encode_slice(cfg, run, model, work, names)
        run.barrier()
        if run.main:
            finish_latents(cfg, run, work, final, folders, names, checkpoint, mark)
        run.barrier()


def encode_slice(cfg: Config, run: data.Run, model: PSVAE, work: Path, names: tuple[str, ...]):
    """This rank's share of the pictures;
    `done-<slice>.json` says how far it is, and which pictures are broken."""
    count = len(run.folder.images)
    first, stop = count * run.rank // run.world, count * (run.rank + 1) // run.world
    progress = work / f"done-{first}-{stop}.json"
    state = data.read_json(progress) or {"next": first, "broken": []}
    run.broken = {index: f"{run.folder.images[index]!r}: unreadable" for index in state["broken"]}
    maps = [np.lib.format.open_memmap(work / f"{name}.npy", "r+") for name in names]
    chunk = max(cfg.batch, 64)
    starts = list(range(state["next"], stop, chunk))
    keys = lambda step: [(i, None) for i in range(starts[step], min(stop, starts[step] + chunk))]
    stream = data.batches(data.Pictures(run.folder, cfg.image_size), keys, 0, len(starts), cfg.workers,
                          run.device.type == "cuda")
    bar = run.bar = data.tqdm(total=stop - first, initial=state["next"] - first, desc="latents",
                              disable=not run.main, mininterval=1)
    run.stepping = True                                # a signal waits for the end of a chunk
    for number, (images, broken) in enumerate(stream):
        with run.autocast():
            posterior = model.encode(data.to_float(images, run.device))
        rows = slice(starts[number], starts[number] + len(images))
        for array, value in zip(maps, posterior):
            array[rows] = value.half().cpu().numpy()
        run.count_broken(broken)
        here = set(range(rows.start, rows.stop))
        state["broken"] += [index for index, _ in broken if index in here]
        bar.update(len(images))
        if number % 50 == 49 or rows.stop == stop or run.stop:
            state["next"] = rows.stop
            for array in maps:
                array.flush()
            with data.atomic(progress) as partial:
                partial.write_text(json.dumps(state))
        if run.stop:
            raise data.Stopped(run.stop)
    run.stepping = False
    bar.close()


def finish_latents(cfg, run, work, final, folders, names, checkpoint, mark):
    """Rows, channel statistics in float64, and one rename: out/latents/ is whole or it is not there."""
    maps = [np.load(work / f"{name}.npy", mmap_mode="r") for name in names]
    broken = {index for path in work.glob("done-*.json") for index in json.loads(path.read_text())["broken"]}
    data.tolerate([repr(run.folder.images[index]) for index in sorted(broken)], len(run.folder.images),
                  cfg.max_broken, "pictures")          # of all ranks, and of all runs that it took
    train_images, train_rows = len(folders[0].images), len(folders[0].rows)
    with open(work / "rows.jsonl", "w", encoding="utf-8") as lines:
        for number, (image, text, source) in enumerate(run.folder.rows):
            if image not in broken and source not in broken:
                row = {"image": image, "text": text} | ({"source": source} if source >= 0 else {})
                row |= {"held_out": True} if number >= train_rows else {}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    training = [image for image in range(train_images) if image not in broken]
    mean, variance = channel_statistics(maps, np.array(training))
    meta = {**mark, "count": len(run.folder.images) - len(broken), "broken": len(broken),
            "grid": cfg.image_size // 16, "z_dim": cfg.z_dim, "mean": mean.tolist(),
            "variance": variance.tolist(), "preset": cfg.preset, "psvae_step": checkpoint["step"]}
    with data.atomic(work / "meta.json") as partial:
        partial.write_text(json.dumps(meta, indent=1))
    data.replace_folder(work, final)
    run.say(f"wrote {final}: {meta['count']:,} pictures"
            f"{f', {len(broken)} broken ones left out' if broken else ''}. Next: python dit.py")


def channel_statistics(maps: list[np.ndarray], pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each channel of z over the given pictures,
    float64: Var(z) = Var(mu) + E[sigma^2]."""
    total, square, variance, n = 0.0, 0.0, 0.0, 0
    for part in np.array_split(pictures, max(1, len(pictures) // 1024)):
        mu = maps[0][part].astype(np.float64).reshape(-1, maps[0].shape[-1])
        total, square, n = total + mu.sum(0), square + (mu ** 2).sum(0), n + len(mu)
        if len(maps) > 1:
            variance = variance + np.exp(maps[1][part].astype(np.float64)).reshape(mu.shape).sum(0)
    mean = total / n
    return mean, square / n - mean ** 2 + variance / n


@data.program
def main(argv: list[str] | None = None):
    typed = data.read_flags(Config, argv, __doc__, PRESETS)
    out = Path(typed.get("out", "out"))
    only = [name for name in ("encode_only", "evaluate", "reconstruct") if typed.get(name)]
    there = (out / "psvae.pt").exists() and not typed.get("fresh")  # another rank may not have moved it yet
    checkpoint = data.load(out / "psvae.pt", "psvae", "python psvae.py") if only or there else None
    stage_1 = data.load(out / "svae.pt", "svae") if not checkpoint and (out / "svae.pt").exists() else None
    inherited = data.inherit(stage_1 and stage_1["config"], INHERITED, typed, out / "svae.pt")
    cfg = data.configure(Config, PRESETS, typed, inherited, checkpoint and checkpoint["config"],
                         strict=not only)
    if cfg.fresh and not only:
        data.set_aside(out, "psvae.pt", "psvae.csv", "psvae.png")
    if not checkpoint and not stage_1:
        print(f"no {out / 'svae.pt'}: projector and semantic decoder start from scratch. Without stage 1 the "
              f"latent has first to find the features' meaning again (python svae.py makes it).")
    if cfg.reconstruct:
        return reconstruct(cfg)
    if cfg.evaluate:
        return evaluate(cfg)
    if not cfg.encode_only and not (checkpoint and data.is_finished(checkpoint, cfg, out / "psvae.pt")):
        train(cfg, checkpoint, stage_1)
    write_latents(cfg)


if __name__ == "__main__":
    sys.exit(main())
