"""dit.py - stage 3, the Diffusion Transformer: noise becomes latents, conditioned on text.

Noise is added to clean latents z_0 to an extent t, and a transformer predicts it from z_t, t and
the caption c. The same network edits: the latents of a source picture join the sequence as further
tokens, and the text is then an instruction. This file never sees a pixel: sample.py decodes.

Eq. 20 to 32, as numbered in notes/equations.md; "the guide" is docs/architecture.md of the public
repository Gaurav14cs17/PS-VAE.

    z_t (B,16,16,96) -> Linear + PE -> h (B,256,D) -> [ DiTBlock ] x depth -> AdaLN -> Linear -> eps
    source, if any -> the same + type, 256 more tokens   ^   ^               ^      (B,16,16,96)
    t (B,) -> sin, cos -> MLP -> t_emb -> gamma, beta, gate -|---------------'
    text -> T5, frozen -> c (B,L,d_text) -> Linear -> K, V --'

    python dit.py                         reads out/latents; tiny: 37 minutes on 2 CPU cores
    python dit.py --size XL               width 1152, 28 blocks, on one CUDA GPU

Reads out/latents/ (psvae.py writes it). Writes out/text/ (the embedding of every distinct caption),
out/dit.pt, out/dit.csv and out/dit.png (latents as colours: z_0 | z_t | predicted z_0 at four t).
Run again, it resumes.
Expect (tiny, seed 0): held-out loss of v by quarter of t 0.58, 0.16, 0.29, 0.71 after 500 steps,
0.25, 0.02, 0.09, 0.48 at the end, when nine tenths of the prompts are drawn right; two objects
whose places are left open come last.
"""

import collections
import contextlib
import copy
import math
import re
import sys
import textwrap
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
    out: str = "out"                        # folder with latents/; checkpoint and log go there too
    preset: str = ""                        # full or tiny; default: that of the latents
    text_encoder: str = "google/flan-t5-xxl"  # a T5, hub name or folder
    max_tokens: int = 120                   # text length; longer texts are truncated
    size: str = ""                          # S, B, L or XL: sets width, depth and heads at once
    width: int = 768                        # D
    depth: int = 12                         # blocks
    heads: int = 12                         # attention heads; D / heads channels each
    T: int = 1000                           # diffusion steps
    schedule: str = "scaled_linear"         # scaled_linear (linear in sqrt(beta)) or linear
    beta_start: float = 1e-4                # beta_1
    beta_end: float = 0.02                  # beta_T
    drop_text: float = 0.1                  # chance that a caption is replaced by "" (for guidance)
    drop_both: float = 0.05                 # share of edit batches with neither source nor text
    edit_fraction: float = 0.3              # share of batches that are edits, where there are any
    predict: str = "eps"                    # what the network predicts: eps, as in Eq. 32, or v
    logit_mean: float = 0.0                 # mean of logit(t / T) in training, if logit_std > 0
    logit_mean_edits: float = 0.0           # the same in batches of edits
    logit_std: float = 0.0                  # standard deviation for both; 0: t is uniform on 1 .. T
    whiten_text: bool = False               # text enters with mean 0, covariance I over all tokens
    steps: int = 400_000                    # optimisation steps
    batch: int = 256                        # latents a step, over all processes
    micro_batches: int = 1                  # gradient accumulation: parts of a process's batch
    learning_rate: float = 1e-4             # peak, after warm-up
    muon: bool = False                      # Muon, not AdamW, for the blocks' attention and FFN
    weight_decay: float = 0.0               # of AdamW and Muon
    warmup: int = 1000                      # steps of linear warm-up, before the cosine decay
    clip: float = 1.0                       # gradient clipping: maximum norm
    ema: float = 0.9999                     # decay of the averaged weights that sampling uses
    precision: str = "bf16"                 # bf16 (autocast; loss in fp32) or fp32 (TF32 on CUDA)
    compile: bool = True                    # torch.compile, on CUDA
    checkpointing: bool = False             # recompute activations: less memory, a third slower
    device: str = "auto"                    # auto, cpu or cuda
    workers: int = 4                        # processes that read latents
    max_broken: float = 0.01                # largest tolerated share of unusable rows
    log_every: int = 50                     # steps between rows of the log
    eval_every: int = 2000                  # steps between held-out losses and previews
    save_every: int = 2000                  # steps between checkpoints
    seed: int = 0                           # of everything random
    fresh: bool = False                     # move the old run aside and start over

    def __post_init__(self):
        data.check(self, width=(2, 65536), beta_start=(1e-9, 0.999), beta_end=(1e-9, 0.999),
                   drop_text=(0, 1), drop_both=(0, 1), edit_fraction=(0, 1), ema=(0, 1),
                   clip=(1e-9, 1e9), max_broken=(0, 1), logit_mean=(-10, 10),
                   logit_mean_edits=(-10, 10), logit_std=(0, 10))
        data.check_choice(self, precision=("bf16", "fp32"), device=("auto", "cpu", "cuda"),
                          schedule=("scaled_linear", "linear"), predict=("eps", "v"),
                          size=("", *SIZES))
        if self.width % self.heads:
            raise data.UserError(f"--width {self.width} is not divisible by --heads {self.heads}.")


