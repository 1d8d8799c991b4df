"""sample.py - inference: a prompt becomes a picture; picture and instruction, an edited picture.

The guide's chapter "Inference", Eq. 33 and 34 as numbered in notes/equations.md: start from noise
z_T, let the DiT predict the noise at falling t, once with the text and once without
(classifier-free guidance), take a DDIM step, and decode z_0 with PS-VAE's pixel decoder.

    prompt -> T5 -> c --.
    z_T ~ N(0, I) -> [ eps = CFG(DiT(z_t, t, c), DiT(z_t, t, "")) -> DDIM step ] x steps -> z_0
      -> PixelDecoder -> x

    python sample.py --prompt "a red circle above a blue square"
    python sample.py --prompt "make the circle green" --image in.png   edits in.png
    python sample.py --prompt "a star" --out stars/                    also a file for each picture
    python sample.py --prompt "a star" --film                          also predicted z_0 on the way

Reads psvae.pt and dit.pt of out/, at any time during training, or the shipped tiny model where out/
has none. Writes a row for each prompt, with prompts, settings and seed inside the file. In Python:

    from sample import Pipeline
    pictures = Pipeline("notes/tiny")(["a red circle"], seeds=[0])      # uint8 (1, 64, 64, 3)
"""

import difflib
import functools
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
from dit import DiT, eps_from_v, load_dit, normalise, schedule_of, text_embedding
from psvae import load_psvae


@dataclass(frozen=True)
class Config:
    prompt: tuple[str, ...] = ()            # what to draw, or with --image to change
    image: str = ""                         # a picture to edit
    n: int = 4                              # pictures of each prompt
    steps: int = 50                         # DDIM steps, at most T
    guidance: float = 7.5                   # s of Eq. 33; 1 is none (without --image half the work)
    image_guidance: float = 1.5             # how closely an edit keeps to its source
    eta: float = 0.0                        # 0: deterministic; 1, with all T steps: DDPM; or more
    seed: int = 0                           # picture i of a prompt starts from noise (seed, i)
    out: str = ""                           # a picture or folder/; default: beside the model
    film: bool = False                      # also <out>_film: predicted z_0, decoded, along the way
    model: str = ""                         # folder with dit.pt; default: out, or what ships
    batch: int = 64                         # pictures drawn at once
    device: str = "auto"                    # auto, cpu or cuda

    def __post_init__(self):
        data.check(self, n=(1, 1e6), steps=(1, 1e6))
        data.check_choice(self, device=("auto", "cpu", "cuda"))
        if not self.prompt:
            raise data.UserError('--prompt is missing; for example: python sample.py --prompt '
                                 '"a red circle"')


PRESETS = {                                 # by the preset of dit.pt
    "full": {},
    # DEVIATION (tiny): the guide samples with sigma_t = 0. With most of the noise fresh at every
    # step, a small DiT's errors add up less (notes/claims/schedule.md).
    "tiny": dict(guidance=3.0, eta=2.0),
}
EDITS = {"tiny": dict(eta=1.0)}             # for edits, where that noise changes too much
SHIPPED = data.HERE / "notes/tiny"


# === Classifier-Free Guidance (CFG) ===============================================================

def classifier_free_guidance(eps_null: torch.Tensor, eps_c: torch.Tensor, s: float) -> torch.Tensor:
    """On all channels of the latent, (B, h, w, z_dim). s = 1 gives eps_c, s = 0 eps_null."""
    # Eq. 33: eps = eps(z_t, t, null) + s * ( eps(z_t, t, c) - eps(z_t, t, null) )
    return eps_null + s * (eps_c - eps_null)


def edit_guidance(eps_00, eps_s0, eps_sc, s: float, s_image: float):
    """Guidance on source picture and text: eps without both, with the source, with both."""
    # DEVIATION: the guide has no equation for edits. This is its Eq. 33 twice, as InstructPix2Pix
    # does it (Brooks et al. 2023): (1 - s_image) eps_00 + (s_image - s) eps_s0 + s eps_sc.
    return eps_00 + s_image * (eps_s0 - eps_00) + s * (eps_sc - eps_s0)


