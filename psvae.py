"""psvae.py - stage 2, the Pixel-Semantic VAE: the encoder learns pixels and keeps the meaning.

Frozen features have thrown away what a picture looks like up close (the guide's Problem 2). So the
encoder is trained too: a pixel decoder draws the picture from z, while the semantic decoder must
still reproduce the features of a frozen copy of the encoder. At the end every picture is encoded
once, for stage 3.

Eq. 12 to 19, as numbered in notes/equations.md; "the guide" is docs/architecture.md of the public
repository Gaurav14cs17/PS-VAE.

    x (B,3,256,256) --E, trained--> f (B,16,16,1024) --Projector--> mu, log_var (B,16,16,96)
    |                                                                  | z = mu + sigma * eps
    |--E, frozen--> f_target ----- MSE ----- f_hat <--SemanticDecoder--|
    '---------------------- L1, MSE, LPIPS --- x_hat <--PixelDecoder---'

    python psvae.py                       from out/svae.pt; tiny: 21 minutes on 2 CPU cores
    python psvae.py --data ./imagenet     the real thing, on one CUDA GPU
    python psvae.py --reconstruct a.png   out/reconstruction.png: picture | its reconstruction
    python psvae.py --encode-only         writes out/latents/ again

Reads out/svae.pt (projector, semantic decoder) and the folder of pictures. Writes out/psvae.pt,
out/psvae.csv, out/psvae.png (pictures above, reconstructions below) and out/latents/. Run again, it
resumes. notes/checks/evaluate.py measures the result: PSNR, SSIM, LPIPS, FDD.
Expect (tiny, seed 0): held-out PSNR 26.9 dB after 400 steps, 31.5 after 1,000, 36.1 after 2,000,
37.5 at the end.
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
    image_size: int = 256                   # pixels per side; the latent grid has a sixteenth
    z_dim: int = 96                         # latent channels
    widths: tuple[int, ...] = (512, 512, 256, 128)  # channels of the pixel decoder's four levels
    alpha: float = 1.0                      # weight of the semantic loss, Eq. 15
    gamma: float = 1.0                      # weight of the pixel loss
    lpips_weight: float = 0.1               # of the perceptual loss, the guide's lambda; 0: no VGG
    beta: float = 1e-4                      # weight of the KL term
    beta_warmup: float = 0.0                # share of the steps in which it grows from 0, linearly
    steps: int = 200_000                    # optimisation steps
    batch: int = 64                         # pictures a step, over all processes
    micro_batches: int = 1                  # gradient accumulation: parts of a process's batch
    learning_rate: float = 2e-4             # peak, after warm-up
    encoder_lr_scale: float = 0.1           # the encoder's share of it
    muon: bool = False                      # Muon, not AdamW, for matrices outside of the encoder
    weight_decay: float = 0.01              # of AdamW and Muon
    warmup: int = 1000                      # steps of linear warm-up, before the cosine decay
    clip: float = 1.0                       # gradient clipping: maximum norm
    precision: str = "bf16"                 # bf16 (autocast; losses in fp32) or fp32 (TF32 on CUDA)
    compile: bool = True                    # torch.compile, on CUDA
    checkpointing: bool = False             # recompute activations: less memory, a third slower
    device: str = "auto"                    # auto, cpu or cuda
    workers: int = 8                        # processes that read pictures
    count: int = 75_000                     # of the built-in world: pictures that have words
    max_broken: float = 0.01                # largest tolerated share of unreadable pictures or rows
    log_every: int = 50                     # steps between rows of the log
    eval_every: int = 1000                  # steps between held-out losses and previews
    save_every: int = 1000                  # steps between checkpoints
    seed: int = 0                           # of everything random
    fresh: bool = False                     # move the old run aside and start over
    latents: str = "both"                   # for stage 3: both (mu, log_var) or mu (half the size)
    encode_only: bool = False               # only write out/latents/ again
    reconstruct: tuple[str, ...] = ()       # only reconstruct these image files

    def __post_init__(self):
        data.check(self, image_size=(32, 4096), widths=(4, 65536), beta_warmup=(0, 1),
                   clip=(1e-9, 1e9), count=(10, 1e8), max_broken=(0, 1))
        data.check_choice(self, precision=("bf16", "fp32"), device=("auto", "cpu", "cuda"),
                          latents=("both", "mu"))
        if self.image_size % 16:
            raise data.UserError(f"--image-size {self.image_size}: allowed are multiples of 16.")
        if len(self.widths) != 4 or any(width % 4 for width in self.widths):
            raise data.UserError(f"--widths {self.widths}: "
                                 f"four multiples of 4 are needed, one for each doubling.")


PRESETS = {
    "full": {},
    # DEVIATION (tiny): lambda is 0: VGG is ten times the size of this encoder, and flat shapes need
    # it least. beta is thirty times the guide's, to make latents easy enough for a tiny DiT.
    "tiny": dict(encoder=data.TINY_IMAGE_ENCODER, image_size=64, z_dim=24, widths=(96, 64, 32, 16),
                 lpips_weight=0.0, beta=3e-3, beta_warmup=0.7, steps=3000, batch=16,
                 learning_rate=1e-3, encoder_lr_scale=0.5, muon=True, warmup=50,
                 precision="fp32", compile=False, workers=0, log_every=20, eval_every=200,
                 save_every=200, latents="mu"),
}
INHERITED = ("preset", "data", "encoder", "image_size", "z_dim", "count")   # from svae.pt
TERMS = ("loss", "semantic", "pixel", "perceptual", "kl")


# === From stage 1 =================================================================================
# The same text as in svae.py (a test holds them equal), so that this file reads from end to end. So
# is kl_divergence below.

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


def reparameterize(mu: torch.Tensor, log_var: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """A sample of N(mu, sigma^2) that gradients pass through. All of one shape."""
    # Eq. 6: z = mu + sigma * eps, sigma = exp(log sigma^2 / 2), eps ~ N(0, I)
    return mu + torch.exp(0.5 * log_var) * eps


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


# === Architecture: 1. Trainable Representation Encoder ============================================

class PSVAE(nn.Module):
    """The trainable encoder, the projector and both decoders; the frozen copy is no part of it."""

    def __init__(self, encoder: data.ImageEncoder, z_dim: int, widths: tuple[int, ...],
                 checkpointing: bool = False):
        super().__init__()
        self.encoder = encoder
        self.projector = Projector(encoder.dim, z_dim)
        self.semantic_decoder = SemanticDecoder(encoder.dim, z_dim)
        self.pixel_decoder = PixelDecoder(z_dim, widths, checkpointing)

    def forward(self, x: torch.Tensor, eps: torch.Tensor):
        """x (B, 3, H, W), eps (B, h, w, z_dim)
        -> x_hat (B, 3, H, W), f_hat (B, h, w, d), mu, log_var (B, h, w, z_dim)."""
        mu, log_var = self.encode(x)
        z = reparameterize(mu, log_var, eps)
        return self.decode(z), self.semantic_decoder(z), mu, log_var

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, 3, H, W) in [-1, 1] -> mu, log_var (B, h, w, z_dim)."""
        # Eq. 12: f = E_train(x)
        f = self.encoder(x)                                                 # (B, h, w, d)
        return self.projector(f)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """z (B, h, w, z_dim) -> x_hat (B, 3, H, W), in the type of z (fp32)."""
        return self.pixel_decoder(z).to(z.dtype)

    def fingerprint(self) -> str:
        """Of the weights that encode: latents belong to them, whatever becomes of the decoders."""
        return data.fingerprint(self.encoder, self.projector, extra=self.encoder.description)


