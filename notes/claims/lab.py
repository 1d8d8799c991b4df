"""The laboratory of weak_pixels, ladder, kl, guide_vs_paper and channels: small latent spaces and their DiTs.

Networks, losses and samplers are the stage files' own; here is only what lets many small runs share one
memory and one table. Pictures of the built-in world are drawn once (one filled object, so that a short
training is enough), their frozen features are computed once, and every trained part is kept in --out under
the digest of its settings: run again, a script goes on where it stopped, and one script takes over what
another has trained. Every random number of a step comes from (seed, part, step), as in the stages.

    lab = Lab(read_config(argv, __doc__))
    model = lab.autoencoder(Space("psvae", z_dim=24, seed=0))      # trained or read
    lab.pixels(space), lab.semantics(space), lab.generation(space)  # measured or read, as plain dicts
"""

import copy
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import data                                                                                      # noqa: E402
from dit import DiT, add_noise, dit_loss, noise_schedule, normalise                              # noqa: E402
from notes.world import judge, world                                                                   # noqa: E402
from notes.claims.off_manifold import into_page                                                         # noqa: E402
from psvae import (ConvBlock, PSVAE, PixelDecoder, Projector, SemanticDecoder, frechet_distance,  # noqa: E402
                   group_norm, kl_divergence, psnr, psvae_loss, reparameterize, semantic_loss, ssim)
from sample import ddim, sampling_times                                                          # noqa: E402

VERSION = 3            # goes up when the same settings would train something else: old parts are then unused
SAVE_EVERY = 60        # seconds between checkpoints of a part
T, BETAS = 1000, (1e-4, 0.02)
KINDS = {"vae": "Standard VAE", "rae": "RAE", "svae": "S-VAE", "pvae": "P-VAE", "psvae": "PS-VAE",
         "semantic": "S-VAE, features only"}


@dataclass(frozen=True)
class Config:
    scale: str = "cpu"                  # how big: cpu (minutes a part on one core), gpu, or quick (a test)
    quick: bool = False                 # the same as --scale quick
    seeds: tuple[int, ...] = (0,)       # of initialisation, order and noise; all other things are the same
    only: tuple[str, ...] = ()          # only these rows: to run several at once on one card
    out: str = "out/lab"                # trained parts and measurements; shared by the scripts
    page: bool = False                  # tables and figure go into notes/claims/ too
    device: str = "auto"                # auto, cpu or cuda

    def __post_init__(self):
        data.check_choice(self, scale=tuple(SCALES), device=("auto", "cpu", "cuda"))
        data.check(self, seeds=(0, 2**31))


@dataclass(frozen=True)
class Scale:
    """How big; the same for every row of a table."""
    pictures: int               # that train everything
    held_out: int               # that measure everything, and whose captions are the prompts
    widths: tuple[int, ...]     # of the pixel decoder
    stage_1: tuple              # S-VAE: steps, batch, peak learning rate
    stage_2: tuple              # pixel decoder, and all of P-VAE, PS-VAE and the standard VAE
    stage_3: tuple              # DiT
    dit: tuple                  # its width, depth, heads
    prompts: int                # generated pictures a measurement
    sampler: tuple              # DDIM steps, guidance
    readers: int                # training pictures from which linear read-outs are fitted
    marks: tuple[float, ...] = (0.25, 0.5, 1.0)     # shares of stage 3 at which pictures are generated


SCALES = {
    "cpu": Scale(4000, 400, (64, 32, 16, 8), (300, 64, 2e-3), (900, 8, 2e-3), (500, 32, 1e-3),
                 (128, 3, 4), 192, (16, 2.0), 2000, (0.5, 1.0)),
    "gpu": Scale(40_000, 2000, (128, 128, 64, 32), (2000, 256, 2e-3), (4000, 128, 1e-3), (6000, 256, 1e-3),
                 (384, 6, 6), 2000, (50, 2.0), 4000),
    "quick": Scale(64, 16, (8, 8, 8, 8), (2, 8, 1e-3), (2, 4, 1e-3), (2, 4, 1e-3), (16, 1, 1), 8, (2, 2.0),
                   48, (1.0,)),
}


# kl, guide_vs_paper and channels compare many spaces. On a CPU they do so in stage 1 alone, z -> features
# without pixels ("semantic"); on a GPU with the whole PS-VAE.
STUDY_KIND = {"cpu": "semantic", "quick": "semantic", "gpu": "psvae"}

