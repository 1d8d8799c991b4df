"""Random command lines, built from the real flags with edge values: exit code 0 or 2, never a traceback.

    python notes/checks/fuzz.py [--lines 2000] [--processes 50] [--seed 0]

Of each program so many lines go through main(argv) in one process, a fork of this one, and so many start a
process as a person does. Most lines begin where there is nothing to train on, so that they end early; one in
ten has a micro world, encoders and all earlier stages, and trains one step where its values allow it. What is
valid and only large (--batch 1000000, --depth 1000) is left out: it would be slow, not wrong.
"""

import argparse
import collections
import contextlib
import io
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import fields
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))

from notes.checks import reliability                          # noqa: E402

data = reliability.data
MODULES = {"data": data, "svae": reliability.svae, "psvae": reliability.psvae, "dit": reliability.dit,
           "sample": reliability.sample, "convert": reliability.convert}
TEXTS = ["", " ", "x", "-", "--", "nowhere", "/dev/null", ".", "a\nb", "é", "\udcff", "\u0663",
         "0x10", "1e3", "1_0", " 7 ", "+1", "None", "nan", "-inf", "[]", "{}", "%s", "tiny", "full", "cpu",
         "bf16", "mu", "S", "x" * 3000, "8,8,8,8", "8,", ",", "0,0,0,0", "-4,8,8,8", "facebook/dinov2-small",
         "notes/tiny/text_encoder"]
NUMBERS = ["0", "1", "2", "-1", "-0", "0.5", "1.5", "nan", "inf", "1e-300", "1e99", "9" * 30, str(2**63),
           "1e400"]
COSTLY = {"steps", "batch", "count", "width", "depth", "heads", "workers", "n", "T", "image_size", "z_dim",
          "widths", "max_tokens"}
# Where there is nothing to train on; a line that finds something all the same finds a small world and a step
SMALL = ["--data", "nowhere", "--out", "nothing", "--count", "20"]
NOWHERE = {"data": SMALL, "svae": [*SMALL, "--steps", "1"], "psvae": [*SMALL, "--steps", "1"],
           "dit": ["--out", "nothing", "--steps", "1"], "convert": [],
           "sample": ["--model", "nothing", "--out", "nothing/x.png"]}


def value(rng, field, micro: Path) -> list[str]:
    """What is typed after a flag."""
    if field.type is bool:
        return []
    if field.name in COSTLY:
        return [rng.choice(["0", "1", "2", "-1", "1.5", "nan", "9" * 30, "", "x", "16", "8,8,8,8"])]
    texts = [*TEXTS, str(micro), str(micro / "dit.pt"), str(micro / "world/world.json")]
    some = [rng.choice(NUMBERS if field.type in (int, float) and rng.random() < 0.7 else texts)]
    return some * rng.choice((1, 1, 0, 2)) if rng.random() < 0.1 else some


def line(rng, name: str, out: Path, ready: list[str] | None) -> list[str]:
    """Flags of a program, in any order; `ready` stands before them."""
    argv = list(ready or [])
    for field in rng.sample(fields(MODULES[name].Config), rng.randint(0 if ready else 1, 3)):
        flag = data.flag(field.name)
        if field.type is bool and rng.random() < 0.5:
            flag = "--no-" + flag[2:]
        argv += [flag, *value(rng, field, out)]
    if rng.random() < 0.03:
        argv.append(rng.choice(TEXTS))
    return argv


def make_ready(micro: reliability.Micro, name: str) -> tuple[Path, list[str]]:
    """A new out/ with everything that the program needs, and flags that keep it small."""
    more = {"svae": [], "psvae": [], "dit": ["latents"], "sample": ["psvae.pt", "dit.pt"]}.get(name, [])
    out = micro.fresh("psvae" if name == "psvae" else "svae", *more)
    if name in ("svae", "psvae", "dit"):
        return out, [*micro.flags[name], "--steps", "1", "--batch", "2", "--out", str(out)]
    return out, {"sample": ["--prompt", "a", "--steps", "1", "-n", "1", "--model", str(out),
                            "--out", str(out / "x.png")],
                 "data": ["--image-size", "32", "--count", "20", "--out", str(out)],
                 "convert": ["--src", str(out), "--out", str(out / "converted")]}[name]


