"""Proves by force that a run loses nothing and lets nothing in.

    python notes/checks/reliability.py                       everything: half an hour of one core
    python notes/checks/reliability.py kill disk             some of it; --times 5 for fewer strikes
    python notes/checks/reliability.py --short               what test_all.py runs

    kill     each stage ended at random moments (kill -9, SIGINT, SIGTERM), and at every rename
    ranks    two processes (gloo), one of which is killed
    disk     a disk that is full after a random number of bytes of a file
    files    damaged checkpoints, pictures and tables; a pickle that would run code

Every run is a fork of this process, which has imported everything already. A struck run is started
again with the same command until it is done; then all in its out/ is compared with a run that
nobody disturbed: checkpoints bit by bit, other files byte by byte, and no file more or less. Exit
code 1 if anything differs.
"""

import argparse
import collections
import ctypes
import itertools
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.distributed  # noqa: E402

import data  # noqa: E402
import dit  # noqa: E402
import psvae  # noqa: E402
import sample  # noqa: E402
import svae  # noqa: E402
from notes.checks import bench  # noqa: E402
from notes.world import world  # noqa: E402

torch.set_num_threads(1)
MODULES = {"svae": svae, "psvae": psvae, "dit": dit, "sample": sample}
NEEDS = {"svae": [], "psvae": ["svae.pt"], "dit": ["latents"]}      # psvae: encodes at its end


# --- Micro runs, in forks -------------------------------------------------------------------------

class Fork:
    """main(argv) in a fork of this process; before() runs first in it."""

    def __init__(self, main, argv: list[str], before=None):
        sys.stdout.flush()
        self.read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(write, 1), os.dup2(write, 2)
            sys.stdout = open(1, "w")                       # a pipe does not seek
            sys.stderr = open(2, "w", errors="backslashreplace")
            self.run(main, argv, before)
        os.close(write)

    def run(self, main, argv, before):
        code = 1
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # it dies with the process that made it
            signal.alarm(600)                               # and does not hang
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if before:
                before()
            code = main(argv)
        except SystemExit as end:                           # --help
            code = end.code
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 0 if code is None else 1)

    def ended(self) -> tuple[int, str]:
        """Its exit code (128 + n after a signal n) and what it said; then .seconds of work."""
        with open(self.read, errors="replace") as pipe:
            said = pipe.read()
        _, status, used = os.wait4(self.pid, 0)
        self.seconds = used.ru_utime                        # what after() counts in
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code, said


class Micro:
    """A small world, untrained encoders, and an out/ of each stage that nobody disturbed.

    Runs have 16 steps (9 in short) of 16 of 120 pictures, so that epochs end inside steps; 32 px,
    2 x 2 latents.
    """

    def __init__(self, top: Path, steps: int, stages: list[str]):
        self.top, self.seconds, self.reference = top, {}, {}
        bench.build_image_encoder(top / "image", "nano")
        bench.build_text_encoder(top / "text", "nano")
        world.write(top / "world", count=100, workers=1)
        common = (f"--steps {steps} --batch 16 --warmup 2 --log-every 2 --eval-every 9 "
                  f"--save-every {steps // 4} --workers 0 --device cpu").split()
        self.flags = {
            "svae": ["--preset", "tiny", "--encoder", str(top / "image"), *common,
                     *"--image-size 32 --z-dim 8 --count 100".split()],
            "psvae": ["--widths", "8,8,8,8", "--latents", "both", *common],
            "dit": ["--text-encoder", str(top / "text"), *common,
                    *"--width 32 --depth 2 --heads 2 --max-tokens 24".split()]}
        for stage in stages:                            # each in a fork: this process never trains
            self.reference[stage] = self.fresh(*NEEDS[stage])
            run = self.start(stage, self.reference[stage])
            code, said = run.ended()
            assert code == 0, f"{stage}: {code}\n{said}"
            self.seconds[stage] = run.seconds

    def fresh(self, *needs: str) -> Path:
        """A new out/ with a link to the world and copies of what is needed."""
        out = Path(tempfile.mkdtemp(dir=self.top))
        (out / "world").symlink_to(self.top / "world")
        for name in needs:
            made = next(top / name for top in self.reference.values() if (top / name).exists())
            (shutil.copytree if made.is_dir() else shutil.copy)(made, out / name)
        return out

    def start(self, stage: str, out: Path, before=None) -> Fork:
        return Fork(MODULES[stage].main, [*self.flags[stage], "--out", str(out)], before)

    def finish(self, stage: str, out: Path, whole: Path | None = None, start=None):
        """Starts the struck run again until it is done; it ends as if nobody had struck."""
        for path in out.glob("*.pt"):                   # as the strike left them
            checkpoint = data.load(path, path.stem)
            assert all(torch.isfinite(w).all() for w in checkpoint["model"].values()), path
        for run in start() if start else [self.start(stage, out)]:
            code, said = run.ended()
            assert code == 0, f"{stage}, again: {code}\n{said}"
        whole = whole or self.reference[stage]
        one, two = ({path.relative_to(top) for path in top.rglob("*") if path.suffix != ".lock"}
                    for top in (out, whole))
        assert one == two, f"{stage}: missing or too many are {sorted(map(str, one ^ two))}"
        found = [str(name) for name in one if not same(out / name, whole / name)]
        assert not found, f"{stage}: {found} differ"
        shutil.rmtree(out)


