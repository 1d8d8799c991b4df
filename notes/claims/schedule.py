"""schedule.py - the noise schedule of Eq. 21, the steps and eta of Eq. 34, the guidance of Eq. 33:
what does each do to the pictures of a trained model?

    python notes/claims/schedule.py                     the model that sample.py would take; prints the tables
    python notes/claims/schedule.py --model out_linear  another model folder, of either schedule
    python notes/claims/schedule.py --page              the same into notes/claims/schedule.md and .png (matplotlib)
    python notes/claims/schedule.py --quick             a few seconds, to see that it works

Prompts are those of geneval.py, spread evenly over its tasks. For each one true pictures of the built-in
world are made too, with everything that the prompt leaves open left to chance. What is measured:
    right        share of pictures that the judge finds to be what the prompt says
    unreadable   share of pictures that the judge cannot read
    Fréchet      distance between the latent vectors of drawn and true pictures, as Gaussians, all cells of
                 the grid together (in normalised latents: the true ones have variance 1 in each channel)
    spread       root mean square of the drawn normalised latents; of true ones it is about 1
    change       root mean square difference, of 255 grey levels, from the picture that the same noise gives
                 after the most steps: what fewer steps cost (where the path is the same: eta 0)
"""

import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data                                                                                       # noqa: E402
from dit import add_noise, dit_loss, noise_schedule, normalise                                    # noqa: E402
from notes.world import geneval, judge, world                                                           # noqa: E402
from notes.claims.off_manifold import into_page                                                          # noqa: E402
from psvae import frechet_distance                                                                # noqa: E402
from sample import PRESETS, SHIPPED, Pipeline, ddim, draw, find_model, sampling_times             # noqa: E402
from sample import Config as SampleConfig                                                         # noqa: E402

SCHEDULES = ("scaled_linear", "linear")
NOISE_LEVELS = 40       # values of t at which Eq. 32 is measured
REPEATS = 8             # true pictures of each prompt


@dataclass(frozen=True)
class Config:
    model: str = ""                         # folder of psvae.pt and dit.pt; default: out or the shipped one
    prompts: int = 40                       # of geneval.py's 553
    seeds: int = 3                          # noises: every one draws each prompt once
    steps: tuple[int, ...] = (5, 10, 25, 50, 100, 250)  # DDIM steps; the others are held against the most
    batch: int = 64                         # pictures drawn at once
    out: str = "out/schedule.png"           # the figure
    page: bool = False                      # write tables and figure into notes/claims/ too
    device: str = "auto"                    # auto, cpu or cuda
    quick: bool = False                     # few prompts, few steps, one seed

    def __post_init__(self):
        data.check(self, prompts=(2, 553), seeds=(1, 1000), steps=(1, 100_000), batch=(1, 1e6))
        data.check_choice(self, device=("auto", "cpu", "cuda"))


ETAS = (0.25, 0.5, 1.0)
GUIDANCES = (1.0, 1.5, 2.5, 4.0, 7.5, 15.0)


# --- Prompts and true pictures ------------------------------------------------------------------------------

