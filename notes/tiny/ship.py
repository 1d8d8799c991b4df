"""Makes the model that ships: weights in half precision, without optimizer, under notes/tiny/.

    python svae.py && python psvae.py
    python notes/tiny/ship.py psvae            rounds the weights of out/psvae.pt in place,
                                          and writes notes/tiny/psvae.pt
    python psvae.py --encode-only         latents of the rounded weights:
                                          their fingerprint is that of what ships
    python dit.py
    python notes/tiny/ship.py dit              writes notes/tiny/dit.pt: the averaged weights only
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
from psvae import load_psvae


def half(state: dict) -> dict:
    return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}


@data.program
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("psvae", "dit"))
    parser.add_argument("--out", default="out", help="folder of the trained model")
    parser.add_argument("--to", default=str(data.HERE / "notes/tiny"), help="where the small file goes")
    args = parser.parse_args(argv)
    path = Path(args.out) / f"{args.stage}.pt"
    checkpoint = dict(data.load(path, args.stage))
    if args.stage == "psvae":
        model, _ = load_psvae(path)
        model.half().float()                           # latents belong to the rounded weights
        checkpoint |= {"model": model.state_dict(), "fingerprint": model.fingerprint()}
        with data.atomic(path) as partial:
            torch.save(checkpoint, partial)
        checkpoint["model"] = half(checkpoint["model"])
    else:
        checkpoint |= {"model": {}, "ema": half(checkpoint["ema"])}
    for name in ("optimizer", "pending"):
        checkpoint.pop(name, None)
    checkpoint["config"] = checkpoint["config"] | {"out": "out"}
    shipped = Path(args.to) / path.name
    with data.atomic(shipped) as partial:
        torch.save(checkpoint, partial)
    print(f"{shipped}: {data.human(shipped.stat().st_size)}, step {checkpoint['step']:,}")


if __name__ == "__main__":
    sys.exit(main())
