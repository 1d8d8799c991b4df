"""Draws every CSV of a run: each loss term and its held-out column against steps.

    python notes/curves.py out          writes out/curves.png (pip install matplotlib)
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

out, stages = Path(*sys.argv[1:2] or ["out"]), {}
for stage in ("svae", "psvae", "dit"):
    panels, path = defaultdict(lambda: defaultdict(list)), out / f"{stage}.csv"
    for row in csv.DictReader(path.read_text().splitlines()) if path.exists() else ():
        for name, value in row.items():
            if value and name not in ("step", "learning_rate"):
                panel = panels[name.removeprefix("held_out_")]
                panel[name].append((int(row["step"]), float(value)))
    if panels:
        stages[stage] = panels
if not stages:
    sys.exit(f"error: {out} has no svae.csv, psvae.csv or dit.csv with a row in it.")

columns = max(map(len, stages.values()))
figure = Figure(figsize=(3.2 * columns, 2.6 * len(stages)), layout="constrained")
axes = figure.subplots(len(stages), columns, squeeze=False)
for line, (stage, panels) in zip(axes, stages.items()):
    for axis, (title, curves) in zip(line, panels.items()):
        for name, curve in curves.items():
            style, width, label = (("C1o-", 1.5, "held out") if name.startswith("held_out_")
                                   else ("C0-", 0.7, "training"))
            axis.plot(*zip(*curve), style, ms=3, lw=width, label=label)
        if title != "psnr" and all(y > 0 for curve in curves.values() for _, y in curve):
            axis.set_yscale("log")
        axis.set_title(f"{stage}: {title}", fontsize=9)
        axis.legend(fontsize=7)
    for axis in line[len(panels):]:
        axis.axis("off")
figure.savefig(out / "curves.png", dpi=100)
print(f"wrote {out / 'curves.png'}")
