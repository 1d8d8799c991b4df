"""Speed and memory of every part, a line each, beside its peer in the same run where one is installed.

    python notes/checks/bench.py                          what fits the machine: full preset on CUDA, tiny on a CPU
    python notes/checks/bench.py --only dit --size XL --batch 64 --memory-cap 24       does it fit into 24 GB?
    python notes/checks/bench.py --only svae psvae dit --sync-check                    does a step wait for the card?

Parts: loading (pictures/s, against torchvision's ImageFolder), svae, psvae, encode, dit (the real programs on
the real folder: steps/s, pictures/s, utilisation, waiting for data, peak memory), picture (prompt to
picture), train and ddim (the DiT alone, against diffusers' PixArtTransformer2DModel of the same width,
depth, tokens and text, and its DDIMScheduler). dit and picture need what psvae leaves in --work.

Encoders have the real sizes and random weights (notes/checks/full_path.py). Competitors take turns, the order
turning too; what is printed are medians, and for a comparison the median of the ratios of neighbours, with
the smallest and the largest. With one thread on a CPU the clock is CPU time, which other programs disturb
less. Utilisation is of the card's data sheet (data.PEAK); on a CPU, and on cards not in that table, of what
a large matrix product reaches here.
"""

import argparse
import contextlib
import copy
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
import dit
import psvae
import sample
import svae
from notes.checks import full_path

PARTS = ("loading", "svae", "psvae", "dit", "picture", "train", "ddim")
CUDA = torch.cuda.is_available()


# ------------------------------------------------------------------------------------------------------------
# Clocks
# ------------------------------------------------------------------------------------------------------------