SIZES = {"S": (384, 12, 6), "B": (768, 12, 12),        # width, depth, heads
         "L": (1024, 24, 16), "XL": (1152, 28, 16)}
PRESETS = {
    # DEVIATION: the guide's T5-XXL is flan-t5-xxl, the same network tuned further, whose tokenizer
    # needs no more packages; and texts end after --max-tokens, to bound their memory.
    "full": {},
    "tiny": dict(text_encoder=data.TINY_TEXT_ENCODER, max_tokens=64, width=128, depth=6, heads=4,
                 steps=7000, predict="v", logit_mean=0.2, logit_mean_edits=0.8, logit_std=0.8,
                 whiten_text=True, batch=64, learning_rate=2e-3, muon=True, warmup=100, ema=0.999,
                 precision="fp32", compile=False, workers=0, log_every=20, eval_every=500,
                 save_every=500),
}


# === Diffusion Process. Forward Process (Adding Noise) ============================================

def forward_process(z_0, t: torch.Tensor, alpha_bar: torch.Tensor):
    """Mean and standard deviation of z_t given z_0.

    z_0 (B, ...), t (B,) in 1 .. T, alpha_bar (T + 1,) -> (B, ...), (B, 1, ...)
    """
    signal, noise = scales(alpha_bar, t, z_0)
    # Eq. 20: q(z_t | z_0) = N( z_t; sqrt(alpha_bar_t) z_0, (1 - alpha_bar_t) I )
    return signal * z_0, noise


def noise_schedule(T: int, beta_start: float, beta_end: float,
                   schedule: str = "scaled_linear") -> torch.Tensor:
    """alpha_bar_0 .. alpha_bar_T: (T + 1,), float64. No noise at t = 0: alpha_bar_0 is 1."""
    if schedule == "scaled_linear":         # "scaled": it is sqrt(beta) that grows linearly
        beta = torch.linspace(beta_start ** 0.5, beta_end ** 0.5, T, dtype=torch.float64) ** 2
    else:
        beta = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
    # Eq. 21: alpha_bar_t = prod_{s=1..t} alpha_s, alpha_t = 1 - beta_t, beta_t in [1e-4, 0.02]
    alpha_bar = (1 - beta).cumprod(0)
    return torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar])


def add_noise(z_0, t: torch.Tensor, eps, alpha_bar: torch.Tensor) -> torch.Tensor:
    """A sample of q(z_t | z_0): z_0, eps (B, ...), t (B,) in 1 .. T -> z_t (B, ...)."""
    mean, deviation = forward_process(z_0, t, alpha_bar)
    # Eq. 22: z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps, eps ~ N(0, I)
    return mean + deviation * eps


def scales(alpha_bar: torch.Tensor, t: torch.Tensor, like: torch.Tensor):
    """sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t): each (B, 1, ...), type and device of `like`."""
    ab = alpha_bar[t].view(-1, *[1] * (like.dim() - 1))
    return ab.sqrt().to(like), (1 - ab).sqrt().to(like)


# --- Reverse Process (Denoising) ------------------------------------------------------------------

def predict_z_0(z_t, t: torch.Tensor, eps, alpha_bar: torch.Tensor) -> torch.Tensor:
    """What the reverse process aims at: Eq. 22 solved for z_0. Shapes as in add_noise.

    sample.py takes the step from z_t towards it; with all T steps and eta = 1 that is Eq. 23.
    """
    signal, noise = scales(alpha_bar, t, z_t)
    # Eq. 23: p(z_{t-1} | z_t) = N( z_{t-1}; mu_theta(z_t, t), sigma_t^2 I ), mu_theta from z_0:
    return (z_t - noise * eps) / signal


# === DiT Architecture. Input Processing: 1. Patch Embedding =======================================

