"""dit.py - stage 3, the Diffusion Transformer:
learns to turn noise into latents of PS-VAE, conditioned on a text.

Noise is added to clean latents z_0 to an extent t, and a transformer guesses the noise from z_t, t and the
caption c. The same network edits: the latents of a source picture join the sequence as further tokens, and
the text is then an instruction. This file never sees a pixel: sample.py decodes.

Eq. 20 to 32, as numbered in notes/equations.md; "the guide" is docs/architecture.md of Gaurav14cs17/PS-VAE.

    z_t (B,16,16,96) -> Linear + PE -> h (B,256,D) -> [ DiTBlock ] x depth -> AdaLN -> Linear -> eps or v
    source, if any -> the same + type, 256 more tokens   ^   ^               ^              (B,16,16,96)
    t (B,) -> sin, cos -> MLP -> t_emb -> gamma, beta, gate -|---------------'
    text -> T5, frozen -> c (B,L,d_text) -> Linear -> K, V --'

    python dit.py                         reads out/latents; tiny: an hour on 2 CPU cores
    python dit.py --size XL               width 1152, 28 blocks, on one CUDA GPU

Reads out/latents/ (psvae.py writes it). Writes out/text/ (every distinct caption's embedding, once),
out/dit.pt, out/dit.csv and
out/dit.png (latents as colours: z_0 | z_t | predicted z_0 at four t). Run again, it goes on.
Expect (tiny, seed 0): held-out Eq. 32 for t in the second quarter 0.17 after 1,000 steps, 0.10 after 3,000;
the model that ships is at 0.034 after 38,140, 800 of them notes/places.py. Single objects are then mostly
right, and two mostly stand where they should; numbers are right in half of the cases.
"""

import collections
import contextlib
import json
import math
import re
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
    out: str = "out"                        # folder with latents/; checkpoint, log and picture go there too
    preset: str = ""                        # full or tiny; default: that of the latents
    text_encoder: str = "google/flan-t5-xxl"  # a T5, hub name or folder
    max_tokens: int = 120                   # longest text; what is longer is cut
    size: str = ""                          # S, B, L or XL: sets width, depth and heads at once
    width: int = 768                        # D
    depth: int = 12                         # blocks
    heads: int = 12                         # attention heads; D / heads channels each
    T: int = 1000                           # diffusion steps
    schedule: str = "scaled_linear"         # scaled_linear (linear in sqrt(beta)) or linear
    beta_start: float = 1e-4                # beta_1
    beta_end: float = 0.02                  # beta_T
    drop_text: float = 0.1                  # chance that a caption is replaced by "" (for guidance)
    drop_both: float = 0.05                 # share of edit batches without source and text
    edit_fraction: float = 0.3              # share of batches that are edits, where there are any
    predict: str = "eps"                    # what the network predicts: eps, as in Eq. 32, or v
    whiten_text: bool = False               # text enters with mean 0 and covariance I over the captions' tokens
    steps: int = 400_000                    # optimisation steps
    batch: int = 256                        # latents a step, over all processes
    micro_batches: int = 1                  # gradient accumulation: parts that a process cuts its batch into
    learning_rate: float = 1e-4             # peak, after warm-up; AdamW
    weight_decay: float = 0.0               # of AdamW
    warmup: int = 1000                      # steps of linear warm-up, before the cosine decay
    clip: float = 1.0                       # largest norm of the gradient
    ema: float = 0.9999                     # decay of the averaged weights that sampling uses
    precision: str = "bf16"                 # bf16 (autocast; loss in fp32) or fp32 (TF32 on CUDA)
    compile: bool = True                    # torch.compile, on CUDA
    checkpointing: bool = False             # recompute activations going back: less memory, a third slower
    device: str = "auto"                    # auto, cpu or cuda
    workers: int = 4                        # processes that read latents
    max_broken: float = 0.01                # largest tolerated fraction of unusable rows
    log_every: int = 50                     # steps between rows of the log
    eval_every: int = 2000                  # steps between held-out losses and previews
    save_every: int = 2000                  # steps between checkpoints
    seed: int = 0                           # of everything random
    fresh: bool = False                     # move the old run aside and start over

    def __post_init__(self):
        data.check(self, max_tokens=(1, 4096), width=(2, 65536), depth=(1, 1000), heads=(1, 1000),
                   T=(1, 100_000), beta_start=(1e-9, 0.999), beta_end=(1e-9, 0.999), drop_text=(0, 1),
                   drop_both=(0, 1), edit_fraction=(0, 1), steps=(1, 1e9),
                   batch=(1, 1e6), micro_batches=(1, 1e6), learning_rate=(0, 10), weight_decay=(0, 10),
                   warmup=(0, 1e9), clip=(1e-9, 1e9), ema=(0, 1), workers=(0, 512), max_broken=(0, 1),
                   log_every=(1, 1e9), eval_every=(1, 1e9), save_every=(1, 1e9), seed=(0, 2**63 - 1))
        data.check_choice(self, precision=("bf16", "fp32"), device=("auto", "cpu", "cuda"),
                          schedule=("scaled_linear", "linear"), predict=("eps", "v"), size=("", *SIZES))
        if self.width % self.heads:
            raise data.UserError(f"--width {self.width} does not divide by --heads {self.heads}.")


