"""off_manifold.py - Eq. 1, the guide's Problem 1: does a diffusion model fall beside data that fill
only a thin sheet of its space, and does a small KL autoencoder help?

The paper's toy. Points in the shape of the letters "PS" are embedded in R^D by an orthonormal Q, x
= Q y. The same 256-wide network learns to draw y in R^2, x in R^D, or the latent of an autoencoder
of x, with this project's own objective (noise_schedule, add_noise, dit_loss of dit.py) and sampler
(ddim_step of sample.py).

    python notes/claims/off_manifold.py           every run below, 3 seeds; killed, it goes on
    python notes/claims/off_manifold.py --page    the same into off_manifold.md and .png
    python notes/claims/off_manifold.py --quick   a few seconds, to see that it works

    raw D        x as it is: in the sheet's plane the same ratio of signal to noise as in R^2
    scaled D     every channel of x to variance 1, as in dit.py: D / 2 times the signal
    latent       svae.py's SVAE, Eq. 5 to 11, on the scaled x; diffusion on its scaled z
    residual D   raw, but each hidden layer adds to its input: is it the space or the network?

What is measured, in units of the letters' standard deviation, on points sent back to R^D:
    beside       distance to the sheet, |x - Q Q^T x|, which projecting back does not see
    nearest      distance of Q^T x to the nearest of 10,000 true points
    both         distance of x to the nearest true point in R^D
each as the mean over all points and over the worst 5 %.
"""

import itertools
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import dit  # noqa: E402
import svae  # noqa: E402
from notes.claims.claims import into_page, spread, table  # noqa: E402
from sample import ddim_step, sampling_times  # noqa: E402

WIDTH = 256             # of the network, as in the paper
ALPHA_BAR = dit.schedule_of(data.plain(dit.Config()))
LEARNING_RATE = 1e-3    # AdamW, constant: an error after n steps is then that of a run of n steps
EMA = 0.999             # decay of the averaged weights that are sampled, with dit.py's warm-up
DDIM_STEPS = 50
TRUE = 10_000           # points to compare with
WORST = 0.05            # the share that the paper looks at


@dataclass(frozen=True)
class Config:
    dims: tuple[int, ...] = (4, 8, 16, 32, 64)  # ambient dimensions D, besides 2
    steps: int = 4000                       # optimisation steps of each diffusion model
    autoencoder_steps: int = 2000           # optimisation steps of each autoencoder
    batch: int = 128                        # fresh points a step
    drawn: int = 2048                       # points that a model draws to be measured
    seeds: int = 3                          # each has its own Q, weights, points and noise
    out: str = "out/off_manifold.json"      # what was measured so far; a figure goes beside it
    page: bool = False                      # write tables and figure into notes/claims/ too
    quick: bool = False                     # a few steps, one seed, D = 8

    def __post_init__(self):
        data.check(self, dims=(3, 4096), steps=(16, 1e7), autoencoder_steps=(1, 1e7),
                   batch=(2, 1e6), drawn=(20, 1e6), seeds=(1, 1000))


@dataclass(frozen=True)
class Variant:
    dim: int                # D
    scaled: bool = False
    z_dim: int = 0          # of the autoencoder; 0: none
    beta: float = 0.0
    residual: bool = False  # network with skip connections

    @property
    def name(self) -> str:
        if self.z_dim:
            return f"latent {self.z_dim} of {self.dim}, beta {self.beta:g}"
        return f"{'scaled' if self.scaled else 'residual' if self.residual else 'raw'} {self.dim}"


def variants(cfg: Config) -> list[Variant]:
    """In the order of the tables."""
    high, middle = max(cfg.dims), 8 if 8 in cfg.dims else cfg.dims[0]
    # which half of the remedy is it: the squeeze to fewer channels, or the KL term?
    latents = [Variant(middle, z_dim=z_dim, beta=beta) for z_dim in (middle, 2)
               for beta in (1e-4, 0)]
    if high != middle:
        latents.append(Variant(high, z_dim=2, beta=1e-4))
    return [*(Variant(d) for d in (2, *cfg.dims)), *(Variant(d, scaled=True) for d in cfg.dims),
            Variant(high, residual=True), *latents]


