"""sample.py - inference: a prompt in, a picture out;
or a picture and an instruction in, the edited picture out.

The guide's chapter "Inference", Eq. 33 and 34 as numbered in notes/equations.md: start from noise z_T, let
the DiT guess the noise at falling t, once with the text and once without (classifier-free guidance), take a
DDIM step, and decode z_0 with PS-VAE's pixel decoder.

    prompt -> T5 -> c --.
    z_T ~ N(0, I) -> [ eps = CFG(DiT(z_t, t, c), DiT(z_t, t, "")) -> DDIM step ] x steps -> z_0
      -> PixelDecoder -> x

    python sample.py --prompt "a red circle above a blue square"
    python sample.py --prompt "make the circle green" --image in.png   edits in.png
    python sample.py --prompt "a star" --film                          also the predicted z_0 along the way

Reads psvae.pt and dit.pt of out/, at any time during training, or the shipped tiny model where out/ has none.
Writes out/sample.png, a row for each prompt, with prompts, settings and seed in the PNG's text chunks.
"""

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

import data
from dit import DiT, eps_from_v, load_dit, normalise, schedule_of
from psvae import load_psvae


@dataclass(frozen=True)
class Config:
    prompt: tuple[str, ...] = ()            # what to draw, or with --image to change; several: several rows
    image: str = ""                         # a picture to edit
    n: int = 4                              # pictures of each prompt
    steps: int = 50                         # DDIM steps, at most T
    guidance: float = 7.5                   # s of Eq. 33; 1 is none (and, without --image, half the work)
    image_guidance: float = 1.5             # how closely an edit keeps to its source
    eta: float = 0.0                        # 0: DDIM, deterministic; 1, with all T steps: DDPM
    seed: int = 0                           # picture i of a prompt starts from the noise of (seed, i)
    out: str = "out/sample.png"             # the picture
    film: bool = False                      # also write <out>_film.png: predicted z_0, decoded, along the way
    model: str = ""                         # folder of psvae.pt and dit.pt; default: out or the shipped one
    batch: int = 64                         # pictures drawn at once
    device: str = "auto"                    # auto, cpu or cuda

    def __post_init__(self):
        data.check(self, n=(1, 1e6), steps=(1, 1e6), guidance=(0, 1000), image_guidance=(0, 1000), eta=(0, 1),
                   seed=(0, 2**63 - 1), batch=(1, 1e6))
        data.check_choice(self, device=("auto", "cpu", "cuda"))
        if not self.prompt:
            raise data.UserError('--prompt is missing; for example: python sample.py --prompt "a red circle"')
        if not Path(self.out).name or os.path.isdir(self.out):
            raise data.UserError(f"--out {self.out!r}: a file is needed, for example out/sample.png.")


PRESETS = {                                 # by the preset of dit.pt
    "full": {},
    "tiny": dict(guidance=3.0, eta=1.0),
}
SHIPPED = data.HERE / "notes/tiny"


# ------------------------------------------------------------------------------------------------------------
# Classifier-Free Guidance
# ------------------------------------------------------------------------------------------------------------


def classifier_free_guidance(eps_null: torch.Tensor, eps_c: torch.Tensor, s: float) -> torch.Tensor:
    """Eq. 33, on all channels of the latent; all (B, h, w, z_dim). s = 1 gives eps_c, s = 0 eps_null."""
    # Eq. 33: eps = eps(z_t, t, null) + s * ( eps(z_t, t, c) - eps(z_t, t, null) )
    return eps_null + s * (eps_c - eps_null)


def edit_guidance(eps_00, eps_s0, eps_sc, s: float, s_image: float):
    """Guidance on the source picture and on the text:
    eps without both, with the source, with both (B, h, w, z_dim).

    The guide has no equation for edits; this is its Eq. 33 applied twice, as in InstructPix2Pix (Brooks et
    al. 2023): (1 - s_image) eps_00 + (s_image - s) eps_s0 + s eps_sc, regrouped.
    """
    return eps_00 + s_image * (eps_s0 - eps_00) + s * (eps_sc - eps_s0)