SIZES = {"S": (384, 12, 6), "B": (768, 12, 12),        # width, depth, heads
         "L": (1024, 24, 16), "XL": (1152, 28, 16)}
PRESETS = {
    "full": {},
    "tiny": dict(text_encoder=data.TINY_TEXT_ENCODER, max_tokens=64, width=128, depth=6, heads=4, steps=8000,
                 edit_fraction=0.2, predict="v", whiten_text=True, batch=64, learning_rate=2e-3, warmup=100, ema=0.999,
                 precision="fp32", compile=False, workers=0, log_every=20, eval_every=500, save_every=500),
}


# ------------------------------------------------------------------------------------------------------------
# Diffusion Process
# ------------------------------------------------------------------------------------------------------------


def noise_schedule(T: int, beta_start: float, beta_end: float,
                   schedule: str = "scaled_linear") -> torch.Tensor:
    """Eq. 21: alpha_bar_0 .. alpha_bar_T, (T + 1,) float64.
    alpha_bar_0 = 1 stands in front: no noise at t = 0."""
    if schedule == "scaled_linear":         # "scaled": it is sqrt(beta) that grows linearly
        beta = torch.linspace(beta_start ** 0.5, beta_end ** 0.5, T, dtype=torch.float64) ** 2
    else:
        beta = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
    # Eq. 21: alpha_bar_t = prod_{s=1..t} alpha_s, alpha_t = 1 - beta_t, beta_t in [1e-4, 0.02]
    alpha = 1 - beta
    return torch.cat([torch.ones(1, dtype=torch.float64), alpha.cumprod(0)])