# --- Data -----------------------------------------------------------------------------------------

class Letters:
    """Uniform on the ink of "PS", each of the two axes with mean 0 and variance 1."""

    def __init__(self, height: int = 160):
        image = Image.new("L", (2 * height, 2 * height))
        ImageDraw.Draw(image).text((height // 4, height // 8), "PS", 255,
                                   ImageFont.load_default(height), stroke_width=height // 40)
        ink = torch.from_numpy(np.argwhere(np.asarray(image) > 127)[:, ::-1].copy()).float()
        ink[:, 1] *= -1                                     # pixels count downwards
        self.ink, self.mean, self.std = ink, ink.mean(0), ink.std(0)

    def __call__(self, n: int, g: torch.Generator) -> torch.Tensor:
        """(n, 2): a pixel of the ink, and a place inside the pixel."""
        y = self.ink[torch.randint(len(self.ink), (n,), generator=g)]
        y = y + torch.rand(n, 2, generator=g) - 0.5
        return (y - self.mean) / self.std


def embedding(dim: int, g: torch.Generator) -> torch.Tensor:
    """Q (D, 2) with orthonormal columns; in R^2 the identity."""
    return torch.eye(2) if dim == 2 else torch.linalg.qr(torch.randn(dim, 2, generator=g))[0]


# --- The diffusion model --------------------------------------------------------------------------

class Denoiser(nn.Module):
    """eps_hat (B, d) from z_t (B, d) and t (B,). Only the first and the last layer know d."""

    def __init__(self, d: int, residual: bool = False):
        super().__init__()
        self.residual = residual
        self.embed, self.time = nn.Linear(d, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, d)

    def forward(self, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.embed(z_t) + self.time(dit.timestep_embedding(t, WIDTH))
        for layer in self.hidden:
            h = h + layer(F.silu(h)) if self.residual else layer(F.silu(h))
        return self.head(h if self.residual else F.silu(h))


def learn_to_denoise(draw_z_0, d: int, residual: bool, cfg: Config, seed: int):
    """Trains on draw_z_0(n, generator) -> (n, d); yields (steps, averaged model) five times on the
    way."""
    torch.manual_seed(seed)
    model, average = Denoiser(d, residual), Denoiser(d, residual)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True)
    points, noise = (data.generator(seed, "off_manifold", 0, what) for what in ("points", "noise"))
    for step in range(cfg.steps):
        z_0 = draw_z_0(cfg.batch, points)
        t = torch.randint(1, len(ALPHA_BAR), (cfg.batch,), generator=noise)
        eps = torch.randn(z_0.shape, generator=noise)
        # Eq. 22 and 32
        loss = dit.dit_loss(eps, model(dit.add_noise(z_0, t, eps, ALPHA_BAR), t))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(EMA, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        if step + 1 in milestones(cfg):
            yield step + 1, average


def milestones(cfg: Config) -> list[int]:
    return [cfg.steps // part for part in (16, 8, 4, 2, 1)]


@torch.no_grad()
def draw(model: Denoiser, n: int, d: int, seed: int) -> torch.Tensor:
    """(n, d) by Eq. 34 with eta = 0, always from the same noise."""
    times = sampling_times(dit.Config.T, DDIM_STEPS)
    z_t = torch.randn(n, d, generator=data.generator(seed, "off_manifold", 0, "draw"))
    for t, t_prev in zip(times, times[1:]):
        eps = model(z_t, torch.full((n,), t))
        z_t, _ = ddim_step(z_t, eps, ALPHA_BAR[t].item(), ALPHA_BAR[t_prev].item(), 0.0, 0)
    return z_t


# --- The spaces it works in -----------------------------------------------------------------------

def space(variant: Variant, Q: torch.Tensor, letters: Letters, cfg: Config, seed: int):
    """(draw_z_0, back, dimension): points of the space that the diffusion model works in, and back
    to R^D."""
    g = data.generator(seed, "off_manifold", 0, "statistics")
    if not variant.scaled and not variant.z_dim:
        return lambda n, g: letters(n, g) @ Q.T, lambda z: z, variant.dim
    x = letters(TRUE, g) @ Q.T
    x_mean, x_variance = x.mean(0), x.var(0)
    draw_x = lambda n, g: dit.normalise(letters(n, g) @ Q.T, x_mean, x_variance)
    unscale = lambda x: x * x_variance.sqrt() + x_mean
    if variant.scaled:
        return draw_x, unscale, variant.dim

    model = train_autoencoder(draw_x, variant, cfg, seed)

    @torch.no_grad()
    def draw_z(n, g):
        mu, log_var = model.projector(draw_x(n, g))
        return svae.reparameterize(mu, log_var, torch.randn(mu.shape, generator=g))

    z = draw_z(TRUE, g)
    z_mean, z_variance = z.mean(0), z.var(0)
    z_back = lambda z: model.semantic_decoder(z * z_variance.sqrt() + z_mean)
    decode = torch.no_grad()(lambda z: unscale(z_back(z)))
    return lambda n, g: dit.normalise(draw_z(n, g), z_mean, z_variance), decode, variant.z_dim


def train_autoencoder(draw_x, variant: Variant, cfg: Config, seed: int) -> svae.SVAE:
    """Stage 1 with x in the place of the features: Eq. 5 to 11, svae.py's own network and loss."""
    torch.manual_seed(seed)
    model = svae.SVAE(variant.dim, variant.z_dim)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    g = data.generator(seed, "off_manifold", 0, "autoencoder")
    for step in range(cfg.autoencoder_steps):
        for group in optimizer.param_groups:
            group["lr"] = data.learning_rate(step, cfg.autoencoder_steps, 50, 2e-3)
        x = draw_x(cfg.batch, g)
        x_hat, mu, log_var = model(x, torch.randn(len(x), variant.z_dim, generator=g))
        svae.svae_loss(x_hat, x, mu, log_var, variant.beta)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


# --- Errors ---------------------------------------------------------------------------------------

def errors(x: torch.Tensor, Q: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    """How far points x (n, D) are from a sheet spanned by Q (D, 2) and from true points (m, 2) on
    it, on average and at worst."""
    y = x @ Q
    beside = (x - y @ Q.T).norm(dim=1)
    nearest = torch.cat([torch.cdist(part, true).min(1).values for part in y.split(1024)])
    # x - Q y' = (x - Q Q^T x) + Q (Q^T x - y'), and the two are orthogonal
    parts = {"beside": beside, "nearest": nearest, "both": (beside ** 2 + nearest ** 2).sqrt()}
    worst = lambda e: e.topk(max(1, round(WORST * len(e)))).values.mean().item()
    return {key: value for name, e in parts.items()
            for key, value in ((name, e.mean().item()), (f"{name}_worst", worst(e)))}


def measure(variant: Variant, cfg: Config, seed: int, letters: Letters) -> dict:
    """One run: errors after each milestone, and of true points there and back ("floor"); some
    points."""
    began = time.perf_counter()
    Q = embedding(variant.dim, data.generator(seed, "off_manifold", variant.dim, "Q"))
    true = letters(TRUE, data.generator(seed, "off_manifold", 0, "true"))
    draw_z_0, back, d = space(variant, Q, letters, cfg, seed)
    there_and_back = back(draw_z_0(cfg.drawn, data.generator(seed, "off_manifold", 0, "fresh")))
    run = {"floor": errors(there_and_back, Q, true), "steps": {}}
    for step, model in learn_to_denoise(draw_z_0, d, variant.residual, cfg, seed):
        x = back(draw(model, cfg.drawn, d, seed))
        run["steps"][str(step)] = errors(x, Q, true)
    return run | {"points": [[round(v, 3) for v in p] for p in (x @ Q)[:1500].tolist()],
                  "seconds": round(time.perf_counter() - began, 1)}


# --- Tables and figure ----------------------------------------------------------------------------

def tables(runs: dict[str, list[dict]], cfg: Config) -> str:
    """runs: by the name of a variant, one for each seed."""
    said = lambda errors, measure: spread([one[measure] for one in errors], "{:.3f}")
    at = lambda name, step, measure: said([run["steps"][str(step)] for run in runs[name]], measure)
    heads = ["space", *(f"{step:,} steps" for step in milestones(cfg)),
             "true points, there and back"]
    rows = [[name, *(at(name, step, "nearest_worst") for step in milestones(cfg)),
             said([run["floor"] for run in runs[name]], "nearest_worst")] for name in runs]
    parts = ["Distance to the nearest true point after projecting back, worst 5 %, as training "
             f"goes on:\n\n{table(heads, rows)}"]
    columns = ("beside", "beside_worst", "nearest", "nearest_worst", "both_worst")
    heads = ["space", *(name.replace("_worst", ", worst 5 %") for name in columns)]
    rows = [[name, *(at(name, cfg.steps, measure) for measure in columns)] for name in runs]
    parts.append(f"Every space after {cfg.steps:,} steps:\n\n{table(heads, rows)}")
    seconds = [run["seconds"] for seeds in runs.values() for run in seeds]
    parts.append(f"± is the standard deviation over seeds ({cfg.seeds}). {len(seconds)} runs of "
                 f"{statistics.median(seconds):.0f} s (median); {torch.get_num_threads()} "
                 f"thread(s), torch {torch.__version__}.")
    return "\n\n".join(parts)


def figure(runs: dict[str, list[dict]], path: Path, side=96):
    """What is drawn in each space, seen in the plane of the sheet: darker where there is more."""
    def picture(points):
        x, y = np.array(points).T
        seen = np.histogram2d(-y, x, side, ((-2.6, 2.6), (-2.6, 2.6)))[0]
        return np.repeat(np.uint8(255 * np.exp(-seen))[..., None], 3, axis=2)

    true = Letters()(1500, torch.Generator().manual_seed(0)).tolist()
    cells = [(picture(true), "true points")]
    cells += [(picture(seeds[0]["points"]), name) for name, seeds in runs.items()]
    rows = [zip(*cells[i:i + 6]) for i in range(0, len(cells), 6)]
    data.save_picture(data.grid(*map(list, zip(*rows))), path)
    print(f"wrote {path}")


@data.program
def main(argv: list[str] | None = None):
    cfg = Config(**data.read_flags(Config, argv, __doc__))
    if cfg.quick:
        cfg = replace(cfg, dims=(8,), steps=32, autoencoder_steps=32, drawn=64, seeds=1)
    out, letters = Path(cfg.out), Letters()
    kept = data.read_json(out)
    runs: dict[str, list[dict]] = {}
    for seed, variant in itertools.product(range(cfg.seeds), variants(cfg)):
        key = (f"{variant.name}; seed {seed}, {cfg.steps} and {cfg.autoencoder_steps} steps "
               f"of {cfg.batch}, {cfg.drawn} drawn")
        if key not in kept:
            kept[key] = measure(variant, cfg, seed, letters)
            data.write_json(out, kept)
        run = kept[key]
        runs.setdefault(variant.name, []).append(run)
        last = run["steps"][str(cfg.steps)]
        print(f"{variant.name}, seed {seed}: worst 5 %: beside {last['beside_worst']:.3f}, "
              f"nearest {last['nearest_worst']:.3f}; {run['seconds']:.0f} s", flush=True)
    text = tables(runs, cfg)
    print(f"\n{text}\n")
    here = Path(__file__).parent
    page = cfg.page and not cfg.quick
    figure(runs, here / "off_manifold.png" if page else out.with_suffix(".png"))
    if page:
        into_page(here / "off_manifold.md", text)


if __name__ == "__main__":
    sys.exit(main())