def guided_noise(dit: DiT, z_t, modulations, keys_values, mask, source, s: float,
                 s_image: float) -> torch.Tensor:
    """The guided eps at one t; keys_values and mask hold the B texts and then B times the null text.

    Both halves run as one batch. A picture costs two passes of the network, one at s = 1; an edit three, one
    less where s = s_image (eps_s0 has weight 0) and one less where s_image = 1 (eps_00 has).
    """
    B = len(z_t)
    text, null = [[(k[half], v[half]) for k, v in keys_values] for half in (slice(0, B), slice(B, None))]
    if source is None:
        if s == 1:
            return dit.denoise(z_t, modulations, text, mask[:B])
        eps_c, eps_null = dit.denoise(torch.cat([z_t, z_t]), modulations, keys_values, mask).chunk(2)
        return classifier_free_guidance(eps_null, eps_c, s)
    if s == s_image:
        eps_sc = eps_s0 = dit.denoise(z_t, modulations, text, mask[:B], source)
    else:
        both = torch.cat([z_t, z_t]), modulations, keys_values, mask, torch.cat([source, source])
        eps_sc, eps_s0 = dit.denoise(*both).chunk(2)
    eps_00 = eps_s0 if s_image == 1 else dit.denoise(z_t, modulations, null, mask[B:])
    return edit_guidance(eps_00, eps_s0, eps_sc, s, s_image)


# ------------------------------------------------------------------------------------------------------------
# DDIM Sampling Formula
# ------------------------------------------------------------------------------------------------------------


def sampling_times(T: int, steps: int) -> list[int]:
    """`steps` times from T down, evenly spaced
    ("trailing": the first is T, where training's noise is), then 0."""
    steps = min(steps, T)
    return [round(T - i * T / steps) for i in range(steps)] + [0]


def ddim_step(z_t, eps, ab_t: float, ab_prev: float, eta: float, noise):
    """Eq. 34: from t to the next time of the list, of any distance. ab are alpha_bar there; noise ~ N(0, I).

    eta = 0 is deterministic; with eta = 1 and all T steps sigma_t is that of the DDPM posterior (Eq. 23).
    Returns (z_prev, predicted z_0).
    """
    sigma_t = eta * ((1 - ab_prev) / (1 - ab_t)) ** 0.5 * (1 - ab_t / ab_prev) ** 0.5
    z_0 = (z_t - (1 - ab_t) ** 0.5 * eps) / ab_t ** 0.5                     # predicted z_0
    towards_z_t = max(0.0, 1 - ab_prev - sigma_t ** 2) ** 0.5               # max: rounding, at ab_t near 0
    # Eq. 34: z_{t-1} = sqrt(ab_{t-1}) * predicted z_0
    #                   + sqrt(1 - ab_{t-1} - sigma_t^2) * eps + sigma_t * noise
    return ab_prev ** 0.5 * z_0 + towards_z_t * eps + sigma_t * noise, z_0


@torch.no_grad()
def ddim(dit: DiT, z_T, c, mask, alpha_bar, times, s, s_image=1.0, eta=0.0, source=None, generators=(),
         film=None, predict="eps"):
    """The sampling loop. z_T (B, h, w, z_dim), c (2B, L, d_text) and mask (2B, L):
    texts, then null texts -> z_0.

    One generator a picture draws its noise (eta > 0), so that a picture does not depend on its neighbours.
    `film`, a list, receives (t, predicted z_0) of each step.
    """
    keys_values = dit.keys_values(c)                                        # once for all steps
    modulations = dit.modulations(torch.tensor(times[:-1], device=z_T.device))      # once for all times
    z_t = z_T
    for i, (t, t_prev) in enumerate(zip(times, times[1:])):
        eps = guided_noise(dit, z_t, [m[i:i + 1] for m in modulations], keys_values, mask, source, s, s_image)
        if predict == "v":                              # guidance is linear: on v it is the same as on eps
            eps = eps_from_v(z_t, eps, torch.tensor([t]), alpha_bar)
        noise = draw(generators, z_t) if eta else 0
        z_t, z_0 = ddim_step(z_t, eps, alpha_bar[t].item(), alpha_bar[t_prev].item(), eta, noise)
        if film is not None:
            film.append((t, z_0))
    return z_t


