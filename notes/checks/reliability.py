"""Proves by force that a run loses nothing and lets nothing in.

    python notes/checks/reliability.py                       everything: an hour and more, one core
    python notes/checks/reliability.py kill disk             some of it; --times 5 for fewer strikes
    python notes/checks/reliability.py --short --json FILE   what test_all.py runs

    kill     each stage ended at random moments (kill -9, SIGINT, SIGTERM), and at every rename
    ranks    two processes (gloo), one of which is killed
    disk     a disk that is full after a random number of bytes of a file
    files    damaged checkpoints, pictures and tables; a pickle that would run code
    flags    random command lines from the real flags: exit code 0, or 2 with one line

Every run is a fork of this process, which has imported everything already. A struck run is started
again with the same command until it is done; then all in its out/ is compared with a run that
nobody disturbed: checkpoints bit by bit, other files byte by byte, and no file more or less. Exit
code 1 if anything differs.
"""

import argparse
import collections
import ctypes
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import fields
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.distributed  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import dit  # noqa: E402
import psvae  # noqa: E402
import sample  # noqa: E402
import svae  # noqa: E402
from notes import convert  # noqa: E402
from notes.tiny import pretrain_tiny  # noqa: E402
from notes.world import world  # noqa: E402

torch.set_num_threads(1)
MODULES = {"svae": svae, "psvae": psvae, "dit": dit, "sample": sample, "data": data,
           "convert": convert}
STAGES = ("svae", "psvae", "dit")                       # psvae: with the encoding that follows it
NEEDS = {"svae": (), "psvae": ("svae.pt",), "dit": ("latents",)}
WRITES = {"svae": ("svae.pt", "svae.csv", "svae.png"),
          "psvae": ("psvae.pt", "psvae.csv", "psvae.png", "latents"),
          "dit": ("dit.pt", "dit.csv", "dit.png", "text")}


# --- Micro runs, in forks -------------------------------------------------------------------------