def add_noise(z_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """Eq. 20, 22: z_0, eps (B, ...), t (B,) in 1 .. T,
    alpha_bar (T + 1,) -> z_t (B, ...) in the type of z_0."""
    ab = alpha_bar[t].view(-1, *[1] * (z_0.dim() - 1))                      # (B, 1, ...)
    # Eq. 20: q(z_t | z_0) = N( z_t; sqrt(alpha_bar_t) z_0, (1 - alpha_bar_t) I ), that is
    # Eq. 22: z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps
    return ab.sqrt().to(z_0.dtype) * z_0 + (1 - ab).sqrt().to(z_0.dtype) * eps


def predict_z_0(z_t: torch.Tensor, t: torch.Tensor, eps: torch.Tensor,
                alpha_bar: torch.Tensor) -> torch.Tensor:
    """Eq. 22 solved for z_0; shapes as in add_noise."""
    ab = alpha_bar[t].view(-1, *[1] * (z_t.dim() - 1))
    return (z_t - (1 - ab).sqrt().to(z_t.dtype) * eps) / ab.sqrt().to(z_t.dtype)


# Eq. 23: p(z_{t-1} | z_t) = N( z_{t-1}; mu_theta(z_t, t), sigma_t^2 I ) is sample.py's DDIM with eta = 1
# and all T steps.


# ------------------------------------------------------------------------------------------------------------
# DiT Architecture
# ------------------------------------------------------------------------------------------------------------


def timestep_embedding(t: torch.Tensor, d: int) -> torch.Tensor:
    """Eq. 25 without its MLP (that is DiT.time):
    t (B,) -> (B, d), in fp32: bf16 cannot tell t = 999 from 1000."""
    i = torch.arange(d // 2, device=t.device, dtype=torch.float32)
    # Eq. 25: t_emb = MLP( [ sin(t / 10000^(2i/d)), cos(t / 10000^(2i/d)) ] ), i = 0 .. d/2 - 1
    angle = t.float()[:, None] / 10000 ** (2 * i / d)                       # (B, d/2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def adaln(h: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Eq. 27: h (B, N, D), gamma, beta (B, 1, D).
    LayerNorm has no weights of its own: gamma and beta are these."""
    # Eq. 27: AdaLN(h) = gamma * LayerNorm(h) + beta, gamma and beta from an MLP of t_emb
    return torch.addcmul(beta, gamma, F.layer_norm(h, h.shape[-1:]))       # beta + gamma * ..., in one pass


class SelfAttention(nn.Module):
    """Eq. 28: h (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        # Eq. 28: Q, K, V = h W_Q, h W_K, h W_V; Attention(Q, K, V) = softmax( Q K^T / sqrt(d_k) ) V
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d_k)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Eq. 29: h (B, N, D) looks at the text;
    its keys and values do not depend on t, so they are computed apart."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = (nn.Linear(width, width), nn.Linear(width, 2 * width),
                                     nn.Linear(width, width))

    def keys_values(self, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """c (B, L, D) -> K, V (B, heads, L, d_k)."""
        # Eq. 29: K, V = c W_K, c W_V
        return self.kv(c).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, h: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # Eq. 29: Q = h W_Q, then as Eq. 28; mask (B, 1, 1, L) is True at tokens, False at padding
        q = self.q(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)       # (B, heads, N, d_k)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class FFN(nn.Module):
    """Eq. 30: h (B, N, D) -> (B, N, D), four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        # Eq. 30: FFN(h) = GELU(h W_1) W_2
        return self.w_2(F.gelu(self.w_1(h)))


class DiTBlock(nn.Module):
    """h (B, N, D) -> (B, N, D): self-attention, cross-attention, FFN, each after an AdaLN and behind a gate.

    All nine modulation vectors come from one Linear of t_emb that starts at zero: AdaLN's gamma is 1 + 0, its
    beta 0, the gate 0, so a fresh block is the identity (adaLN-Zero, Peebles and Xie 2023).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention, self.cross, self.ffn = (SelfAttention(width, heads), CrossAttention(width, heads),
                                                FFN(width))
        self.modulation = nn.Sequential(nn.SiLU(), zero_linear(width, 9 * width))

    def forward(self, h: torch.Tensor, modulation: torch.Tensor, k, v, mask) -> torch.Tensor:
        (scale_1, beta_1, gate_1, scale_2, beta_2, gate_2,
         scale_3, beta_3, gate_3) = modulation.unflatten(-1, (9, 1, -1)).unbind(1)          # (B, 1, D) each
        # Eq. 31: h = h + gate * Block(h), addcmul: in one pass over memory
        h = torch.addcmul(h, gate_1, self.attention(adaln(h, 1 + scale_1, beta_1)))
        h = torch.addcmul(h, gate_2, self.cross(adaln(h, 1 + scale_2, beta_2), k, v, mask))
        h = torch.addcmul(h, gate_3, self.ffn(adaln(h, 1 + scale_3, beta_3)))
        return h


def zero_linear(d_in: int, d_out: int) -> nn.Linear:
    linear = nn.Linear(d_in, d_out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def sine_cosine(grid: int, width: int) -> torch.Tensor:
    """Where the learnable PE of Eq. 24 starts from: (1, grid * grid, width), half of it for the row and half for
    the column. From noise of 0.02, which drowns in Linear(z_t), places are read several times later."""
    half = width // 2
    angle = timestep_embedding(torch.arange(grid) * 1000 / grid, half)      # (grid, width / 2)
    rows, columns = angle[:, None].expand(-1, grid, -1), angle[None].expand(grid, -1, -1)
    return F.pad(torch.cat([rows, columns], dim=-1), (0, width - 2 * angle.shape[1])).flatten(0, 1)[None]


class DiT(nn.Module):
    """What the network predicts of z_t, t, c[, source]: eps, or v (see eps_from_v).

    Args of forward: z_t (B, h, w, z_dim) normalised latents with noise; t (B,) in 1 .. T; c (B, L, d_text)
    text embeddings and mask (B, L), True at tokens; source (B, h, w, z_dim) normalised clean latents of the
    picture to edit, or None. Returns (B, h, w, z_dim).
    """

    def __init__(self, grid: int, z_dim: int, d_text: int, width: int, depth: int, heads: int,
                 whiten_text: bool = False, checkpointing: bool = False):
        super().__init__()
        self.grid, self.whiten_text, self.checkpointing = grid, whiten_text, checkpointing
        self.embed = nn.Linear(z_dim, width)
        self.position = nn.Parameter(sine_cosine(grid, width))
        self.source_type = nn.Parameter(torch.zeros(1, 1, width))           # tells source tokens from z_t's
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.text = nn.Linear(d_text, width)
        if whiten_text:                                                     # set before training, then fixed
            self.register_buffer("text_shift", torch.zeros(d_text))
            self.register_buffer("text_map", torch.eye(d_text))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.head_modulation = nn.Sequential(nn.SiLU(), zero_linear(width, 2 * width))
        self.head = zero_linear(width, z_dim)

    def forward(self, z_t, t, c, mask, source=None) -> torch.Tensor:
        return self.denoise(z_t, self.modulations(t), self.keys_values(c), mask, source)

    def modulations(self, t: torch.Tensor) -> list[torch.Tensor]:
        """All that depends on t alone: one (B, 9 D) for each block, (B, 2 D) for the head."""
        # Eq. 25: t_emb = MLP(...)
        t_emb = self.time(timestep_embedding(t, 256))                       # (B, D)
        return [block.modulation(t_emb) for block in self.blocks] + [self.head_modulation(t_emb)]

    def keys_values(self, c: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """All that depends on the text alone: (K, V) for each block; sampling needs it once for all steps."""
        if self.whiten_text:
            c = (c - self.text_shift) @ self.text_map
        c = self.text(c)                                                    # (B, L, D)
        return [block.cross.keys_values(c) for block in self.blocks]

    def denoise(self, z_t, modulations, keys_values, mask, source=None) -> torch.Tensor:
        # Eq. 24: h_0 = Linear(z_t) + PE
        h = self.embed(z_t.flatten(1, 2)) + self.position                   # (B, N, D)
        if source is not None:
            h = torch.cat([h, self.embed(source.flatten(1, 2)) + self.position + self.source_type], dim=1)
        mask = mask[:, None, None, :]                                       # (B, 1, 1, L)
        for block, modulation, (k, v) in zip(self.blocks, modulations, keys_values):
            if self.checkpointing and self.training:
                h = recompute(block, h, modulation, k, v, mask, use_reentrant=False)
            else:
                h = block(h, modulation, k, v, mask)
        scale, beta = modulations[-1].unflatten(-1, (2, 1, -1)).unbind(1)
        h = adaln(h[:, :self.grid ** 2], 1 + scale, beta)                   # the source tokens' part is done
        return self.head(h).to(z_t.dtype).unflatten(1, (self.grid, self.grid))      # (B, h, w, z_dim)


# ------------------------------------------------------------------------------------------------------------
# Training Objective
# ------------------------------------------------------------------------------------------------------------


def sample_z_0(mu: torch.Tensor, log_var: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """The guide's z_0 = PS-VAE.encode(x), from a stored posterior: a fresh sample by Eq. 6 at every step.
    Where psvae.py --latents mu kept the mean alone, sigma is next to nothing and z_0 is mu."""
    # Eq. 6: z = mu + sigma * eps, sigma = exp(log sigma^2 / 2)
    return mu + torch.exp(0.5 * log_var) * eps


def normalise(z: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Every channel to mean 0, variance 1: Eq. 22 mixes z_0 with noise of variance 1,
    and latents are not N(0, I)."""
    return (z - mean) / variance.sqrt()


def v_of(z_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) z_0 (Salimans and Ho 2022); shapes as in add_noise."""
    ab = alpha_bar[t].view(-1, *[1] * (z_0.dim() - 1))
    return ab.sqrt().to(z_0.dtype) * eps - (1 - ab).sqrt().to(z_0.dtype) * z_0


def eps_from_v(z_t: torch.Tensor, v: torch.Tensor, t: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """eps = sqrt(1 - alpha_bar_t) z_t + sqrt(alpha_bar_t) v; shapes as in add_noise."""
    ab = alpha_bar[t].view(-1, *[1] * (z_t.dim() - 1))
    return (1 - ab).sqrt().to(z_t.dtype) * z_t + ab.sqrt().to(z_t.dtype) * v


def dit_loss(target: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """Eq. 32: the mean over all elements, both (B, ...) (the guide's norm sums over them: the same minimum).

    With --predict v target and prediction are v: then each latent's error of eps is divided by alpha_bar_t.
    """
    # DEVIATION (--predict v): the network need not carry the noise through, and noisy t, where the prompt is
    # decided, weigh as much as others; learns several times faster (notes/decisions.md)
    # Eq. 32: L_DiT = E || eps - eps_theta(z_t, t, c) ||^2
    return (target - prediction).square().mean()


# ------------------------------------------------------------------------------------------------------------
# Latents and texts
# ------------------------------------------------------------------------------------------------------------


class Latents(torch.utils.data.Dataset):
    """out/latents/ and out/text/ as rows.
    A key is (row, drop_text, drop_source); rows of a batch agree in drop_source.

    A batch is (mu, log_var, c, mask, source): (B, h, w, z_dim) twice, (B, L, d_text), (B, L), and mu of the
    sources or None; L is padded to a multiple of 16.
    """

    def __init__(self, folder: Path, meta: dict, rows: list[dict], texts: "Texts"):
        self.mu = np.load(folder / "mu.npy", mmap_mode="r")
        self.log_var = np.load(folder / "log_var.npy", mmap_mode="r") if meta["latents"] == "both" else None
        self.texts, self.image, self.text, self.source, self.kinds = texts, [], [], [], {}
        for number, row in enumerate(rows):
            self.image.append(row["image"])
            self.text.append(texts.index[row["text"]])
            self.source.append(row.get("source", -1))
            self.kinds.setdefault((row.get("held_out", False), "source" in row), []).append(number)

    def rows(self, held_out: bool, edits: bool) -> list[int]:
        return self.kinds.get((held_out, edits), [])

    def __getitem__(self, key):
        row, drop_text, drop_source = key
        image, source = self.image[row], -1 if drop_source else self.source[row]
        mu = torch.from_numpy(self.mu[image].astype(np.float32))
        log_var = (torch.from_numpy(self.log_var[image].astype(np.float32)) if self.log_var is not None
                   else torch.full_like(mu, -30))                           # no variance kept: sigma = 3e-7
        source_mu = torch.from_numpy(self.mu[source].astype(np.float32)) if source >= 0 else None
        return mu, log_var, self.texts[self.texts.null if drop_text else self.text[row]], source_mu

    def collate(self, items):
        mu, log_var, texts, sources = zip(*items)
        length = -(-max(map(len, texts)) // 16) * 16
        c, mask = (torch.zeros(len(items), length, texts[0].shape[1]),
                   torch.zeros(len(items), length, dtype=torch.bool))
        for i, text in enumerate(texts):
            c[i, :len(text)], mask[i, :len(text)] = text, True
        source = torch.stack(sources) if sources[0] is not None else None
        return torch.stack(mu), torch.stack(log_var), c, mask, source


class Texts:
    """Embeddings of distinct captions, float16, one after another in out/text/embeddings.npy;
    [i] -> (L, d_text)."""

    def __init__(self, folder: Path, captions: list[str]):
        self.embeddings = np.load(folder / "embeddings.npy", mmap_mode="r")
        self.offsets = np.load(folder / "offsets.npy")
        self.fingerprint = json.loads((folder / "meta.json").read_text())["fingerprint"]
        self.index = {caption: i for i, caption in enumerate(captions)}
        self.null, self.dim = self.index[""], self.embeddings.shape[1]

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(self.embeddings[self.offsets[i]:self.offsets[i + 1]].astype(np.float32))

    def whitening(self, most: int = 200_000) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (d_text,) of the tokens and the map (d_text, d_text) that gives them covariance I (PCA), from
        `most` of them; directions that hardly vary are not blown up. What tells shapes apart is a tenth of
        what tells colours apart in T5's tokens; whitened, both are read."""
        tokens = self.embeddings[::max(1, len(self.embeddings) // most)].astype(np.float64)
        mean = tokens.mean(0)
        variance, axes = np.linalg.eigh((tokens - mean).T @ (tokens - mean) / len(tokens))
        scale = 1 / np.sqrt(variance.clip(0) + 1e-3 * variance.mean())
        return torch.from_numpy(mean).float(), torch.from_numpy(axes * scale).float()


@torch.no_grad()
def encode_texts(cfg: Config, run: data.Run, captions: list[str]) -> Texts:
    """Embeds each distinct caption once and frees the encoder, before the DiT needs the memory;
    kept in out/text/."""
    folder = run.out / "text"
    key = {"captions": data.digest_of(captions), "encoder": data.stamp(cfg.text_encoder),
           "max_tokens": cfg.max_tokens}
    meta = data.read_json(folder / "meta.json")
    if run.main and any(meta.get(name) != value for name, value in key.items()):
        work = run.out / "text.partial"
        data.remove_folder(work)
        encoder = data.load_text_encoder(cfg.text_encoder, cfg.max_tokens, run.device)
        lengths = [len(ids) for ids in encoder.tokenizer(captions)["input_ids"]]
        cut, lengths = sum(n > cfg.max_tokens for n in lengths), [min(n, cfg.max_tokens) for n in lengths]
        data.free_space(work, 2 * sum(lengths) * encoder.dim,
                        f"embeddings of {len(captions):,} distinct captions")
        if cut:
            run.say(f"{cut:,} captions are longer than {cfg.max_tokens} tokens and were cut (--max-tokens)")
        array = data.new_array(work / "embeddings.npy", (sum(lengths), encoder.dim))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        by_length = sorted(range(len(captions)), key=lengths.__getitem__)   # equal lengths need no padding
        for start in data.tqdm(range(0, len(captions), 256), desc="texts", mininterval=1):
            part = by_length[start:start + 256]
            # Eq. 26: c = TextEncoder(prompt), c in R^(L x d_text)
            embeddings, mask = encoder([captions[i] for i in part])
            for i, embedding, keep in zip(part, embeddings.half().cpu().numpy(), mask.cpu().numpy()):
                array[offsets[i]:offsets[i + 1]] = embedding[keep]
        array.flush()
        np.save(work / "offsets.npy", offsets)
        (work / "meta.json").write_text(json.dumps(key | {"fingerprint": encoder.fingerprint()}))
        data.replace_folder(work, folder)
        del encoder                                    # a T5-XXL is 9 GB: gone before there is a DiT
        torch.cuda.empty_cache()
    run.barrier()
    return Texts(folder, captions)


def words_of(texts: list[str], most: int = 10_000) -> list[str]:
    """The `most` frequent words of the captions, lower-cased: sample.py says which words a prompt has besides."""
    counts = collections.Counter(word for text in texts for word in re.findall(r"\w+", text.lower()))
    return [word for word, _ in counts.most_common(most)]


def is_edit(step: int, fraction: float) -> bool:
    """Whether a step's batch is one of edits:
    evenly spread, floor(step * fraction) of them before each step."""
    return math.floor((step + 1) * fraction) > math.floor(step * fraction)


def keys_of_step(step: int, cfg: Config, captions: list[int],
                 edits: list[int]) -> list[tuple[int, bool, bool]]:
    """The global batch of a step as keys of Latents. Never the source alone is dropped: that would teach the
    model to draw a whole picture from "make it green"."""
    share = (cfg.edit_fraction if captions else 1.0) if edits else 0.0
    edit, edits_before = is_edit(step, share), math.floor(step * share)
    rows, number = (edits, edits_before) if edit else (captions, step - edits_before)
    chosen = data.order(cfg.seed, f"dit {'edit' if edit else 'caption'}", len(rows), cfg.batch, number)
    g = data.generator(cfg.seed, "dit", step, "drop")
    drop_both = edit and torch.rand((), generator=g).item() < cfg.drop_both
    drop_text = torch.rand(cfg.batch, generator=g) < cfg.drop_text
    return [(rows[row], drop_both or bool(drop), drop_both) for row, drop in zip(chosen, drop_text)]


# ------------------------------------------------------------------------------------------------------------
# Held-out losses and preview
# ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def averaged(model: DiT, ema: dict[str, torch.Tensor]):
    """Inside the block the model has its averaged weights and is in eval mode."""
    raw = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(ema)
    try:
        yield model.eval()
    finally:
        model.load_state_dict(raw)
        model.train()


def held_out_batch(run: data.Run, latents: Latents, rows: list[int], mean, variance, most: int = 64):
    """(z_0, c, mask, source) of rows from all over the list, on the device; z_0 is the normalised mu."""
    rows = rows[::max(1, len(rows) // most)][:most]
    mu, _, c, mask, source = run.to_device(latents.collate([latents[(row, False, False)] for row in rows]))
    return (normalise(mu, mean, variance), c, mask,
            source if source is None else normalise(source, mean, variance))


@torch.no_grad()
def held_out_losses(model: DiT, z_0, c, mask, source, alpha_bar: torch.Tensor,
                    cfg: Config) -> dict[str, float]:
    """Eq. 32 (of v with --predict v) on held-out latents for t in each quarter q1 .. q4 of 1 .. T,
    the same t and noise at every call."""
    g = data.generator(cfg.seed, "dit", 0, "held out", z_0.device)
    losses = {}
    for quarter in range(4):
        low, high = 1 + cfg.T * quarter // 4, max(1 + cfg.T * (quarter + 1) // 4, 2 + cfg.T * quarter // 4)
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
    eps = torch.randn(z_0.shape, generator=data.generator(cfg.seed, "dit", 0, "preview")).to(z_0.device)
    titles, columns = ["z_0"], [z_0]
    for t_value in (max(1, round(cfg.T * share)) for share in (0.1, 0.3, 0.6, 0.9)):
        t = torch.full((len(z_0),), t_value, device=z_0.device)
        z_t = add_noise(z_0, t, eps, alpha_bar)
        eps_hat = model(z_t, t, c, mask, source)
        if cfg.predict == "v":
            eps_hat = eps_from_v(z_t, eps_hat, t, alpha_bar)
        columns += [z_t, predict_z_0(z_t, t, eps_hat, alpha_bar)]
        titles += [f"z_t, t = {t_value}", "predicted z_0"]
    colours = data.pca_colours(*columns, size=96)
    data.save_png(data.grid([list(row) for row in zip(*colours)], heads=titles), path)


# ------------------------------------------------------------------------------------------------------------
# Training Procedures. Stage 3: Train DiT
# ------------------------------------------------------------------------------------------------------------


def build(config: dict, shape: dict) -> DiT:
    """The network of a config as plain types;
    shape holds grid, z_dim, d_text, which came with the latents and texts."""
    return DiT(shape["grid"], shape["z_dim"], shape["d_text"], config["width"], config["depth"],
               config["heads"], config["whiten_text"], config["checkpointing"])


def schedule_of(config: dict) -> torch.Tensor:
    return noise_schedule(config["T"], config["beta_start"], config["beta_end"], config["schedule"])


def load_dit(path: Path, device="cpu") -> tuple[DiT, dict]:
    """The averaged model of a checkpoint, in eval mode, and the checkpoint."""
    checkpoint = data.load(path, "dit", before="python dit.py")
    cfg, shape = data.configure(Config, PRESETS, {}, saved=checkpoint["config"]), checkpoint["shape"]
    most = {"grid": 256, "z_dim": 65536, "d_text": 65536}
    if not (isinstance(shape, dict)
            and all(isinstance(shape.get(name), int) and 0 < shape[name] <= most[name] for name in most)
            and are_statistics(checkpoint["mean"], checkpoint["variance"], shape["z_dim"])):
        raise data.UserError(f"{path}: shape, mean or variance does not fit. Restore it, or train it again: "
                             f"python dit.py --fresh")
    model = build(data.plain(cfg), shape)
    data.load_weights(model, checkpoint["ema"], path)
    checkpoint["config"] = data.plain(cfg)             # whole and checked
    return model.eval().requires_grad_(False).to(device), checkpoint


def are_statistics(mean, variance, z_dim: int) -> bool:
    """Whether these are the finite mean and positive variance of z_dim channels."""
    return all(isinstance(part, list) and len(part) == z_dim
               and all(isinstance(v, float) and math.isfinite(v) for v in part) for part in (mean, variance)
               ) and min(variance) > 0


def train(cfg: Config, checkpoint: dict | None, meta: dict):
    with data.Run(cfg, "dit", terms=("loss", "grad_norm")) as run:
        rows = read_rows(run.out, meta)
        texts = encode_texts(cfg, run, ["", *sorted({row["text"] for row in rows} - {""})])
        latents = Latents(run.out / "latents", meta, rows, texts)
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
        ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=cfg.weight_decay,
                                      fused=True)
        start = 0
        if checkpoint:
            start, path = checkpoint["step"], run.out / "dit.pt"
            if checkpoint["text_fingerprint"] != texts.fingerprint:
                raise data.UserError(f"{path} was trained with another text encoder than {cfg.text_encoder} "
                                     f"is now. Start over with --fresh.")
            data.load_weights(model, checkpoint["ema"], path)
            ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
            data.load_weights(model, checkpoint["model"], path)
            data.load_optimizer(optimizer, checkpoint["optimizer"], path)
        elif cfg.whiten_text:
            model.text_shift[:], model.text_map[:] = texts.whitening()
            ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
        alpha_bar = schedule_of(data.plain(cfg)).to(run.device)
        mean, variance = (torch.tensor(meta[name], device=run.device) for name in ("mean", "variance"))
        held_out = {"": latents.rows(True, False) or captions, "edit_": latents.rows(True, True) or edits}
        held_out = {prefix: held_out_batch(run, latents, rows, mean, variance)
                    for prefix, rows in held_out.items() if rows}
        for prefix, what in (("", "captions"), ("edit_", "edits")):
            if prefix in held_out and not latents.rows(True, bool(prefix)):
                run.say(f"no held-out {what}: the columns held_out_{prefix}q1 to q4 are of training pictures")
        share = (cfg.edit_fraction if captions else 1.0) if edits else 0.0
        t_one = torch.ones(1, dtype=torch.long, device=run.device)
        for prefix, several in held_out.items():
            z_0, c, mask, source = (None if part is None else part[:1] for part in several)
            run.count_flops(model, lambda: model(z_0, t_one, c, mask, source).sum(),
                            share if prefix else 1 - share)
        if cfg.compile and run.device.type == "cuda":
            model.compile()
        run.open_log(start, checkpoint and checkpoint["pending"],
                     held_out=tuple(f"{prefix}q{quarter}" for prefix in held_out for quarter in (1, 2, 3, 4)))

        keys = lambda step: run.mine(keys_of_step(step, cfg, captions, edits))
        stream = data.batches(latents, keys, start, cfg.steps, cfg.workers, run.device.type == "cuda")
        for step, batch in enumerate(stream, start):
            # linear warm-up from peak / warmup, then a cosine to a hundredth of the peak
            rate = data.learning_rate(step, cfg.steps, cfg.warmup, cfg.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            mu, log_var, c, mask, source = run.to_device(batch)
            z_0 = normalise(sample_z_0(mu, log_var, run.randn(step, "z_0", *mu.shape[1:])), mean, variance)
            source = source if source is None else normalise(source, mean, variance)
            t = run.randint(step, "t", 1, cfg.T + 1)                        # t ~ Uniform(1, T), ends included
            eps = run.randn(step, "eps", *mu.shape[1:])
            # Eq. 22: z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps
            z_t = add_noise(z_0, t, eps, alpha_bar)                         # (B, h, w, z_dim)
            target = v_of(z_0, t, eps, alpha_bar) if cfg.predict == "v" else eps

            total = {"loss": 0}
            parts = [(part.chunk(cfg.micro_batches) if part is not None else [None] * cfg.micro_batches)
                     for part in (z_t, t, c, mask, source, target)]
            for z_t_part, t_part, c_part, mask_part, source_part, target_part in zip(*parts):
                with run.autocast():
                    prediction = model(z_t_part, t_part, c_part, mask_part, source_part)
                loss = dit_loss(target_part, prediction) / cfg.micro_batches
                loss.backward()
                total["loss"] += loss.detach()
            run.average([p.grad for p in model.parameters()])
            total["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(cfg.ema, (1 + step) / (10 + step))                  # early weights are soon forgotten
            torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - decay)

            # Diagnostics: what is logged, looked at and kept
            run.record(total)
            done = step + 1
            last, stopping = done == cfg.steps, run.stopping(done)
            if done % cfg.eval_every == 0 or last:
                with averaged(model, ema):
                    run.log(done, rate, {
                        prefix + name: value for prefix, batch in held_out.items()
                        for name, value in held_out_losses(model, *batch, alpha_bar, cfg).items()})
                    if run.main:
                        preview(model, *next(iter(held_out.values())), alpha_bar, cfg, run.out / "dit.png")
            elif done % cfg.log_every == 0:
                run.log(done, rate)
            if done % cfg.save_every == 0 or last or stopping:
                run.save(done, rate, model=model.state_dict(), ema=ema, optimizer=optimizer.state_dict(),
                         shape=shape, mean=meta["mean"], variance=meta["variance"], edits=len(edits),
                         vocabulary=vocabulary,
                         psvae_fingerprint=meta["fingerprint"], text_fingerprint=texts.fingerprint)
            if stopping and not last:
                raise data.Stopped(run.stop)
        run.say(f"finished: {run.out / 'dit.pt'}. Next: python sample.py --prompt \"{rows[0]['text'][:60]}\"")


def read_meta(out: Path) -> dict:
    """out/latents/meta.json. Raises UserError where it is missing or of another format."""
    path = out / "latents/meta.json"
    try:
        meta = json.loads(path.read_text())
        if meta["format"] != data.FORMAT:
            raise data.UserError(f"{path} has format {meta['format']}; this code reads format {data.FORMAT}.")
        if not are_statistics(meta["mean"], meta["variance"], meta["z_dim"]):
            raise ValueError
        return {key: meta[key]
                for key in ("fingerprint", "preset", "latents", "grid", "z_dim", "mean", "variance")}
    except FileNotFoundError:
        raise data.UserError(f"{path} is not there; first run: "
                             f"python psvae.py (it writes the latents at its end).")
    except (ValueError, KeyError, TypeError):
        raise data.UserError(f"{path} is damaged; write the latents again: python psvae.py --encode-only")


def read_rows(out: Path, meta: dict) -> list[dict]:
    """out/latents/rows.jsonl. Raises UserError where it is damaged or does not fit mu.npy and log_var.npy."""
    folder = out / "latents"
    try:
        with open(folder / "rows.jsonl", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        shapes = {np.load(folder / f"{name}.npy", mmap_mode="r").shape
                  for name in (("mu", "log_var") if meta["latents"] == "both" else ("mu",))}
        (shape,) = shapes
        if shape[1:] != (meta["grid"], meta["grid"], meta["z_dim"]) or not all(
                isinstance(row["text"], str) and 0 <= row["image"] < shape[0]
                and 0 <= row.get("source", 0) < shape[0]
                for row in rows):
            raise ValueError(f"rows and latents of shape {shape} do not fit")
        return rows
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise data.UserError(f"{folder} is damaged ({error}); write the latents again: "
                             f"python psvae.py --encode-only")


@data.program
def main(argv: list[str] | None = None):
    typed = data.read_flags(Config, argv, __doc__, PRESETS)
    out = Path(typed.get("out", "out"))
    if typed.get("size") in SIZES:
        typed = dict(zip(("width", "depth", "heads"), SIZES[typed["size"]])) | typed
    checkpoint = (data.load(out / "dit.pt", "dit")
                  if (out / "dit.pt").exists() and not typed.get("fresh") else None)
    meta = read_meta(out)
    if ((out / "psvae.pt").exists()
            and data.load(out / "psvae.pt", "psvae")["fingerprint"] != meta["fingerprint"]):
        raise data.UserError(f"{out}/latents were made by another psvae.pt than the one beside them. Write "
                             f"them again: python psvae.py --encode-only")
    if checkpoint and checkpoint["psvae_fingerprint"] != meta["fingerprint"]:
        raise data.UserError(f"{out}/dit.pt was trained on latents of another psvae.pt than {out}/latents "
                             f"({str(checkpoint['psvae_fingerprint'])[:12]} and {meta['fingerprint'][:12]}). "
                             f"Start over with --fresh.")
    inherited = data.inherit(None if checkpoint else meta, ("preset",), typed, out / "latents")
    cfg = data.configure(Config, PRESETS, typed, inherited, checkpoint and checkpoint["config"])
    if cfg.fresh:
        data.set_aside(out, "dit.pt", "dit.csv", "dit.png")
    if checkpoint and data.is_finished(checkpoint, cfg, out / "dit.pt"):
        return
    train(cfg, checkpoint, meta)


if __name__ == "__main__":
    sys.exit(main())