def draw(generators: list[torch.Generator], like: torch.Tensor) -> torch.Tensor:
    """N(0, 1) like a batch, each row from its own CPU generator:
    the same on every device and in every batch."""
    return torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]).to(like.device)


# ------------------------------------------------------------------------------------------------------------
# Text-to-Image Generation, and editing
# ------------------------------------------------------------------------------------------------------------


class Pipeline:
    """PS-VAE, DiT and text encoder of a folder, checked to belong together."""

    def __init__(self, folder: Path, device: torch.device):
        self.device = device
        self.psvae, psvae_checkpoint = load_psvae(folder / "psvae.pt", device)
        self.dit, checkpoint = load_dit(folder / "dit.pt", device)
        self.config, self.step, self.edits = (checkpoint[name] for name in ("config", "step", "edits"))
        if self.psvae.fingerprint() != checkpoint["psvae_fingerprint"]:
            raise data.UserError(f"{folder}/dit.pt was trained on latents of another psvae.pt. Train it on "
                                 f"this one's: python psvae.py --encode-only, then python dit.py --fresh")
        self.text_encoder = data.load_text_encoder(self.config["text_encoder"], self.config["max_tokens"],
                                                   device)
        if self.text_encoder.fingerprint() != checkpoint["text_fingerprint"]:
            raise data.UserError(f"{folder}/dit.pt was trained with another text encoder than "
                                 f"{self.config['text_encoder']} is now. "
                                 f"Train it again: python dit.py --fresh")
        self.half = device.type == "cuda" and self.config["precision"] == "bf16"
        self.size, grid = psvae_checkpoint["config"]["image_size"], checkpoint["shape"]["grid"]
        self.latent_shape = (grid, grid, checkpoint["shape"]["z_dim"])
        self.mean, self.variance = (torch.tensor(checkpoint[name], device=device)
                                    for name in ("mean", "variance"))
        self.alpha_bar = schedule_of(self.config)      # (T + 1,) float64

    @torch.no_grad()
    def __call__(self, prompts: list[str], seeds: list[int], sources: np.ndarray | None = None, steps=50,
                 guidance=7.5, image_guidance=1.5, eta=0.0, film: list | None = None) -> np.ndarray:
        """One picture for each prompt and seed, uint8 (B, H, W, 3); sources uint8 (B, H, W, 3) are edited."""
        # bf16 on CUDA, as in training; noise and z_t stay in fp32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            # 1. Encode text
            c, mask = self.text_encoder([*prompts, *[""] * len(prompts)])
            # 2. Initialize from noise
            generators = [data.generator(seed, "sample", 0, "z_T") for seed in seeds]
            z_T = draw(generators, torch.empty(len(seeds), *self.latent_shape, device=self.device))
            # 3. DDIM sampling
            source, frames = None, [] if film is not None else None
            if sources is not None:
                x = data.to_float(torch.from_numpy(sources).permute(0, 3, 1, 2), self.device)
                source = normalise(self.psvae.encode(x)[0], self.mean, self.variance)
            times = sampling_times(self.config["T"], steps)
            z_0 = ddim(self.dit, z_T, c, mask, self.alpha_bar, times, guidance, image_guidance, eta, source,
                       generators, frames, self.config["predict"])
            # 4. Decode to image
            if film is not None:
                shown = sorted({round(i * (len(frames) - 1) / 8) for i in range(9)})
                film += [(frames[i][0], self.decode(frames[i][1])) for i in shown]
            return self.decode(z_0)

    def decode(self, z_0: torch.Tensor) -> np.ndarray:
        """Normalised latents (B, h, w, z_dim) -> uint8 (B, H, W, 3)."""
        return data.to_uint8(self.psvae.decode(z_0 * self.variance.sqrt() + self.mean))


