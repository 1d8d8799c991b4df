"""Proves by force that a run loses nothing and lets nothing in.

    python notes/checks/reliability.py                       everything, an hour and more on one core
    python notes/checks/reliability.py kill signals          some of it; --times 5 for fewer strikes
    python notes/checks/reliability.py --short --json FILE   what test_all.py runs: half a minute

    kill         kill -9 at random moments, inside writes, and at every file operation in turn
    signals      SIGINT and SIGTERM at random moments, and twice in a row
    ranks        two gloo processes, one of which is killed or asked to stop
    two          two runs started at once on one --out
    disk         a disk that fills up (a tmpfs where one can be mounted, else RLIMIT_FSIZE), a read-only out/
    data         broken and hostile pictures, tables and tars, both ways; a million rows
    checkpoints  every part of every checkpoint changed into something else
    numbers      NaN and infinities planted in every loss term and in a gradient
    long         ten thousand steps of each stage: memory and file handles

Every run is a fork of this process, which has imported everything already, so that a strike costs a second
instead of ten. A struck run is started again with the same command until it is done; then all in its out/ is
compared with a run that nobody disturbed: checkpoints bit by bit, other files byte by byte, and no file more
or less. Exit code 1 if anything differs.
"""

import argparse
import collections
import contextlib
import copy
import csv
import ctypes
import faulthandler
import io
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np                                     # noqa: E402
import torch                                           # noqa: E402
import torch.distributed                               # noqa: E402
from PIL import Image                                  # noqa: E402

import data                                            # noqa: E402
import dit                                             # noqa: E402
import psvae                                           # noqa: E402
import sample                                          # noqa: E402
import svae                                            # noqa: E402
from notes import convert                              # noqa: E402
from notes.tiny import pretrain_tiny                   # noqa: E402
from notes.world import world                          # noqa: E402

torch.set_num_threads(1)
PROGRAMS = {"svae": svae.main, "psvae": psvae.main, "latents": psvae.main, "dit": dit.main,
            "sample": sample.main, "data": data.main, "convert": convert.main}
STAGES = ("svae", "psvae", "latents", "dit")           # latents: psvae.py with nothing left to train
NEEDS = {"svae": ("world",), "psvae": ("world", "svae.pt"), "latents": ("large/world", "psvae.pt"),
         "dit": ("latents",)}
WRITES = {"svae": ("svae.pt", "svae.csv", "svae.png"),
          "psvae": ("psvae.pt", "psvae.csv", "psvae.png", "latents"), "latents": ("latents",),
          "dit": ("dit.pt", "dit.csv", "dit.png", "text")}
steps_done = mmap.mmap(-1, 8)                          # shared with the forks: steps recorded so far


# ------------------------------------------------------------------------------------------------------------
# Micro runs, in forks
# ------------------------------------------------------------------------------------------------------------