# The part of the scale that a trained part depends on (a measurement: all of it).
MATTERS = {"world": ("pictures", "held_out"), "stage1": ("pictures", "stage_1"),
           "stage2": ("pictures", "stage_1", "stage_2", "widths")}
MATTERS["stage3"] = (*MATTERS["stage2"], "stage_3", "dit", "marks")


@dataclass(frozen=True)
class Space:
    """A latent space: everything, beside the scale, that its training depends on."""
    kind: str = "psvae"         # of KINDS
    z_dim: int = 24             # channels (rae: those of the features)
    beta: float = 1e-4          # weight of the KL term
    reduction: str = "sum"      # of the KL over channels: sum (Eq. 11) or mean (the guide's pseudo-code)
    body: str = "mlp"           # of projector and semantic decoder, see BODIES
    semantic: str = "mse"       # of SEMANTIC
    seed: int = 0


# What guide_vs_paper.py adds its own entries to. The mean over channels is the sum with beta / z_dim.
BODIES = {"mlp": (Projector, SemanticDecoder)}
SEMANTIC = {"mse": semantic_loss}


def read_config(argv, description) -> Config:
    cfg = Config(**data.read_flags(Config, argv, description))
    return Config(**asdict(cfg) | {"scale": "quick", "out": cfg.out}) if cfg.quick else cfg


# --- The pictures -------------------------------------------------------------------------------------------

ATTRIBUTES = {"background": tuple(world.BACKGROUNDS), "colour": tuple(world.COLOURS), "shape": world.SHAPES,
              "size": tuple(world.SIZES)}


def one_object(index: int, split: str) -> world.Scene:
    """Scene `index`: one filled object on a background, of the pairs that the split allows."""
    rng = world.generator("lab", split, index)
    colour, shape = world.pick_look(rng, "train")
    thing = world.Object(shape, colour, world.choose(rng, world.SIZES), "filled")
    return world.Scene(world.choose(rng, world.BACKGROUNDS), world.place([thing], rng))


def caption(scene: world.Scene) -> str:
    o = scene.objects[0]
    return f"a {o.size} {o.colour} {o.shape} on {world.with_article(scene.background)} background"


def facts(scene: world.Scene) -> list[int]:
    o = scene.objects[0]
    values = {"background": scene.background, "colour": o.colour, "shape": o.shape, "size": o.size}
    return [options.index(values[name]) for name, options in ATTRIBUTES.items()]