def same(one: Path, two: Path) -> bool:
    if one.suffix != ".pt":
        return one.is_dir() or one.read_bytes() == two.read_bytes()
    one, two = (torch.load(path, weights_only=True) for path in (one, two))
    one["config"].pop("out"), two["config"].pop("out")
    return equal(one, two)


def equal(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def refused_or_done(code: int, said: str, what=""):
    """Exit code 0, or 2 with one line; never a traceback."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code in (0, 2) and "Traceback" not in said, f"{what}: exit code {code}\n{said[-2000:]}"
    assert len(errors) == (code == 2), f"{what}: {errors}"


# --- Strikes --------------------------------------------------------------------------------------

def after(seconds: float, number: int):
    """Struck by a signal after so many seconds of work, which a busy machine does not change."""
    def before():
        if number == signal.SIGKILL:                    # the timer's own signal ends it as surely
            signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
        else:
            signal.signal(signal.SIGVTALRM, lambda *_: os.kill(os.getpid(), number))
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    return before


def at_rename(number: int, below: Path):
    """Killed before its number-th rename: what was written is there, and does not have its name."""
    left = itertools.count(number - 1, -1)

    def hook(event, args):
        if event == "os.rename" and str(args[1]).startswith(str(below)) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return lambda: sys.addaudithook(hook)


def full(limit: int):
    """No file may grow beyond so many bytes."""
    def before():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(limit, 4096), resource.RLIM_INFINITY))
    return before


def struck(micro: Micro, stage: str, strikes: list, allowed: tuple[int, ...]) -> list[int]:
    """A run with one strike after another, that then ends as if undisturbed: its exit codes."""
    out, codes = micro.fresh(*NEEDS[stage]), []
    for before in strikes:
        code, said = micro.start(stage, out, before).ended()
        assert code in allowed, f"{stage}: {code}\n{said}"
        if code in (0, 2):
            refused_or_done(code, said, stage)
        codes.append(code)
    micro.finish(stage, out)
    return codes


def kill(micro: Micro, times: int, rng, report):
    signals = itertools.cycle((signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM))
    for stage, seconds in micro.seconds.items():
        codes = collections.Counter()
        for _ in range(times):                          # several strikes to a run
            strikes = [after(rng.uniform(0.01, seconds), next(signals))
                       for _ in range(rng.randint(1, 3) if times > 1 else 1)]
            codes.update(struck(micro, stage, strikes, (0, 130, 143, 128 + signal.SIGVTALRM)))
        report(f"{stage}: ended at random moments, exit codes {dict(codes)}; all as if undisturbed")
        for number in itertools.count(1) if times > 1 else [rng.randint(1, 7)]:
            if struck(micro, stage, [at_rename(number, micro.top)], (0, 137)) == [0]:
                break                                   # it has no more renames
        report(f"{stage}: killed at renames up to number {number}; all as if undisturbed")


def pair(micro: Micro, stage: str, out: Path, victim=-1, seconds=0.0) -> list[Fork]:
    """Both ranks of a run, as torchrun starts them; one may be killed after some seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def as_rank(rank):
        def before():
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            if rank == victim:
                after(seconds, signal.SIGKILL)()
        return before
    return [micro.start(stage, out, as_rank(rank)) for rank in range(2)]


def ranks(micro: Micro, times: int, rng, report):
    for stage in micro.reference:
        whole, hits = micro.fresh(*NEEDS[stage]), 0
        codes = [run.ended() for run in pair(micro, stage, whole)]
        assert [code for code, _ in codes] == [0, 0], codes
        for _ in range(times):
            out, victim = micro.fresh(*NEEDS[stage]), rng.randrange(2)
            runs = pair(micro, stage, out, victim, rng.uniform(0.01, micro.seconds[stage]))
            refused_or_done(*runs[1 - victim].ended(), f"{stage}, the other rank")
            hits += runs[victim].ended()[0] != 0
            micro.finish(stage, out, whole, lambda: pair(micro, stage, out))
        report(f"{stage}: one of two ranks killed {hits} times; all as an undisturbed pair")


def disk(micro: Micro, times: int, rng, report):
    for stage, whole in micro.reference.items():
        sizes = [path.stat().st_size for path in whole.rglob("*") if path.is_file()]
        limits = [int(rng.choice(sizes) * rng.random()) for _ in range(times)]
        codes = [struck(micro, stage, [full(limit)], (0, 2)) for limit in limits]
        report(f"{stage}: the disk full {codes.count([2])} of {times} times; all as if undisturbed")


# --- Damaged files --------------------------------------------------------------------------------

def damage(path: Path, rng, executed: Path) -> str:
    """Cuts a file, blots a part of it out, puts noise or a pickle that runs code in its place."""
    content, how = path.read_bytes(), rng.choice(("cut", "blot", "noise", "empty", "pickle"))
    at = rng.randrange(max(1, len(content)))
    path.write_bytes({"cut": content[:at], "blot": content[:at] + b"\xff" * 64 + content[at + 64:],
                      "noise": rng.randbytes(len(content)), "empty": b"",
                      "pickle": f"cposix\nsystem\n(S'touch {executed}'\ntR.".encode()}[how])
    return f"{path.name}: {how} at {at} of {len(content)}"


def files(micro: Micro, times: int, rng, report):
    own = "--data {out}/mine --max-broken 1 --steps 1 --batch 2 --out {out}"
    draw = "--prompt a --steps 2 -n 1 --model {out} --out {out}/x.png"
    uses = {"svae.pt": ("psvae", ["svae.pt"], "--out {out}"),
            "psvae.pt": ("psvae", ["psvae.pt"], "--encode-only --out {out}"),
            "dit.pt": ("sample", ["psvae.pt", "dit.pt"], draw),
            "mine/train/000007.png": ("svae", [], own),
            "mine/train/metadata.jsonl": ("svae", [], own)}
    made = {name for out in micro.reference.values() for name in os.listdir(out)}
    for name, (program, needs, typed) in uses.items():
        if not made.issuperset(needs):                  # in short
            continue
        codes = collections.Counter()
        for _ in range(times):
            out = micro.fresh(*needs)
            shutil.copytree(micro.top / "world", out / "mine")
            what = damage(out / name, rng, out / "executed")
            argv = [*micro.flags.get(program, []), *typed.format(out=out).split()]
            code, said = Fork(MODULES[program].main, argv).ended()
            refused_or_done(code, said, what)
            assert not (out / "executed").exists(), what
            codes[code] += 1
            shutil.rmtree(out)
        report(f"{name} damaged {times} times: exit codes {dict(codes)}; nothing was executed")


# --------------------------------------------------------------------------------------------------

SECTIONS = {"kill": kill, "ranks": ranks, "disk": disk, "files": files}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--times", type=int, default=25, help="strikes of each kind [25]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="one strike of each kind, stage 1")
    args = parser.parse_args(argv)
    begin, failed = time.monotonic(), []
    report = lambda text: print(f"[{time.monotonic() - begin:5.0f} s] {text}", flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as top:
        micro = Micro(Path(top), 9 if args.short else 16, ["svae"] if args.short else list(NEEDS))
        for name in args.sections or SECTIONS:
            try:
                SECTIONS[name](micro, 1 if args.short else args.times,
                               random.Random(f"{args.seed} {name}"), report)
            except Exception as error:
                failed.append(name)
                report(f"FAILED: {name}: {type(error).__name__}: {error}")
            else:
                report(f"{name} held")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