class Micro:
    """A small world, untrained encoders, and out/ of all stages, undisturbed: the reference.

    Runs have 16 steps of 16 of 120 pictures, so that epochs end inside steps; 32 px, 2 x 2 latents.
    """

    def __init__(self, top: Path):
        self.work, self.reference = top / "work", top / "reference"
        self.number, self.seconds = 0, {}
        self.work.mkdir(parents=True)
        pretrain_tiny.untrained_encoders(top)
        world.write(self.reference / "world", count=120, workers=1)
        common = ("--steps 16 --batch 16 --warmup 2 --log-every 2 --eval-every 9 --save-every 4 "
                  "--workers 0 --device cpu").split()
        self.flags = {
            "svae": ["--preset", "tiny", "--encoder", str(top / "image"), *common,
                     *"--image-size 32 --z-dim 8 --count 120".split()],
            "psvae": ["--widths", "8,8,8,8", "--latents", "both", *common],
            "dit": ["--text-encoder", str(top / "text"), *common,
                    *"--width 32 --depth 2 --heads 2 --max-tokens 24".split()]}
        for stage in STAGES:                            # each in a fork: this process never trains
            out = self.fresh(stage)
            code, said = ended(self.start(stage, out))
            assert code == 0, f"{stage}: {code}\n{said}"
            self.seconds[stage] = ended.cpu
            for name in WRITES[stage]:
                shutil.move(out / name, self.reference / name)

    def fresh(self, stage: str, *more: str) -> Path:
        """A new out/ with a link to the world and copies of what the stage needs."""
        self.number += 1
        out = self.work / f"{stage}-{self.number}"
        out.mkdir()
        (out / "world").symlink_to(self.reference / "world")
        for name in dict.fromkeys((*NEEDS.get(stage, ()), *more)):
            copy = shutil.copytree if (self.reference / name).is_dir() else shutil.copy
            copy(self.reference / name, out / name)
        return out

    def start(self, stage: str, out: Path, *flags: str, before=None) -> int:
        return fork(MODULES[stage].main, [*self.flags[stage], *flags, "--out", str(out)],
                    out.with_suffix(".log"), before)

    def differences(self, stage: str, out: Path, whole: Path | None = None) -> list[str]:
        """What in out/ is not as an undisturbed run leaves it."""
        whole, found = whole or self.reference, []
        for name in WRITES[stage]:
            files = {p.relative_to(top) for top in (whole, out)
                     for p in ((top / name).rglob("*") if (top / name).is_dir() else [top / name])}
            for file in sorted(files):
                one, two = out / file, whole / file
                if one.is_file() != two.is_file():
                    found.append(f"{file} is missing or too many")
                elif file.suffix == ".pt":
                    one, two = (torch.load(path, weights_only=True) for path in (one, two))
                    one["config"].pop("out"), two["config"].pop("out")
                    found += [] if equal(one, two) else [f"{file} differs"]
                elif one.is_file() and one.read_bytes() != two.read_bytes():
                    found.append(f"{file} differs")
        known = {"world", *NEEDS[stage], *WRITES[stage]}
        return found + [f"stray: {name}" for name in sorted(os.listdir(out))
                        if name not in known and not name.endswith(".lock")]

    def finish(self, stage: str, out: Path, whole: Path | None = None, start=None):
        """Starts the struck run again until it is done; it ends as if nobody had struck."""
        for path in out.glob("*.pt"):                   # as the strike left them
            checkpoint = data.load(path, path.stem)
            assert all(torch.isfinite(w).all() for w in checkpoint["model"].values()), path
        for pid in start() if start else [self.start(stage, out)]:
            code, said = ended(pid)
            assert code == 0, f"{stage}, again: {code}\n{said}"
        found = self.differences(stage, out, whole)
        assert not found, f"{stage}: {found}"
        self.drop(out)

    def drop(self, out: Path):
        for path in out.parent.glob(f"{out.name}*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def equal(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def fork(main, argv: list[str], log: Path, before=None) -> int:
    """main(argv) in a fork whose output goes to `log`; before() runs first in it. Returns its
    process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        fork.logs[pid] = log
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # the fork dies with this process
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
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


fork.logs = {}


def ended(pid: int, within: float = 600) -> tuple[int, str]:
    """The exit code of a fork (128 + n after a signal n) and what it said; ended.cpu: seconds it
    worked."""
    begin = time.monotonic()
    while time.monotonic() - begin < within:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            ended.cpu = used.ru_utime + used.ru_stime
            code = os.waitstatus_to_exitcode(status)
            said = fork.logs.pop(pid).read_text(errors="replace")
            return (code if code >= 0 else 128 - code), said
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1, f"still there after {within} s\n" + fork.logs.pop(pid).read_text(errors="replace")


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


def at_rename(number: int, out: Path, count=None):
    """Killed before its number-th rename below out/: what was written is there, and does not have
    its name."""
    seen = [0]

    def hook(event, args):
        if event == "os.rename" and str(args[1]).startswith(str(out)):
            seen[0] += 1
            if count:
                count.write_text(str(seen[0]))
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
    return lambda: sys.addaudithook(hook)


def kill(micro: Micro, times: int, rng, report, stages):
    for stage in stages:
        codes = collections.Counter()
        for _ in range(times):
            out = micro.fresh(stage)
            for _ in range(rng.randint(1, 3)):          # several strikes to a run
                number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM))
                how = after(rng.uniform(0.01, micro.seconds[stage]), number)
                code, said = ended(micro.start(stage, out, before=how))
                assert code in (0, 128 + signal.SIGVTALRM, 130, 143), f"{stage}: {code}\n{said}"
                codes[code] += 1
            micro.finish(stage, out)
        report(f"{stage}: ended at random moments, exit codes {dict(codes)}; all as if undisturbed")
        out, count = micro.fresh(stage), micro.work / "count"
        assert ended(micro.start(stage, out, before=at_rename(0, out, count)))[0] == 0
        renames = int(count.read_text())
        micro.drop(out)
        chosen = range(1, renames + 1)
        chosen = rng.sample(chosen, min(renames, 4 * times))
        for number in chosen:
            out = micro.fresh(stage)
            code, said = ended(micro.start(stage, out, before=at_rename(number, out)))
            assert code == 137, f"{stage}, rename {number}: {code}\n{said}"
            micro.finish(stage, out)
        report(f"{stage}: killed at {len(chosen)} of {renames} renames; all as if undisturbed")


def pair(micro: Micro, stage: str, out: Path, struck=-1, seconds=0.0) -> list[int]:
    """Both ranks of a run, as torchrun starts them; one may be killed after so many seconds of
    work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pids = []
    for rank in range(2):
        def before():
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            if rank == struck:
                after(seconds, signal.SIGKILL)()
        pids.append(fork(MODULES[stage].main, [*micro.flags[stage], "--out", str(out)],
                         out.with_name(f"{out.name}.{rank}.log"), before))
    return pids


def ranks(micro: Micro, times: int, rng, report, stages):
    for stage in stages:
        whole, hits = micro.fresh(stage), 0
        codes = [ended(pid) for pid in pair(micro, stage, whole)]
        assert [code for code, _ in codes] == [0, 0], codes
        for _ in range(times):
            out, struck = micro.fresh(stage), rng.randrange(2)
            pids = pair(micro, stage, out, struck, rng.uniform(0.01, micro.seconds[stage]))
            code, said = ended(pids[1 - struck])
            refused_or_done(code, said, f"{stage}, the other rank")
            hits += ended(pids[struck])[0] != 0
            micro.finish(stage, out, whole, lambda: pair(micro, stage, out))
        report(f"{stage}: one of two ranks killed {hits} times; all as an undisturbed pair")


def disk(micro: Micro, times: int, rng, report, stages):
    """No file may grow beyond a limit: where it is met, one line; with room, as if undisturbed."""
    for stage in stages:
        written = [micro.reference / name for name in WRITES[stage]]
        sizes = [path.stat().st_size for top in written for path in [top, *top.rglob("*")]
                 if path.is_file()]
        hits = 0
        for _ in range(times):
            out, limit = micro.fresh(stage), int(rng.choice(sizes) * rng.random())

            def full():
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # what it says must not meet it
                resource.setrlimit(resource.RLIMIT_FSIZE,
                                   (max(limit, 4096), resource.RLIM_INFINITY))
            code, said = ended(micro.start(stage, out, before=full))
            refused_or_done(code, said, f"{stage}, {limit} bytes")
            hits += code == 2
            micro.finish(stage, out)
        report(f"{stage}: the disk was full {hits} of {times} times, one line each; all as if "
               f"undisturbed")


# --- Damaged files --------------------------------------------------------------------------------

class Attack:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def damage(path: Path, rng, executed: Path) -> str:
    """Cuts a file, blots a part of it out, puts noise or a pickle that runs code in its place."""
    content, how = path.read_bytes(), rng.choice(("cut", "blot", "noise", "empty", "pickle"))
    at = rng.randrange(max(1, len(content)))
    path.write_bytes({"cut": content[:at], "blot": content[:at] + b"\xff" * 64 + content[at + 64:],
                      "noise": rng.randbytes(len(content)), "empty": b"",
                      "pickle": pickle.dumps(Attack(executed))}[how])
    return f"{path.name}: {how} at {at} of {len(content)}"


def files(micro: Micro, times: int, rng, report, stages):
    uses = {"svae.pt": ("psvae", ["svae.pt"], []),
            "psvae.pt": ("psvae", ["psvae.pt"], ["--encode-only"]),
            "dit.pt": ("sample", ["psvae.pt", "dit.pt"], []),
            "picture": ("svae", [], ["--max-broken", "1"]),
            "table": ("svae", [], ["--max-broken", "1"])}
    for name, (program, needs, flags) in uses.items():
        codes = collections.Counter()
        for _ in range(times):
            out = micro.fresh("svae", *needs)
            target, executed = out / name, out / "executed"
            argv = [*micro.flags.get(program, []), *flags, "--out", str(out)]
            if name in ("picture", "table"):
                folder = out / "pictures"
                folder.mkdir()
                for k in range(20):
                    Image.new("RGB", (40, 40), (12 * k, 80, 90)).save(folder / f"{k}.png")
                rows = [json.dumps({"file_name": f"{k}.png", "text": f"number {k}"})
                        for k in range(20)]
                (folder / "metadata.jsonl").write_text("\n".join(rows))
                target = folder / ("7.png" if name == "picture" else "metadata.jsonl")
                argv += ["--data", str(folder), "--steps", "1", "--batch", "2"]
            if program == "sample":
                argv = ["--prompt", "a", "--steps", "2", "-n", "1", "--model", str(out), "--out",
                        str(out / "x.png")]
            what = damage(target, rng, executed)
            code, said = ended(fork(MODULES[program].main, argv, out.with_suffix(".log")))
            refused_or_done(code, said, what)
            assert not executed.exists(), what
            codes[code] += 1
            micro.drop(out)
        report(f"{name} damaged {times} times: exit codes {dict(codes)}; nothing was executed")


# --- Random command lines -------------------------------------------------------------------------

TEXTS = ["", " ", "x", "-", "--", "nowhere", "/dev/null", ".", "a\nb", "é", "\udcff", "0x10",
         "1e3", "1_0", " 7 ", "None", "[]", "%s", "tiny", "full", "cpu", "mu", "S", "x" * 3000,
         "8,8,8,8", "8,", "-4,8,8,8", "notes/tiny/text_encoder"]
NUMBERS = ["0", "1", "2", "-1", "-0", "0.5", "1.5", "nan", "inf", "1e-300", "1e99", "9" * 30,
           str(2**63)]
# What is valid and only large (--batch 1000000, --depth 1000) would be slow, not wrong.
COSTLY = {"steps", "batch", "count", "width", "depth", "heads", "workers", "n", "T", "image_size",
          "z_dim", "widths", "max_tokens"}


def line(rng, name: str, given: list[str]) -> list[str]:
    """Some of a program's real flags with edge values, behind those `given`."""
    argv = list(given)
    for field in rng.sample(fields(MODULES[name].Config), rng.randint(1, 3)):
        flag, texts = data.flag(field.name), NUMBERS if field.type in (int, float) else TEXTS
        if field.type is bool:
            argv.append(flag if rng.random() < 0.5 else "--no-" + flag[2:])
        else:
            costly = ["0", "1", "2", "-1", "1.5", "nan", "", "x", "16", "8,8,8,8"]
            values = costly if field.name in COSTLY else texts if rng.random() < 0.7 else TEXTS
            argv += [flag, *[rng.choice(values)] * rng.choice((1, 1, 1, 1, 0, 2))]
    return argv + [rng.choice(TEXTS)] * (rng.random() < 0.03)


def flags(micro: Micro, times: int, rng, report, stages):
    """Most lines begin where there is nothing to train on; one in ten has all that the program
    needs."""
    nothing = micro.work / "nothing"
    for name in MODULES:
        small = ["--data", str(nothing), "--out", str(nothing / "out"), "--count", "20"]
        given = {"dit": ["--out", str(nothing)], "sample": ["--model", str(nothing)],
                 "convert": []}.get(name, small)

        def many(_):
            os.chdir(micro.work)
            os.environ["HF_HUB_OFFLINE"] = "1"
            for _ in range(40 * times):
                argv, out = line(rng, name, given), None
                if name in micro.flags and rng.random() < 0.1:
                    out = micro.fresh(name)
                    argv = line(rng, name, [*micro.flags[name], "--steps", "1", "--batch", "2",
                                            "--out", str(out)])
                code, said = ended(fork(MODULES[name].main, argv, micro.work / "line.log"))
                codes[code] += 1
                if not ("--help" in argv or "-h" in argv):
                    refused_or_done(code, said, f"{name} {argv!a}")
                if out:
                    micro.drop(out)
            print(f"exit codes {dict(codes)}")
            return 0
        codes = collections.Counter()
        code, said = ended(fork(many, [], micro.work / f"{name}.log"), 36_000)
        assert code == 0, said
        report(f"{name}: {40 * times} random lines: {said.strip()}")


# --------------------------------------------------------------------------------------------------

SECTIONS = {"kill": kill, "ranks": ranks, "disk": disk, "files": files, "flags": flags}
SHORT = {"kill": ("psvae", "dit"), "ranks": ("dit",), "disk": ("psvae",), "files": ()}   # stages


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--times", type=int, default=25, help="strikes of each kind [25]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="one strike of each kind")
    parser.add_argument("--json", type=Path, help="a file for {section: held, or what failed}")
    args = parser.parse_args(argv)
    begin, results = time.monotonic(), {}
    report = lambda text: print(f"[{time.monotonic() - begin:5.0f} s] {text}", flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as top:
        micro = Micro(Path(top))
        for name in args.sections or (SHORT if args.short else SECTIONS):
            try:
                SECTIONS[name](micro, 1 if args.short else args.times,
                               random.Random(f"{args.seed} {name}"), report,
                               SHORT[name] if args.short else STAGES)
                results[name] = "held"
            except Exception as error:
                results[name] = f"{type(error).__name__}: {error}"
                report(f"FAILED: {name}: {results[name]}")
    if args.json:
        args.json.write_text(json.dumps(results))
    return 0 if set(results.values()) == {"held"} else 1


if __name__ == "__main__":
    sys.exit(main())