def now(device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall = device.type == "cuda" or torch.get_num_threads() > 1
    return time.perf_counter() if wall else time.process_time()


def interleaved(competitors: dict, runs: int, device) -> dict[str, list[float]]:
    """Seconds of each call, the competitors taking turns; one call of each before, which does not count."""
    seconds = {name: [] for name in competitors}
    for number in range(runs + 1):
        order = list(competitors.items())
        for name, call in order if number % 2 else reversed(order):
            begin = now(device)
            call()
            seconds[name].append(now(device) - begin)
    return {name: values[1:] for name, values in seconds.items()}


def compare(title: str, seconds: dict[str, list[float]], amount: float, unit: str):
    """One line: the first competitor is ours."""
    (ours, mine), *others = seconds.items()
    median = statistics.median(mine)
    line = f"{title}: {ours} {median * 1000:.1f} ms, {amount / median:.4g} {unit}"
    for name, theirs in others:
        ratios = [b / a for a, b in zip(mine, theirs)]
        line += (f"; {name} {statistics.median(theirs) * 1000:.1f} ms: ours is "
                 f"{statistics.median(ratios):.3f}x as fast [{min(ratios):.3f} to {max(ratios):.3f}]")
    print(line, flush=True)


def matrix_rate(device, dtype, n: int) -> float:
    """FLOP/s of an n x n x n matrix product, the best of ten."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = min(interleaved({"matrix product": lambda: a @ b}, 10, device)["matrix product"])
    return 2 * n ** 3 / max(best, 1e-9)


# ------------------------------------------------------------------------------------------------------------
# Reading pictures
# ------------------------------------------------------------------------------------------------------------


def loading(args, pictures: str):
    """All of the folder, cropped, flipped and scaled at random, in batches: pictures/s."""
    size, batch = args.image_size, 32
    folder, _ = data.read_folder(pictures)
    count = len(folder.images) // batch * batch

    def ours():
        keys = lambda step: [(i, i) for i in range(step * batch, (step + 1) * batch)]
        return data.batches(data.Pictures(folder, size), keys, 0, count // batch, args.workers)
    competitors = {"ours": ours}
    with contextlib.suppress(Exception):                # no torchvision, or one that does not fit this torch
        from torchvision import datasets, transforms as t
        imagenet = datasets.ImageFolder(str(folder.root), t.Compose([
            t.RandomResizedCrop(size, scale=(0.5, 1)), t.RandomHorizontalFlip(), t.ToTensor(),
            t.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)]))
        imagenet.samples = imagenet.samples[:count]
        competitors["torchvision"] = lambda: torch.utils.data.DataLoader(
            imagenet, batch, shuffle=True, num_workers=args.workers)
    # workers start before the clock; their CPU time is not this process's, so the clock is the wall's
    seconds = {name: [] for name in competitors}
    for number in range(args.runs):
        for name, stream in competitors.items() if number % 2 else reversed(competitors.items()):
            batches = iter(stream())
            next(batches)
            begin = time.perf_counter()
            assert sum(1 for _ in batches) == count // batch - 1
            seconds[name].append(time.perf_counter() - begin)
    compare(f"loading, {size} px, {args.workers} workers, JPEGs of 500 x 375", seconds, count - batch,
            "pictures/s")


# ------------------------------------------------------------------------------------------------------------
# The stages as they are run
# ------------------------------------------------------------------------------------------------------------


class Watch:
    """Times the steps of a real run from inside, without a loop of its own, and counts waits for the card."""

    def __init__(self, args):
        self.args, self.total = args, args.warm + args.runs * args.window
        self.done, self.marks, self.waited, self.waits, self.run = 0, [], 0.0, [], None

    def __enter__(self):
        self.record, self.batches, self.slice = data.Run.record, data.batches, psvae.encode_slice
        data.Run.record, data.batches, psvae.encode_slice = self._recorded, self._waited, self._encoded
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_):
        data.Run.record, data.batches, psvae.encode_slice = self.record, self.batches, self.slice
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")

    @property
    def _recorded(self):
        def record(run, losses):
            self.record(run, losses)
            self.run, self.done = run, self.done + 1
            inside = self.args.warm <= self.done < self.total
            if self.args.sync_check and CUDA:
                torch.cuda.set_sync_debug_mode("default")
            if self.done >= self.args.warm and (self.done - self.args.warm) % self.args.window == 0:
                self.marks.append(now(run.device))
                self.waits.append(self.waited)
            if self.args.sync_check and CUDA and inside:                # until the next step is recorded
                torch.cuda.set_sync_debug_mode("warn")
        return record

    def _waited(self, *args):
        stream = iter(self.batches(*args))
        while True:
            begin = time.perf_counter()
            try:
                batch = next(stream)
            except StopIteration:
                return
            self.waited += time.perf_counter() - begin
            yield batch

    def _encoded(self, cfg, run, *args):
        begin = now(run.device)
        self.slice(cfg, run, *args)
        print(f"encode, {cfg.preset}, {cfg.image_size} px: "
              f"{len(run.folder.images) / (now(run.device) - begin):.4g} pictures/s", flush=True)

    def line(self, title: str) -> str:
        windows = [b - a for a, b in zip(self.marks, self.marks[1:])]
        rate = self.args.window / statistics.median(windows)
        waiting = (self.waits[-1] - self.waits[0]) / (self.marks[-1] - self.marks[0])
        batch = self.run.cfg.batch
        memory = f", peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if CUDA else ""
        return (f"{title}: {rate:.4g} steps/s, {rate * batch:.4g} pictures/s, "
                f"{self.run.flops / batch / 1e9:.4g} GFLOP a picture, "
                f"utilisation {self.run.flops * rate / self.run.peak:.1%}, "
                f"waiting for data {waiting:.0%}{memory}")


def stage(args, name: str, program, argv: list[str]):
    """A stage, fresh, for as many steps as are timed; one line, or that it does not fit."""
    argv = [*argv, "--fresh", "--out", str(args.out), "--steps", str(args.warm + args.runs * args.window),
            "--workers", str(args.workers), "--device", args.device, *(["--no-compile"] * args.no_compile)]
    argv += [word for flag in ("log", "eval", "save") for word in (f"--{flag}-every", "1000000000")]
    for flag, value in (("--batch", args.batch), ("--micro-batches", args.micro_batches)):
        argv += [flag, str(value)] if value else []
    with Watch(args) as watch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code = program(argv)
        title = f"{name}, {args.preset}"
        if len(watch.marks) <= args.runs:
            limit = f" in {args.memory_cap:g} GB" if args.memory_cap else ""
            print(f"{title}: does not run{limit} (exit code {code})", flush=True)
            return
        cfg = watch.run.cfg
        print(watch.line(f"{title}, batch {cfg.batch} in {cfg.micro_batches}"), flush=True)
    if args.sync_check:
        where = {f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)}
        said = ", ".join(sorted(where)) or "none" if CUDA else "no card here"
        print(f"  waits for the card inside a step: {said}", flush=True)


def stages(args, image_encoder: str, text_encoder: str, pictures: str):
    """svae, psvae (its encoding too) and dit, as typed."""
    recompute = ["--checkpointing"] * args.checkpointing
    given = ["--data", pictures] if args.preset == "full" else ["--count", str(args.pictures)]
    given += ["--preset", args.preset, "--encoder", image_encoder]
    if args.preset == "full":
        full_path.build_vgg(Path(args.work) / "torch")
    if "svae" in args.only:
        stage(args, "svae", svae.main, given)
    if "psvae" in args.only:
        stage(args, "psvae", psvae.main, [*given, *recompute])
    if "dit" in args.only:
        size = ["--size", args.size] if args.preset == "full" else []
        stage(args, f"dit {args.size}".strip(), dit.main, ["--text-encoder", text_encoder, *size, *recompute])


def picture(args, device):
    """Prompt to picture: text encoder, guided DDIM, pixel decoder."""
    pipeline = sample.Pipeline(args.out, device)
    for n in (1, 64) if CUDA else (1, 4):
        prompts = ["a red circle above a blue square"] * n
        call = lambda: pipeline(prompts, list(range(n)), steps=args.sample_steps, guidance=4.0)
        seconds = interleaved({"ours": call}, args.runs, device)
        compare(f"picture, {args.preset}, {args.sample_steps} guided steps, batch {n}", seconds, n,
                "pictures/s")


# ------------------------------------------------------------------------------------------------------------
# The DiT beside its peer
# ------------------------------------------------------------------------------------------------------------


class Peer:
    """diffusers' PixArtTransformer2DModel, called as our DiT is."""

    def __init__(self, grid, z_dim, d_text, width, depth, heads, device):
        from diffusers import PixArtTransformer2DModel
        self.network = PixArtTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=width // heads, in_channels=z_dim,
            out_channels=z_dim, num_layers=depth, cross_attention_dim=width, caption_channels=d_text,
            sample_size=grid, patch_size=1, norm_type="ada_norm_single",
            use_additional_conditions=False).to(device)

    def __call__(self, z_t, t, c, mask):
        nothing = {"resolution": None, "aspect_ratio": None}
        return self.network(z_t, encoder_hidden_states=c, timestep=t, encoder_attention_mask=mask.long(),
                            added_cond_kwargs=nothing, return_dict=False)[0]


