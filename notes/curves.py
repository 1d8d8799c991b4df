"""Draws every CSV of a run: each loss term and its held-out column against steps.

    python notes/curves.py out          writes out/curves.png (matplotlib)
"""

import csv
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402

SKIPPED = ("step", "seconds", "learning_rate")


@dataclass(frozen=True)
class Config:
    out: str = "out"                # folder with svae.csv, psvae.csv, dit.csv, or some of them
    to: str = ""                    # the picture; default: curves.png in that folder


def columns(path: Path) -> dict[str, list[tuple[float, float]]]:
    """{column: [(step, value), …]}, without what is empty or no number."""
    found = defaultdict(list)
    with open(path, newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            for name, value in row.items():
                if name and name not in SKIPPED and value:
                    found[name].append((float(row["step"]), float(value)))
    return dict(found)


def panels(names) -> dict[str, list[str]]:
    """{title: columns drawn together}: a term with what was held out of it."""
    together = defaultdict(list)
    for name in names:
        together[name.removeprefix("held_out_")].append(name)
    return dict(together)


def draw(files: list[Path], to: Path):
    try:                                            # no requirements.txt asks for it
        from matplotlib.figure import Figure
    except ImportError:
        raise data.UserError("matplotlib is missing: pip install matplotlib") from None
    rows = {path.stem: columns(path) for path in files}
    width = max(len(panels(found)) for found in rows.values())
    figure = Figure(figsize=(3.2 * width, 2.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), width, squeeze=False)
    for line, (stage, found) in zip(axes, rows.items()):
        for axis, (title, names) in zip(line, panels(found).items()):
            for name in names:
                style, lw, label = (("C1o-", 1.5, "held out") if name.startswith("held_out_")
                                    else ("C0-", 0.7, "training"))
                axis.plot(*zip(*found[name]), style, ms=3, lw=lw, label=label)
            if all(value > 0 for name in names for _, value in found[name]) and title != "psnr":
                axis.set_yscale("log")
            axis.set_title(f"{stage}: {title}", fontsize=9)
            axis.legend(fontsize=7)
        for axis in line[len(panels(found)):]:
            axis.axis("off")
    with data.atomic(to) as partial:
        figure.savefig(partial, dpi=100, format="png")
    print(f"wrote {to}")


@data.program
def main(argv: list[str] | None = None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--out")
    cfg = Config(**data.read_flags(Config, argv, __doc__))
    files = [Path(cfg.out) / f"{stage}.csv" for stage in ("svae", "psvae", "dit")]
    files = [path for path in files if path.exists()]
    if not files:
        raise data.UserError(f"no svae.csv, psvae.csv or dit.csv in {cfg.out}.")
    draw(files, Path(cfg.to) if cfg.to else Path(cfg.out) / "curves.png")


if __name__ == "__main__":
    sys.exit(main())
