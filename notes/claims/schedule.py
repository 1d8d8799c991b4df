"""Eq. 21, 33, 34: what noise schedule, DDIM steps, eta and guidance do to the pictures of a trained
model.

    python notes/claims/schedule.py                     the model that sample.py would take
    python notes/claims/schedule.py --model out_linear  another one, of either schedule
    python notes/claims/schedule.py --page              the same into schedule.md and .png
    python notes/claims/schedule.py --quick             a few seconds, to see that it works

Prompts are those of geneval.py, spread evenly over its tasks. What is measured:
    right        share of pictures in which the judge finds what the prompt says
    unreadable   share of pictures that the judge cannot read
    change       root mean square difference, of 255 grey levels, from the picture that the same
                 noise gives after the most steps: what fewer steps cost (at eta 0)
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
from dit import add_noise, dit_loss, noise_schedule, normalise, v_of  # noqa: E402
from notes import curves as drawing  # noqa: E402
from notes.claims.claims import into_page, pyplot, spread, table  # noqa: E402
from notes.world import geneval, judge, world  # noqa: E402
from sample import PRESETS, Pipeline, ddim, draw, find_model, sampling_times  # noqa: E402
from sample import Config as SampleConfig  # noqa: E402

SCHEDULES = ("scaled_linear", "linear")
NOISE_LEVELS = 40       # values of t at which Eq. 32 is measured
REPEATS = 8             # true pictures of each prompt, for Eq. 32
ETAS = (0.0, 0.25, 0.5, 1.0)
GUIDANCES = (1.0, 1.5, 3.0, 7.5, 15.0)


@dataclass(frozen=True)
class Config:
    model: str = ""                         # folder of the model; default: out or the shipped one
    prompts: int = 40                       # of geneval.py's 553
    seeds: int = 3                          # noises: each draws every prompt once
    steps: tuple[int, ...] = (5, 10, 25, 50, 100, 250)  # DDIM steps
    batch: int = 64                         # pictures drawn at once
    out: str = "out/schedule.png"           # the figure
    page: bool = False                      # write tables and figure into notes/claims/ too
    device: str = "auto"                    # auto, cpu or cuda
    quick: bool = False                     # few prompts, few steps, one seed

    def __post_init__(self):
        data.check(self, prompts=(2, 553), seeds=(1, 1000), steps=(1, 100_000), batch=(1, 1e6))
        data.check_choice(self, device=("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class Setting:
    """A row of the tables."""
    group: str          # steps, spacing, eta or guidance
    x: float            # what is varied in the group
    name: str
    times: tuple[int, ...]
    guidance: float
    eta: float = 0.0


def choose_prompts(n: int) -> list[dict]:
    """n of geneval.py's, evenly over its tasks; none with a held-out pair, which true pictures may
    lack."""
    rows = [row for row in geneval.prompts() if not row["heldout"]]
    return [rows[i * len(rows) // n] for i in range(n)]


# --- The schedules --------------------------------------------------------------------------------

def alpha_bar_of(pipeline: Pipeline, schedule: str) -> torch.Tensor:
    settings = (pipeline.config[name] for name in ("T", "beta_start", "beta_end"))
    return noise_schedule(*settings, schedule)


def times_like(pipeline: Pipeline, schedule: str, steps: int) -> tuple[int, ...]:
    """The model's own times whose alpha_bar is nearest to those at which another schedule would
    sample.

    A trained model cannot change its schedule, but it can be sampled at the noise levels of
    another.
    """
    wanted = alpha_bar_of(pipeline, schedule)[sampling_times(pipeline.config["T"], steps)]
    times = (logit(pipeline.alpha_bar)[None] - logit(wanted)[:, None]).abs().argmin(1).tolist()
    return tuple(sorted(set(times), reverse=True))


def logit(alpha_bar: torch.Tensor) -> torch.Tensor:
    """log of the ratio of signal to noise; at alpha_bar = 1 a large number instead of infinity."""
    alpha_bar = alpha_bar.clamp(max=1 - 1e-9)
    return (alpha_bar / (1 - alpha_bar)).log()


@torch.no_grad()
def loss_by_noise(pipeline: Pipeline, prompts: list[dict]):
    """(t, Eq. 32 at t) for NOISE_LEVELS times, with the text, on latents of true pictures."""
    prompts = [prompt for prompt in prompts for _ in range(REPEATS)]
    pictures = np.stack([geneval.true_picture(prompt["requirement"], world.generator("schedule", i))
                         for i, prompt in enumerate(prompts)])
    x = data.to_float(torch.from_numpy(pictures).permute(0, 3, 1, 2), pipeline.device)
    z_0 = normalise(pipeline.psvae.encode(x)[0], pipeline.mean, pipeline.variance)
    c, mask = pipeline.text_encoder([prompt["text"] for prompt in prompts])
    times = torch.linspace(1, pipeline.config["T"], NOISE_LEVELS).round().long().unique()
    alpha_bar, losses = pipeline.alpha_bar.to(z_0.device), []
    for t in times:
        g = data.generator(0, "schedule", int(t), "eps")
        eps = torch.randn(z_0.shape, generator=g).to(z_0.device)
        t = torch.full((len(z_0),), int(t), device=z_0.device)
        target = v_of(z_0, t, eps, alpha_bar) if pipeline.config["predict"] == "v" else eps
        prediction = pipeline.dit(add_noise(z_0, t, eps, alpha_bar), t, c, mask)
        losses.append(dit_loss(target, prediction).cpu())
    return times, torch.stack(losses).double()


def schedule_table(pipeline: Pipeline, times: torch.Tensor, losses: torch.Tensor) -> str:
    """What either schedule asks of training, and what this model's loss would be at the noise it
    draws."""
    rows, own_levels = [], logit(pipeline.alpha_bar[times]).flip(0).numpy()     # increasing
    for schedule in SCHEDULES:
        alpha_bar = alpha_bar_of(pipeline, schedule)[1:]
        mean = np.interp(logit(alpha_bar).numpy(), own_levels, losses.flip(0).numpy()).mean()
        share = lambda low, high: f"{((alpha_bar > low) & (alpha_bar <= high)).double().mean():.0%}"
        mine = " (this model's)" if schedule == pipeline.config["schedule"] else ""
        rows.append([schedule.replace("_", " ") + mine, f"{alpha_bar[-1]:.1e}", share(0.9, 1),
                     share(0.1, 0.9), share(0, 0.1), f"{mean:.4f}"])
    return table(["schedule", "alpha_bar at T", "t with alpha_bar over 0.9", "0.1 to 0.9",
                  "under 0.1", "Eq. 32 over its t, this model"], rows)


# --- Drawing and measuring ------------------------------------------------------------------------

def settings(pipeline: Pipeline, cfg: Config, guidance: float) -> list[Setting]:
    """All rows; the first takes the most steps, and is what the others are held against."""
    T, other = pipeline.config["T"], next(s for s in SCHEDULES if s != pipeline.config["schedule"])
    counts = sorted({min(n, T) for n in cfg.steps}, reverse=True)
    middle = min(SampleConfig.steps, counts[0])
    own = lambda n: tuple(sampling_times(T, n))
    rows = [Setting("steps", n, f"{n} steps", own(n), guidance) for n in counts]
    rows += [Setting("spacing", n, f"{n} steps, noise levels of {other.replace('_', ' ')}",
                     times_like(pipeline, other, n), guidance) for n in counts if n <= middle]
    rows += [Setting("eta", eta, f"eta {eta:g}", own(middle), guidance, eta) for eta in ETAS]
    return rows + [Setting("guidance", s, f"guidance {s:g}", own(middle), s) for s in GUIDANCES]


@torch.no_grad()
def draw_all(pipeline: Pipeline, texts: list[str], seed: int, how: Setting, batch: int):
    """Pipeline.__call__ at times of our own, from the noise of (seed, number)."""
    pictures = []
    for start in range(0, len(texts), batch):
        some = texts[start:start + batch]
        c, mask = pipeline.text_encoder([*some, *[""] * len(some)])
        generators = [data.generator(seed, "schedule", start + i, "z_T") for i in range(len(some))]
        shape = (len(some), *pipeline.latent_shape)
        z_T = draw(generators, torch.empty(shape, device=pipeline.device))
        z_0 = ddim(pipeline.dit, z_T, c, mask, pipeline.alpha_bar, how.times, how.guidance,
                   eta=how.eta, generators=generators, predict=pipeline.config["predict"])
        pictures.append(pipeline.decode(z_0))
    return np.concatenate(pictures)


def measure(pipeline: Pipeline, prompts: list[dict], rows: list[Setting], cfg: Config) -> dict:
    """{setting: {measure: a value for each seed, "pictures": those of seed 0}}"""
    texts, results, most = [row["text"] for row in prompts], {}, None
    for row in rows:
        began = time.perf_counter()
        drawn = [draw_all(pipeline, texts, seed, row, cfg.batch) for seed in range(cfg.seeds)]
        values = {"seconds": [(time.perf_counter() - began) / cfg.seeds / len(texts)]}
        most = most or drawn
        for pictures, best in zip(drawn, most):
            facts = [judge.read(picture) for picture in pictures]
            one = {"right": np.mean([judge.check(f, p["requirement"])
                                     for f, p in zip(facts, prompts)]),
                   "unreadable": np.mean([f is None for f in facts])}
            if row.group in ("steps", "spacing") and row.x < rows[0].x:
                one["change"] = np.sqrt(np.mean((pictures.astype(float) - best) ** 2))
            for name, value in one.items():
                values.setdefault(name, []).append(float(value))
        results[row] = values | {"pictures": drawn[0]}
        print(f"{row.name}: right {np.mean(values['right']):.1%}", flush=True)
    return results


def result_tables(results: dict) -> list[str]:
    forms = {"right": "{:.1%}", "unreadable": "{:.1%}", "change": "{:.1f}", "seconds": "{:.2f}"}
    return [table([group, *forms], [[row.name, *(spread(values.get(name, []), form)
                                                 for name, form in forms.items())]
                                    for row, values in results.items() if row.group == group])
            for group in dict.fromkeys(row.group for row in results)]


def figure(results: dict, film: list, losses: tuple, pipeline: Pipeline, path: Path):
    """A film, the same noise with each setting, and curves."""
    plt = pyplot()
    if plt is None:
        return
    groups = {group: sorted((row for row in results if row.group == group), key=lambda row: row.x)
              for group in ("steps", "eta", "guidance")}
    strips = [[(f"t = {t}", frame[0]) for t, frame in film]]
    strips += [[(row.name, results[row]["pictures"][0]) for row in rows]
               for rows in groups.values()]
    columns = max(map(len, strips))
    sheet = plt.figure(figsize=(1.3 * columns, 1.6 * len(strips) + 3), layout="constrained")
    above, below = sheet.subfigures(2, 1, height_ratios=(1.6 * len(strips), 3))
    for i, strip in enumerate(strips):
        for j, (title, picture) in enumerate(strip):
            axes = above.add_subplot(len(strips), columns, i * columns + j + 1)
            axes.imshow(picture)
            axes.set_title(title, fontsize=7)
            axes.axis("off")
    *curves, last = below.subplots(1, 4)
    for axes, (group, rows) in zip(curves, groups.items()):
        right = np.array([results[row]["right"] for row in rows])
        axes.errorbar([row.x for row in rows], 100 * right.mean(1), 100 * right.std(1), marker="o",
                      capsize=2)
        axes.set(xlabel=group, title="right by the judge, %", ylim=(0, 105),
                 xscale="linear" if group == "eta" else "log")
    times, values = losses
    last.plot(logit(pipeline.alpha_bar[times]), values, "k-")
    last.set(xlabel="log of signal to noise", title="Eq. 32, this model")
    drawing.save(sheet, path)


@data.program
def main(argv: list[str] | None = None):
    cfg = Config(**data.read_flags(Config, argv, __doc__))
    if cfg.quick:
        cfg = replace(cfg, prompts=3, seeds=1, steps=(2, 4))
    began, folder = time.perf_counter(), find_model(cfg.model)
    pipeline = Pipeline(folder, data.pick_device(cfg.device))
    if pipeline.size != world.CANVAS:
        raise data.UserError(f"{folder} draws pictures of {pipeline.size} px; the judge reads "
                             f"those of {world.CANVAS}.")
    guidance = PRESETS.get(pipeline.config["preset"], {}).get("guidance", SampleConfig.guidance)
    prompts = choose_prompts(cfg.prompts)
    losses = loss_by_noise(pipeline, prompts)
    results = measure(pipeline, prompts, settings(pipeline, cfg, guidance), cfg)
    text = "\n\n".join((
        f"{folder.name}, {pipeline.step:,} steps, {pipeline.config['schedule'].replace('_', ' ')} "
        f"schedule. {cfg.prompts} prompts, {cfg.seeds} seeds (± is the standard deviation over "
        f"them), guidance {guidance:g} and eta 0 unless said.",
        schedule_table(pipeline, *losses), *result_tables(results),
        f"{(time.perf_counter() - began) / 60:.1f} minutes, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}, {pipeline.device}."))
    print(f"\n{text}\n")
    film: list = []
    pipeline([prompts[0]["text"]], [0], guidance=guidance, film=film,
             steps=min(SampleConfig.steps, max(cfg.steps)))
    here = Path(__file__).parent
    figure(results, film, losses, pipeline, here / "schedule.png" if cfg.page else Path(cfg.out))
    if cfg.page:
        into_page(here / "schedule.md", text)


if __name__ == "__main__":
    sys.exit(main())