def choose_prompts(n: int) -> list[dict]:
    """n of geneval.py's, evenly over its tasks; none with a held-out pair, which true pictures may lack."""
    rows = [row for row in geneval.prompts() if not row["heldout"]]
    return [rows[i * len(rows) // n] for i in range(n)]


def true_picture(requirement: dict, rng: np.random.Generator) -> np.ndarray:
    """A picture that meets a requirement of geneval.py, with all else as scenes of the world have it."""
    while True:
        objects = []
        for wanted in requirement["objects"]:
            colour, shape = world.pick_look(rng, "train", wanted.get("colour"), wanted["shape"])
            look = {"size": wanted.get("size") or world.choose(rng, world.SIZES),
                    "style": wanted.get("style") or world.choose(rng, world.STYLES, (0.65, 0.35))}
            objects += [world.Object(shape, colour, **look)] * wanted.get("count", 1)
        placed = world.place(objects, rng)
        background = requirement.get("background") or world.choose(rng, world.BACKGROUNDS)
        if placed and judge.check(world.Scene(background, placed), requirement):
            return world.draw(world.Scene(background, placed))


@torch.no_grad()
def encode(pipeline: Pipeline, pictures: list[np.ndarray]) -> torch.Tensor:
    """Normalised mu (N, h, w, z_dim)."""
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return torch.cat([normalise(pipeline.psvae.encode(data.to_float(part, pipeline.device))[0], pipeline.mean,
                                pipeline.variance) for part in x.split(256)])


# --- The schedules ------------------------------------------------------------------------------------------

def alpha_bar_of(pipeline: Pipeline, schedule: str) -> torch.Tensor:
    return noise_schedule(*(pipeline.config[name] for name in ("T", "beta_start", "beta_end")), schedule)


def times_like(pipeline: Pipeline, schedule: str, steps: int) -> tuple[int, ...]:
    """The model's own times whose alpha_bar is nearest to those at which another schedule would sample.

    A trained model cannot change its schedule, but it can be sampled at the noise levels of another.
    """
    wanted = alpha_bar_of(pipeline, schedule)[sampling_times(pipeline.config["T"], steps)]
    times = (logit(pipeline.alpha_bar)[None] - logit(wanted)[:, None]).abs().argmin(1).tolist()
    return tuple(sorted(set(times), reverse=True))


def logit(alpha_bar: torch.Tensor) -> torch.Tensor:
    """log of the ratio of signal to noise; at alpha_bar = 1 a large number instead of infinity."""
    alpha_bar = alpha_bar.clamp(max=1 - 1e-9)
    return (alpha_bar / (1 - alpha_bar)).log()


@torch.no_grad()
def loss_by_noise(pipeline: Pipeline, z_0: torch.Tensor, texts: list[str]):
    """(t, Eq. 32 at t) for NOISE_LEVELS times, with the text, on latents of true pictures."""
    c, mask = pipeline.text_encoder(texts)
    T = pipeline.config["T"]
    times = torch.linspace(1, T, NOISE_LEVELS).round().long().unique()
    losses = []
    for t in times:
        g = data.generator(0, "schedule", int(t), "eps")
        eps = torch.randn(z_0.shape, generator=g).to(z_0.device)
        t_row = torch.full((len(z_0),), int(t), device=z_0.device)
        z_t = add_noise(z_0, t_row, eps, pipeline.alpha_bar.to(z_0.device))
        losses.append(dit_loss(eps, pipeline.dit(z_t, t_row, c, mask)).cpu())
    return times, torch.stack(losses).double()


def schedule_table(pipeline: Pipeline, times: torch.Tensor, losses: torch.Tensor) -> str:
    """What either schedule asks of training, and what this model's loss would be at the noise it draws."""
    rows = []
    own_levels = logit(pipeline.alpha_bar[times]).flip(0).numpy()             # increasing, as np.interp wants
    for schedule in SCHEDULES:
        alpha_bar = alpha_bar_of(pipeline, schedule)[1:]
        mean_loss = np.interp(logit(alpha_bar).numpy(), own_levels, losses.flip(0).numpy()).mean()
        share = lambda low, high: f"{((alpha_bar > low) & (alpha_bar <= high)).double().mean():.0%}"
        mine = " (this model's)" if schedule == pipeline.config["schedule"] else ""
        rows.append([words(schedule) + mine, f"{alpha_bar[-1]:.1e}", share(0.9, 1), share(0.1, 0.9),
                     share(0, 0.1), f"{mean_loss:.4f}"])
    return table(["schedule", "alpha_bar at T", "t with alpha_bar over 0.9", "0.1 to 0.9", "under 0.1",
                  "Eq. 32 over its t, this model"], rows)


# --- Drawing and measuring ----------------------------------------------------------------------------------

@torch.no_grad()
def draw_all(pipeline: Pipeline, texts: list[str], seed: int, how: "Setting",
             batch: int) -> tuple[torch.Tensor, np.ndarray]:
    """Normalised latents and pictures:
    Pipeline.__call__ at times of our own, from the noise of (seed, number)."""
    latents = []
    for start in range(0, len(texts), batch):
        some = texts[start:start + batch]
        c, mask = pipeline.text_encoder([*some, *[""] * len(some)])
        generators = [data.generator(seed, "schedule", start + i, "z_T") for i in range(len(some))]
        z_T = draw(generators, torch.empty(len(some), *pipeline.latent_shape, device=pipeline.device))
        latents.append(ddim(pipeline.dit, z_T, c, mask, pipeline.alpha_bar, how.times, how.guidance,
                            eta=how.eta, generators=generators))
    z_0 = torch.cat(latents)
    return z_0, np.concatenate([pipeline.decode(part) for part in z_0.split(256)])


@dataclass(frozen=True)
class Setting:
    """A row of the tables."""
    group: str          # steps, spacing, eta or guidance
    x: float            # what is varied in the group
    name: str
    times: tuple[int, ...]
    guidance: float
    eta: float = 0.0


def settings(pipeline: Pipeline, cfg: Config, guidance: float) -> list[Setting]:
    """All rows; the first takes the most steps, and is what the others are held against."""
    T, other = pipeline.config["T"], next(s for s in SCHEDULES if s != pipeline.config["schedule"])
    counts = sorted({min(n, T) for n in cfg.steps}, reverse=True)
    middle = min(SampleConfig.steps, counts[0])
    own = lambda n: tuple(sampling_times(T, n))
    rows = [Setting("steps", n, f"{n} steps", own(n), guidance) for n in counts]
    rows += [Setting("spacing", n, f"{n} steps, noise levels of {words(other)}",
                     times_like(pipeline, other, n), guidance) for n in counts if n <= middle]
    rows += [Setting("eta", eta, f"eta {eta:g}, {n} steps", own(n), guidance, eta)
             for n, eta in (*((middle, eta) for eta in ETAS), (counts[0], ETAS[-1]))]
    return rows + [Setting("guidance", s, f"guidance {s:g}, {middle} steps", own(middle), s)
                   for s in sorted({*GUIDANCES, guidance})]


def words(name: str) -> str:
    return name.replace("_", " ")


def measure(pipeline: Pipeline, prompts: list[dict], true: torch.Tensor, rows: list[Setting],
            cfg: Config) -> dict:
    """{setting: {measure: a value for each seed, "seconds": a picture's, "pictures": those of seed 0}}"""
    texts, results, most = [row["text"] for row in prompts], {}, None
    for row in rows:
        twin = next((old for old in results if (old.times, old.guidance, old.eta) ==
                     (row.times, row.guidance, row.eta)), None)
        if twin:                                            # 50 steps at the usual guidance are in two groups
            results[row] = results[twin]
            continue
        began = time.perf_counter()
        drawn = [draw_all(pipeline, texts, seed, row, cfg.batch) for seed in range(cfg.seeds)]
        seconds = (time.perf_counter() - began) / cfg.seeds / len(texts)
        most, values = most or [pictures for _, pictures in drawn], {}
        for (z_0, pictures), best in zip(drawn, most):
            one = score(z_0, pictures, prompts, true)
            if row.group in ("steps", "spacing") and row.x < rows[0].x:
                one["change"] = np.sqrt(np.mean((pictures.astype(float) - best) ** 2))
            for name, value in one.items():
                values.setdefault(name, []).append(float(value))
        results[row] = values | {"seconds": seconds, "pictures": drawn[0][1]}
        print(f"{row.name}: right {np.mean(values['right']):.1%}, Fréchet {np.mean(values['Fréchet']):.2f}, "
              f"{seconds:.2f} s a picture", flush=True)
    return results


def score(z_0: torch.Tensor, pictures: np.ndarray, prompts: list[dict], true: torch.Tensor) -> dict:
    facts = [judge.read(picture) for picture in pictures]
    return {"right": np.mean([judge.check(f, p["requirement"]) for f, p in zip(facts, prompts)]),
            "unreadable": np.mean([f is None for f in facts]),
            "Fréchet": distance(z_0, true), "spread": z_0.square().mean().sqrt().item()}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(*(z_0.flatten(0, 2).cpu().numpy() for z_0 in (a, b)))


# --- Tables and figure --------------------------------------------------------------------------------------

def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def cell(values: list[float], form: str) -> str:
    """mean ± standard deviation over seeds."""
    spread = f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else ""
    return f"{format(statistics.fmean(values), form)}{spread}"


def result_tables(results: dict) -> str:
    forms = {"right": ".1%", "unreadable": ".1%", "Fréchet": ".2f", "spread": ".3f", "change": ".1f"}
    parts = []
    for group in dict.fromkeys(row.group for row in results):
        shown = lambda values: [cell(values[name], form) if name in values else "–"
                                for name, form in forms.items()]
        lines = [[row.name, *shown(values), f"{values['seconds']:.2f}"]
                 for row, values in results.items() if row.group == group]
        parts.append(table([group, *forms, "seconds a picture"], lines))
    return "\n\n".join(parts)


def figure(pipeline: Pipeline, results: dict, film: list, losses: tuple, floor: list, path: Path):
    """Film, pictures of each setting, and curves, where matplotlib is."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no figure: pip install matplotlib draws it")
    groups = {group: sorted((row for row in results if row.group == group), key=lambda row: row.x)
              for group in ("steps", "spacing", "eta", "guidance")}
    strips = [[(f"t = {t}", frame[i]) for t, frame in film] for i in range(len(film[0][1]))]
    strips += [[(row.name.split(",")[0] if group != "eta" else row.name, results[row]["pictures"][0])
                for row in groups[group]] for group in ("steps", "eta", "guidance")]
    columns = max(map(len, strips))
    sheet = plt.figure(figsize=(1.3 * columns, 1.6 * len(strips) + 3.4), layout="constrained")
    above, below = sheet.subfigures(2, 1, height_ratios=(1.6 * len(strips), 3.4))
    for i, strip in enumerate(strips):
        for j, (title, picture) in enumerate(strip):
            axes = above.add_subplot(len(strips), columns, i * columns + j + 1)
            axes.imshow(picture)
            axes.set_title(title, fontsize=7)
            axes.axis("off")
    curves = below.subplots(1, 4)
    draw_curves(curves, pipeline, groups, results, losses)
    for axes in curves[1:3]:
        axes.axhline(statistics.fmean(floor), color="gray", ls=":", label="true pictures")
    for axes in curves:
        axes.legend(fontsize=6)
        axes.title.set_fontsize(8)
    with data.atomic(path) as partial:
        sheet.savefig(partial, dpi=100, format="png")
    plt.close(sheet)
    print(f"wrote {path}")


def draw_curves(curves, pipeline: Pipeline, groups: dict, results: dict, losses: tuple):
    def curve(axes, group, name, **style):
        rows = [row for row in groups[group] if name in results[row]]
        if rows:
            values = np.array([results[row][name] for row in rows])
            axes.errorbar([row.x for row in rows], values.mean(1), values.std(1), marker="o", ms=3, capsize=2,
                          **style)

    own, other = sorted(SCHEDULES, key=lambda schedule: schedule != pipeline.config["schedule"])
    for axes, name, title in ((curves[0], "change", "change from most steps, grey levels"),
                              (curves[1], "Fréchet", "Fréchet distance")):
        for group, schedule in (("steps", own), ("spacing", other)):
            curve(axes, group, name, label=f"noise levels of {words(schedule)}")
        axes.set(xscale="log", xlabel="DDIM steps", title=title)
    curve(curves[2], "guidance", "Fréchet", label="drawn")
    right = curves[2].twinx()
    curve(right, "guidance", "right", color="C3", ls="--", label="right, axis on the right")
    right.set_ylim(bottom=0)
    right.legend(fontsize=6, loc="lower right")
    curves[2].set(xscale="log", xlabel="guidance s", title="Fréchet distance; right")
    for axes, group in ((curves[0], "steps"), (curves[1], "steps"), (curves[2], "guidance")):
        axes.set_xticks([row.x for row in groups[group]], [f"{row.x:g}" for row in groups[group]])
        axes.minorticks_off()
    times, values = losses
    for schedule in SCHEDULES:
        level = logit(alpha_bar_of(pipeline, schedule)[1:]).numpy()
        curves[3].hist(level, bins=40, range=(-10, 9), density=True, histtype="step",
                       label=f"t drawn by {words(schedule)}")
    curves[3].plot(logit(pipeline.alpha_bar[times]), values, "k-", label="Eq. 32, this model")
    curves[3].set(xlabel="log of signal to noise", title="where training looks", ylim=(0, 1.05))


@data.program
def main(argv: list[str] | None = None):
    cfg = Config(**data.read_flags(Config, argv, __doc__))
    if cfg.quick:
        cfg = replace(cfg, prompts=3, seeds=1, steps=(2, 4))
    began, folder = time.perf_counter(), find_model(cfg.model)
    pipeline = Pipeline(folder, data.pick_device(cfg.device))
    if pipeline.size != world.CANVAS:
        raise data.UserError(f"{folder} draws pictures of {pipeline.size} px; the judge reads those of "
                             f"{world.CANVAS}.")
    guidance = PRESETS.get(pipeline.config["preset"], {}).get("guidance", SampleConfig.guidance)
    prompts = choose_prompts(cfg.prompts)
    true = [true_picture(prompt["requirement"], world.generator("schedule", prompt["text"], i))
            for prompt in prompts for i in range(REPEATS)]
    latents = encode(pipeline, true)
    losses = loss_by_noise(pipeline, latents, [prompt["text"] for prompt in prompts for _ in range(REPEATS)])
    first = torch.arange(len(true)) % REPEATS
    floor = [distance(latents[first == i], latents[first != i]) for i in range(REPEATS)]
    results = measure(pipeline, prompts, latents, settings(pipeline, cfg, guidance), cfg)
    minutes = (time.perf_counter() - began) / 60
    text = "\n\n".join((
        f"{'The shipped model' if folder == SHIPPED else folder}: {pipeline.step:,} steps with the "
        f"{words(pipeline.config['schedule'])} schedule. {cfg.prompts} prompts, {cfg.seeds} seeds (± is the "
        f"standard deviation over them), guidance {guidance:g} unless said.",
        schedule_table(pipeline, *losses), result_tables(results),
        true_ones(pipeline, prompts, latents, floor),
        f"{minutes:.1f} minutes, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"{pipeline.device}."))
    print(f"\n{text}\n")
    film: list = []
    pipeline([prompt["text"] for prompt in prompts[:2]], [0, 1], guidance=guidance, film=film,
             steps=min(SampleConfig.steps, max(cfg.steps)))
    figure(pipeline, results, film, losses, floor, Path(cfg.out))
    if cfg.page:
        here = Path(__file__).parent
        into_page(here / "schedule.md", text)
        figure(pipeline, results, film, losses, floor, here / "schedule.png")


def true_ones(pipeline: Pipeline, prompts: list[dict], latents: torch.Tensor, floor: list[float]) -> str:
    """The same measures for true pictures that went through the PS-VAE: the best that a DiT can do here."""
    facts = [judge.read(picture) for part in latents.split(256) for picture in pipeline.decode(part)]
    right = np.mean([judge.check(f, prompts[i // REPEATS]["requirement"]) for i, f in enumerate(facts)])
    return (f"True pictures of these prompts, {len(latents)} of them, through this PS-VAE: {right:.1%} "
            f"right, {np.mean([f is None for f in facts]):.1%} unreadable, spread "
            f"{latents.square().mean().sqrt():.3f}, Fréchet distance of one of each prompt from the others "
            f"{cell(floor, '.2f')}. This is what a perfect DiT would show.")


if __name__ == "__main__":
    sys.exit(main())