def guided_noise(dit: DiT, z_t, modulations, keys_values, mask, source, s: float,
                 s_image: float) -> torch.Tensor:
    """The guided eps (or v) at one t; keys_values and mask hold B texts, then B null texts.

    Both halves run as one batch. A picture costs two passes of the network, one at s = 1; an edit
    three, one less where s = s_image (eps_s0 has weight 0) and one less where s_image = 1 (eps_00).
    """
    B = len(z_t)
    text = [(k[:B], v[:B]) for k, v in keys_values]
    null = [(k[B:], v[B:]) for k, v in keys_values]
    if source is None:
        if s == 1:
            return dit.denoise(z_t, modulations, text, mask[:B])
        both = dit.denoise(torch.cat([z_t, z_t]), modulations, keys_values, mask)
        eps_c, eps_null = both.chunk(2)
        return classifier_free_guidance(eps_null, eps_c, s)
    if s == s_image:
        eps_sc = eps_s0 = dit.denoise(z_t, modulations, text, mask[:B], source)
    else:
        both = dit.denoise(torch.cat([z_t, z_t]), modulations, keys_values, mask,
                           torch.cat([source, source]))
        eps_sc, eps_s0 = both.chunk(2)
    eps_00 = eps_s0 if s_image == 1 else dit.denoise(z_t, modulations, null, mask[B:])
    return edit_guidance(eps_00, eps_s0, eps_sc, s, s_image)


# === DDIM Sampling Formula ========================================================================

def ddim_step(z_t, eps, ab_t: float, ab_prev: float, eta: float, noise):
    """From t to the next time of the list, however far; ab is alpha_bar there, noise ~ N(0, I).

    eta = 0 is deterministic; with eta = 1 and all T steps sigma_t is that of the DDPM posterior
    (Eq. 23). It is capped where all noise is fresh: beyond, the square root in Eq. 34 is imaginary.
    Returns (z_prev, predicted z_0).
    """
    sigma_t = eta * ((1 - ab_prev) / (1 - ab_t)) ** 0.5 * (1 - ab_t / ab_prev) ** 0.5
    sigma_t = min(sigma_t, (1 - ab_prev) ** 0.5)
    z_0 = (z_t - (1 - ab_t) ** 0.5 * eps) / ab_t ** 0.5                     # predicted z_0
    towards_z_t = max(0.0, 1 - ab_prev - sigma_t ** 2) ** 0.5               # 0.0: rounding
    # Eq. 34: z_{t-1} = sqrt(ab_{t-1}) * predicted z_0
    #                   + sqrt(1 - ab_{t-1} - sigma_t^2) * eps + sigma_t * noise
    return ab_prev ** 0.5 * z_0 + towards_z_t * eps + sigma_t * noise, z_0


def sampling_times(T: int, steps: int) -> list[int]:
    """`steps` times from T down, then 0."""
    # DEVIATION: the guide's loop takes all T steps. Fewer, evenly spaced down from T ("trailing"),
    # are faster; each goes to the next time of the list, never to t - T // steps.
    steps = min(steps, T)
    return [round(T - i * T / steps) for i in range(steps)] + [0]


@torch.no_grad()
def ddim(dit: DiT, z_T, c, mask, alpha_bar, times, s, s_image=1.0, eta=0.0, source=None,
         generators=(), film=None, predict="eps"):
    """The sampling loop: z_T (B, h, w, z_dim), c (2B, L, d_text), mask (2B, L): texts, then null
    texts -> z_0.

    Each picture has its own noise generator (eta > 0): it does not depend on the rest of the batch.
    `film`, a list, receives (t, predicted z_0) of each step.
    """
    keys_values = dit.keys_values(c)                                        # once for all steps
    modulations = dit.modulations(torch.tensor(times[:-1], device=z_T.device))      # for all times
    z_t = z_T
    for i, (t, t_prev) in enumerate(zip(times, times[1:])):
        at_t = [m[i:i + 1] for m in modulations]
        eps = guided_noise(dit, z_t, at_t, keys_values, mask, source, s, s_image)
        if predict == "v":                             # guidance is linear: the same on v as on eps
            eps = eps_from_v(z_t, eps, torch.tensor([t]), alpha_bar)
        noise = draw(generators, z_t) if eta else 0
        z_t, z_0 = ddim_step(z_t, eps, alpha_bar[t].item(), alpha_bar[t_prev].item(), eta, noise)
        if film is not None:
            film.append((t, z_0))
    return z_t


def draw(generators: list[torch.Generator], like: torch.Tensor) -> torch.Tensor:
    """N(0, 1) like a batch, each row from its own CPU generator: the same on every device."""
    rows = [torch.randn(like.shape[1:], generator=g) for g in generators]
    return torch.stack(rows).to(like.device)


# === Text-to-Image Generation, and editing ========================================================

