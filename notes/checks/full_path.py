"""The full preset from a folder of pictures to a drawn one, with encoders of the real sizes and no download.

Pretrained weights are gigabytes from a hub. What they do to memory, speed and code depends on their sizes
alone, so here DINOv2 and T5 are built from their configs with random weights and saved in their own format,
with a tokenizer that loads; then every stage runs as a person would start it. Nothing is learned in 2 steps:
what is shown is that the path works, and what it costs.

    python notes/checks/full_path.py                       DINOv2-S and T5-small, 2 steps a stage; a CPU will do
    python notes/checks/full_path.py --image large --text xxl --size XL --batch 8 --precision bf16       for a card
    python notes/checks/full_path.py --build-only --image large --text xxl     only the encoders, for notes/checks/bench.py
    python notes/checks/full_path.py --reduced             the same path with everything small: what a test runs

Writes --work (out/full): pictures/, encoders/, and out/ with what each stage writes. Exit code 1 where a
stage fails or leaves out what it promises.
"""

import argparse
import csv
import math
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
import dit
import psvae
import sample
import svae
from notes.tiny import pretrain_tiny

# as in the config.json of facebook/dinov2-*: width, layers, heads; giant has the gated feed-forward
IMAGE = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "giant": (1536, 40, 24),
         "nano": (48, 2, 3)}
# of google/flan-t5-*: width, feed-forward, heads, layers; 64 channels a head
TEXT = {"small": (512, 1024, 6, 8), "base": (768, 2048, 12, 12), "large": (1024, 2816, 16, 24),
        "xl": (2048, 5120, 32, 24), "xxl": (4096, 10240, 64, 24), "nano": (32, 64, 2, 2)}
VOCABULARY = 32128


def build_image_encoder(folder: Path, size: str, registers: bool = False) -> str:
    """A DINOv2 of that size with random weights, saved as the hub has it; the folder's name."""
    from transformers import (Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig,
                              Dinov2WithRegistersModel)
    if not (folder / "config.json").exists():
        width, layers, heads = IMAGE[size]
        settings = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                        image_size=518, patch_size=14, use_swiglu_ffn=size == "giant")
        torch.manual_seed(0)
        network = (Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings, num_register_tokens=4))
                   if registers else Dinov2Model(Dinov2Config(**settings)))
        network.save_pretrained(folder)
    return str(folder)