def find_model(name: str) -> Path:
    """The folder of a trained model: as typed, else out/ where it has one, else the shipped one."""
    if name:
        return Path(name)
    return (Path("out")
            if (Path("out") / "dit.pt").exists() and (Path("out") / "psvae.pt").exists() else SHIPPED)


@data.program
def main(argv: list[str] | None = None):
    typed = data.read_flags(Config, argv, __doc__, PRESETS)
    cfg = Config(**typed)                              # wrong values are told before anything is loaded
    folder = find_model(cfg.model)
    pipeline = Pipeline(folder, data.pick_device(cfg.device))
    cfg = Config(**PRESETS.get(pipeline.config["preset"], {}) | typed)
    print(f"{'the shipped model' if folder == SHIPPED else folder}: {pipeline.config['preset']} preset, "
          f"{pipeline.step:,} steps, {pipeline.size} px")
    T = pipeline.config["T"]
    if cfg.steps > T:
        raise data.UserError(f"--steps {cfg.steps}: allowed is 1 to {T}, the steps of the diffusion process.")
    for prompt in cfg.prompt:
        if not prompt.strip():
            print("an empty prompt: the null condition, whatever the model likes to draw")
        if pipeline.text_encoder.is_cut(prompt):
            print(f"a prompt is longer than {pipeline.text_encoder.max_tokens} tokens; the rest of "
                  f"it is not read (it begins: {prompt[:60]}…)")
    if cfg.image:
        if not pipeline.edits:
            raise data.UserError(f"--image: the model in {folder} was trained without edits. Rows with a "
                                 f"\"source\" in metadata.jsonl make one: "
                                 f"python psvae.py --data DIR, then python dit.py")
        source = data.user_image(cfg.image, pipeline.size)

    jobs = [(prompt.strip(), cfg.seed * 1_000_003 + i) for prompt in cfg.prompt for i in range(cfg.n)]
    pictures, film = [], [] if cfg.film else None
    for start in range(0, len(jobs), cfg.batch):
        prompts, seeds = zip(*jobs[start:start + cfg.batch])
        sources = np.stack([source] * len(prompts)) if cfg.image else None
        frames = [] if cfg.film and not start else None
        pictures += list(pipeline(list(prompts), list(seeds), sources, cfg.steps, cfg.guidance,
                                  cfg.image_guidance, cfg.eta, frames))
        film = frames if frames is not None else film
    rows = [pictures[i:i + cfg.n] for i in range(0, len(pictures), cfg.n)]
    captions = [[prompt] + [""] * (cfg.n - 1) for prompt in cfg.prompt]
    if cfg.image:
        rows = [[source, *row] for row in rows]
        captions = [[Path(cfg.image).name, *row] for row in captions]
    settings = ({f.name: getattr(cfg, f.name) for f in fields(Config)}
                | {"model": folder.name, "step": pipeline.step})
    data.save_png(data.grid(rows, captions, least=128), Path(cfg.out), settings)
    print(f"wrote {cfg.out}")
    if film:
        path = Path(cfg.out).with_name(Path(cfg.out).stem + "_film.png")
        data.save_png(data.grid([list(row) for row in zip(*(frame for _, frame in film))],
                                heads=[f"t = {t}" for t, _ in film]), path, settings)
        print(f"wrote {path}: the predicted z_0, decoded, from noise to picture")


if __name__ == "__main__":
    sys.exit(main())