class Pipeline:
    """Pixel decoder, DiT and text encoder of a folder, checked to belong together."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu"):
        self.folder, self.device = Path(folder), torch.device(device)
        path, again = self.folder / "dit.pt", f"{data.command('dit.py', out=folder)} --fresh"
        if not self.folder.is_dir():
            raise data.UserError(f"{folder}: no such folder. A folder with dit.pt is needed.")
        self.pixel_decoder, psvae = load_psvae(self.folder / "psvae.pt", self.device,
                                               draws_only=True)
        self.dit, checkpoint = load_dit(path, self.device)
        with data.reading(path):
            self.config, self.step = checkpoint["config"], checkpoint["step"]
            self.edits, text_fingerprint = checkpoint["edits"], checkpoint["text_fingerprint"]
            self.vocabulary = checkpoint.get("vocabulary", [])
            self.mean, self.variance = (torch.tensor(checkpoint[name], device=self.device)
                                        for name in ("mean", "variance"))
            grid, z_dim = checkpoint["shape"]["grid"], checkpoint["shape"]["z_dim"]
            belongs = checkpoint["psvae_fingerprint"] == psvae.get("fingerprint")
        if not belongs:
            encode = data.command("psvae.py", out=folder) + " --encode-only"
            raise data.UserError(f"{path} was trained on latents of another psvae.pt. Train it on "
                                 f"this one's: {encode}, then {again}")
        name = self.config["text_encoder"]
        if name != data.TINY_TEXT_ENCODER:             # what a file names is said before loading
            data.say(f"{path} names the text encoder {name}")
        self.text_encoder = data.load_text_encoder(name, self.config["max_tokens"], self.device)
        if self.text_encoder.fingerprint() != text_fingerprint:
            raise data.UserError(f"{path} was trained with a different text encoder than {name} is "
                                 f"now. Train it again: {again}")
        self.half = (self.device.type == "cuda" and self.config["precision"] == "bf16"
                     and data.has_bf16(self.device))
        self.size, self.latent_shape = psvae["config"]["image_size"], (grid, grid, z_dim)
        self.alpha_bar = schedule_of(self.config)      # (T + 1,) float64
        preset = self.config["preset"]
        own = {name: getattr(Config, name) for name in ("guidance", "image_guidance", "eta")}
        own |= PRESETS.get(preset, {})
        self.defaults = {False: own, True: own | EDITS.get(preset, {})}     # is it an edit?

    @functools.cached_property
    def psvae(self):
        """The whole PS-VAE, with its image encoder: only edits need it."""
        return load_psvae(self.folder / "psvae.pt", self.device)[0]

    @torch.no_grad()
    def __call__(self, prompts: list[str], seeds: list[int], sources: np.ndarray | None = None,
                 steps=50, guidance=None, image_guidance=None, eta=None,
                 film: list | None = None) -> np.ndarray:
        """A picture for each prompt and seed, uint8 (B, H, W, 3); sources, likewise, are edited.

        guidance, image_guidance and eta: by default those of the model's preset.
        """
        typed = {"guidance": guidance, "image_guidance": image_guidance, "eta": eta}
        own = dict(self.defaults[sources is not None])
        own |= {name: value for name, value in typed.items() if value is not None}
        # bf16 on CUDA, as in training; noise and z_t stay in fp32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            # 1. Encode text
            c, mask = text_embedding(self.text_encoder, [*prompts, *[""] * len(prompts)])
            # 2. Initialize from noise
            generators = [data.generator(seed, "sample", 0, "z_T") for seed in seeds]
            z_T = draw(generators, torch.empty(len(seeds), *self.latent_shape, device=self.device))
            # 3. DDIM sampling
            source = None if sources is None else self.encode(sources)
            times = sampling_times(self.config["T"], steps)
            z_0 = ddim(self.dit, z_T, c, mask, self.alpha_bar, times, own["guidance"],
                       own["image_guidance"], own["eta"], source, generators, film,
                       self.config["predict"])
            # 4. Decode to image
            return self.decode(z_0)

    def encode(self, pictures: np.ndarray) -> torch.Tensor:
        """uint8 (B, H, W, 3) -> normalised mu (B, h, w, z_dim)."""
        x = data.to_float(torch.from_numpy(pictures).permute(0, 3, 1, 2), self.device)
        return normalise(self.psvae.encode(x)[0], self.mean, self.variance)

    def decode(self, z_0: torch.Tensor) -> np.ndarray:
        """Normalised latents (B, h, w, z_dim) -> uint8 (B, H, W, 3)."""
        z = z_0 * self.variance.sqrt() + self.mean
        return data.to_uint8(self.pixel_decoder(z).to(z.dtype))

    def remarks(self, prompt: str):
        """Lines about what of a prompt the model cannot read."""
        if not prompt.strip():
            yield "an empty prompt: the null condition, whatever the model likes to draw"
        if self.text_encoder.lengths([prompt])[0] > self.text_encoder.max_tokens:
            yield (f"a prompt is longer than {self.text_encoder.max_tokens} tokens; the rest of it "
                   f"is not read (it begins: {prompt[:60]}…)")
        for word in dict.fromkeys(re.findall(r"\w+", prompt.lower())) if self.vocabulary else ():
            if word not in self.vocabulary:
                near = difflib.get_close_matches(word, self.vocabulary, 1, cutoff=0.5)
                yield (f"{word!r} is none of the {len(self.vocabulary):,} words the model knows"
                       + (f"; the nearest word is {near[0]!r}" if near else ""))


def find_model(name: str) -> Path:
    """The folder of a trained model: as typed, else out/ where it has one, else the shipped one."""
    own = all((Path("out") / file).exists() for file in ("dit.pt", "psvae.pt"))
    folder = Path(name) if name else Path("out") if own else SHIPPED
    return SHIPPED if folder.resolve() == SHIPPED else folder


@data.program
def main(argv: list[str] | None = None):
    typed = data.read_flags(Config, argv, __doc__, PRESETS)
    cfg = Config(**typed)                              # wrong values come before long loading
    folder = find_model(cfg.model)
    out = cfg.out or str((Path("out") if folder == SHIPPED else folder) / "sample.png")
    several = out.endswith(("/", os.sep)) or Path(out).is_dir()
    path = Path(out) / "sample.png" if several else Path(out)
    data.check_picture_path(path)
    if cfg.image and not Path(cfg.image).is_file():
        raise data.UserError(f"{data.printable(cfg.image)}: no such file.")
    pipeline = Pipeline(folder, data.pick_device(cfg.device))
    cfg = Config(**pipeline.defaults[bool(cfg.image)] | typed)
    config, name = pipeline.config, "the shipped model" if folder == SHIPPED else folder
    data.say(f"{name}: {config['preset']} preset, {pipeline.step:,} steps, {pipeline.size} px")
    if cfg.steps > config["T"]:
        raise data.UserError(f"--steps {cfg.steps}: allowed is 1 to {config['T']}, the steps of "
                             f"the diffusion process.")
    for prompt in cfg.prompt:
        for remark in pipeline.remarks(prompt):
            data.say(remark)
    if cfg.image:
        if not pipeline.edits:
            raise data.UserError(f"--image: the model in {folder} was trained without edits. Rows "
                                 f"with a \"source\" in metadata.jsonl make one: "
                                 f"python psvae.py --data DIR, then python dit.py")
        source = data.user_image(cfg.image, pipeline.size)

    jobs = [(prompt.strip(), cfg.seed * 1_000_003 + i)
            for prompt in cfg.prompt for i in range(cfg.n)]
    pictures, film = [], [] if cfg.film else None      # the film is of the first batch
    for start in range(0, len(jobs), cfg.batch):
        prompts, seeds = zip(*jobs[start:start + cfg.batch])
        sources = np.stack([source] * len(prompts)) if cfg.image else None
        pictures += list(pipeline(list(prompts), list(seeds), sources, cfg.steps, cfg.guidance,
                                  cfg.image_guidance, cfg.eta, None if start else film))

    rows = [pictures[i:i + cfg.n] for i in range(0, len(pictures), cfg.n)]
    captions = [[prompt] for prompt in cfg.prompt]
    if cfg.image:
        rows = [[source, *row] for row in rows]
        captions = [[Path(cfg.image).name, *row] for row in captions]
    settings = {f.name: getattr(cfg, f.name) for f in fields(Config)}
    settings |= {"model": folder.name, "step": pipeline.step}
    data.save_picture(data.grid(rows, captions, least=128), path, settings)
    print(f"wrote {path}")
    if several:
        for i, (picture, (prompt, _)) in enumerate(zip(pictures, jobs)):
            data.save_picture(Image.fromarray(picture), Path(out) / f"{i:04d}.png",
                              settings | {"prompt": prompt})
        print(f"wrote {Path(out) / '0000.png'} to {len(pictures) - 1:04d}.png")
    if film:
        path = path.with_name(f"{path.stem}_film{path.suffix}")
        film = [film[i] for i in sorted({round(i * (len(film) - 1) / 8) for i in range(9)})]
        frames = [list(row) for row in zip(*(pipeline.decode(z_0) for _, z_0 in film))]
        data.save_picture(data.grid(frames, heads=[f"t = {t}" for t, _ in film]), path, settings)
        print(f"wrote {path}: the predicted z_0, decoded, from noise to picture")


if __name__ == "__main__":
    sys.exit(main())