def dit_shape(args) -> tuple:
    """grid, z_dim, d_text, width, depth, heads."""
    if args.preset == "full":
        return 16, 96, full_path.TEXT[args.text][0], *dit.SIZES[args.size or "B"]
    return 4, 24, 128, 192, 6, 3


def contestants(args, device) -> dict:
    """name -> (module, call) of ours and, where diffusers is installed, of the peer;
    on CUDA each eager and compiled."""
    shape, found = dit_shape(args), {}
    torch.manual_seed(0)
    model = dit.DiT(*shape, dit.noise_schedule(1000, 1e-4, 0.02)).to(device)
    found["ours"] = (model, model)
    with contextlib.suppress(ImportError):
        peer = Peer(*shape, device)
        found["PixArt"] = (peer.network, peer)
    if CUDA and not args.no_compile:
        for name, (module, call) in list(found.items()):
            compiled = copy.deepcopy(call)
            network = compiled if name == "ours" else compiled.network
            network.compile()
            found[f"{name} compiled"] = (network, compiled)
        found = {"ours compiled": found.pop("ours compiled"), **found}   # what dit.py runs comes first
    return found


def parameters(found: dict) -> str:
    return ", ".join(f"{name} {sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"
                     for name, (module, _) in found.items())


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train(args, device):
    """Forward, backward, clipping and fused AdamW on one batch that lies on the device."""
    grid, z_dim, d_text, *_ = dit_shape(args)
    B = args.batch or (64 if CUDA or args.preset == "tiny" else 8)
    z_t, eps = torch.randn(2, B, grid, grid, z_dim, device=device)
    t, c = torch.randint(1, 1001, (B,), device=device), torch.randn(B, args.tokens, d_text, device=device)
    mask = torch.ones(B, args.tokens, dtype=torch.bool, device=device)
    found, calls = contestants(args, device), {}
    for name, (module, call) in found.items():
        first = (lambda x: x) if name.startswith("ours") else (lambda x: x.permute(0, 3, 1, 2).contiguous())
        optimizer = torch.optim.AdamW(module.train().parameters(), 1e-4, fused=True)

        def step(module=module, call=call, optimizer=optimizer, z_t=first(z_t), eps=first(eps)):
            with autocast(device):
                eps_hat = call(z_t, t, c, mask)
            F.mse_loss(eps_hat.float(), eps).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        calls[name] = lambda step=step: [step() for _ in range(args.inner)]
    print(f"  {parameters(found)}; {args.tokens} text tokens", flush=True)
    seconds = interleaved(calls, args.runs, device)
    compare(f"train, DiT {args.size or args.preset}, {grid * grid} tokens, batch {B}",
            {name: [s / args.inner for s in values] for name, values in seconds.items()}, B, "latents/s")


def ddim(args, device):
    """50 guided steps from noise to z_0: latency at batch 1, throughput at 64 (on a CPU: 4, tiny only)."""
    grid, z_dim, d_text, *_ = dit_shape(args)
    alpha_bar = dit.noise_schedule(1000, 1e-4, 0.02)
    times, found = sample.sampling_times(1000, args.sample_steps), contestants(args, device)
    for module, call in found.values():
        module.eval()
        if call is module and module is not found.get("ours", (None,))[0]:
            module.denoise = torch.compile(module.denoise)               # sampling calls denoise, not forward
    for B in (1, 64) if CUDA else (1,) if args.preset == "full" else (1, 4):
        z_T = torch.randn(B, grid, grid, z_dim, device=device)
        c = torch.randn(2 * B, args.tokens, d_text, device=device)
        mask = torch.ones(2 * B, args.tokens, dtype=torch.bool, device=device)

        def ours(call):
            with autocast(device):
                return sample.ddim(call, z_T, c, mask, alpha_bar, times, 4.0)

        @torch.no_grad()
        def theirs(call):
            from diffusers import DDIMScheduler
            scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=1e-4, beta_end=0.02,
                                      clip_sample=False, timestep_spacing="trailing")
            scheduler.set_timesteps(args.sample_steps)
            z_t = z_T.permute(0, 3, 1, 2).contiguous()
            for t in scheduler.timesteps.tolist():
                with autocast(device):
                    eps = call(torch.cat([z_t, z_t]), torch.full((2 * B,), t, device=device), c, mask)
                eps_c, eps_null = eps.float().chunk(2)
                z_t = scheduler.step(eps_null + 4.0 * (eps_c - eps_null), t, z_t).prev_sample
            return z_t
        calls = {name: (lambda call=call, run=ours if name.startswith("ours") else theirs: run(call))
                 for name, (_, call) in found.items()}
        compare(f"ddim, DiT {args.size or args.preset}, {grid * grid} tokens, {args.sample_steps} guided "
                f"steps, batch {B}", interleaved(calls, args.runs, device), B, "latents/s")


# ------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, metavar="PART")
    parser.add_argument("--preset", default="full" if CUDA else "tiny", choices=("full", "tiny"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--image", default="large", choices=full_path.IMAGE, help="DINOv2 of the full preset")
    parser.add_argument("--text", default="base", choices=full_path.TEXT, help="T5 of the full preset")
    parser.add_argument("--size", default="", choices=("", *dit.SIZES), help="DiT of the full preset")
    parser.add_argument("--batch", type=int, default=0, help="0: as in the preset")
    parser.add_argument("--micro-batches", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--tokens", type=int, default=32, help="text tokens of train and ddim, on both sides")
    parser.add_argument("--image-size", type=int, default=256, help="of loading")
    parser.add_argument("--workers", type=int, default=16 if CUDA else 0)
    parser.add_argument("--pictures", type=int, default=4096 if CUDA else 500, help="in the folder read")
    parser.add_argument("--warm", type=int, default=20 if CUDA else 3, help="steps before the clock starts")
    parser.add_argument("--window", type=int, default=10 if CUDA else 3, help="steps a time is taken over")
    parser.add_argument("--inner", type=int, default=10 if CUDA else 1, help="the same for train")
    parser.add_argument("--runs", type=int, default=5, help="times taken; the median is shown")
    parser.add_argument("--sample-steps", type=int, default=50)
    parser.add_argument("--memory-cap", type=float, default=0, help="GB of the card that may be used")
    parser.add_argument("--sync-check", action="store_true", help="names each wait for the card in a step")
    parser.add_argument("--work", default="out/bench", help="folder for pictures, encoders and runs")
    args = parser.parse_args(argv)
    args.out = Path(args.work) / args.preset
    if args.preset == "full" and not args.size:
        args.size = "B"
    return args


@data.program
def main(argv: list[str] | None = None):
    args = parse(argv)
    device = data.pick_device(args.device)
    if args.memory_cap and CUDA:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_cap * 1e9 / total), device)
    torch.set_float32_matmul_precision("high")
    rate = matrix_rate(device, *((torch.bfloat16, 8192) if CUDA else (torch.float32, 1024)))
    known = data.peak_flops(device, "bf16")
    data.peak_flops = lambda *_: known or rate
    name = torch.cuda.get_device_name(device) if CUDA else f"CPU, threads: {torch.get_num_threads()}"
    print(f"{name}, torch {torch.__version__}: a matrix product reaches {rate / 1e12:.3g} TFLOP/s"
          f"{f', the data sheet says {known / 1e12:.0f}' if known else ''}", flush=True)
    pictures = ""
    if "loading" in args.only or args.preset == "full" and {"svae", "psvae"} & set(args.only):
        pictures = full_path.build_pictures(Path(args.work) / "pictures", args.pictures)
    image_encoder, text_encoder = data.TINY_IMAGE_ENCODER, data.TINY_TEXT_ENCODER
    if args.preset == "full" and {"svae", "psvae", "dit"} & set(args.only):
        folder = Path(args.work) / "encoders"
        image_encoder = full_path.build_image_encoder(folder / f"dinov2-{args.image}", args.image)
        text_encoder = full_path.build_text_encoder(folder / f"t5-{args.text}", args.text)
    if "loading" in args.only:
        loading(args, pictures)
    if {"svae", "psvae", "dit"} & set(args.only):
        stages(args, image_encoder, text_encoder, pictures)
    for part, measure in (("picture", picture), ("train", train), ("ddim", ddim)):
        if part in args.only:
            measure(args, device)


if __name__ == "__main__":
    sys.exit(main())
