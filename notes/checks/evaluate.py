"""Measures a trained PS-VAE on held-out pictures: what comes back, and what its latents hold.

    python notes/checks/evaluate.py                  the model in out/, on the pictures it is for
    python notes/checks/evaluate.py --count 50000    as many of them (default 1,000)

PSNR, SSIM, LPIPS (where VGG can be had) and FDD, the Fréchet distance between DINOv2 features of
pictures and reconstructions, from mu. PSNR within 3 pixels of an edge and elsewhere. How much of
each channel of the frozen features comes back through the semantic decoders (1 - squared error /
variance; cosine would flatter, for all features share a large mean).
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import psvae  # noqa: E402
import svae  # noqa: E402


@dataclass(frozen=True)
class Config:
    data: str = ""              # folder of pictures; default: the one that psvae.pt was trained on
    out: str = "out"            # folder with psvae.pt, and maybe svae.pt
    count: int = 1000           # held-out pictures, at most
    batch: int = 50             # pictures at once
    workers: int = 0            # processes that read pictures
    device: str = "auto"        # auto, cpu or cuda

    def __post_init__(self):
        data.check(self, count=(2, 1e8), batch=(1, 1e6), workers=(0, 512))


# --- Measures -------------------------------------------------------------------------------------

def psnr(x_hat: torch.Tensor, x: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture (B,) in dB, over the pixels where `where` (B, 1,
    H, W) is True (default: all; nan where none is); x_hat, x (B, 3, H, W) in [-1, 1]."""
    error = (x_hat.clamp(-1, 1) - x).square().mean(1, keepdim=True) / 4
    where = torch.ones_like(error) if where is None else where
    mean = (error * where).sum((1, 2, 3)) / where.sum((1, 2, 3))
    return -10 * mean.clamp(min=1e-12).log10()


def near_edges(x: torch.Tensor, reach: int = 3) -> torch.Tensor:
    """(B, 1, H, W), True within `reach` pixels of a step of colour; x (B, 3, H, W) in [-1, 1]."""
    step = torch.zeros_like(x[:, :1])
    step[:, :, :, 1:] += (x[:, :, :, 1:] - x[:, :, :, :-1]).abs().amax(1, keepdim=True)
    step[:, :, 1:] += (x[:, :, 1:] - x[:, :, :-1]).abs().amax(1, keepdim=True)
    return F.max_pool2d((step > 0.1).float(), 2 * reach + 1, 1, reach) > 0