class Micro:
    """A folder with a small world, untrained encoders, and out/ of all stages, undisturbed: the reference.

    Runs have 16 steps of 16 of 120 pictures, so that epochs end inside steps; 32 px, 2 x 2 latents. Encoders
    are read once: the forks share them.
    """

    def __init__(self, top: Path, steps: int = 16, large: int = 3600):
        self.top, self.work, self.number = top, top / "work", 0
        self.reference = top / "reference"
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        common = (f"--steps {steps} --batch 16 --warmup 2 --log-every 2 --eval-every 9 --save-every 4 "
                  f"--workers 0 --device cpu").split()
        self.steps, self.flags = steps, {
            "svae": ["--preset", "tiny", "--encoder", str(top / "image"), "--image-size", "32", "--z-dim",
                     "8", "--count", "120", *common],
            "psvae": ["--widths", "8,8,8,8", "--latents", "both", *common], "latents": ["--workers", "0"],
            "dit": ["--width", "32", "--depth", "2", "--heads", "2", "--max-tokens", "24", "--text-encoder",
                    str(top / "text"), *common]}
        if not (self.reference / "latents").exists():
            shutil.rmtree(self.reference, ignore_errors=True)
            pretrain_tiny.untrained_encoders(top)
            world.write(self.reference / "world", count=120, workers=1)
            world.write(self.reference / "large/world", count=large, workers=1)
        image, text = data.load_image_encoder(str(top / "image")), data.load_text_encoder(str(top / "text"))
        data.load_image_encoder = lambda name: copy.deepcopy(image)
        data.load_text_encoder = lambda name, max_tokens=120, device="cpu": data.TextEncoder(
            text.network, text.tokenizer, max_tokens)
        self.seconds = {}
        for stage in STAGES:                           # each in a fork: this process never trains
            out = self.fresh(stage)
            pid = self.start(stage, out)
            begin = first_step(pid)
            code, said = ended(pid)
            assert code == 0, f"{stage}: {code}\n{said}"
            self.seconds[stage] = ended.cpu - begin    # of work, from the first step to the end
            target = self.reference if stage != "latents" else self.reference / "large"
            for name in WRITES[stage]:
                data.remove_folder(target / name)
                shutil.move(out / name, target / name)

    def fresh(self, stage: str, *more: str) -> Path:
        """A new out/ with what the stage needs: links to the worlds, copies of everything else."""
        self.number += 1
        out = self.work / f"{stage}-{self.number}"
        out.mkdir()
        for name in (*NEEDS[stage], *more):
            there = self.reference / name
            if there.name == "world":
                (out / "world").symlink_to(there)
            elif there.is_dir():
                shutil.copytree(there, out / there.name)
            else:
                shutil.copy(there, out / there.name)
        return out

    def start(self, stage: str, out: Path, *flags: str, before=None) -> int:
        return fork(PROGRAMS[stage], [*self.flags[stage], *map(str, flags), "--out", str(out)],
                    out.with_suffix(".log"), before)

    def differences(self, stage: str, out: Path, whole: Path | None = None) -> list[str]:
        """What in out/ is not as an undisturbed run leaves it."""
        whole = whole or (self.reference if stage != "latents" else self.reference / "large")
        found = []
        for name in WRITES[stage]:
            files = {p.relative_to(whole) for p in (whole / name).rglob("*")} | {Path(name)}
            files |= {p.relative_to(out) for p in (out / name).rglob("*")}
            for file in sorted(f for f in files if not (whole / f).is_dir()):
                if not ((out / file).is_file() and (whole / file).is_file()):
                    found.append(f"{file} is missing or too many")
                elif file.suffix == ".pt":
                    one, two = (torch.load(f / file, weights_only=True) for f in (out, whole))
                    one["config"].pop("out"), two["config"].pop("out")
                    found += [] if equal(one, two) else [f"{file} differs"]
                elif (out / file).read_bytes() != (whole / file).read_bytes():
                    found.append(f"{file} differs")
        known = {Path(name).name for name in (*NEEDS[stage], *WRITES[stage])}
        return found + [f"stray: {name}" for name in sorted(os.listdir(out))
                        if name not in known and not name.endswith(".lock")]

    def drop(self, out: Path):
        for path in (out, *out.parent.glob(f"{out.name}.*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def equal(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def fork(main, argv: list[str], log: Path, before=None) -> int:
    """main(argv) in a fork whose output goes to `log`; before() runs first in it. Returns its process id."""
    put(0)
    log.write_text("")
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        fork.logs[pid] = log
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)     # the fork dies with this process
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        count_steps()
        if before:
            before()
        code = main(argv)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


fork.logs = {}


def ended(pid: int, within: float = 120) -> tuple[int, str]:
    """The exit code of a fork (128 + n after a signal n) and what it said; ended.after: how long."""
    ended.after, last = 0.0, time.monotonic()
    while ended.after < within:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            ended.cpu = used.ru_utime + used.ru_stime
            code = os.waitstatus_to_exitcode(status)
            return (code if code >= 0 else 128 - code), fork.logs.pop(pid).read_text(errors="replace")
        time.sleep(0.01)
        now = time.monotonic()                         # while this process is held up, so are its forks
        ended.after, last = ended.after + min(0.1, now - last), now
    state = Path(f"/proc/{pid}/stat").read_text().split()[2]
    os.kill(pid, signal.SIGUSR1)                       # its stack goes to its log
    time.sleep(2)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1, f"still there ({state}) after {within} s\n" + fork.logs.pop(pid).read_text(errors="replace")


def work(pid: int, seconds: float):
    """Waits until a fork has worked so long, not counting what other processes took from it; or has ended."""
    while not has_ended(pid):
        with contextlib.suppress(OSError):
            if int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9 > seconds:
                return
        time.sleep(0.003)


def first_step(pid: int) -> float:
    """Waits for the first step; seconds that the fork has worked until then."""
    while not got() and not has_ended(pid):
        time.sleep(0.003)
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    return 0.0


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def put(count: int):
    steps_done[:8] = struct.pack("q", count)


def got() -> int:
    return struct.unpack("q", steps_done[:8])[0]


def count_steps():
    """In a fork: steps (of the encoding: chunks) are counted where the parent sees them."""
    record, count_broken = data.Run.record, data.Run.count_broken

    def recorded(run, *args):
        put(got() + 1)
        return record(run, *args)

    def counted(run, *args):
        put(got() + (run.stage == "latents"))
        return count_broken(run, *args)
    data.Run.record, data.Run.count_broken = recorded, counted


def checkpoints_are_whole(out: Path):
    """Every checkpoint in out/, as a struck run left it, loads and is finite."""
    for path in out.glob("*.pt"):
        checkpoint = data.load(path, path.stem)
        for part in ("model", "ema"):
            assert all(torch.isfinite(w).all() for w in checkpoint.get(part, {}).values()), path


def one_line(said: str) -> str:
    """The one line of a refusal; fails on a traceback."""
    assert "Traceback" not in said, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and len(errors[0]) < 1200, said
    return errors[0]


# ------------------------------------------------------------------------------------------------------------
# kill -9
# ------------------------------------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(wanted):
    """Dies at the end of the step for which wanted(step, cfg) is true, before anything of it is kept."""
    def before():
        original = data.Run.stopping

        def stopping(run, step):
            die() if wanted(step, run.cfg) else None
            return original(run, step)
        data.Run.stopping = stopping
    return before


def at_record():
    data.Run.record = lambda run, losses: die()


def half(module, name: str, write):
    """Dies when module.name is called the second time, after `write`, which leaves half of what was asked."""
    def before():
        original, calls = getattr(module, name), []

        def called(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                write(original, *args, **kwargs)
                die()
            return original(*args, **kwargs)
        setattr(module, name, called)
    return before


def half_a_file(original, *args, **kwargs):
    buffer, path = io.BytesIO(), args[1]
    original(args[0], buffer, *args[2:], **kwargs)
    Path(path).write_bytes(buffer.getvalue()[:buffer.tell() // 2])


def half_a_row(original, writer, row):
    buffer = io.StringIO()
    original(csv.DictWriter(buffer, writer.fieldnames, restval="", lineterminator="\n"), row)
    text = buffer.getvalue()
    for handle in os.listdir("/proc/self/fd"):         # where the row would go, behind what stands there
        target = os.readlink(f"/proc/self/fd/{handle}") if os.path.exists(f"/proc/self/fd/{handle}") else ""
        if target.endswith(".csv"):
            os.write(int(handle), text[:len(text) // 2].encode())


def after_move(suffix: str):
    def before():
        original, calls = os.replace, []

        def replace(source, target):
            original(source, target)
            if str(target).endswith(suffix):
                calls.append(1)
                die() if len(calls) == 2 else None
        os.replace = replace
    return before


EPOCH = lambda step, cfg: step * cfg.batch // 120 > (step - 1) * cfg.batch // 120
PLANTED = {"in the first step": at_record,
           "in the last step": at_step(lambda step, cfg: step == cfg.steps),
           "at the end of an epoch": at_step(EPOCH),
           "in the middle of a checkpoint": half(torch, "save", half_a_file),
           "in the middle of a picture": half(Image.Image, "save", half_a_file),
           "in the middle of a row of the log": half(csv.DictWriter, "writerow", half_a_row),
           "after a checkpoint has its name": after_move(".pt")}


def at_file_operation(number: int, out: Path, counter=None):
    """Dies at the number-th time that the run opens, moves, removes or makes something below out/."""
    def before():
        seen, prefix = [0], str(out)

        def hook(event, args):
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree",
                         "os.truncate") and args and str(args[0]).startswith(prefix) \
                        and "/world/" not in str(args[0]):
                seen[0] += 1
                if counter:
                    put(seen[0])
                if seen[0] == number:
                    die()
        sys.addaudithook(hook)
    return before


def strike(micro: Micro, stage: str, out: Path, moment, rng) -> bool:
    """One start of the command, and one kill; whether it struck before the run was done."""
    if callable(moment):
        code, said = ended(micro.start(stage, out, before=moment))
    else:
        pid = micro.start(stage, out)
        work(pid, first_step(pid) + rng.uniform(0, micro.seconds[stage]))
        os.kill(pid, signal.SIGKILL)
        code, said = ended(pid)
    assert code in (0, 137), said
    checkpoints_are_whole(out)
    return code == 137


def lives(micro: Micro, stage: str, moments: list, rng, log) -> int:
    """Strikes run after run of a stage until every moment has been; each run ends as if nobody had."""
    runs, left = 0, len(moments)
    while moments:
        assert runs < 20 * left, f"{stage}: {len(moments)} of {left} kills never struck"
        out, kills, runs = micro.fresh(stage), 0, runs + 1
        for _ in range(40):
            if not moments or not strike(micro, stage, out, moments[-1], rng):
                break
            moments.pop()
            kills += 1
        code, said = ended(micro.start(stage, out))
        assert code == 0, said
        found = micro.differences(stage, out)
        assert not found, f"{stage} after {kills} kills: {found}"
        micro.drop(out)
    return runs


def kill(micro: Micro, times: int, rng, report, stages=STAGES, every=True):
    for stage in stages:
        runs = lives(micro, stage, ["random"] * times, rng, report)
        report(f"kill -9, {stage}: {times} random moments in {runs} runs, all as if undisturbed")
        planted = {} if stage == "latents" else PLANTED
        if not every:                                  # the short form
            planted = {name: moment for name, moment in PLANTED.items()
                       if "middle" in name and stage == "dit"}
        for name, moment in planted.items():
            lives(micro, stage, [moment], rng, report)
        if planted:
            report(f"kill -9, {stage}: {', '.join(planted)}: as if undisturbed")
        if not every or stage == "latents":            # whose file operations are among those of psvae.py
            continue
        out = micro.fresh(stage)
        assert ended(micro.start(stage, out, before=at_file_operation(0, out, True)))[0] == 0
        operations = got()
        micro.drop(out)
        numbers = range(1, operations + 1)
        for number in numbers if operations <= 4 * times else sorted(rng.sample(numbers, 4 * times)):
            out = micro.fresh(stage)
            code, said = ended(micro.start(stage, out, before=at_file_operation(number, out)))
            assert code == 137, f"{stage}, file operation {number}: {code}\n{said}"
            checkpoints_are_whole(out)
            code, said = ended(micro.start(stage, out))
            found = micro.differences(stage, out)
            assert code == 0 and not found, f"{stage}, file operation {number}: {code} {found}\n{said}"
            micro.drop(out)
        report(f"kill -9, {stage}: at {min(operations, 4 * times)} of {operations} file operations, all as "
               f"if undisturbed")


# ------------------------------------------------------------------------------------------------------------
# SIGINT and SIGTERM
# ------------------------------------------------------------------------------------------------------------


def step_of(out: Path, stage: str) -> int:
    path = out / f"{stage}.pt"
    return data.load(path, stage)["step"] if path.exists() else 0


def signals(micro: Micro, times: int, rng, report, stages=STAGES):
    """Saved at the end of the step, exit code 130 or 143; one time in four, a second signal right after."""
    for stage in stages:
        codes, out = collections.Counter(), None
        for number in range(times + 1):
            out, last = out or micro.fresh(stage), number == times
            sent, twice = rng.choice((signal.SIGINT, signal.SIGTERM)), rng.random() < 0.25
            before, pid = step_of(out, stage), micro.start(stage, out)
            if not last:
                early = rng.random() < 0.2             # while encoders, texts or folders are still read
                work(pid, rng.uniform(0, 0.3 * micro.seconds[stage]) if early else
                     first_step(pid) + rng.uniform(0, 0.5 * micro.seconds[stage]))
                os.kill(pid, sent)
                if twice:
                    time.sleep(rng.uniform(0, 0.03))
                    os.kill(pid, sent)
            code, said = ended(pid)
            crash = "Traceback" in said.split("Exception ignored in")[0]    # Python drops what __del__ raises
            assert code in ((0,) if last else (0, 128 + sent)) and not crash, f"{code}\n{said}"
            codes[code] += 1
            checkpoints_are_whole(out)
            if code and not twice:
                steps = min(before + got(), micro.steps)                # what comes after these is encoding
                assert stage == "latents" or step_of(out, stage) == steps, said
            if not code:
                found = micro.differences(stage, out)
                assert not found, f"{stage} after signals: {found}"
                micro.drop(out)
                out = None
        report(
            f"signals, {stage}: {times} at random moments; exit codes {dict(sorted(codes.items()))}; "
            f"saved at the end of the step; all as if undisturbed")


# ------------------------------------------------------------------------------------------------------------
# Two processes of one run, and two runs
# ------------------------------------------------------------------------------------------------------------


def pair(micro: Micro, stage: str, out: Path, late: float = 0.0) -> list[int]:
    """Both ranks of a run, as torchrun starts them; the one that writes is `late` by so many seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out.with_suffix(".1").mkdir(exist_ok=True)
    pids = []
    save = data.Run.save
    for rank in range(2):
        def before():
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=str(port))
            data.Run.save = lambda run, *args, **parts: (
                (run.main and time.sleep(late)) or save(run, *args, **parts))
        pids.append(fork(PROGRAMS[stage], [*micro.flags[stage], "--out", str(out)],
                         out.with_suffix(".1") / f"{rank}.log", before))
    return pids


def ranks(micro: Micro, times: int, rng, report, stages=STAGES):
    for stage in stages:
        whole, waits = micro.fresh(stage), []
        codes = [ended(pid) for pid in pair(micro, stage, whole, late=0.3)]
        assert [code for code, _ in codes] == [0, 0], codes
        if stage == "psvae":                           # were all latents made with the last psvae.pt?
            again = micro.fresh(stage)
            for name in ("psvae.pt", "psvae.csv", "psvae.png"):
                shutil.copy(whole / name, again / name)
            codes = [ended(pid) for pid in pair(micro, stage, again)]
            found = micro.differences(stage, again, whole)
            assert not found, f"a pair's latents are not of its psvae.pt: {codes}\n{found}"
            micro.drop(again)
        asked = collections.Counter()
        for number in range(times):
            out = micro.fresh(stage)
            pids, struck = pair(micro, stage, out), rng.randrange(2)
            work(pids[struck], first_step(pids[struck]) + rng.uniform(0, micro.seconds[stage]))
            if number % 4 == 3:                        # asked to stop: they agree on a step
                for pid in pids:
                    os.kill(pid, signal.SIGTERM)
                codes = [ended(pid, 60) for pid in pids]
                assert all(code in (0, 143) and "Traceback" not in said for code, said in codes), codes
                asked[codes[0][0]] += 1
            else:
                os.kill(pids[struck], signal.SIGKILL)
                code, said = ended(pids[1 - struck], 60)
                waits.append(ended.after)
                assert code == 0 or code == 2 and one_line(said), f"{code}\n{said}"
                ended(pids[struck])
            checkpoints_are_whole(out)
            codes = [ended(pid) for pid in pair(micro, stage, out)]
            assert [code for code, _ in codes] == [0, 0], codes
            found = micro.differences(stage, out, whole)
            assert not found, f"{stage}, two ranks: {found}"
            micro.drop(out)
        report(f"ranks, {stage}: of two gloo processes one killed {len(waits)} times, the other ended after "
               f"{max(waits, default=0):.1f} s at most; both asked to stop: exit codes {dict(asked)}; run "
               f"again, all as an undisturbed pair's")
        micro.drop(whole)


def two(micro: Micro, times: int, rng, report, stages=STAGES):
    """Two runs started at once on one --out: one goes on, the other names it."""
    for stage in stages:
        late = 0
        for _ in range(times):
            out = micro.fresh(stage)
            pids = [fork(PROGRAMS[stage], [*micro.flags[stage], "--out", str(out)], out.with_suffix(f".{i}"))
                    for i in (0, 1)]
            results = [ended(pid) for pid in pids]
            codes = sorted(code for code, _ in results)
            if codes == [0, 0]:                        # the second came when the first was done
                late += 1
            else:
                assert codes == [0, 2], results
                loser = 0 if results[0][0] == 2 else 1
                assert f"(process {pids[1 - loser]})" in one_line(results[loser][1]), results[loser][1]
            found = micro.differences(stage, out)
            assert not found, found
            micro.drop(out)
        report(f"two runs at once, {stage}: {times} times, the second refused naming the first"
               + (f" ({late} times it came when the first was done)" if late else ""))


# ------------------------------------------------------------------------------------------------------------
# A full disk, a read-only out/
# ------------------------------------------------------------------------------------------------------------


def can_mount(folder: Path) -> bool:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    return done.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


def mount(folder: Path, options: str):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def size_of(folder: Path) -> int:
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in folder.rglob("*") if not p.is_symlink())


def disk(micro: Micro, times: int, rng, report, stages=STAGES):
    tmpfs = can_mount(micro.work / "mount")
    for stage in stages:
        full = {"tmpfs": 0, "limit": 0}
        example = micro.fresh(stage)
        inputs = size_of(example)
        assert ended(micro.start(stage, example))[0] == 0
        files = [p.stat().st_size for name in WRITES[stage]
                 for p in [example / name, *(example / name).rglob("*")] if p.is_file()]
        micro.drop(example)
        for number in range(times):
            kind = "tmpfs" if tmpfs and number % 2 else "limit"
            out = micro.fresh(stage)
            before = None
            if kind == "tmpfs":                        # room for a random part of what the run writes
                room = inputs + int(rng.uniform(0, 1.1) * (sum(files) + max(files)))
                held = out.rename(out.with_suffix(".held"))
                out.mkdir()
                mount(out, f"size={max(room, inputs + 8192)}")
                shutil.copytree(held, out, symlinks=True, dirs_exist_ok=True)
                shutil.rmtree(held)
            else:
                most = int(rng.uniform(0.02, 1.1) * max(files))
                before = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            try:
                code, said = ended(micro.start(stage, out, before=before))
                assert code == 0 or code == 2 and one_line(said), f"{stage}, {kind}: {code}\n{said}"
                full[kind] += code == 2
                checkpoints_are_whole(out)
                if kind == "tmpfs":
                    subprocess.run(["mount", "-o", "remount,size=1g", out], check=True)
                code, said = ended(micro.start(stage, out))
                found = micro.differences(stage, out)
                assert code == 0 and not found, f"{stage}, {kind}: {code} {found}\n{said}"
            finally:
                if kind == "tmpfs":
                    subprocess.run(["umount", "-l", out], check=True)
            micro.drop(out)
        report(f"full disk, {stage}: {full['tmpfs']} tmpfs and {full['limit']} RLIMIT_FSIZE runs of {times} "
               f"ended with one line and exit code 2; with room, all as if undisturbed")
    read_only(micro, tmpfs, report)


def read_only(micro: Micro, tmpfs: bool, report):
    if os.geteuid() and not tmpfs:
        how = lambda out: os.chmod(out, 0o555)
    elif tmpfs:
        def how(out):
            held = out.rename(out.with_suffix(".held"))
            out.mkdir()
            mount(out, "size=64m")
            shutil.copytree(held, out, symlinks=True, dirs_exist_ok=True)
            subprocess.run(["mount", "-o", "remount,ro", out], check=True)
    else:
        return report("read-only out/: not tried (root, and no tmpfs can be mounted)")
    for stage in (*STAGES, "sample", "data"):
        out = micro.fresh(stage if stage in STAGES else "svae",
                          *(("psvae.pt", "dit.pt") if stage == "sample" else ()))
        how(out)
        flags = {"sample": ["--prompt", "a", "--model", str(out), "--steps", "2",
                            "--out", str(out / "x.png")],
                 "data": ["--image-size", "32", "--out", str(out)]}.get(
            stage, [*micro.flags.get(stage, []), "--out", str(out)])
        code, said = ended(fork(PROGRAMS[stage], flags, out.with_suffix(".log")))
        assert code == 2, f"{stage}: {code}\n{said}"
        one_line(said)
        subprocess.run(["umount", "-l", out]) if tmpfs else os.chmod(out, 0o755)
        micro.drop(out)
    report("read-only out/: each of the five programs ends with one line and exit code 2")


# ------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------


def nothing_outside(forbidden: Path):
    """In a fork: opening anything below `forbidden` ends it with code 99."""
    def before():
        def hook(event, args):
            if event == "open" and isinstance(args[0], (str, bytes)) \
                    and os.path.realpath(os.fsdecode(args[0])).startswith(str(forbidden)):
                os.write(2, f"read {args[0]!r}\n".encode())
                os._exit(99)
        sys.addaudithook(hook)
    return before


def broken_data(micro: Micro, times: int, rng, report, stages=STAGES):
    import test_all as t                               # its zoos: pictures and rows of every kind
    top = micro.work / "zoo"
    t.readable_zoo(top / "zoo"), t.broken_zoo(top / "zoo")
    t.hostile_table(top / "table")
    secret = t.picture(top / "secret/secret.png").parent
    for folder in (top / "zoo", top / "table/in"):
        (folder / "link.png").symlink_to(secret / "secret.png")
        (folder / "folder").symlink_to(secret)
        os.mkfifo(folder / "pipe.png"), os.mkfifo(folder / "pipe.txt")
    os.rename(top / "table/secret.png", secret / "secret.png")
    for folder in (top / "zoo", top / "table/in"):
        flags = ["--preset", "tiny", "--encoder", str(micro.top / "image"), "--image-size", "32",
                 "--z-dim", "8", *micro.flags["psvae"], "--lpips-weight", "0", "--batch", "8",
                 "--data", str(folder)]
        said = {}
        for most in ("0.01", "1"):
            out = micro.work / f"zoo-{folder.name}-{most}"
            code, said[most] = ended(fork(psvae.main, [*flags, "--max-broken", most, "--out", str(out)],
                                          out.with_suffix(".log"), nothing_outside(secret)))
            assert code == (2 if most == "0.01" else 0), f"{code}\n{said[most]}"
        assert re.search(r"\d+ of \d+ .* are unusable", one_line(said["0.01"]))
        code, text = ended(fork(dit.main, [*micro.flags["dit"], "--out", str(out)], out.with_suffix(".log")))
        assert code == 0, text
        code, text = ended(fork(data.main, ["--data", str(folder), "--image-size", "32", "--out", str(out)],
                                out.with_suffix(".log"), nothing_outside(secret)))
        assert code == 0 and "broken or skipped" in text, text
        refusal = one_line(said["0.01"]).split(". The first")[0]
        report(f"broken data, {folder.name}: by default {refusal}; with --max-broken 1 stages 2 and 3 end "
               f"well; nothing outside was opened")
    million(micro, report, 1_000_000 if times >= 25 else 50_000)
    shards(micro, times, rng, report)


def million(micro: Micro, report, rows: int):
    """A metadata.jsonl of so many rows: start-up of stage 2 in seconds of this machine, and memory."""
    folder = micro.work / "million"
    shutil.copytree(micro.reference / "world/train", folder, ignore=lambda _, names: [
        name for name in names if name.endswith("jsonl")])
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))
    with open(folder / "metadata.jsonl", "w") as table:
        for number in range(rows):
            row = {"file_name": names[number % len(names)], "text": f"picture {number}"}
            table.write(json.dumps(row) + "\n")

    def before():
        begin, cpu = time.monotonic(), time.process_time()
        read = data.read_folder

        def timed(*args, **kwargs):
            folders = read(*args, **kwargs)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(f"READ {time.monotonic() - begin:.1f} s, {time.process_time() - cpu:.1f} s of CPU, "
                  f"{peak:.2f} GB at most", flush=True)
            assert sum(len(part.rows) for part in folders) == rows
            die()
        data.read_folder = timed
    out = micro.work / "million-out"
    code, said = ended(fork(svae.main, [*micro.flags["svae"], "--data", str(folder), "--out", str(out)],
                            out.with_suffix(".log"), before), 600)
    assert code == 137 and "READ" in said, said
    figures = re.search(r"READ (.*)", said)[1]
    shutil.rmtree(folder)
    report(f"{rows:,} rows read in {figures} (a fork that had {base_memory():.2f} GB)")


def base_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def shards(micro: Micro, times: int, rng, report):
    """img2dataset tars, whole and cut at random places; names in them that would leave the folder."""
    import tarfile
    folder = micro.work / "tars/in"
    folder.mkdir(parents=True)
    pictures = sorted((micro.reference / "world/train").rglob("*.png"))[:30]
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, path in enumerate(pictures):
            key = f"{number:09d}" if number % 5 else f"../../../{number:09d}"
            for suffix, content in (("png", path.read_bytes()), ("txt", f"picture {number}".encode()),
                                    ("json", json.dumps({"caption": "not this", "key": key}).encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with tarfile.open(folder / "00000.tar") as tar:
        end = max(member.offset_data + member.size for member in tar)  # behind it stands nothing to lose
    whole, counts = (folder / "00000.tar").read_bytes(), []
    for number in range(times + 1):
        cut = rng.randrange(600, end) if number else len(whole)
        (folder / "00000.tar").write_bytes(whole[:cut])
        out, log = micro.work / "tars/out", micro.work / "tars/log"
        for most in ("0", "1"):
            argv = ["--src", str(folder), "--out", str(out), "--max-broken", most]
            code, said = ended(fork(convert.main, argv, log))
            if number and most == "0" or code == 2:    # a cut is always noticed
                assert code == 2 and one_line(said), f"{code}\n{said}"
                assert not out.exists()
            else:
                assert code == 0, said
                rows = [json.loads(line) for line in open(out / "metadata.jsonl")]
                counts.append(len(rows))
                assert [row["text"] for row in rows] == [f"picture {i}" for i in range(len(rows))]
                assert all((out / row["file_name"]).read_bytes() == pictures[i].read_bytes()
                           for i, row in enumerate(rows))
                shutil.rmtree(out)
        assert sorted(os.listdir(micro.work / "tars")) == ["in", "log"]
        assert number or counts[0] == len(pictures)
    report(f"img2dataset tars: {len(pictures)} rows of a whole one; cut at {times} random places, each "
           f"noticed, {min(counts)} to {max(counts)} rows kept, every kept one right")


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def places(value, depth=2, at=()):
    """Every key of nested dicts, as paths."""
    for key in (value if isinstance(value, dict) else {}):
        yield (*at, key)
        if depth > 1:
            yield from places(value[key], depth - 1, (*at, key))


def changed(path: Path, rng, attack: Path) -> str:
    """One part of a checkpoint replaced or removed; says which."""
    checkpoint = torch.load(path, weights_only=True)
    at = rng.choice([place for place in places(checkpoint) if place[0] not in ("model", "ema", "optimizer")
                     or rng.random() < 0.1])
    inner = checkpoint
    for key in at[:-1]:
        inner = inner[key]
    old = inner[at[-1]]
    new = rng.choice([None, "7", -1, 0, 10**12, float("nan"), [], {}, [float("nan")], True, "gone", "attack",
                      torch.full((3,), float("nan")), torch.zeros(2, 2)])
    if isinstance(new, str) and new == "gone":
        del inner[at[-1]]
    else:
        inner[at[-1]] = Attack(attack) if isinstance(new, str) and new == "attack" else new
    torch.save(checkpoint, path)
    return f"{path.name} {'.'.join(map(str, at))}: {str(old)[:30]!r} -> {str(new)[:30]!r}"


def checkpoints(micro: Micro, times: int, rng, report, stages=STAGES):
    """Refused with one line, or done where the change harms nothing; never a traceback, nothing executed."""
    cases = {"svae": ("svae.pt", svae.main, ["--steps", str(micro.steps + 1)]),
             "psvae from svae.pt": ("svae.pt", psvae.main, micro.flags["psvae"]),
             "psvae": ("psvae.pt", psvae.main, ["--steps", str(micro.steps + 1)]),
             "latents": ("psvae.pt", psvae.main, ["--encode-only"]),
             "dit": ("dit.pt", dit.main, ["--steps", str(micro.steps + 1)]),
             "sample, psvae.pt": ("psvae.pt", sample.main, None),
             "sample, dit.pt": ("dit.pt", sample.main, None)}
    for name, (file, main, flags) in cases.items():
        codes, bad = collections.Counter(), []
        for _ in range(times):
            out = micro.fresh("svae", *{"svae.pt": ["svae.pt"], "psvae.pt": ["psvae.pt", "dit.pt"],
                                        "dit.pt": ["dit.pt", "psvae.pt", "latents", "text"]}[file])
            what = changed(out / file, rng, out / "executed")
            argv = [*flags, "--out", str(out)] if flags else [
                "--prompt", "a", "--steps", "2", "-n", "1", "--model", str(out), "--out", str(out / "x.png")]

            def little():
                resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
                resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
            code, said = ended(fork(main, argv, out.with_suffix(".log"), little))
            codes[code] += 1
            assert not (out / "executed").exists(), what
            if code not in (0, 2) or "Traceback" in said:
                bad.append(f"{what}: exit code {code}: {said.splitlines()[-1] if said else ''}")
            micro.drop(out)
        report(f"checkpoints, {name}: {times} changed in one part; exit codes {dict(sorted(codes.items()))}")
        assert not bad, f"{name}:\n  " + "\n  ".join(bad)


# ------------------------------------------------------------------------------------------------------------
# Numbers going wrong
# ------------------------------------------------------------------------------------------------------------

TERMS = [("svae", "semantic", "semantic_loss"), ("svae", "kl", "kl_divergence"),
         ("psvae", "semantic", "semantic_loss"), ("psvae", "pixel", "pixel_loss"),
         ("psvae", "perceptual", "perceptual_loss"), ("psvae", "kl", "kl_divergence"),
         ("dit", "loss", "dit_loss")]


class WrongGradient(torch.autograd.Function):
    """The value as it is, a gradient that is NaN: what the square root of 0 does inside LPIPS."""

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        return gradient * float("nan")


def numbers(micro: Micro, times: int, rng, report, stages=STAGES):
    tried = 0
    for stage, term, function in TERMS:
        if stage not in stages:
            continue
        for value in (float("nan"), float("inf"), -float("inf"), "gradient"):
            at = rng.choice((1, rng.randrange(2, micro.steps), micro.steps))
            module = {"svae": svae, "psvae": psvae, "dit": dit}[stage]

            def before():
                original, calls = getattr(module, function), []

                def planted(*args):
                    out = original(*args)
                    calls.append(torch.is_grad_enabled())
                    if calls[-1] and sum(calls) == at:
                        return WrongGradient.apply(out) if value == "gradient" else out + value
                    return out
                setattr(module, function, planted)
            out = micro.fresh(stage)
            code, said = ended(micro.start(stage, out, "--save-every", 1, before=before))
            if value == "gradient" and term == "perceptual":       # no LPIPS here: nothing to go wrong
                assert code == 0, said
                micro.drop(out)
                continue
            line = one_line(said) if code == 2 else said
            name = "grad_norm" if value == "gradient" else term
            assert code == 2 and re.search(rf"\b{name}\b.* at step {at}, learning rate", line), line
            assert ("checkpoint is none" in line) if at == 1 else f"{stage}.pt" in line, line
            assert step_of(out, stage) == at - 1
            checkpoints_are_whole(out)
            tried += 1
            micro.drop(out)
    report(f"numbers: {tried} NaN, inf, -inf and NaN gradients in the terms of {', '.join(stages)}, at the "
           f"first, the last and random steps: each run stopped at that step and term, none reached a "
           f"checkpoint")


# ------------------------------------------------------------------------------------------------------------
# Ten thousand steps
# ------------------------------------------------------------------------------------------------------------


def long(micro: Micro, times: int, rng, report, stages=STAGES):
    steps = 400 * times
    for stage in stages:
        if stage == "latents":
            continue
        out = micro.fresh(stage)

        def before():
            record, seen = data.Run.record, [0]

            def recorded(run, losses):
                seen[0] += 1
                if seen[0] % (steps // 20) == 0:
                    pages = int(open("/proc/self/statm").read().split()[1])
                    handles = len(os.listdir("/proc/self/fd"))
                    print(f"AT {seen[0]} {pages * 4096 / 1e6:.2f} {handles}", flush=True)
                return record(run, losses)
            data.Run.record = recorded
        code, said = ended(micro.start(
            stage, out, "--steps", steps, "--batch", 2, "--save-every", steps // 10,
            "--eval-every", steps // 10, "--log-every", 100, before=before), 7200)
        assert code == 0, said
        seen = [(int(a), float(b), int(c)) for a, b, c in re.findall(r"AT (\d+) ([\d.]+) (\d+)", said)]
        memory, handles = [m for step, m, _ in seen if step > steps // 5], {h for *_, h in seen[4:]}
        report(f"long, {stage}: {steps:,} steps; memory {memory[0]:.0f} MB after a fifth, "
               f"{memory[-1]:.0f} MB at the end, {max(memory):.0f} at most; file handles {sorted(handles)}")
        assert max(memory) <= 1.02 * memory[0] and len(handles) == 1, seen
        micro.drop(out)


# ------------------------------------------------------------------------------------------------------------


SECTIONS = {"kill": kill, "signals": signals, "ranks": ranks, "two": two, "disk": disk, "data": broken_data,
            "checkpoints": checkpoints, "numbers": numbers, "long": long}
# Strikes and stages of the short form
SHORT = {"kill": (1, ("psvae", "dit")), "signals": (2, ("dit",)), "ranks": (1, ("psvae", "dit")),
         "disk": (1, ("psvae",)), "checkpoints": (1, STAGES)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--times", type=int, default=25, help="strikes of each kind [25]")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="few strikes of every kind but the long ones")
    parser.add_argument("--json", type=Path, help="a file for {section: held, or what failed}")
    parser.add_argument("--work", type=Path, help="a scratch folder; default: a new one, removed at the end")
    args = parser.parse_args(argv)
    sections = args.sections or list(SHORT if args.short else SECTIONS)
    if len(sections) > 1 and not args.short:           # each from a process of its own: some work in threads,
        rest = [part for part in (argv or sys.argv[1:]) if part not in sections]      # and then forks hang
        return max(subprocess.run([sys.executable, __file__, name, *rest]).returncode for name in sections)
    top, begin, results = args.work or Path(tempfile.mkdtemp()), time.monotonic(), {}
    micro = Micro(top, large=130 if args.short else 3600)
    report = lambda line: print(f"[{time.monotonic() - begin:5.0f} s] {line}", flush=True)
    report("micro runs, seconds of CPU: "
           + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in micro.seconds.items()))
    for name in sections:
        times, stages = SHORT[name] if args.short else (args.times, args.stages)
        more = {"every": False} if args.short and name == "kill" else {}
        try:
            SECTIONS[name](micro, times, random.Random(f"{args.seed} {name}"), report, stages, **more)
            results[name] = "held"
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
            report(f"FAILED: {name}: {results[name]}")
            if not isinstance(error, AssertionError):
                traceback.print_exc()
    if args.json:
        args.json.write_text(json.dumps(results))
    if not args.work:
        shutil.rmtree(top, ignore_errors=True)
    return 0 if set(results.values()) == {"held"} else 1


if __name__ == "__main__":
    sys.exit(main())