def patch_embedding(z, linear: nn.Linear, position: torch.Tensor) -> torch.Tensor:
    """Every cell of the latent is a token: z (B, h, w, z_dim), position (1, N, D) -> (B, N, D)."""
    # Eq. 24: h_0 = Linear(z_t) + PE
    return linear(z.flatten(1, 2)) + position


def sine_cosine(grid: int, width: int) -> torch.Tensor:
    """Initial value of the learnable PE: (1, grid * grid, width), half for rows, half for columns.

    Small noise, the usual init, drowns in Linear(z_t): positions are learned several times slower.
    """
    half = width // 2
    angle = timestep_embedding(torch.arange(grid) * 1000 / grid, half)      # (grid, width / 2)
    rows, columns = angle[:, None].expand(-1, grid, -1), angle[None].expand(grid, -1, -1)
    both = torch.cat([rows, columns], dim=-1)
    return F.pad(both, (0, width - 2 * angle.shape[1])).flatten(0, 1)[None]


# --- 2. Timestep Embedding ------------------------------------------------------------------------

def timestep_embedding(t: torch.Tensor, d: int) -> torch.Tensor:
    """t (B,) -> (B, d), what the MLP (DiT.time) gets; in fp32: to bf16, 999 and 1000 are one."""
    # DEVIATION: i ends at d/2 - 1, not at d/2, so that there are d numbers; no effect otherwise.
    i = torch.arange(d // 2, device=t.device, dtype=torch.float32)
    # Eq. 25: t_emb = MLP( [ sin(t / 10000^(2i/d)), cos(t / 10000^(2i/d)) ]_i )
    angle = t.float()[:, None] / 10000 ** (2 * i / d)                       # (B, d/2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


# --- 3. Text Embedding ----------------------------------------------------------------------------

def text_embedding(encoder: data.TextEncoder, prompts: list[str]):
    """From a frozen T5: c (B, L, d_text) fp32 and its mask (B, L), True at tokens."""
    # Eq. 26: c = TextEncoder(prompt), c in R^(L x d_text)
    return encoder(prompts)


# === DiT Block: 1. Adaptive Layer Norm (AdaLN) ====================================================

def adaln(h: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """h (B, N, D), gamma, beta (B, 1, D), which are the weights of the LayerNorm."""
    # Eq. 27: AdaLN(h) = gamma * LayerNorm(h) + beta, gamma and beta from an MLP of t_emb
    return torch.addcmul(beta, gamma, F.layer_norm(h, h.shape[-1:]))        # in one pass


# --- 2. Self-Attention ----------------------------------------------------------------------------

class SelfAttention(nn.Module):
    """h (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        # Eq. 28: Q, K, V = h W_Q, h W_K, h W_V; Attention = softmax( Q K^T / sqrt(d_k) ) V
        q, k, v = split_heads(self.qkv(h), 3, self.heads)                   # (B, heads, N, d_k)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.out(h.transpose(1, 2).flatten(2))


def split_heads(h: torch.Tensor, parts: int, heads: int) -> torch.Tensor:
    """(B, N, parts * D) -> (parts, B, heads, N, d_k), d_k = D / heads."""
    return h.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


# --- 3. Cross-Attention (with text) ---------------------------------------------------------------

class CrossAttention(nn.Module):
    """h (B, N, D) reads the text. K and V do not depend on t: sampling computes them once."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """c (B, L, D) -> K, V (B, heads, L, d_k)."""
        return split_heads(self.kv(c), 2, self.heads).unbind(0)

    def forward(self, h: torch.Tensor, k, v, mask: torch.Tensor) -> torch.Tensor:
        """mask (B, 1, 1, L) is True at tokens, False at padding."""
        # Eq. 29: Q = h W_Q, K, V = c W_K, c W_V, then as Eq. 28
        (q,) = split_heads(self.q(h), 1, self.heads)                        # (B, heads, N, d_k)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(h.transpose(1, 2).flatten(2))


# --- 4. Feed-Forward Network ----------------------------------------------------------------------

class FFN(nn.Module):
    """h (B, N, D) -> (B, N, D), four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.w_1 = nn.Linear(width, 4 * width)
        self.w_2 = nn.Linear(4 * width, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        # Eq. 30: FFN(h) = GELU(h W_1) W_2
        return self.w_2(F.gelu(self.w_1(h)))


# --- 5. Gated Residual ----------------------------------------------------------------------------

class DiTBlock(nn.Module):
    """h (B, N, D) -> (B, N, D): self-attention, cross-attention, FFN, each after its AdaLN.

    The nine modulation vectors come from one Linear of t_emb that starts at zero: gamma is 1 + 0,
    beta and gate are 0, and a fresh block is the identity (adaLN-Zero, Peebles and Xie 2023).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.cross = CrossAttention(width, heads)
        self.ffn = FFN(width)
        self.modulation = nn.Sequential(nn.SiLU(), zero_linear(width, 9 * width))

    def forward(self, h: torch.Tensor, modulation: torch.Tensor, k, v, mask) -> torch.Tensor:
        (scale_1, beta_1, gate_1, scale_2, beta_2, gate_2, scale_3, beta_3, gate_3) = (
            modulation.unflatten(-1, (9, 1, -1)).unbind(1))                 # (B, 1, D) each
        # Eq. 31: h = h + gate * Block(h)
        h = torch.addcmul(h, gate_1, self.attention(adaln(h, 1 + scale_1, beta_1)))
        h = torch.addcmul(h, gate_2, self.cross(adaln(h, 1 + scale_2, beta_2), k, v, mask))
        h = torch.addcmul(h, gate_3, self.ffn(adaln(h, 1 + scale_3, beta_3)))
        return h


def zero_linear(d_in: int, d_out: int) -> nn.Linear:
    linear = nn.Linear(d_in, d_out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


# --- The whole network ----------------------------------------------------------------------------

class DiT(nn.Module):
    """eps_theta(z_t, t, c), or v (see eps_from_v); with a source picture, an edit of it.

    Args of forward: z_t (B, h, w, z_dim), noisy normalised latents; t (B,) in 1 .. T; c (B, L,
    d_text) and mask (B, L), True at tokens; source, clean latents of the picture to edit, or None.
    Returns (B, h, w, z_dim).
    """

    def __init__(self, grid: int, z_dim: int, d_text: int, width: int, depth: int, heads: int,
                 whiten_text: bool = False, checkpointing: bool = False):
        super().__init__()
        self.grid, self.whiten_text, self.checkpointing = grid, whiten_text, checkpointing
        self.embed = nn.Linear(z_dim, width)
        self.position = nn.Parameter(sine_cosine(grid, width))
        self.source_type = nn.Parameter(torch.zeros(1, 1, width))           # marks source tokens
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        # DEVIATION: one Linear(d_text, D) before every block's W_K and W_V: the guide's d_text is
        # 4096 for T5-XXL; W_K and W_V of that width would add a fifth (XL) or more to each block.
        self.text = nn.Linear(d_text, width)
        if whiten_text:                                                     # set once, then fixed
            self.register_buffer("text_shift", torch.zeros(d_text))
            self.register_buffer("text_map", torch.eye(d_text))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        # DEVIATION: the guide ends with the blocks. AdaLN and a Linear bring D back to z_dim; that
        # Linear starts at zero, so a fresh DiT predicts 0.
        self.head_modulation = nn.Sequential(nn.SiLU(), zero_linear(width, 2 * width))
        self.head = zero_linear(width, z_dim)

    def forward(self, z_t, t, c, mask, source=None) -> torch.Tensor:
        return self.denoise(z_t, self.modulations(t), self.keys_values(c), mask, source)

    def modulations(self, t: torch.Tensor) -> list[torch.Tensor]:
        """All that depends on t alone: (B, 9 D) for each block, (B, 2 D) for the head."""
        t_emb = self.time(timestep_embedding(t, 256))                       # (B, D)
        return [block.modulation(t_emb) for block in self.blocks] + [self.head_modulation(t_emb)]

    def keys_values(self, c: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """All that depends on the text alone: (K, V) for each block."""
        if self.whiten_text:
            # DEVIATION (--whiten-text, tiny): T5's token embeddings are whitened. In them, shapes
            # differ a tenth as much as colours do; after whitening, the DiT learns to read both.
            c = (c - self.text_shift) @ self.text_map
        c = self.text(c)                                                    # (B, L, D)
        return [block.cross.keys_values(c) for block in self.blocks]

    def denoise(self, z_t, modulations, keys_values, mask, source=None) -> torch.Tensor:
        h = patch_embedding(z_t, self.embed, self.position)                 # (B, N, D)
        if source is not None:
            # DEVIATION: the guide promises editing and has no equation for it. As in the paper, the
            # source picture's latents are further tokens, at the same places, of their own type.
            h_source = patch_embedding(source, self.embed, self.position) + self.source_type
            h = torch.cat([h, h_source], dim=1)
        mask = mask[:, None, None, :]                                       # (B, 1, 1, L)
        for block, modulation, (k, v) in zip(self.blocks, modulations, keys_values):
            if self.checkpointing and self.training:
                h = recompute(block, h, modulation, k, v, mask, use_reentrant=False)
            else:
                h = block(h, modulation, k, v, mask)
        scale, beta = modulations[-1].unflatten(-1, (2, 1, -1)).unbind(1)
        h = adaln(h[:, :self.grid ** 2], 1 + scale, beta)                   # no source tokens
        return self.head(h).to(z_t.dtype).unflatten(1, (self.grid, self.grid))


# === Training Objective ===========================================================================

def dit_loss(target: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """Both (B, h, w, z_dim) -> scalar. The mean, where the guide's norm sums: the same minimum."""
    # Eq. 32: L_DiT = E || eps - eps_theta(z_t, t, c) ||^2
    return (target - prediction).square().mean()


# DEVIATION (--predict v, tiny): target and prediction of Eq. 32 are v instead of eps. The network
# need not carry the noise through, and noisy t, where the prompt decides, weigh as much as others:
# it learns several times faster. The error of eps is thereby divided by alpha_bar_t.


def v_of(z_0, t: torch.Tensor, eps, alpha_bar: torch.Tensor) -> torch.Tensor:
    """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) z_0 (Salimans and Ho 2022)."""
    signal, noise = scales(alpha_bar, t, z_0)
    return signal * eps - noise * z_0


def eps_from_v(z_t, v, t: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """eps = sqrt(1 - alpha_bar_t) z_t + sqrt(alpha_bar_t) v; shapes as in add_noise."""
    signal, noise = scales(alpha_bar, t, z_t)
    return noise * z_t + signal * v


def sample_t(run: data.Run, step: int, cfg: Config, edit: bool) -> torch.Tensor:
    """t (B,) in 1 .. T: uniform, or with --logit-std more often from the middle."""
    if not cfg.logit_std:
        return run.randint(step, "t", 1, cfg.T + 1)
    # DEVIATION (--logit-std, tiny): the guide's t is uniform, the paper's logit-normal, as here.
    # Middle t decide what a picture shows: drawn more often, they gave the same accuracy after two
    # thirds of the steps. High t decide what an edit changes, since the source shows the rest.
    mean = cfg.logit_mean_edits if edit else cfg.logit_mean
    u = torch.sigmoid(mean + cfg.logit_std * run.randn(step, "t"))
    return (1 + cfg.T * u).long().clamp(max=cfg.T)


def sample_z_0(mu: torch.Tensor, log_var: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """The guide's z_0 = PS-VAE.encode(x), from a stored posterior: a fresh sample at every step.

    Where psvae.py --latents mu kept the mean alone, sigma is next to nothing and z_0 is mu.
    """
    return mu + torch.exp(0.5 * log_var) * eps


def normalise(z: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Every channel to mean 0 and variance 1."""
    # DEVIATION: Eq. 22 mixes z_0 with noise of variance 1, and latents are not N(0, I): without
    # this the noise schedule would mean something else for every channel.
    return (z - mean) / variance.sqrt()


# === Held-out losses and preview ==================================================================

def held_out_batch(run: data.Run, latents: data.Latents, rows: list[int], mean, variance, most=64):
    """(z_0, c, mask, source) of rows from all over the list; z_0 is the normalised mu."""
    count = min(most, len(rows))
    rows = [rows[i * len(rows) // count] for i in range(count)]
    batch = latents.collate([latents[(row, False, False)] for row in rows])
    mu, _, c, mask, source = run.to_device(batch)
    source = source if source is None else normalise(source, mean, variance)
    return normalise(mu, mean, variance), c, mask, source


@torch.no_grad()
def held_out_losses(model: DiT, z_0, c, mask, source, alpha_bar: torch.Tensor,
                    cfg: Config) -> dict[str, float]:
    """The loss for t in each quarter q1 .. q4 of 1 .. T; t and noise are the same at every call."""
    g = data.generator(cfg.seed, "dit", 0, "held out", z_0.device)
    losses = {}
    for quarter in range(4):
        low = 1 + cfg.T * quarter // 4
        high = max(1 + cfg.T * (quarter + 1) // 4, low + 1)
        t = torch.randint(low, high, (len(z_0),), generator=g, device=z_0.device)
        eps = torch.randn(z_0.shape, generator=g, device=z_0.device)
        z_t = add_noise(z_0, t, eps, alpha_bar)
        target = v_of(z_0, t, eps, alpha_bar) if cfg.predict == "v" else eps
        losses[f"q{quarter + 1}"] = dit_loss(target, model(z_t, t, c, mask, source)).item()
    return losses


@torch.no_grad()
def preview(model: DiT, z_0, c, mask, source, alpha_bar: torch.Tensor, cfg: Config, path: Path):
    """Latents as PCA colours: z_0 | z_t | predicted z_0 at four t, for four held-out pictures."""
    z_0, c, mask, source = (None if part is None else part[:4] for part in (z_0, c, mask, source))
    g = data.generator(cfg.seed, "dit", 0, "preview")
    eps = torch.randn(z_0.shape, generator=g).to(z_0.device)
    titles, columns = ["z_0"], [z_0]
    for share in (0.1, 0.3, 0.6, 0.9):
        t = torch.full((len(z_0),), max(1, round(cfg.T * share)), device=z_0.device)
        z_t = add_noise(z_0, t, eps, alpha_bar)
        eps_hat = model(z_t, t, c, mask, source)
        if cfg.predict == "v":
            eps_hat = eps_from_v(z_t, eps_hat, t, alpha_bar)
        columns += [z_t, predict_z_0(z_t, t, eps_hat, alpha_bar)]
        titles += [f"z_t, t = {t[0].item()}", "predicted z_0"]
    colours = data.pca_colours(*columns, size=96)
    data.save_picture(data.grid([list(row) for row in zip(*colours)], heads=titles), path)


# === Training Procedures. Stage 3: Train DiT ======================================================

def keys_of_step(step: int, cfg: Config, captions: list[int],
                 edits: list[int]) -> list[tuple[int, bool, bool]]:
    """The global batch of a step as keys of data.Latents: (row, drop_text, drop_source).

    Never the source alone: that would teach the model to draw a picture from "make it green".
    """
    share = (cfg.edit_fraction if captions else 1.0) if edits else 0.0
    edits_before = math.floor(step * share)            # batches of edits are spread evenly
    edit = math.floor((step + 1) * share) > edits_before
    rows, number = (edits, edits_before) if edit else (captions, step - edits_before)
    stream = f"dit {'edit' if edit else 'caption'}"
    chosen = data.order(cfg.seed, stream, len(rows), cfg.batch, number)
    g = data.generator(cfg.seed, "dit", step, "drop")
    drop_both = edit and torch.rand((), generator=g).item() < cfg.drop_both
    drop_text = torch.rand(cfg.batch, generator=g) < cfg.drop_text
    return [(rows[row], drop_both or bool(drop), drop_both) for row, drop in zip(chosen, drop_text)]


def embed_captions(cfg: Config, run: data.Run, captions: list[str]) -> data.Texts:
    """Embeds each distinct caption once, kept in out/text/, and frees the encoder before there is a
    DiT: a T5-XXL is 9 GB."""
    folder = run.out / "text"
    mark = {"captions": data.digest_of(captions), "encoder": data.stamp(cfg.text_encoder),
            "max_tokens": cfg.max_tokens}
    meta = data.read_json(folder / "meta.json")
    if run.main and any(meta.get(name) != value for name, value in mark.items()):
        run.say(f"text encoder {cfg.text_encoder}: {len(captions):,} distinct captions")
        encoder = data.load_text_encoder(cfg.text_encoder, cfg.max_tokens, run.device)
        embed = lambda part: text_embedding(encoder, part)
        data.write_texts(folder, mark, captions, encoder, embed)
        del encoder, embed
        torch.cuda.empty_cache()
    run.barrier()
    return data.Texts(folder, captions)


def words_of(texts: list[str], most: int = 10_000) -> list[str]:
    """The most frequent words of the captions: sample.py points out any others in a prompt."""
    words = (word for text in texts for word in re.findall(r"\w+", text.lower()))
    counts = collections.Counter(words)
    return [word for word, _ in counts.most_common(most)]


@contextlib.contextmanager
def averaged(model: DiT, ema: dict[str, torch.Tensor]):
    """Inside the block the model has its averaged weights and is in eval mode."""
    raw = copy.deepcopy(model.state_dict())
    model.load_state_dict(ema)
    try:
        yield model.eval()
    finally:
        model.load_state_dict(raw)
        model.train()


def build(config: dict, shape: dict) -> DiT:
    """The network of a plain config; shape has what came with the data: grid, z_dim and d_text."""
    return DiT(shape["grid"], shape["z_dim"], shape["d_text"], config["width"], config["depth"],
               config["heads"], config["whiten_text"], config["checkpointing"])


def schedule_of(config: dict) -> torch.Tensor:
    return noise_schedule(config["T"], config["beta_start"], config["beta_end"], config["schedule"])


def load_dit(path: Path, device="cpu") -> tuple[DiT, dict]:
    """The averaged model of a checkpoint, in eval mode, and the checkpoint."""
    checkpoint = data.load(path, "dit", before=data.command("dit.py", out=path.parent))
    cfg = data.configure(Config, PRESETS, {}, saved=checkpoint["config"])
    checkpoint["config"] = data.plain(cfg)                                  # whole and checked
    with data.reading(path):
        make = lambda: build(checkpoint["config"], checkpoint["shape"])
        return data.rebuild(make, checkpoint["ema"], path).to(device), checkpoint


def set_up(cfg: Config, checkpoint: dict | None, run: data.Run):
    """Latents and texts, the model, its average and its optimizer, at the checkpoint's step."""
    path = run.out / "dit.pt"
    meta = read_meta(run.out, checkpoint)              # under the lock that keeps them as they are
    rows = data.read_rows(run.out / "latents", meta)
    run.data = {"digest": meta["digest"], "pictures": meta["pictures"]}
    texts = embed_captions(cfg, run, ["", *sorted({row["text"] for row in rows} - {""})])
    latents = data.Latents(run.out / "latents", rows, texts)
    captions = latents.rows(False, False)
    edits = latents.rows(False, True) if cfg.edit_fraction else []
    if not captions and not edits:
        raise data.UserError(f"{run.out}/latents has no rows to train on.")
    shape = {"grid": meta["grid"], "z_dim": meta["z_dim"], "d_text": texts.dim}
    vocabulary = words_of([row["text"] for row in rows if not row.get("held_out")])
    run.say(f"stage 3, {cfg.preset} preset on {run.device}: "
            f"{len(captions):,} captions, {len(edits):,} edits")

    torch.manual_seed(cfg.seed)
    model = build(data.plain(cfg), shape).to(run.device).train()
    if cfg.whiten_text and not checkpoint:
        model.text_shift[:], model.text_map[:] = texts.whitening()
    ema = copy.deepcopy(model.state_dict())
    # DEVIATION (--muon, tiny): after the same steps of Muon more prompts are drawn right. What t
    # and the text enter by, and the head, stay with AdamW.
    by_muon = lambda name: cfg.muon and re.search(r"\.(attention|cross|ffn)\..*weight", name)
    matrices = [p for name, p in model.named_parameters() if by_muon(name)]
    momenta = [torch.zeros_like(p) for p in matrices]
    rest = [p for name, p in model.named_parameters() if not by_muon(name)]
    optimizer = torch.optim.AdamW(rest, betas=(0.9, 0.99),                  # see svae.py
                                  weight_decay=cfg.weight_decay, fused=True)
    if checkpoint:
        with data.reading(path):
            if checkpoint["text_fingerprint"] != texts.fingerprint:
                raise data.UserError(f"{path} was trained with a different text encoder than "
                                     f"{cfg.text_encoder} is now. Start over with --fresh.")
            data.load_weights(model, checkpoint["ema"], path)
            ema = copy.deepcopy(model.state_dict())
            data.load_weights(model, checkpoint["model"], path)
            optimizer.load_state_dict(checkpoint["optimizer"])
            for own, kept in zip(momenta, checkpoint.get("momenta", []), strict=True):
                own.copy_(kept)
    if run.compile:
        model.compile()

    alpha_bar = schedule_of(data.plain(cfg)).to(run.device)
    mean, variance = (torch.tensor(meta[name], device=run.device) for name in ("mean", "variance"))
    held_out = {}
    for prefix, training in (("", captions), ("edit_", edits)):
        own = latents.rows(True, bool(prefix))
        if training or own:
            held_out[prefix] = held_out_batch(run, latents, own or training, mean, variance)
        if training and not own:
            run.say(f"no held-out rows: held_out_{prefix}q1 to q4 are measured on training rows")

    def look(picture: Path | None) -> dict[str, float]:
        with averaged(model, ema):
            if picture:
                preview(model, *next(iter(held_out.values())), alpha_bar, cfg, picture)
            return {prefix + name: value for prefix, batch in held_out.items()
                    for name, value in held_out_losses(model, *batch, alpha_bar, cfg).items()}

    run.start(checkpoint, tuple(f"{prefix}q{i}" for prefix in held_out for i in (1, 2, 3, 4)), look,
              lambda: dict(model=model.state_dict(), ema=ema, optimizer=optimizer.state_dict(),
                           momenta=momenta, shape=shape, vocabulary=vocabulary, edits=len(edits),
                           mean=meta["mean"], variance=meta["variance"],
                           psvae_fingerprint=meta["fingerprint"],
                           text_fingerprint=texts.fingerprint))
    keys = lambda step: run.mine(keys_of_step(step, cfg, captions, edits))
    return latents, keys, mean, variance, model, ema, optimizer, (matrices, momenta), alpha_bar


def train(cfg: Config, checkpoint: dict | None):
    with data.Run(cfg, "dit", terms=("loss", "grad_norm"), also=("latents",)) as run:
        (latents, keys, mean, variance, model, ema, optimizer, muon,
         alpha_bar) = set_up(cfg, checkpoint, run)
        dit = run.distribute(model, unused=True)       # source_type rests where there is no source

        for step, batch in run.batches(latents, keys):
            run.set_rate(optimizer, step)
            mu, log_var, c, mask, source = run.to_device(batch)
            z_0 = sample_z_0(mu, log_var, run.randn(step, "z_0", *mu.shape[1:]))
            z_0 = normalise(z_0, mean, variance)                            # (B, h, w, z_dim)
            source = source if source is None else normalise(source, mean, variance)

            t = sample_t(run, step, cfg, edit=source is not None)           # 1 .. T
            eps = run.randn(step, "eps", *mu.shape[1:])
            z_t = add_noise(z_0, t, eps, alpha_bar)
            target = v_of(z_0, t, eps, alpha_bar) if cfg.predict == "v" else eps

            for target_part, *inputs in run.micro_batches(dit, target, z_t, t, c, mask, source):
                with run.autocast():
                    prediction = dit(*inputs)                               # eps, or v
                loss = dit_loss(target_part, prediction)
                (loss / cfg.micro_batches).backward()
                run.add({"loss": loss})
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            optimizer.step()
            data.muon_step(*muon, run.rate, cfg.weight_decay)
            model.zero_grad(set_to_none=True)

            # DEVIATION: sampling uses an exponential moving average of the weights, over about the
            # last 1 / (1 - ema) steps (fewer at first). The guide has none; pictures get cleaner.
            decay = min(cfg.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - decay)
            run.after_step(step, grad_norm)             # log, preview, save, stop
        prompt = (textwrap.wrap(latents.example, 60) or [""])[0]
        run.say(f"Next: {data.command('sample.py', model=run.out, prompt=prompt)}")


def read_meta(out: Path, checkpoint: dict | None) -> dict:
    """meta.json of out/latents/, if they are those that the checkpoint was trained on."""
    meta = data.read_meta(out / "latents")
    again = f"{data.command('psvae.py', out=out)} --encode-only"
    if (out / "psvae.pt").exists():
        psvae = data.load(out / "psvae.pt", "psvae")
        if psvae.get("fingerprint") != meta["fingerprint"]:
            raise data.UserError(f"{out}/latents were made by another psvae.pt than the one beside "
                                 f"them. Write them again: {again}")
    if checkpoint:
        with data.reading(out / "dit.pt"):
            then = checkpoint.get("data", meta)
            own = {name: checkpoint[name] for name in ("mean", "variance")}
            close = all(np.allclose(own[name], meta[name], rtol=1e-3, atol=1e-4) for name in own)
            others = ""
            if checkpoint["psvae_fingerprint"] != meta["fingerprint"]:
                others = "another psvae.pt"
            elif then["digest"] != meta["digest"]:
                others = (f"other pictures or captions: {meta['pictures']:,} pictures, "
                          f"{then['pictures']:,} then")
            elif not close:
                others = f"other channel statistics (--latents both or mu? now {meta['latents']})"
        if others:
            raise data.UserError(f"{out}/dit.pt was trained on latents of {others}. Start over "
                                 f"with --fresh, or bring those back and run {again}")
        meta |= own
    return meta


@data.program
def main(argv: list[str] | None = None):
    typed = data.read_flags(Config, argv, __doc__, PRESETS)
    out = Path(typed.get("out", "out"))
    if typed.get("size") in SIZES:
        typed = dict(zip(("width", "depth", "heads"), SIZES[typed["size"]])) | typed
    resumes = (out / "dit.pt").exists() and not typed.get("fresh")
    checkpoint = data.load(out / "dit.pt", "dit") if resumes else None
    meta = read_meta(out, checkpoint)
    inherited = data.inherit(None if checkpoint else meta, ("preset",), typed, out / "latents")
    cfg = data.configure(Config, PRESETS, typed, inherited, checkpoint and checkpoint["config"])
    if cfg.fresh:
        data.set_aside(out, "dit.pt", "dit.csv", "dit.png")
    if not (checkpoint and data.is_finished(checkpoint, cfg, out / "dit.pt")):
        train(cfg, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