def nearest(picture: np.ndarray) -> list[int]:
    """The attributes that a picture, uint8 (64, 64, 3), comes nearest to: a choice is forced, however bad.

    The judge refuses what is not clean, and so nearly all that a short training draws. This takes its palette
    and its templates: background from the picture's frame, where no object may be; colour from the pixels
    that differ most from it; shape and size from the filled template that fits what lies between the two.
    """
    rgb = picture.astype(np.float32)
    frame = np.ones(rgb.shape[:2], bool)
    frame[2:-2, 2:-2] = False
    base = np.median(rgb[frame], axis=0)
    rgb = rgb - base
    strongest = np.argsort(np.linalg.norm(rgb, axis=-1).ravel())[-60:]
    way = np.median(rgb.reshape(-1, 3)[strongest], axis=0)
    alpha = np.clip(rgb @ way / max(float(way @ way), 1e-6), 0, 1.1)
    alpha[alpha < 0.15] = 0
    middle, total = np.arange(world.CANVAS) + 0.5, max(float(alpha.sum()), 1e-6)
    y, x = round(4 * float(alpha.sum(1) @ middle) / total), round(4 * float(alpha.sum(0) @ middle) / total)
    half = judge.HALF                                   # the window around the centre of mass, 2 half wide
    cut = np.pad(alpha, half)[y // 4:y // 4 + 2 * half, x // 4:x // 4 + 2 * half]
    stack, norms, edge = judge.templates()
    error = (norms[y % 4, x % 4] - 2 * (stack[y % 4, x % 4].reshape(len(edge), -1) @ cut.ravel())) / edge
    filled = [k for k in range(len(edge)) if judge.TEMPLATES[k // len(judge.SOFTNESS)][2] == "filled"]
    error += (alpha ** 2).sum() / edge
    shape, size, _ = judge.TEMPLATES[min(filled, key=error.__getitem__) // len(judge.SOFTNESS)]
    closest = lambda colour, palette: int(np.linalg.norm(palette - colour, axis=1).argmin())
    return [closest(base, judge.BACKGROUND_RGB), closest(base + way, judge.OBJECT_RGB),
            ATTRIBUTES["shape"].index(shape), ATTRIBUTES["size"].index(size)]


def near_edges(x: torch.Tensor, reach: int = 3) -> torch.Tensor:
    """(B, 1, H, W), True within `reach` pixels of a step of colour; x (B, 3, H, W) in [-1, 1]."""
    step = torch.zeros_like(x[:, :1])
    step[:, :, :, 1:] += (x[:, :, :, 1:] - x[:, :, :, :-1]).abs().amax(1, keepdim=True)
    step[:, :, 1:] += (x[:, :, 1:] - x[:, :, :-1]).abs().amax(1, keepdim=True)
    return F.max_pool2d((step > 0.1).float(), 2 * reach + 1, 1, reach) > 0


# --- Encoders and decoders ----------------------------------------------------------------------------------

class ConvEncoder(nn.Module):
    """The standard VAE's: x (B, 3, H, W) -> mu, log_var (B, H/16, W/16, z_dim); no pretraining."""

    def __init__(self, z_dim: int, widths=(32, 64, 96, 128)):
        super().__init__()
        down = [nn.Conv2d(c_in, c_out, 3, 2, 1) for c_in, c_out in zip((3, *widths), widths)]
        self.body = nn.Sequential(*(layer for conv, c in zip(down, widths) for layer in (conv, ConvBlock(c))),
                                  group_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 2 * z_dim, 1))

    def forward(self, x):
        mu, log_var = self.body(x).permute(0, 2, 3, 1).chunk(2, -1)
        return mu, log_var.clamp(-30, 20)


class Autoencoder(nn.Module):
    """One of KINDS: encode(x, f) -> mu, log_var, and the project's decoders.

    f are the frozen features of x, normalised per channel for the RAE. Only vae, pvae and psvae train what
    encodes; what is not trained is no parameter of theirs that stage 2 sees (see `trained`).
    """

    def __init__(self, space: Space, encoder: data.ImageEncoder, f_mean, f_std, widths):
        super().__init__()
        self.kind, self.trains, self.seconds = space.kind, space.kind in ("vae", "pvae", "psvae"), 0.0
        self.register_buffer("f_mean", f_mean)
        self.register_buffer("f_std", f_std)
        projector, semantic_decoder = BODIES[space.body]
        if space.kind in ("pvae", "psvae"):
            model = PSVAE(copy.deepcopy(encoder).requires_grad_(True), space.z_dim, widths)
            model.encoder.network.embeddings.mask_token.requires_grad_(False)
            self.encoder, self.pixel_decoder = model.encoder, model.pixel_decoder
        else:
            self.encoder = ConvEncoder(space.z_dim) if space.kind == "vae" else None
            self.pixel_decoder = PixelDecoder(space.z_dim, widths) if space.kind != "semantic" else None
        if space.kind not in ("vae", "rae"):
            self.projector = projector(encoder.dim, space.z_dim)
            self.semantic_decoder = semantic_decoder(encoder.dim, space.z_dim)

    def encode(self, x, f):
        if self.kind == "rae":
            mu = (f - self.f_mean) / self.f_std
            return mu, torch.full_like(mu, -30.0)
        if self.kind == "vae":
            return self.encoder(x)
        if self.kind in ("svae", "semantic"):
            with torch.no_grad():
                return self.projector(f)
        return self.projector(self.encoder(x))

    def trained(self) -> list[dict]:
        """Parameters of stage 2, with the share of the learning rate that each group takes (as psvae.py)."""
        pretrained = list(self.encoder.parameters()) if self.kind in ("pvae", "psvae") else []
        skip = {id(p) for p in pretrained}
        if self.kind == "svae":
            skip |= {id(p) for part in (self.projector, self.semantic_decoder) for p in part.parameters()}
        rest = [p for p in self.parameters() if id(p) not in skip]
        pretrained = [p for p in pretrained if p.requires_grad]
        groups = [{"params": rest, "scale": 1.0}, {"params": pretrained, "scale": 0.5}]
        return groups if pretrained else groups[:1]


# --- Training, kept on disk ---------------------------------------------------------------------------------

def clock(device) -> float:
    """Seconds of work: of the processor on a CPU, whatever else runs beside it; of the wall on a GPU."""
    return time.process_time() if device.type == "cpu" else time.monotonic()


def replace_file(path: Path, write):
    """Never half a file; several processes may be at the same one (data.atomic is for one)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    write(partial)
    os.replace(partial, path)


@torch.enable_grad()           # measurements, which need no gradient, may be what asks for the training
def fit(path: Path, model: nn.Module, groups, steps, peak, loss_of, device, decay=0.01, marks=(), say=""):
    """Trains in place, from where `path` stops to `steps`; loss_of(step) is the loss of its batch.

    Keeps {step, seconds, model, optimizer, snapshots at marks} in `path`, every SAVE_EVERY and at the end
    (then without the optimizer). Returns seconds and snapshots.
    """
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.99), weight_decay=decay, fused=True)
    kept = {"step": 0, "seconds": 0.0, "snapshots": {}}
    if path.exists():
        kept = torch.load(path, weights_only=True, map_location=device)
        model.load_state_dict(kept["model"])
        if kept["step"] < steps:
            optimizer.load_state_dict(kept["optimizer"])
    begin, saved = clock(device) - kept["seconds"], time.monotonic()
    for step in range(kept["step"], steps):
        rate = data.learning_rate(step, steps, min(50, steps // 10), peak)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done in marks:
            kept["snapshots"][done] = copy.deepcopy(model.state_dict())
        if done == steps or time.monotonic() - saved > SAVE_EVERY:
            if not torch.isfinite(loss):
                raise data.UserError(f"{path.name}: the loss is {loss.item()} at step {done}")
            kept |= {"step": done, "seconds": clock(device) - begin, "model": model.state_dict(),
                     "optimizer": optimizer.state_dict() if done < steps else {}}
            replace_file(path, lambda partial: torch.save(kept, partial))
            saved = time.monotonic()
            print(f"  {say} step {done:,} of {steps:,}, loss {loss.item():.4f}, "
                  f"{kept['seconds']:.0f} s", file=sys.stderr, flush=True)
    return kept["seconds"], kept["snapshots"]


class Lab:
    """The pictures, the frozen encoders, and everything trained or measured so far."""

    def __init__(self, cfg: Config):
        self.cfg, self.scale, self.out = cfg, SCALES[cfg.scale], Path(cfg.out)
        self.device = data.pick_device(cfg.device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.encoder = data.load_image_encoder(data.TINY_IMAGE_ENCODER).to(self.device).requires_grad_(False)
        s = self.scale
        self.scenes = ([one_object(i, "train") for i in range(s.pictures)]
                       + [one_object(i, "held out") for i in range(s.held_out)])
        self.facts = torch.tensor([facts(scene) for scene in self.scenes])
        self.train, self.test = slice(0, s.pictures), slice(s.pictures, None)
        self.pictures, self.f = self.drawn()
        train = self.f[self.train].double().flatten(0, 2)
        self.f_mean, self.f_std = train.mean(0).float(), train.std(0).float()
        self.alpha_bar = noise_schedule(T, *BETAS).to(self.device)
        texts = sorted({caption(scene) for scene in self.scenes})
        encoder = data.load_text_encoder(data.TINY_TEXT_ENCODER, 64, self.device)
        c, mask = encoder(["", *texts])
        self.c, self.mask = c, mask
        place = {text: i + 1 for i, text in enumerate(texts)}
        self.text = torch.tensor([place[caption(scene)] for scene in self.scenes], device=self.device)
        self.models = {}

    def drawn(self):
        """Pictures, uint8 (N, 3, H, W), and their frozen features (N, h, w, d); kept on disk."""
        path = self.path("world")
        if not path.exists():
            pictures = np.stack([world.draw(scene) for scene in self.scenes])
            pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
            kept = {"pictures": pictures, "f": self.features(data.to_float(pictures, self.device)).cpu()}
            replace_file(path, lambda partial: torch.save(kept, partial))
        kept = torch.load(path, weights_only=True)
        return kept["pictures"].to(self.device), kept["f"].to(self.device)

    def x(self, rows) -> torch.Tensor:
        return data.to_float(self.pictures[rows], self.device)

    @torch.no_grad()
    def features(self, x) -> torch.Tensor:
        """Frozen patch features, in parts."""
        return torch.cat([self.encoder(part) for part in x.split(250)])

    def path(self, what: str, *settings, end=".pt") -> Path:
        scale = asdict(self.scale)
        scale = {name: value for name, value in scale.items() if name in MATTERS.get(what, scale)}
        key = [VERSION, world.VERSION, scale,
               *(asdict(part) if isinstance(part, Space) else part for part in settings)]
        return self.out / f"{what}-{data.digest_of(key)[:12]}{end}"

    def kept(self, what: str, compute, *settings) -> dict:
        """A measurement: read if it was made before, else made and written."""
        path = self.path(what, *settings, end=".json")
        if not path.exists():
            result = compute()
            replace_file(path, lambda partial: partial.write_text(json.dumps(result)))
        return json.loads(path.read_text())

    def rows(self, seed, stage, step, batch):
        return torch.from_numpy(data.order(seed, stage, self.scale.pictures, batch, step))

    def randn(self, seed, stage, step, what, shape):
        return torch.randn(shape, generator=data.generator(seed, stage, step, what)).to(self.device)

    # --- Stages 1 and 2

    def stage_1(self, space: Space, model: Autoencoder):
        """Projector and semantic decoder on frozen features (svae.py's loss), into `model`."""
        steps, batch, peak = self.scale.stage_1
        first = replace(space, kind="svae")         # one stage 1 for all kinds that begin with it
        parts = nn.ModuleList([model.projector, model.semantic_decoder])
        beta = space.beta / (space.z_dim if space.reduction == "mean" else 1)

        def loss_of(step):
            f = self.f[self.rows(space.seed, "lab 1", step, batch)]
            mu, log_var = model.projector(f)
            z = reparameterize(mu, log_var, self.randn(space.seed, "lab 1", step, "eps", mu.shape))
            # Eq. 8: L_S-VAE = L_semantic + beta * L_KL
            return (SEMANTIC[space.semantic](model.semantic_decoder(z), f)
                    + beta * kl_divergence(mu, log_var))

        return fit(self.path("stage1", first), parts, [{"params": list(parts.parameters())}], steps, peak,
                   loss_of, self.device, say=f"stage 1 for {space.kind} seed {space.seed}")[0]

    def autoencoder(self, space: Space) -> Autoencoder:
        """The trained encoder and decoders of a space, in eval mode; `.seconds` says what stage 2 took."""
        if space in self.models:
            return self.models[space]
        steps, batch, peak = self.scale.stage_2
        torch.manual_seed(space.seed)
        model = Autoencoder(space, self.encoder, self.f_mean, self.f_std, self.scale.widths).to(self.device)
        path = self.path("stage2", space)
        if not path.exists() and hasattr(model, "projector"):
            model.seconds = self.stage_1(space, model)
        if space.kind == "semantic":
            self.models[space] = model.eval()
            return model
        model.pixel_decoder.to(memory_format=torch.channels_last)
        beta = space.beta / (space.z_dim if space.reduction == "mean" else 1)
        weights = SimpleNamespace(alpha=float(space.kind == "psvae"), gamma=1.0, lpips_weight=0.0,
                                  beta=beta if model.trains else 0.0)

        def loss_of(step):
            rows = self.rows(space.seed, "lab 2", step, batch)
            x, f = self.x(rows), self.f[rows]
            mu, log_var = model.encode(x, f)
            z = reparameterize(mu, log_var, self.randn(space.seed, "lab 2", step, "eps", mu.shape))
            f_hat = model.semantic_decoder(z) if space.kind == "psvae" else f
            # Eq. 15 with this row's weights; what is frozen enters it without a gradient
            loss = psvae_loss(model.pixel_decoder(z), x, f_hat, f, mu, log_var, weights)["loss"]
            if space.kind == "psvae" and space.semantic != "mse":
                loss = loss + SEMANTIC[space.semantic](f_hat, f) - semantic_loss(f_hat, f)
            return loss

        model.seconds, _ = fit(path, model, model.trained(), steps, peak, loss_of, self.device,
                               say=f"stage 2 {space.kind} seed {space.seed}")
        self.models[space] = model.eval()
        return model

    @torch.no_grad()
    def posterior(self, space: Space, rows: slice):
        """mu, log_var (N, h, w, z_dim) of pictures."""
        model, x, f = self.autoencoder(space), self.x(rows), self.f[rows]
        parts = [model.encode(*pair) for pair in zip(x.split(250), f.split(250))]
        return [torch.cat(part) for part in zip(*parts)]

    @torch.no_grad()
    def decode(self, space: Space, z) -> torch.Tensor:
        """Pictures in [-1, 1], clamped and rounded to bytes as a file would hold them."""
        model = self.autoencoder(space)
        x = torch.cat([model.pixel_decoder(part) for part in z.split(125)]).clamp(-1, 1)
        return ((x + 1) * 127.5).round() / 127.5 - 1

    def statistics(self, mu, log_var):
        """Mean and variance of each channel of z, as psvae.channel_statistics."""
        flat = mu.double().flatten(0, 2)
        return flat.mean(0).float(), (flat.var(0) + log_var.double().exp().flatten(0, 2).mean(0)).float()

    # --- Stage 3

    def dit(self, space: Space, objective: str = "ddpm"):
        """(model, snapshots, mean, variance, seconds) of a DiT on the latents of a space."""
        steps, batch, peak = self.scale.stage_3
        mu, log_var = self.posterior(space, self.train)
        mean, variance = self.statistics(mu, log_var)
        torch.manual_seed(space.seed)
        model = DiT(mu.shape[1], mu.shape[-1], self.c.shape[-1], *self.scale.dit,
                    self.alpha_bar if OBJECTIVES[objective].GIVES_V else None).to(self.device)

        def loss_of(step):
            rows = self.rows(space.seed, "lab 3", step, batch)
            noise = lambda what: self.randn(space.seed, "lab 3", step, what, (batch, *mu.shape[1:]))
            z_0 = normalise(reparameterize(mu[rows], log_var[rows], noise("z_0")), mean, variance)
            g = data.generator(space.seed, "lab 3", step, "drop")
            text = torch.where((torch.rand(batch, generator=g) < 0.1).to(self.device), 0, self.text[rows])
            g = data.generator(space.seed, "lab 3", step, "t")
            c, mask = self.c[text], self.mask[text]
            return OBJECTIVES[objective].loss(self, model, z_0, noise("eps"), c, mask, g)

        marks = [max(1, round(share * steps)) for share in self.scale.marks]
        groups, path = [{"params": list(model.parameters())}], self.path("stage3", space, objective)
        seconds, snapshots = fit(path, model, groups, steps, peak, loss_of, self.device, decay=0.0,
                                 marks=marks, say=f"stage 3 {objective} {space.kind} seed {space.seed}")
        return model.eval(), snapshots, mean, variance, seconds

    @torch.no_grad()
    def generate(self, space: Space, objective="ddpm", mark=None, count=None) -> torch.Tensor:
        """Latents for the first held-out captions; the noise is the same for all spaces of one z_dim."""
        model, snapshots, mean, variance, _ = self.dit(space, objective)
        model.load_state_dict(snapshots[mark or max(snapshots)])
        count = count or self.scale.prompts
        text = self.text[self.test][:count]
        z_T = self.randn(space.seed, "lab 3", 0, "z_T", (count, model.grid, model.grid, len(mean)))
        both = torch.cat([text, torch.zeros_like(text)])
        z_0 = OBJECTIVES[objective].sample(self, model, z_T, self.c[both], self.mask[both])
        return z_0 * variance.sqrt() + mean

    # --- Measures, each a plain dict and kept on disk

    def pixels(self, space: Space) -> dict:
        """What comes back from mu of held-out pictures."""
        def compute():
            x = self.x(self.test)
            x_hat, edge = self.decode(space, self.posterior(space, self.test)[0]), near_edges(x)
            error = (x_hat - x).square().mean(1, keepdim=True) / 4
            mean = lambda mask: (error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
            part = lambda mask: -10 * mean(mask).log10().mean().item()
            return {"psnr": psnr(x_hat, x).mean().item(), "edge": part(edge), "flat": part(~edge),
                    "ssim": ssim(x_hat, x).mean().item(), "seconds": self.autoencoder(space).seconds}
        return self.kept("pixels", compute, space)

    def semantics(self, space: Space) -> dict:
        """What a linear map reads out of mu: attributes, and the frozen features; and the rate."""
        def compute():
            mu, log_var = self.posterior(space, slice(None))
            flat = (mu - mu[self.train].mean((0, 1, 2))).flatten(1)
            some = slice(0, self.scale.readers)
            result = read_out(flat[some], self.facts[some], flat[self.test], self.facts[self.test])
            f = self.f - self.f_mean
            f_hat = ridge(mu[some].flatten(0, 2), f[some].flatten(0, 2), 1e-4)(mu[self.test].flatten(0, 2))
            result["linear"] = explained(f_hat, f[self.test].flatten(0, 2))
            model = self.autoencoder(space)
            if space.kind in ("semantic", "svae", "psvae"):
                g = data.generator(space.seed, "lab 2", 0, "held out")
                eps = torch.randn(mu[self.test].shape, generator=g).to(self.device)
                for name, z in (("semantic", mu[self.test]),
                                ("noisy", reparameterize(mu[self.test], log_var[self.test], eps))):
                    with torch.no_grad():
                        result[name] = explained(model.semantic_decoder(z) - self.f_mean, f[self.test])
            if space.kind != "rae":         # whose latents are points
                result["rate"] = (kl_divergence(mu[self.test], log_var[self.test]) / mu.shape[-1]).item()
            result["active"] = (mu[self.train].flatten(0, 2).var(0) > 0.01).float().mean().item()
            result["sigma"] = (log_var[self.test] / 2).exp().mean().item()
            return result
        return self.kept("semantics", compute, space)

    @torch.no_grad()
    def seen(self, space: Space, z) -> torch.Tensor:
        """Features of what z stands for: of the decoded picture; without pixels, those from D_sem."""
        if space.kind == "semantic":
            return self.autoencoder(space).semantic_decoder(z)
        return self.features(self.decode(space, z))

    def generation(self, space: Space, objective="ddpm") -> dict:
        """{step: scores} of what the DiT draws; "mu": those of true pictures through the same decoder.

        Attributes are those that a picture comes nearest to (see `nearest`). Without pixels they are read by
        a linear map of D_sem(z), fitted on training pictures. fd is the Fréchet distance between frozen
        features (mean over the cells) of what was drawn and of training pictures.
        """
        def compute():
            some, first = slice(0, self.scale.readers), slice(0, self.scale.prompts)
            flat = lambda f: (f - self.f_mean).flatten(1)
            pooled = lambda f: f.mean((1, 2)).cpu().numpy()
            truth, reference = self.facts[self.test][first], pooled(self.f[some])
            if space.kind == "semantic":
                reader = fit_readers(flat(self.seen(space, self.posterior(space, some)[0])), self.facts[some])

            def score(z):
                f = self.seen(space, z)
                distance = {"fd": frechet_distance(pooled(f), reference)}
                if space.kind == "semantic":
                    read = [part.argmax(1).cpu() for part in reader(flat(f))]
                    return attributes_right(read, truth) | distance
                pictures = data.to_uint8(self.decode(space, z))
                distance["judge"] = float(np.mean([self.judged(x, i) for i, x in enumerate(pictures)]))
                return attributes_right(torch.tensor([nearest(x) for x in pictures]).T, truth) | distance

            *_, snapshots, _, _, seconds = self.dit(space, objective)
            result = {"seconds": seconds, "mu": score(self.posterior(space, self.test)[0][first])}
            for mark in sorted(snapshots):
                result[str(mark)] = score(self.generate(space, objective, mark))
            return result | {"floor": frechet_distance(pooled(self.f[self.test][first]), reference)}
        return self.kept("generation", compute, space, objective)

    def judged(self, picture: np.ndarray, i: int) -> bool:
        """Whether the judge reads, in the picture of held-out prompt i, just what the prompt says."""
        scene = self.scenes[self.scale.pictures + i]
        wanted = {name: getattr(scene.objects[0], name) for name in ("shape", "colour", "size")}
        return judge.check(judge.read(picture), {"objects": [wanted], "background": scene.background})


# --- The objective and the sampler of stage 3 ---------------------------------------------------------------

class Diffusion:
    """The guide's: Eq. 22, 32 and DDIM (Eq. 34) with guidance (Eq. 33)."""

    GIVES_V = True      # the DiT's head gives v, of which eps_hat is made

    @staticmethod
    def loss(lab, model, z_0, eps, c, mask, g):
        t = torch.randint(1, T + 1, (len(z_0),), generator=g).to(z_0.device)
        # Eq. 32: L_DiT = E || eps - eps_theta(z_t, t, c) ||^2, z_t by Eq. 22
        return dit_loss(eps, model(add_noise(z_0, t, eps, lab.alpha_bar), t, c, mask))

    @staticmethod
    def sample(lab, model, z_T, c, mask):
        steps, guidance = lab.scale.sampler
        return ddim(model, z_T, c, mask, lab.alpha_bar, sampling_times(T, steps), guidance)


OBJECTIVES = {"ddpm": Diffusion}


# --- Linear maps --------------------------------------------------------------------------------------------

def ridge(a: torch.Tensor, b: torch.Tensor, strength: float):
    """x -> the linear map (with a constant) of a onto b, least squares, float64; a (N, d), b (N, k).

    The penalty is `strength` times the mean eigenvalue of a's scatter: the same for spaces of any scale.
    """
    a, b = a.double(), b.double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = a - mean_a, b - mean_b
    penalty = strength * a.square().sum() / a.shape[1] + 1e-12
    few = len(a) < a.shape[1]               # then the N x N system is the smaller one of two equal ones
    gram = a @ a.T if few else a.T @ a
    gram.diagonal().add_(penalty)
    weight = a.T @ torch.linalg.solve(gram, b) if few else torch.linalg.solve(gram, a.T @ b)
    return lambda x: (x.double() - mean_a) @ weight + mean_b


def fit_readers(a, truth, strength=0.01):
    """A linear map onto the one-hot values of all attributes, and how it splits into them."""
    sizes = [len(options) for options in ATTRIBUTES.values()]
    wanted = torch.cat([F.one_hot(truth[:, i], size) for i, size in enumerate(sizes)], 1)
    read = ridge(a, wanted.to(a.device), strength)
    return lambda x: read(x).split(sizes, 1)


def attributes_right(read, truth) -> dict:
    """Share of right values of each attribute, their mean, and the share of pictures with all four right.

    read: one (N,) of indices for each attribute; truth (N, 4).
    """
    right = torch.stack([part == truth[:, i] for i, part in enumerate(read)], 1)
    result = {name: right[:, i].double().mean().item() for i, name in enumerate(ATTRIBUTES)}
    return result | {"mean": right.double().mean().item(), "all": right.all(1).double().mean().item()}


def read_out(a, facts_a, b, facts_b) -> dict:
    return attributes_right([part.argmax(1).cpu() for part in fit_readers(a, facts_a)(b)], facts_b)


def explained(f_hat, f) -> float:
    """Share of the variance of f (around its training mean 0) that f_hat explains."""
    return 1 - ((f_hat - f).square().sum() / f.square().sum()).item()


# --- Tables and figures -------------------------------------------------------------------------------------

def spread(values, form="{:.2f}") -> str:
    """mean ± standard deviation over seeds (N - 1), or the one value there is."""
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    mean = form.format(float(np.mean(values)))
    return f"{mean} ± {form.format(float(np.std(values, ddof=1)))}" if len(values) > 1 else mean


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown, without the columns in which no line has a value."""
    keep = [i for i in range(len(head)) if any(line[i] != "–" for line in lines)]
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row[i] for i in keep) + " |" for row in rows)


def publish(lab: Lab, name: str, *parts: str):
    """Prints tables, and with --page writes them into notes/claims/<name>.md."""
    cfg = lab.cfg
    where = torch.cuda.get_device_name() if lab.device.type == "cuda" else "one CPU core (AVX2)"
    how = (f"Seeds {', '.join(map(str, cfg.seeds))}; `--scale {cfg.scale}`: {lab.scale.pictures:,} pictures, "
           f"{lab.scale.held_out} held out, {lab.scale.prompts} prompts; seconds are those of {where}, "
           f"torch {torch.__version__}.")
    text = "\n\n".join([*parts, how])
    print(text + "\n", flush=True)
    if cfg.page and cfg.scale != "quick":
        into_page(ROOT / f"notes/claims/{name}.md", text)


def figure_path(cfg: Config, name: str) -> Path:
    return ROOT / f"notes/claims/{name}.png" if cfg.page and cfg.scale != "quick" else Path(cfg.out) / f"{name}.png"


def pyplot():
    """matplotlib, or None where it is not installed: tables do not need it."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt
