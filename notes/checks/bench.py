"""Speed and memory of every part, a line each, beside its peer in the same run where one is
installed.

    python notes/checks/bench.py                      full preset on CUDA, tiny on a CPU
    python notes/checks/bench.py --only dit --size XL --batch 64 --memory-cap 24   fits 24 GB?
    python notes/checks/bench.py --only path          all of the full preset, 2 steps each

Parts: svae, psvae, dit (the real programs on the real folder: steps/s, pictures/s, peak memory),
train and ddim (the DiT alone, against diffusers' PixArtTransformer2DModel of the same width, depth,
tokens and text, and its DDIMScheduler), path (not by default). dit needs what psvae leaves in
--work.

What pretrained weights do to memory and speed depends on their sizes alone, so DINOv2 and T5 are
built from their configs with random weights: no download. Competitors take turns, the order turning
too; what is printed are medians, and for a comparison the median of the ratios of neighbours, with
the smallest and the largest. With one thread on a CPU the clock is CPU time, which other programs
disturb less.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import dit  # noqa: E402
import psvae  # noqa: E402
import sample  # noqa: E402
import svae  # noqa: E402
from notes.tiny import pretrain_tiny  # noqa: E402

PARTS = ("svae", "psvae", "dit", "train", "ddim")
CUDA = torch.cuda.is_available()
# as in the config.json of facebook/dinov2-*: width, layers, heads; giant has the gated feed-forward
IMAGE = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16),
         "giant": (1536, 40, 24), "nano": (48, 2, 3)}
# of google/flan-t5-*: width, feed-forward, heads, layers; 64 channels a head
TEXT = {"small": (512, 1024, 6, 8), "base": (768, 2048, 12, 12), "large": (1024, 2816, 16, 24),
        "xl": (2048, 5120, 32, 24), "xxl": (4096, 10240, 64, 24), "nano": (32, 64, 2, 2)}


# --- Encoders of the real sizes, and pictures -----------------------------------------------------

def build_image_encoder(folder: Path, size: str) -> str:
    """A DINOv2 of that size with random weights, saved as the hub has it; the folder's name."""
    from transformers import Dinov2Config, Dinov2Model
    if not (folder / "config.json").exists():
        width, layers, heads = IMAGE[size]
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, image_size=518,
            patch_size=14, use_swiglu_ffn=size == "giant")).save_pretrained(folder)
    return str(folder)


def build_text_encoder(folder: Path, size: str) -> str:
    """A T5 encoder of that size with random weights in bf16, and a byte-level tokenizer beside
    it."""
    from transformers import T5Config, T5EncoderModel
    if not (folder / "tokenizer.json").exists():
        width, inside, heads, layers = TEXT[size]
        config = T5Config(vocab_size=32128, d_model=width, d_ff=inside, d_kv=64, num_heads=heads,
                          num_layers=layers, feed_forward_proj="gated-gelu",
                          tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
                          decoder_start_token_id=0)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)                # a T5-XXL in fp32 would be 19 GB
        try:
            T5EncoderModel(config).save_pretrained(folder)
        finally:
            torch.set_default_dtype(torch.float32)
        names = (data.HERE / "notes/imagenet_names.txt").read_text().splitlines()
        tokenizer = pretrain_tiny.build_tokenizer([name.split(" ", 1)[-1] for name in names], 4096)
        tokenizer.save_pretrained(folder)
    return str(folder)


def build_pictures(folder: Path, count: int, size=(500, 375)) -> str:
    """JPEGs of about ImageNet's size in ten class folders: smooth colours and some grain, so that
    they compress like photographs (90 KB)."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"train/n{1440764 + number % 10:08d}/{number:06d}.JPEG"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
            pixels = (pixels + rng.normal(0, 12, (*size[::-1], 1))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path, "JPEG", quality=90)
    return str(folder)


def build_vgg(folder: Path):
    """A VGG16 with random weights where torchvision looks for the real one (553 MB), if it is not
    there."""
    name = "hub/checkpoints/vgg16-397923af.pth"
    if not (Path(torch.hub.get_dir()).parent / name).exists():
        from torchvision.models import vgg16
        os.environ["TORCH_HOME"] = str(folder)
        if not (folder / name).exists():
            torch.manual_seed(0)
            with data.atomic(folder / name) as partial:
                torch.save(vgg16(weights=None, init_weights=False).state_dict(), partial)


# --- Clocks ---------------------------------------------------------------------------------------

def now(device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall = device.type == "cuda" or torch.get_num_threads() > 1
    return time.perf_counter() if wall else time.process_time()


def interleaved(competitors: dict, runs: int, device) -> dict[str, list[float]]:
    """Seconds of each call, the competitors taking turns; one call of each before, which does not
    count."""
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
                 f"{statistics.median(ratios):.3f}x as fast [{min(ratios):.3f} to "
                 f"{max(ratios):.3f}]")
    print(line, flush=True)


# --- The stages as they are run -------------------------------------------------------------------

class Measured(Exception):
    """Enough steps were timed."""


def stage(args, name: str, module, argv: list[str], device):
    """A stage, fresh, timed; one line, or that it does not fit."""
    quiet = [word for flag in ("log", "eval", "save") for word in (f"--{flag}-every", "1000000000")]
    argv = [*argv, "--fresh", "--out", str(args.out), "--workers", str(args.workers),
            "--device", args.device, *quiet]
    for flag, value in (("--batch", args.batch), ("--micro-batches", args.micro_batches)):
        argv += [flag, str(value)] if value and (flag, name) != ("--micro-batches", "svae") else []
    marks, done, total = [], itertools.count(1), args.warm + args.runs * args.window

    def mark(*_):                                      # after each step of the optimizer
        step = next(done)
        if step >= args.warm and (step - args.warm) % args.window == 0:
            marks.append(now(device))
        if step == total and module is dit:            # nobody needs the 15 GB of a DiT-XL
            raise Measured
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    code = 0
    with register_optimizer_step_post_hook(mark), contextlib.suppress(Measured):
        code = module.main([*argv, "--steps", str(total), *["--no-compile"] * args.no_compile])
    if len(marks) <= args.runs:
        limit = f" in {args.memory_cap:g} GB" if args.memory_cap else ""
        return print(f"{name}, {args.preset}: does not run{limit} (exit code {code})", flush=True)
    batch = args.batch or module.PRESETS[args.preset].get("batch", module.Config.batch)
    rate = args.window / statistics.median(b - a for a, b in zip(marks, marks[1:]))
    memory = f", peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if CUDA else ""
    print(f"{name}, {args.preset}, batch {batch}: {rate:.4g} steps/s, "
          f"{rate * batch:.4g} pictures/s{memory}", flush=True)


def stages(args, image_encoder: str, text_encoder: str, pictures: str, device):
    """svae, psvae (its encoding too) and dit, as typed."""
    recompute = ["--checkpointing"] * args.checkpointing
    given = ["--data", pictures] if args.preset == "full" else ["--count", str(args.pictures)]
    given += ["--preset", args.preset, "--encoder", image_encoder]
    size = ["--size", args.size] if args.preset == "full" else []
    if args.preset == "full":
        build_vgg(Path(args.work) / "torch")
    dit_argv = ["--text-encoder", text_encoder, *size, *recompute]
    for name, module, argv in (("svae", svae, given), ("psvae", psvae, [*given, *recompute]),
                               ("dit", dit, dit_argv)):
        if name in args.only:
            title = f"{name} {args.size}".strip() if name == "dit" else name
            stage(args, title, module, argv, device)


def path(args, image_encoder: str, text_encoder: str, pictures: str, device):
    """All stages of the full preset as typed, then a picture; with --reduced everything small."""
    out = Path(args.work) / "path"
    common = ["--fresh", "--out", str(out), "--batch", str(args.batch or 2),
              "--device", args.device, *"--steps 2 --log-every 1 --workers 0".split()]
    common += ["--precision", "fp32"] * (not CUDA and not args.reduced)
    small, widths, size = [], [], ["--size", args.size or "B"]
    if args.reduced:
        small, widths, size = ("--image-size 64 --z-dim 16".split(),
                               "--widths 16,16,8,8 --lpips-weight 0".split(),
                               "--width 64 --depth 2 --heads 2".split())
    else:
        build_vgg(Path(args.work) / "torch")
    prompt = ["--prompt", "a photo of a tench", *"-n 1 --steps 4".split()]
    lines = [("svae", svae.main, ["--data", pictures, "--encoder", image_encoder, *common, *small]),
             ("psvae", psvae.main, [*common, *widths]),
             ("dit", dit.main, ["--text-encoder", text_encoder, *common, *size]),
             ("sample", sample.main, [*prompt, "--device", args.device, "--model", str(out),
                                      "--out", str(out / "sample.png")])]
    for name, program, argv in lines:
        begin = time.monotonic()
        if program(argv):
            raise data.UserError(f"python {name}.py {' '.join(argv)} failed.")
        print(f"path, {name}: {time.monotonic() - begin:.1f} s", flush=True)
    print(f"the full path works: {out / 'sample.png'}")


# --- The DiT beside its peer ----------------------------------------------------------------------

class Peer:
    """diffusers' PixArtTransformer2DModel, called as our DiT is."""

    def __init__(self, grid, z_dim, d_text, width, depth, heads, device):
        from diffusers import PixArtTransformer2DModel
        self.network = PixArtTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=width // heads, in_channels=z_dim,
            out_channels=z_dim, num_layers=depth, cross_attention_dim=width,
            caption_channels=d_text, sample_size=grid, patch_size=1, norm_type="ada_norm_single",
            use_additional_conditions=False).to(device)

    def __call__(self, z_t, t, c, mask):
        nothing = {"resolution": None, "aspect_ratio": None}
        return self.network(z_t, encoder_hidden_states=c, timestep=t,
                            encoder_attention_mask=mask.long(), added_cond_kwargs=nothing,
                            return_dict=False)[0]


def dit_shape(args) -> tuple:
    """grid, z_dim, d_text, width, depth, heads."""
    if args.preset == "full":
        return 16, 96, TEXT[args.text][0], *dit.SIZES[args.size or "B"]
    return 4, 24, 128, 128, 6, 4


def contestants(args, device) -> dict:
    """name -> (module, call) of ours and, where diffusers is installed, of the peer;
    on CUDA each eager and compiled."""
    shape, found = dit_shape(args), {}
    torch.manual_seed(0)
    model = dit.DiT(*shape).to(device)
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
        found = {"ours compiled": found.pop("ours compiled"), **found}   # what dit.py runs
    return found


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train(args, device):
    """Forward, backward, clipping and fused AdamW on one batch that lies on the device."""
    grid, z_dim, d_text, *_ = dit_shape(args)
    B = args.batch or (64 if CUDA or args.preset == "tiny" else 8)
    z_t, eps = torch.randn(2, B, grid, grid, z_dim, device=device)
    t = torch.randint(1, 1001, (B,), device=device)
    c = torch.randn(B, args.tokens, d_text, device=device)
    mask = torch.ones(B, args.tokens, dtype=torch.bool, device=device)
    found, calls = contestants(args, device), {}
    for name, (module, call) in found.items():
        channels_first = lambda x: x.permute(0, 3, 1, 2).contiguous()
        first = (lambda x: x) if name.startswith("ours") else channels_first
        optimizer = torch.optim.AdamW(module.train().parameters(), 1e-4, fused=True)

        def step(module=module, call=call, optimizer=optimizer, z_t=first(z_t), eps=first(eps)):
            with autocast(device):
                eps_hat = call(z_t, t, c, mask)
            F.mse_loss(eps_hat.float(), eps).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        calls[name] = lambda step=step: [step() for _ in range(args.inner)]
    print("  " + ", ".join(f"{name} {sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"
                           for name, (module, _) in found.items()) + f"; {args.tokens} text tokens")
    seconds = interleaved(calls, args.runs, device)
    compare(f"train, DiT {args.size or args.preset}, {grid * grid} tokens, batch {B}",
            {name: [s / args.inner for s in values] for name, values in seconds.items()}, B,
            "latents/s")


def ddim(args, device):
    """50 guided steps from noise to z_0: latency at batch 1, throughput at 64 (on a CPU: 4, tiny
    only)."""
    grid, z_dim, d_text, *_ = dit_shape(args)
    alpha_bar = dit.noise_schedule(1000, 1e-4, 0.02)
    times, found = sample.sampling_times(1000, args.sample_steps), contestants(args, device)
    for name, (module, _) in found.items():
        module.eval()
        if name == "ours compiled":
            module.denoise = torch.compile(module.denoise)   # what sampling calls
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
                    at = torch.full((2 * B,), t, device=device)
                    eps = call(torch.cat([z_t, z_t]), at, c, mask)
                eps_c, eps_null = eps.float().chunk(2)
                z_t = scheduler.step(eps_null + 4.0 * (eps_c - eps_null), t, z_t).prev_sample
            return z_t
        calls = {name: functools.partial(ours if name.startswith("ours") else theirs, call)
                 for name, (_, call) in found.items()}
        compare(f"ddim, DiT {args.size or args.preset}, {grid * grid} tokens, "
                f"{args.sample_steps} guided steps, batch {B}",
                interleaved(calls, args.runs, device), B, "latents/s")


# --- The command line -----------------------------------------------------------------------------

def parse(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--only", nargs="+", default=PARTS, choices=(*PARTS, "path"), metavar="PART")
    flag("--preset", default="full" if CUDA else "tiny", choices=("full", "tiny"),
         help="the full one has these parts:")
    flag("--device", default="auto", choices=("auto", "cpu", "cuda"))
    flag("--image", default="large" if CUDA else "small", choices=IMAGE, help="its DINOv2")
    flag("--text", default="base" if CUDA else "small", choices=TEXT, help="its T5")
    flag("--size", default="", choices=("", *dit.SIZES), help="its DiT")
    flag("--batch", type=int, default=0, help="0: as in the preset")
    flag("--micro-batches", type=int, default=0)
    flag("--checkpointing", action="store_true")
    flag("--no-compile", action="store_true")
    flag("--tokens", type=int, default=32, help="text tokens of train and ddim, on both sides")
    flag("--workers", type=int, default=16 if CUDA else 0)
    flag("--pictures", type=int, default=4096 if CUDA else 500, help="in the folder read")
    flag("--warm", type=int, default=20 if CUDA else 3, help="steps before the clock starts")
    flag("--window", type=int, default=10 if CUDA else 3, help="steps a time is taken over")
    flag("--inner", type=int, default=10 if CUDA else 1, help="the same for train")
    flag("--runs", type=int, default=5, help="times taken; the median is shown")
    flag("--sample-steps", type=int, default=50)
    flag("--memory-cap", type=float, default=0, help="GB of the card that may be used")
    flag("--reduced", action="store_true", help="path with everything small: a test")
    flag("--work", default="out/bench", help="folder for pictures, encoders and runs")
    args = parser.parse_args(argv)
    args.out = Path(args.work) / args.preset
    if "path" in args.only:
        args.preset, args.pictures = "full", 8
    if args.reduced:
        args.image = args.text = "nano"
    if args.preset == "full" and not args.size:
        args.size = "B"
    return args


@data.program
def main(argv: list[str] | None = None):
    args = parse(argv)
    device, only, work = data.pick_device(args.device), set(args.only), Path(args.work)
    if args.memory_cap and CUDA:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_cap * 1e9 / total), device)
    torch.set_float32_matmul_precision("high")
    name = (torch.cuda.get_device_name(device) if CUDA else
            f"CPU, threads: {torch.get_num_threads()}")
    print(f"{name}, torch {torch.__version__}", flush=True)
    pictures, image_encoder, text_encoder = "", data.TINY_IMAGE_ENCODER, data.TINY_TEXT_ENCODER
    if "path" in only or args.preset == "full" and {"svae", "psvae"} & only:
        size = (96, 72) if args.reduced else (500, 375)
        pictures = build_pictures(work / "pictures", args.pictures, size)
    if args.preset == "full" and {"svae", "psvae", "dit", "path"} & only:
        image_encoder = build_image_encoder(work / f"encoders/dinov2-{args.image}", args.image)
        text_encoder = build_text_encoder(work / f"encoders/t5-{args.text}", args.text)
    if {"svae", "psvae", "dit"} & only:
        stages(args, image_encoder, text_encoder, pictures, device)
    for part, measure in (("train", train), ("ddim", ddim)):
        if part in only:
            measure(args, device)
    if "path" in only:
        path(args, image_encoder, text_encoder, pictures, device)


if __name__ == "__main__":
    sys.exit(main())
