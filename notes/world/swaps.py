"""What a DiT reads of its text: how much worse it guesses v when one word is exchanged for another.

    python notes/world/swaps.py [--model notes/tiny] [--count 200]

"a red circle above a star" is given to a picture of just that, noised to t, and so is "a red circle
below a star", with the same noise. A model that reads the word is worse off with the wrong one; the
difference of the errors of v is what the word tells it at that t, and the share of pictures for
which it is positive is 50 % where the word is not read. The training loss hardly shows that: a word
may stand in a sixth of the captions and tell little beside the noise (notes/LOG.md, "What the model
does not read"). The pictures are unseen ones of the built-in world.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
from dit import add_noise, v_of  # noqa: E402
from notes.world import world  # noqa: E402
from sample import SHIPPED, Pipeline  # noqa: E402

TIMES = (400, 500, 600, 700, 800, 900, 1000)    # of 1 to 1000


def exchange(pairs: dict[str, str], only: str = ""):
    """text -> text in which every word of `pairs` is exchanged, where the text starts with one of
    `only`."""
    words = re.compile(rf"\b({'|'.join(pairs)})\b")
    return lambda text: (words.sub(lambda match: pairs[match.group()], text)
                         if re.match(only, text) else text)


def both_ways(*pairs: tuple[str, str]) -> dict[str, str]:
    return dict(pairs) | {b: a for a, b in pairs}


def exchange_colours(text: str) -> str:
    """'a red circle and a blue star' -> 'a blue circle and a red star', where just two objects have
    one, and differ in more."""
    objects, on, background = text.partition(" on ")
    found = re.findall(rf"(\w+ )({'|'.join(world.COLOURS)}) (\w+)", objects)
    if len(found) != 2 or found[0][::2] == found[1][::2]:
        return text
    return exchange(both_ways(tuple(colour for _, colour, _ in found)))(objects) + on + background


SIDES = both_ways(("above", "below"), ("over", "under"), ("left", "right"), ("top", "bottom"))
LARGER = both_ways(("larger", "smaller"), ("bigger", "smaller"), ("enlarge", "shrink"))
OTHER_SHAPE = dict(zip(world.SHAPES, (*world.SHAPES[1:], world.SHAPES[0])))
SWAPS = {   # name: (of an edit, text -> text)
    "place: above, left": (False, exchange(SIDES)),
    "number: two, three": (False, exchange({"two": "three", "three": "four", "four": "two"})),
    "whose colour": (False, exchange_colours),
    "size: small, large": (False, exchange(both_ways(("small", "large"), ("little", "big")))),
    "style: filled, outlined": (False, exchange(both_ways(("filled", "outlined"),
                                                          ("solid", "hollow")))),
    "add …: above, left": (True, exchange(SIDES, "add|draw|insert")),
    "move …: left, top": (True, exchange(SIDES, "move|push|shift")),
    "make …: larger": (True, exchange(LARGER)),
    "remove …: which": (True, exchange(OTHER_SHAPE, "remove|delete|erase|take")),
}


def examples(edit: bool, swap, count: int):
    """(picture, source or None, text, text with the wrong word) of unseen scenes, where there is
    one."""
    index = 0
    while count:
        if edit:
            source, text, content, _ = world.edit(index, "val")
        else:
            source, content = None, world.scene(index, "val")
            text = world.caption(content, world.generator("swaps", index))
        if swap(text) != text:
            yield world.draw(content), source and world.draw(source), text, swap(text)
            count -= 1
        index += 1


@torch.no_grad()
def measure(pipeline: Pipeline, edit: bool, swap, count: int) -> list[tuple[float, float, float]]:
    """For each of TIMES: the error of v with the true text, how much the wrong word adds, and the
    share of pictures to which it adds."""
    pictures, sources, *texts = zip(*examples(edit, swap, count))
    z_0 = pipeline.encode(np.stack(pictures))
    source = pipeline.encode(np.stack(sources)) if edit else None
    eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(0)).to(pipeline.device)
    said, found = [pipeline.text_encoder(list(part)) for part in texts], []
    alpha_bar = pipeline.alpha_bar.to(pipeline.device)
    for t in (max(1, round(t * pipeline.config["T"] / 1000)) for t in TIMES):
        t = torch.full((count,), t, device=pipeline.device)
        z_t = add_noise(z_0, t, eps, alpha_bar)
        is_v = pipeline.config["predict"] == "v"
        target = v_of(z_0, t, eps, alpha_bar) if is_v else eps
        scale = 1 if is_v else alpha_bar[t]             # eps's error: sqrt(alpha_bar) times v's
        true, wrong = ((target - pipeline.dit(z_t, t, *text, source)).square().flatten(1).mean(1)
                       / scale for text in said)
        more = wrong - true
        found.append((true.mean().item(), more.mean().item(), (more > 0).double().mean().item()))
    return found


@data.program
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED, help="folder with psvae.pt and dit.pt")
    parser.add_argument("--count", type=int, default=200, help="pictures for each word")
    args = parser.parse_args(argv)
    pipeline = Pipeline(Path(args.model), data.pick_device("auto"))
    print(f"{args.model}, step {pipeline.step:,}: what the wrong word adds to the error of v, "
          f"and to what share of {args.count} pictures\n")
    print(f"{'':25}" + "".join(f"t = {t:<11}" for t in TIMES))
    for name, (edit, swap) in SWAPS.items():
        if not edit or pipeline.edits:
            row = measure(pipeline, edit, swap, args.count)
            print(f"{name:25}" + "".join(f"{more:+.3f} {share:4.0%}    " for _, more, share in row),
                  flush=True)


if __name__ == "__main__":
    sys.exit(main())
