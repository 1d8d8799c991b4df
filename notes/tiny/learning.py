"""Draws learning.png: what a run draws on its way, and how much of it is right.

    python notes/tiny/learning.py at/*/       folders with psvae.pt and dit.pt, copied meanwhile;
                                              each is named for the minutes since `python svae.py`

One column for each folder: its score (geneval.py --quick, mean and standard deviation over three
sampling seeds), and under it pictures of four prompts, seed 0. Needs matplotlib.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import data  # noqa: E402
import sample  # noqa: E402
from notes.world import geneval  # noqa: E402

PROMPTS = ("a large red circle on a gray background", "a star and a square",
           "three green triangles on a pink background",
           "an outlined purple diamond left of an orange cross")


def main():
    folders = sorted(map(Path, sys.argv[1:]), key=lambda folder: float(folder.name))
    if not folders:
        sys.exit("error: name the folders, at/*/ for example.")
    figure = Figure(figsize=(1.05 * len(folders), 6.4), layout="constrained")
    grid = figure.add_gridspec(1 + len(PROMPTS), len(folders), height_ratios=[2.4, 1, 1, 1, 1])
    scores, asked = [], geneval.prompts()[::4]
    for column, folder in enumerate(folders):
        pipeline = sample.Pipeline(folder, data.pick_device("auto"))
        draw = lambda texts, first: pipeline(texts, [first + i for i in range(len(texts))])
        runs = [geneval.evaluate(draw, asked, n=1, seed=seed) for seed in range(3)]
        scores.append([100 * run["overall"]["score"] for run in runs])
        print(f"minute {folder.name}, step {pipeline.step:,}: "
              f"{np.mean(scores[-1]):.1f} ± {np.std(scores[-1], ddof=1):.1f} %", flush=True)
        for row, picture in enumerate(pipeline(list(PROMPTS), [0] * len(PROMPTS)), 1):
            axis = figure.add_subplot(grid[row, column])
            axis.imshow(picture)
            axis.set_xticks([], []), axis.set_yticks([], [])
    axis, places = figure.add_subplot(grid[0, :]), np.arange(len(folders))
    mean, deviation = np.mean(scores, 1), np.std(scores, 1, ddof=1)
    axis.errorbar(places, mean, deviation, fmt="o-", capsize=3)
    for place, score in zip(places, mean):
        axis.annotate(f"{score:.0f} %", (place, score), (6, -12), textcoords="offset points")
    axis.set_xticks(places, [f"{folder.name} min" for folder in folders])
    axis.set_xlim(-0.5, len(folders) - 0.5), axis.set_ylim(0, 100)
    axis.set_title("of 139 prompts drawn right, and four of them", fontsize=10)
    figure.savefig(HERE / "learning.png", dpi=100)
    print(f"wrote {HERE / 'learning.png'}")


if __name__ == "__main__":
    main()