def build_text_encoder(folder: Path, size: str) -> str:
    """A T5 encoder of that size with random weights in bf16, and a byte-level tokenizer beside it."""
    from transformers import T5Config, T5EncoderModel
    if not (folder / "tokenizer.json").exists():
        width, inside, heads, layers = TEXT[size]
        config = T5Config(vocab_size=VOCABULARY, d_model=width, d_ff=inside, d_kv=64, num_heads=heads,
                          num_layers=layers, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                          pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
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
    """JPEGs of about ImageNet's size in ten class folders: smooth colours and some grain, so that they
    compress like photographs (90 KB); one in ten stands upright."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"train/n{1440764 + number % 10:08d}/{number:06d}.JPEG"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
            pixels = (pixels + rng.normal(0, 12, (*size[::-1], 1))).clip(0, 255).astype(np.uint8)
            image = Image.fromarray(pixels if number % 10 else pixels.transpose(1, 0, 2))
            image.save(path, "JPEG", quality=90)
    return str(folder)


def build_vgg(folder: Path):
    """A VGG16 with random weights where torchvision looks for the real one (553 MB), if it is not there."""
    name = "hub/checkpoints/vgg16-397923af.pth"
    if not (Path(torch.hub.get_dir()).parent / name).exists():
        from torchvision.models import vgg16
        os.environ["TORCH_HOME"] = str(folder)
        if not (folder / name).exists():
            torch.manual_seed(0)
            with data.atomic(folder / name) as partial:
                torch.save(vgg16(weights=None, init_weights=False).state_dict(), partial)


def check(what: str, done: bool):
    if not done:
        raise SystemExit(f"{what}: no")


def stage(name: str, program, argv: list[str], out: Path):
    """Runs a program as typed, sees that it succeeds with finite losses, and says what it took."""
    begin = time.monotonic()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    check(f"python {name}.py {' '.join(argv)}", program(argv) == 0)
    if (out / f"{name}.csv").exists():
        with open(out / f"{name}.csv", newline="") as lines:
            values = [float(value) for row in csv.DictReader(lines) for value in row.values() if value]
        check(f"{name}.csv has finite losses", bool(values) and all(map(math.isfinite, values)))
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    card = f", card {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if torch.cuda.is_available() else ""
    print(f"{name}: {time.monotonic() - begin:.1f} s; peak so far: host {host:.1f} GB{card}", flush=True)


def run(args, image_encoder: str, text_encoder: str, pictures: str, out: Path):
    """All stages of the full preset, then a picture."""
    common = ["--out", str(out), "--steps", str(args.steps), "--batch", str(args.batch), "--log-every", "1",
              "--precision", args.precision, "--workers", str(args.workers), "--device", args.device]
    small = ["--image-size", "64", "--z-dim", "16"] if args.reduced else []
    widths = ["--widths", "16,16,8,8", "--lpips-weight", "0"] if args.reduced else []
    dit_size = ["--width", "64", "--depth", "2", "--heads", "2"] if args.reduced else ["--size", args.size]
    stage("svae", svae.main, ["--data", pictures, "--encoder", image_encoder, *common, *small], out)
    check("the full preset was taken", data.load(out / "svae.pt", "svae")["config"]["preset"] == "full")
    stage("psvae", psvae.main, [*common, *widths, *(["--checkpointing"] if args.checkpointing else [])], out)
    count = len(list(Path(pictures).rglob("*.JPEG")))
    check("a latent for every picture", len(np.load(out / "latents/mu.npy", mmap_mode="r")) == count)
    stage("dit", dit.main, ["--text-encoder", text_encoder, *common, *dit_size,
                            *(["--checkpointing"] if args.checkpointing else [])], out)
    picture = out / "sample.png"
    stage("sample", sample.main, ["--prompt", "a photo of a tench", "-n", "1", "--steps", "4", "--model",
                                  str(out), "--out", str(picture), "--device", args.device], out)
    side = data.load(out / "svae.pt", "svae")["config"]["image_size"]
    check("a picture of the preset's size", Image.open(picture).width >= side)


def parse(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default="small", choices=IMAGE, help="size of the DINOv2")
    parser.add_argument("--registers", action="store_true", help="a DINOv2 with four register tokens")
    parser.add_argument("--text", default="small", choices=TEXT, help="size of the T5")
    parser.add_argument("--size", default="B", choices=dit.SIZES, help="size of the DiT")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"),
                        help="the preset has bf16, which a CPU only emulates: there it takes hours")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--work", default="out/full", help="folder for everything")
    parser.add_argument("--build-only", action="store_true", help="only build and save the encoders")
    parser.add_argument("--reduced", action="store_true", help="everything small, bf16 as in the preset")
    args = parser.parse_args(argv)
    if args.reduced:
        args.image, args.text, args.precision = "nano", "nano", "bf16"
    return args


def main(argv: list[str] | None = None):
    args = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    work, begin = Path(args.work), time.monotonic()
    image_encoder = build_image_encoder(
        work / f"encoders/dinov2-{args.image}{'-registers' * args.registers}", args.image, args.registers)
    text_encoder = build_text_encoder(work / f"encoders/t5-{args.text}", args.text)
    for folder in (image_encoder, text_encoder):
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        print(f"{folder}: {data.human(size)}, random weights", flush=True)
    if args.build_only:
        return
    pictures = build_pictures(work / "pictures", args.pictures, (96, 72) if args.reduced else (500, 375))
    if not args.reduced:
        build_vgg(work / "torch")
    print(f"built in {time.monotonic() - begin:.1f} s", flush=True)
    data.set_aside(work / "out", *(f"{name}.pt" for name in ("svae", "psvae", "dit")))
    run(args, image_encoder, text_encoder, pictures, work / "out")
    print(f"the full path works: {work / 'out/sample.png'}, {time.monotonic() - begin:.1f} s in all")


if __name__ == "__main__":
    main()