def ssim(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004), 11 x 11 Gaussian window of sigma 1.5;
    (B, 3, H, W) in [-1, 1] -> (B,)."""
    window = torch.exp(-(torch.arange(11, device=x.device) - 5.0) ** 2 / (2 * 1.5 ** 2))
    window = (window / window.sum()).expand(3, 1, 1, 11)

    def blur(image):
        return F.conv2d(F.conv2d(image, window, groups=3), window.transpose(2, 3), groups=3)

    a, b = (x_hat.clamp(-1, 1) + 1) / 2, (x + 1) / 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = (blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2,
                         blur(a * b) - mean_a * mean_b)
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    return ((2 * mean_a * mean_b + c1) * (2 * cov + c2) /
            ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between Gaussians fitted to two sets of features (N, d); in DINOv2's space FDD (Stein et al.
    2023)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b)
                 - 2 * root)


def moments(f_hat: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """Sums over all of (..., d) that explained_variance needs, to be added up: (4, d) float64."""
    f_hat, f = f_hat.double().flatten(0, -2), f.double().flatten(0, -2)
    return torch.stack([torch.ones_like(f), f, f ** 2, (f_hat - f) ** 2]).sum(1).cpu()


def explained_variance(sums: torch.Tensor) -> torch.Tensor:
    """Of each channel, (d,) float64: 1 - mean squared error / variance."""
    mean, square, error = sums[1:] / sums[0]
    return 1 - error / (square - mean ** 2)


# --- A trained model ------------------------------------------------------------------------------

@torch.no_grad()
def measure(cfg: Config, model, frozen, stage_1, pictures, count: int) -> dict:
    """{name: values over pictures, or one number} for `count` of `pictures`, from all over them."""
    device = data.pick_device(cfg.device)
    try:
        lpips = data.load_lpips(device)
    except data.UserError as error:
        print(f"LPIPS is left out: {error}")
        lpips = None
    own = pictures.folder.own or len(pictures)          # sorted: the first may be of one class
    chosen = [(i * own // count, None) for i in range(count)]
    keys = lambda step: chosen[step * cfg.batch:(step + 1) * cfg.batch]
    values, sums, real, fake, broken = {}, {}, [], [], set()
    for images, unreadable in data.batches(pictures, keys, 0, -(-count // cfg.batch), cfg.workers):
        broken |= {index for index, _ in unreadable}
        x = data.to_float(images, device)
        mu, target = model.encode(x)[0], frozen(x)
        x_hat = model.decode(mu)
        edge = near_edges(x)
        scores = {"PSNR dB": psnr(x_hat, x), "  near edges": psnr(x_hat, x, edge),
                  "  elsewhere": psnr(x_hat, x, ~edge), "SSIM": ssim(x_hat, x)}
        if lpips:
            scores["LPIPS"] = lpips(x_hat.clamp(-1, 1), x).flatten()
        for name, value in scores.items():
            values.setdefault(name, []).append(value.cpu())
        f_hats = {"features, PS-VAE": model.semantic_decoder(mu)}
        if stage_1:
            f_hats["features, S-VAE"] = stage_1.semantic_decoder(stage_1.projector(target)[0])
        for name, f_hat in f_hats.items():
            sums[name] = sums.get(name, 0) + moments(f_hat, target)
        for features, picture in ((real, x), (fake, x_hat.clamp(-1, 1))):
            features.append(frozen.tokens(picture)[:, 0].cpu().numpy())                     # CLS
    if broken:
        print(f"{len(broken)} pictures cannot be read; the next ones took their places")
    shares = {name: explained_variance(part) for name, part in sums.items()}
    return {name: torch.cat(part) for name, part in values.items()} | shares | {
        "FDD": frechet_distance(np.concatenate(real), np.concatenate(fake))}


@data.program
def main(argv: list[str] | None = None):
    cfg = Config(**data.read_flags(Config, argv, __doc__))
    out, device = Path(cfg.out), data.pick_device(cfg.device)
    if cfg.out == "out" and not (out / "psvae.pt").exists():
        out = data.HERE / "notes/tiny"
        print("no out/psvae.pt: the shipped model")
    model, saved = psvae.load_psvae(out / "psvae.pt", device)
    config = saved["config"]
    frozen = data.load_image_encoder(config["encoder"]).to(device).requires_grad_(False)
    data.check_encoder(data.fingerprint(frozen), saved, config["encoder"])
    stage_1 = None
    if (out / "svae.pt").exists():
        first = data.load(out / "svae.pt", "svae")
        stage_1 = svae.SVAE(frozen.dim, first["config"]["z_dim"]).to(device).eval()
        data.load_weights(stage_1, first["model"], out / "svae.pt")
    _, held_out = data.read_folder(cfg.data or config["data"], config["max_broken"], cfg.out,
                                   config["count"])
    pictures = data.Pictures(held_out, config["image_size"])
    count = min(cfg.count, held_out.own or len(pictures))
    if count < 2:
        raise data.UserError(f"{held_out.root} holds one picture out; FDD needs two or more.")
    found = measure(cfg, model, frozen, stage_1, pictures, count)
    print(f"held-out pictures: N = {len(found['SSIM'])}, from {held_out.root}")
    for name_of, value in found.items():
        if isinstance(value, float):
            print(f"  {name_of:16s} {value:8.3f}  (encoder {config['encoder']}; biased upward for "
                  f"small N)")
        elif name_of.startswith("features"):
            print(f"  {name_of:16s} {value.mean():8.3f}  of the variance, mean over channels; "
                  f"least {value.min():.3f}")
        elif not math.isnan(value.nanmean()):
            value = value[~value.isnan()]
            print(f"  {name_of:16s} {value.mean():8.3f}  (standard deviation over pictures "
                  f"{value.std(correction=0):.3f})")


if __name__ == "__main__":
    sys.exit(main())
