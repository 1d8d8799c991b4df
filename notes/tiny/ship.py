"""Makes the small files that ship from a trained out/: no optimizer, the DiT's averaged weights
only, and half precision for all but what encodes, whose fingerprint the DiT carries.

    python svae.py && python psvae.py && python dit.py && python dit.py --steps 22000
    python notes/tiny/ship.py            writes psvae.pt, dit.pt and the three logs into notes/tiny/
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402

ENCODES = ("encoder.", "projector.")


def half(state: dict) -> dict:
    small = lambda name, value: value.is_floating_point() and not name.startswith(ENCODES)
    return {name: value.half() if small(name, value) else value for name, value in state.items()}


@data.program
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of the trained model")
    parser.add_argument("--to", default=str(data.HERE / "notes/tiny"), help="of the small files")
    args = parser.parse_args(argv)
    out, to = Path(args.out), Path(args.to)
    for stage, weights in (("psvae", "model"), ("dit", "ema")):
        trained = data.load(out / f"{stage}.pt", stage)
        checkpoint = {name: value for name, value in trained.items()
                      if name not in ("model", "ema", "optimizer", "momenta", "pending")}
        checkpoint |= {"model": {}, weights: half(trained[weights])}
        checkpoint["config"] = checkpoint["config"] | {"out": "out", "device": "auto"}
        with data.atomic(to / f"{stage}.pt") as partial:
            torch.save(checkpoint, partial)
        size = (to / f"{stage}.pt").stat().st_size
        print(f"{to / stage}.pt: {data.human(size)}, step {checkpoint['step']:,}")
    for stage in ("svae", "psvae", "dit"):
        shutil.copy(out / f"{stage}.csv", to / f"{stage}.csv")


if __name__ == "__main__":
    sys.exit(main())
