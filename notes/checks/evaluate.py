"""What the tiny encoders and autoencoders hold, in numbers: behind the table of notes/tiny/README.md.

    python notes/checks/evaluate.py [--out out] [--count 1000]

On held-out pictures of the built-in world: what a linear map reads out of the image encoder's patches (fitted
on training pictures); how much of each channel of these features S-VAE gives back (1 - squared error /
variance; cosine would flatter, for all features share a large mean); PSNR of PS-VAE's reconstructions from
mu, within 3 pixels of an edge and elsewhere.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data                                                                                       # noqa: E402
import psvae                                                                                      # noqa: E402
import svae                                                                                       # noqa: E402
from notes.tiny import pretrain_tiny                                                                   # noqa: E402
from notes.claims.lab import near_edges                                                                  # noqa: E402


def explained_variance(f_hat: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """Of each channel, (d,) float64: 1 - mean squared error / variance. f_hat, f (N, d)."""
    f_hat, f = f_hat.double(), f.double()
    return 1 - (f_hat - f).square().mean(0) / f.var(0, correction=0)


def psnr(x_hat: torch.Tensor, x: torch.Tensor, where: torch.Tensor) -> float:
    """Mean over pictures, dB; x_hat, x (B, 3, H, W) in [-1, 1], where (B, 1, H, W): the pixels that count."""
    error = (x_hat.clamp(-1, 1) - x).square().mean(1, keepdim=True) / 4
    return (-10 * (error * where).sum((1, 2, 3)).div(where.sum((1, 2, 3))).log10()).nanmean().item()


@data.program
@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder with world/, svae.pt and psvae.pt")
    parser.add_argument("--count", type=int, default=1000, help="held-out pictures")
    args = parser.parse_args(argv)
    out, device = Path(args.out), data.pick_device("auto")
    saved = data.load(out / "svae.pt", "svae", before="python svae.py")
    folder, held_out = data.read_folder("", out=args.out, count=saved["config"]["count"])
    size = saved["config"]["image_size"]
    train, test = ((data.Pictures(part, size), pretrain_tiny.objects_of(part)) for part in (folder, held_out))
    x = torch.stack([test[0][(i, None)][0] for i in range(min(args.count, len(test[0])))])

    encoder = data.load_image_encoder(saved["config"]["encoder"]).to(device)
    data.check_encoder(data.fingerprint(encoder), saved, saved["config"]["encoder"])
    shares = pretrain_tiny.read_out(encoder, train, test, 2 * args.count)
    print("read out of the patches at an object's centre: "
          + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))

    stage_1 = svae.SVAE(encoder.dim, saved["config"]["z_dim"]).to(device).eval()
    data.load_weights(stage_1, saved["model"], out / "svae.pt")
    stage_2, _ = psvae.load_psvae(out / "psvae.pt", device)
    f, f_hat, x_hat = [], [], []
    for part in x.split(100):
        part = data.to_float(part, device)
        f.append(encoder(part).flatten(0, 2).cpu())
        f_hat.append(stage_1.semantic_decoder(stage_1.projector(encoder(part))[0]).flatten(0, 2).cpu())
        x_hat.append(stage_2.decode(stage_2.encode(part)[0]).cpu())
    share = explained_variance(torch.cat(f_hat), torch.cat(f))
    print(f"S-VAE, from mu: {share.mean():.3f} of the features' variance on average over channels, "
          f"{share.min():.3f} of the least")
    x, x_hat = data.to_float(x, "cpu"), torch.cat(x_hat)
    edge = near_edges(x)
    print(f"PS-VAE, from mu, {len(x):,} pictures: {psnr(x_hat, x, torch.ones_like(edge)):.2f} dB; "
          f"within 3 pixels of an edge {psnr(x_hat, x, edge):.2f}, elsewhere {psnr(x_hat, x, ~edge):.2f}")


if __name__ == "__main__":
    sys.exit(main())