# --- 2. Frozen Encoder (for Semantic Target) ------------------------------------------------------

@torch.no_grad()
def frozen_features(frozen_encoder: data.ImageEncoder, x: torch.Tensor) -> torch.Tensor:
    """x (B, 3, H, W) in [-1, 1] -> f_target (B, h, w, d), from the pretrained weights."""
    # Eq. 13: f_target = E_frozen(x)
    return frozen_encoder(x)


# --- 3. Pixel Decoder -----------------------------------------------------------------------------

class PixelDecoder(nn.Module):
    """z (B, h, w, z_dim) -> x_hat (B, 3, 16 h, 16 w), about [-1, 1], not clamped.

        z -> Conv z_dim, 512 -> GroupNorm -> SiLU
          -> for c_out in 512, 512, 256, 128:  ResBlock, ResBlock, Upsample x 2, Conv c_in, c_out
          -> GroupNorm -> SiLU -> Conv 128, 3
    """

    def __init__(self, z_dim: int, widths: tuple[int, ...], checkpointing: bool = False):
        super().__init__()
        self.checkpointing = checkpointing
        self.stem = nn.Sequential(nn.Conv2d(z_dim, widths[0], 3, padding=1),
                                  group_norm(widths[0]), nn.SiLU())
        self.levels = nn.ModuleList(
            nn.Sequential(ConvBlock(c_in), ConvBlock(c_in),
                          nn.Upsample(scale_factor=2, mode="nearest"),
                          nn.Conv2d(c_in, c_out, 3, padding=1))
            for c_in, c_out in zip((widths[0], *widths), widths))
        self.head = nn.Sequential(group_norm(widths[-1]), nn.SiLU(),
                                  nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        # Eq. 14: x_hat = D_pixel(z)
        x = self.stem(z.permute(0, 3, 1, 2))                                # (B, 512, h, w)
        for level in self.levels:                                           # twice the side each
            keep = self.checkpointing and self.training
            x = recompute(level, x, use_reentrant=False) if keep else level(x)
        return self.head(x)                                                 # (B, 3, 16 h, 16 w)


class ConvBlock(nn.Module):
    """The guide's ResBlock: x + Conv(SiLU(GroupNorm(Conv(SiLU(GroupNorm(x)))))), (B, c, H, W)."""

    def __init__(self, c: int):
        super().__init__()
        self.body = nn.Sequential(group_norm(c), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1),
                                  group_norm(c), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1))
        # DEVIATION: the last convolution starts at zero, so that a fresh block is the identity; the
        # guide does not say how to initialise it. Training starts faster.
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def group_norm(c: int) -> nn.GroupNorm:
    """32 groups as usual, fewer where channels are few."""
    return nn.GroupNorm(math.gcd(min(32, c // 4), c), c)


# === PS-VAE Loss Function =========================================================================
#
#     who gets a gradient    encoder   projector   semantic decoder   pixel decoder
#     semantic                  x          x              x
#     pixel, perceptual         x          x                                x
#     KL                        x          x
#
# The frozen copy and LPIPS never do.

def psvae_loss(x_hat, x, f_hat, f_target, mu, log_var, cfg: Config, lpips=None,
               warm: float = 1.0) -> dict[str, torch.Tensor]:
    """The loss and its terms, each a scalar in fp32; warm is the share of beta that is reached."""
    semantic, pixel = semantic_loss(f_hat, f_target), pixel_loss(x_hat, x)
    perceptual, kl = perceptual_loss(lpips, x_hat, x), kl_divergence(mu, log_var)
    # Eq. 15: L_PS-VAE = alpha * L_semantic + gamma * L_pixel + lambda * L_perceptual + beta * L_KL
    loss = (cfg.alpha * semantic + cfg.gamma * pixel + cfg.lpips_weight * perceptual
            + warm * cfg.beta * kl)
    return {"loss": loss, "semantic": semantic, "pixel": pixel, "perceptual": perceptual, "kl": kl}


def semantic_loss(f_hat: torch.Tensor, f_target: torch.Tensor) -> torch.Tensor:
    """Both (B, h, w, d). With the trained encoder as target, both could collapse to a constant."""
    # Eq. 16: L_semantic = MSE( D_sem(z), E_frozen(x) )
    return F.mse_loss(f_hat.to(f_target.dtype), f_target)


def pixel_loss(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Both (B, 3, H, W). x_hat is not clamped: a value past white is still pulled back."""
    # Eq. 17: L_pixel = 1/2 L1(x_hat, x) + 1/2 MSE(x_hat, x)
    return 0.5 * l1(x_hat, x) + 0.5 * F.mse_loss(x_hat, x)


def l1(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The mean is over the batch, too."""
    # Eq. 18: L1(x_hat, x) = 1/(HWC) sum_ijc | x_hat_ijc - x_ijc |
    return (x_hat - x).abs().mean()


def perceptual_loss(lpips, x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Both (B, 3, H, W) in [-1, 1], fp32; lpips is None where its weight is 0.

    lpips' linear weights are the squares of w_l, and its phi_l are of unit length.
    """
    if lpips is None:
        return x_hat.new_zeros(())
    # Eq. 19: LPIPS(x_hat, x) = sum_l 1/(H_l W_l) sum_hw || w_l * (phi_hat_l - phi_l) ||^2
    return lpips(x_hat, x).to(x.dtype).mean()


def kl_divergence(mu: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """KL(N(mu, sigma^2) || N(0, I)) in nats: mu, log_var (B, h, w, z_dim) -> scalar."""
    # DEVIATION: the mean over batch and positions, but the sum over z_dim, as in the equation. The
    # guide's pseudo-code takes the mean there too: z_dim times less, and no KL divergence.
    # Eq. 10: L_KL = D_KL( q(z|x) || p(z) ), p(z) = N(0, I), which for Gaussians is
    # Eq. 11: L_KL = -1/2 sum_i ( 1 + log sigma_i^2 - mu_i^2 - sigma_i^2 )
    kl = -0.5 * (1 + log_var - mu ** 2 - torch.exp(log_var)).sum(-1)
    return kl.mean()


# === Held-out losses and preview ==================================================================

def psnr(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture in dB: (B, 3, H, W) in [-1, 1] -> (B,)."""
    mse = (x_hat.clamp(-1, 1) - x).square().mean((1, 2, 3)) / 4             # on a scale of 0 to 1
    return -10 * mse.clamp(min=1e-12).log10()


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
        f_target = frozen_features(frozen_encoder, x_part)
        x_hat, f_hat, mu, log_var = model(x_part, eps_part)
        losses = psvae_loss(x_hat, x_part, f_hat, f_target, mu, log_var, cfg, lpips)
        losses["psnr"] = psnr(x_hat, x_part).mean()
        for name, value in losses.items():
            total[name] = total.get(name, 0) + value.item() * len(x_part) / len(x)
    model.train()
    return total


@torch.no_grad()
def preview(model: PSVAE, x: torch.Tensor, path: Path):
    """Two rows: pictures, and what comes back from mu."""
    x_hat = model.decode(model.encode(x)[0])
    captions = [["picture"], ["x_hat, from mu"]]
    data.save_picture(data.grid([data.to_uint8(x), data.to_uint8(x_hat)], captions), path)


@torch.no_grad()
def reconstruct(cfg: Config, folder: Path):
    """Writes out/reconstruction.png: each file, cropped, beside its reconstruction from mu."""
    device, rows, captions = data.pick_device(cfg.device), [], []
    model, _ = load_psvae(folder / "psvae.pt", device)
    for name in cfg.reconstruct:
        pixels = data.user_image(name, cfg.image_size)
        x = data.to_float(torch.from_numpy(pixels).permute(2, 0, 1)[None], device)
        x_hat = model.decode(model.encode(x)[0])
        quality = psnr(x_hat, x).item()
        rows.append([pixels, data.to_uint8(x_hat)[0]])
        captions.append([Path(name).name, f"{quality:.1f} dB"])
        print(f"{data.printable(name)}: PSNR {quality:.2f} dB")

    path = Path(cfg.out) / "reconstruction.png"
    data.save_picture(data.grid(rows, captions), path)
    print(f"wrote {path}: picture | reconstruction")


# === Training Procedures. Stage 2: Train PS-VAE ===================================================

def set_up(cfg: Config, checkpoint: dict | None, stage_1: dict | None, run: data.Run):
    """The folder, both encoders, LPIPS, the model and its optimizer, at the checkpoint's step."""
    folder, held_out = run.read_data(checkpoint)
    run.say(f"stage 2, {cfg.preset} preset on {run.device}: {len(folder.images):,} pictures, "
            f"captions from {folder.layout}, encoder {cfg.encoder}")

    # Keep a frozen copy for the semantic target: the pretrained weights, loaded at every start
    frozen_encoder = data.load_image_encoder(cfg.encoder).to(run.device)
    encoder_fingerprint = data.fingerprint(frozen_encoder)
    lpips = data.load_lpips(run.device) if cfg.lpips_weight else None
    torch.manual_seed(cfg.seed)
    model = PSVAE(copy.deepcopy(frozen_encoder), cfg.z_dim, cfg.widths, cfg.checkpointing)
    model.to(run.device).pixel_decoder.to(memory_format=torch.channels_last)    # faster
    frozen_encoder.requires_grad_(False)
    if cfg.checkpointing:
        model.encoder.recompute_activations()
    model.train()

    encoder = [p for p in model.encoder.parameters() if p.requires_grad]    # not the mask token
    others = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    # DEVIATION (--muon, tiny): Muon teaches decoders and projector in a third of AdamW's steps.
    matrices = [p for p in others if cfg.muon and p.dim() > 1]
    momenta = [torch.zeros_like(p) for p in matrices]
    # DEVIATION: the full preset's encoder learns at a tenth of the rate: the first gradients of a
    # fresh pixel decoder would destroy its features. For the rest of the optimizer see svae.py.
    rest = [p for p in others if not (cfg.muon and p.dim() > 1)]
    optimizer = torch.optim.AdamW([{"params": rest, "scale": 1.0},
                                   {"params": encoder, "scale": cfg.encoder_lr_scale}],
                                  betas=(0.9, 0.99), weight_decay=cfg.weight_decay, fused=True)
    before, path = checkpoint or stage_1, run.out / ("psvae.pt" if checkpoint else "svae.pt")
    with data.reading(path):
        stage_1_digest = stage_1 and data.fingerprint(stage_1["model"])
        if before:
            data.check_encoder(encoder_fingerprint, before, cfg.encoder)
        if checkpoint:
            data.load_weights(model, checkpoint["model"], path)
            optimizer.load_state_dict(checkpoint["optimizer"])
            for own, kept in zip(momenta, checkpoint.get("momenta", []), strict=True):
                own.copy_(kept)
            stage_1_digest = checkpoint.get("stage_1", stage_1_digest)
        elif stage_1:                                   # the pixel decoder starts fresh
            for part in ("projector", "semantic_decoder"):
                data.load_weights(getattr(model, part), part_of(stage_1["model"], part), path)
            run.say(f"projector and semantic decoder from {path}, step {stage_1['step']:,}")
            if stage_1.get("data", run.data)["digest"] != run.data["digest"]:
                run.say("stage 1 was trained on other pictures or captions")
    if run.compile:
        for part in (frozen_encoder, model.encoder, model.pixel_decoder):
            part.compile()

    x_held_out = run.held_out(held_out, cfg.image_size)

    def look(picture: Path | None) -> dict[str, float]:
        if picture:
            preview(model, x_held_out[:8], picture)
        return held_out_losses(model, frozen_encoder, x_held_out, cfg, lpips)

    run.start(checkpoint, (*TERMS, "psnr"), look, lambda: dict(
        model=model.state_dict(), optimizer=optimizer.state_dict(), momenta=momenta,
        stage_1=stage_1_digest, encoder_description=model.encoder.description,
        encoder_fingerprint=encoder_fingerprint, fingerprint=model.fingerprint()))
    return folder, frozen_encoder, lpips, model, optimizer, (matrices, momenta)


def part_of(state: dict, part: str) -> dict:
    """The weights of one part of a model, by their names in it."""
    start = part + "."
    return {name.removeprefix(start): w for name, w in state.items() if name.startswith(start)}


def train(cfg: Config, checkpoint: dict | None, stage_1: dict | None):
    with data.Run(cfg, "psvae", terms=(*TERMS, "grad_norm")) as run:
        (folder, frozen_encoder, lpips, model, optimizer,
         muon) = set_up(cfg, checkpoint, stage_1, run)
        psvae, side = run.distribute(model), cfg.image_size // 16

        # Crops and flips for folders; in the built-in world left means left
        for step, x in run.pictures(folder, cfg.image_size, augment=bool(cfg.data)):
            run.set_rate(optimizer, step)
            eps = run.randn(step, "eps", side, side, cfg.z_dim)             # (B, h, w, z_dim)
            # DEVIATION (tiny): beta grows from 0; at full weight from the first step the KL term
            # costs 1 dB of PSNR throughout.
            warm = min(1.0, (step + 1) / (cfg.beta_warmup * cfg.steps)) if cfg.beta_warmup else 1.0

            for x_part, eps_part in run.micro_batches(psvae, x, eps):
                with run.autocast():
                    f_target = frozen_features(frozen_encoder, x_part)      # (B, h, w, d)
                    x_hat, f_hat, mu, log_var = psvae(x_part, eps_part)
                losses = psvae_loss(x_hat, x_part, f_hat, f_target, mu, log_var, cfg, lpips, warm)
                (losses["loss"] / cfg.micro_batches).backward()
                run.add(losses)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            optimizer.step()
            data.muon_step(*muon, run.rate, cfg.weight_decay)
            model.zero_grad(set_to_none=True)

            run.after_step(step, grad_norm)             # log, preview, save, stop


# === Latents for stage 3: z_0 = PS-VAE.encode(x), with a frozen PS-VAE, is worth computing once ===

def load_psvae(path: Path, device="cpu", draws_only=False) -> tuple[nn.Module, dict]:
    """The model of a checkpoint, in eval mode, and the checkpoint; draws_only: its pixel decoder,
    and no image encoder is built."""
    checkpoint = data.load(path, "psvae", before=data.command("psvae.py", out=path.parent))
    cfg = data.configure(Config, PRESETS, {}, saved=checkpoint["config"])
    checkpoint["config"] = data.plain(cfg)                                  # whole and checked

    def make():
        if draws_only:
            return PixelDecoder(cfg.z_dim, cfg.widths)
        encoder = data.build_image_encoder(checkpoint["encoder_description"])
        return PSVAE(encoder, cfg.z_dim, cfg.widths)

    with data.reading(path):
        state = checkpoint["model"]
        state = part_of(state, "pixel_decoder") if draws_only else state
        return data.rebuild(make, state, path).to(device), checkpoint


@torch.no_grad()
def write_latents(cfg: Config):
    """Encodes every picture of the folder into out/latents/: posteriors, not samples.

    Shards of mu and log_var (see data.Latents); rows.jsonl has {"image", "text"[, "source"]
    [, "held_out"]} for each caption or edit; meta.json the statistics of every channel and the
    fingerprint of the model. Centre crops, no flip. If killed, it resumes at the next shard.
    """
    out, work = Path(cfg.out), Path(cfg.out) / "latents.partial"
    with data.Run(cfg, "latents") as run:
        run.barrier()                                  # rank 0 may still write the last psvae.pt
        model, checkpoint = load_psvae(out / "psvae.pt", run.device)
        train, held_out = data.read_folder(cfg.data, cfg.max_broken, cfg.out, cfg.count)
        run.folder = data.joined([train] if held_out is train else [train, held_out])
        mark = {"format": data.LATENTS, "fingerprint": model.fingerprint(), "latents": cfg.latents,
                "pictures": len(run.folder.images), "digest": data.digest(run.folder)}
        meta = {} if cfg.encode_only else data.read_json(out / "latents/meta.json")
        after = f"Next: {data.command('dit.py', out=out)}"
        if all(meta.get(key) == value for key, value in mark.items()):
            return run.say(f"{out / 'latents'} is complete: {meta['count']:,} pictures. {after}")
        if run.main:
            data.unfinished(out / "latents", mark)
            size = 2 * (1 + (cfg.latents == "both")) * cfg.z_dim * (cfg.image_size // 16) ** 2
            todo = mark["pictures"] - data.SHARD * len(list(work.glob("*.npy")))
            data.free_space(work, size * max(0, todo), f"latents of {todo:,} pictures")
        run.barrier()
        encode_shards(cfg, run, model, work)
        run.barrier()
        if run.main:
            finish_latents(cfg, run, work, len(train.images), len(train.rows), mark
                           | {"preset": cfg.preset, "psvae_step": checkpoint["step"]})
            run.say(after)
        run.barrier()


def encode_shards(cfg: Config, run: data.Run, model: PSVAE, work: Path):
    """Encodes this rank's shards, skipping finished ones. A broken picture's values are all NaN."""
    count, chunk = len(run.folder.images), max(cfg.batch, 64)
    mine = [first for first in range(run.rank * data.SHARD, count, run.world * data.SHARD)
            if not data.shard_path(work, first // data.SHARD).exists()]
    parts = [range(i, min(i + chunk, first + data.SHARD, count))
             for first in mine for i in range(first, min(first + data.SHARD, count), chunk)]
    keys = lambda step: [(i, None) for i in parts[step]]
    stream = data.batches(data.Pictures(run.folder, cfg.image_size), keys, 0, len(parts),
                          cfg.workers, run.device.type == "cuda")
    bar = run.open.enter_context(data.progress(sum(map(len, parts)), "latents"))
    run.stepping, shard = True, []                     # a signal waits for the end of a batch
    for part, (images, broken) in zip(parts, stream):
        with run.autocast():
            mu, log_var = model.encode(data.to_float(images, run.device))
        posterior = torch.stack([mu, log_var] if cfg.latents == "both" else [mu], dim=1).half()
        for index in {index for index, _ in broken if index in part}:
            posterior[index - part.start] = math.nan
        shard.append(posterior.cpu().numpy())
        run.count_broken(broken)
        bar.update(len(images))
        if part.stop % data.SHARD == 0 or part.stop == count:
            data.save_array(data.shard_path(work, part.start // data.SHARD), np.concatenate(shard))
            shard = []
        if run.stop:
            run.say(f"{work} holds what is encoded so far. The same command resumes there")
            raise data.Stopped(run.stop)
    run.stepping = False


def finish_latents(cfg, run, work: Path, train_images: int, train_rows: int, meta: dict):
    """Rows, channel statistics, and one rename: out/latents/ is whole or it is not there."""
    shards = data.Shards(work)
    bad = np.concatenate([np.isnan(shards[number][:, 0, 0, 0, 0])
                          for number in range(-(-meta["pictures"] // data.SHARD))])
    broken = set(np.flatnonzero(bad).tolist())         # of all ranks, and of all runs that it took
    data.tolerate([repr(run.folder.images[index]) for index in sorted(broken)], meta["pictures"],
                  cfg.max_broken, "pictures")
    mean, variance = channel_statistics(shards, np.flatnonzero(~bad[:train_images]))
    shards.opened.clear()                              # Windows renames no open file

    with data.atomic(work / "rows.jsonl") as path, open(path, "w", encoding="utf-8") as lines:
        for number, (image, text, source) in enumerate(run.folder.rows):
            if image not in broken and source not in broken:
                row = {"image": image, "text": text} | ({"source": source} if source >= 0 else {})
                row |= {"held_out": True} if number >= train_rows else {}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    count = meta["pictures"] - len(broken)
    data.finish(work, run.out / "latents", meta | {
        "count": count, "broken": len(broken), "grid": cfg.image_size // 16, "z_dim": cfg.z_dim,
        "mean": mean.tolist(), "variance": variance.tolist()})
    run.say(f"wrote {run.out / 'latents'}: {count:,} pictures"
            f"{f', {len(broken)} broken ones left out' if broken else ''}")


def channel_statistics(shards: data.Shards, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each channel of z over these pictures, in float64:
    Var(z) = Var(mu) + E[sigma^2]."""
    total, square, variance, n = 0.0, 0.0, 0.0, 0
    for some in np.split(pictures, range(512, len(pictures), 512)):
        both = np.stack([shards[i // data.SHARD][i % data.SHARD] for i in some])
        mu, *log_var = np.moveaxis(both.astype(np.float64), 1, 0)           # (n, h, w, z_dim) each
        mu = mu.reshape(-1, mu.shape[-1])
        total, square, n = total + mu.sum(0), square + (mu ** 2).sum(0), n + len(mu)
        if log_var:
            variance = variance + np.exp(log_var[0]).reshape(mu.shape).sum(0)
    mean = total / n
    return mean, square / n - mean ** 2 + variance / n


@data.program
def main(argv: list[str] | None = None):
    typed = data.read_flags(Config, argv, __doc__, PRESETS)
    out = folder = Path(typed.get("out", "out"))
    only = typed.get("encode_only") or typed.get("reconstruct")
    if typed.get("reconstruct") and "out" not in typed and not (out / "psvae.pt").exists():
        folder = data.HERE / "notes/tiny"              # the model that ships
    there = (folder / "psvae.pt").exists() and not typed.get("fresh")
    checkpoint = (data.load(folder / "psvae.pt", "psvae", data.command("psvae.py", out=out))
                  if only or there else None)
    stage_1 = data.load(out / "svae.pt", "svae") if (out / "svae.pt").exists() else None
    parent = None if checkpoint else stage_1 and stage_1["config"]
    inherited = data.inherit(parent, INHERITED, typed, out / "svae.pt")
    cfg = data.configure(Config, PRESETS, typed, inherited, checkpoint and checkpoint["config"],
                         strict=not only)
    if stage_1 and not checkpoint and stage_1["config"].get("z_dim", cfg.z_dim) != cfg.z_dim:
        own = stage_1["config"]["z_dim"]
        raise data.UserError(f"--z-dim {cfg.z_dim} contradicts {out / 'svae.pt'}, which has {own}. "
                             f"Train that anew: {data.command('svae.py', out=out, z_dim=cfg.z_dim)}"
                             f" --fresh")
    if typed.get("reconstruct"):
        return reconstruct(cfg, folder)
    if cfg.fresh and not only:
        data.set_aside(out, "psvae.pt", "psvae.csv", "psvae.png")
    if not checkpoint and not stage_1:
        data.say(f"no {out / 'svae.pt'}: projector and semantic decoder start from scratch, and "
                 f"have to find the features' meaning first ({data.command('svae.py', out=out)})")
    began = checkpoint and stage_1 and checkpoint.get("stage_1")
    if began and began != data.fingerprint(stage_1["model"]):
        data.say(f"{out / 'psvae.pt'} started from another svae.pt than the one beside it; "
                 f"--fresh starts over from that")
    if not only and not (checkpoint and data.is_finished(checkpoint, cfg, out / "psvae.pt")):
        train(cfg, checkpoint, stage_1)
    write_latents(cfg)


if __name__ == "__main__":
    sys.exit(main())