def in_process(micro, name: str, lines: int, seed: int, report) -> list[str]:
    """Runs the lines in a fork; returns those that ended wrongly."""
    log = micro.work / f"fuzz-{name}.log"

    def many(_):
        rng, codes = random.Random(f"{seed} {name}"), collections.Counter()
        os.chdir(micro.work)
        data._online = lambda *_: False
        for number in range(lines):
            out, ready = make_ready(micro, name) if rng.random() < 0.1 else (micro.work / "nothing", None)
            argv = line(rng, name, out, ready or NOWHERE[name])
            said = io.StringIO()
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    code = MODULES[name].main(argv)
            except SystemExit as end:                  # --help
                code = end.code
            except BaseException:
                code = traceback.format_exc()
            codes[code if isinstance(code, int) else "traceback"] += 1
            errors = [one for one in said.getvalue().splitlines() if one.startswith("error: ")]
            if code not in (0, 2) or (code == 2) != bool(errors):
                last = str(code).strip().splitlines()[-1]
                print("WRONG", ascii([name, *argv])[:600], ascii(last), flush=True)
            if ready:
                micro.drop(out)
        print("CODES", dict(sorted(codes.items(), key=str)))
        return 0
    code, said = reliability.ended(reliability.fork(many, [], log), 7200)
    wrong = [one for one in said.splitlines() if one.startswith("WRONG")]
    codes = re.search(r"CODES (.*)", said)
    report(f"fuzz, {name}: {lines} lines in one process: exit codes {codes[1] if codes else said[-800:]}")
    return wrong + ([] if code == 0 and codes else [f"{name}: ended with {code}: {said[-800:]}"])


def as_typed(micro, name: str, lines: int, seed: int, report) -> list[str]:
    rng, wrong, codes = random.Random(f"{seed} {name} typed"), [], collections.Counter()
    script = HERE / ("notes/convert.py" if name == "convert" else f"{name}.py")
    for number in range(lines):
        out, ready = make_ready(micro, name) if rng.random() < 0.1 else (micro.work / "nothing", None)
        argv = line(rng, name, out, ready or NOWHERE[name])
        done = subprocess.run([sys.executable, script, *argv], cwd=micro.work, capture_output=True, text=True,
                              errors="replace", env=os.environ | {"HF_HUB_OFFLINE": "1"})
        codes[done.returncode] += 1
        if done.returncode not in (0, 2) or "Traceback" in done.stderr:
            wrong.append(f"{name} {argv!a}: {done.returncode}: {done.stderr[-300:]}")
        if ready:
            micro.drop(out)
    report(f"fuzz, {name}: {lines} lines as processes: exit codes {dict(codes)}")
    return wrong


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=2000, help="through main(argv), of each program [2000]")
    parser.add_argument("--processes", type=int, default=50, help="as processes, of each program [50]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(MODULES), choices=list(MODULES))
    parser.add_argument("--work", type=Path, help="a scratch folder; default: a new one, removed at the end")
    args = parser.parse_args(argv)
    top, begin = args.work or Path(tempfile.mkdtemp()), time.monotonic()
    micro, wrong = reliability.Micro(top), []
    report = lambda text: print(f"[{time.monotonic() - begin:5.0f} s] {text}", flush=True)
    for name in args.only:
        wrong += in_process(micro, name, args.lines, args.seed, report)
        wrong += as_typed(micro, name, args.processes, args.seed, report)
    if not args.work:
        shutil.rmtree(top, ignore_errors=True)
    print("\n".join(wrong) or "every line ended with exit code 0 or 2, and 2 with its one line")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
