"""Breaks every equation on purpose, one change at a time, and sees whether that equation's tests go
red.

    python notes/checks/mutants.py [--only psvae.py] [--equation 11]
        ten minutes on one core; exit code 1 if a survivor is unexplained
    python notes/checks/mutants.py --faults [--only psvae.py]
        the faults of FAULTS instead, in the wiring of the loops: five minutes

In each function that carries an `# Eq. n` comment: every sign and operator flipped, every term
dropped, every number changed, every reduction and elementary function exchanged, every keyword
argument left out. The changed module is run against `test_eq_n_...` of all n in that function, in a
fork. A survivor is a missing test, or stands in EXPLAINED with the reason why it computes the same
thing.
"""

import argparse
import ast
import contextlib
import copy
import io
import os
import re
import select
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))

EXCHANGE = {"mean": "sum", "sum": "mean", "sqrt": "abs", "exp": "abs", "abs": "square",
            "sin": "cos", "cos": "sin", "cumprod": "cumsum", "square": "abs", "gelu": "silu",
            "mse_loss": "l1_loss", "addcmul": "addcdiv"}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
             ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult}
# (function, the change): why it computes the same
EXPLAINED = {
    ("contrastive_loss", "F.normalize(f, dim=-1)  ->  without dim"):
        "the default, 1, is the last of two",
    ("contrastive_loss", "F.normalize(f_plus, dim=-1)  ->  without dim"): "as above",
    ("contrastive_loss", "F.log_softmax(sim / tau, dim=1)  ->  without dim"):
        "of a matrix, torch takes 1 by itself, and warns",
    ("contrastive_loss", "10000.0  ->  20000.0"): "exp of either is 0",
    ("forward", "recompute(level, x, use_reentrant=False)  ->  without use_reentrant"):
        "chooses between two implementations of the same; torch warns where it is left out",
    ("noise_schedule", "torch.ones(1, dtype=torch.float64)  ->  without dtype"):
        "torch.cat with float64 gives float64",
    ("timestep_embedding", "torch.arange(d // 2, device=t.device, dtype=torch.float32)  ->  "
                           "without device"): "matters on a GPU only",
    ("timestep_embedding", "torch.arange(d // 2, device=t.device, dtype=torch.float32)  ->  "
                           "without dtype"): "the division by d makes it float32",
}

# What is wrong: (file, what stands there, what to put there, tests of which one goes red). One
# fault of a kind in each place where it can be.
FAULTS = {
    "target from the encoder in training":
        ("psvae.py", r"(?m)^( {20}f_target = ).*x_part\)", r"\1model.encoder(x_part).detach()",
         "stage_2_trains"),
    "held-out target from the encoder in training":
        ("psvae.py", r"(?m)^( {8}f_target = ).*x_part\)", r"\1model.encoder(x_part)",
         "eq_13_the_held_out"),
    "the frozen encoder is trained too":
        ("svae.py", r"@torch.no_grad\(\)\n(def frozen_features(?:.*\n)*?.*requires_grad_\()False"
         r"((?:.*\n)*?.*AdamW\()model.parameters\(\)",
         r"\1True\2[*model.parameters(), *encoder.parameters()]", "stage_1_trains"),
    "a step waits for the device":
        ("svae.py", r"( +)optimizer.step\(\)", r"\1optimizer.step()\n\1losses['loss'].item()",
         "waits_for_the_device"),
    "t from 0 to T - 1": ("dit.py", r'"t", 1, cfg.T \+ 1', '"t", 0, cfg.T', "t_is_uniform"),
    "t uniform after all": ("dit.py", "if not cfg.logit_std", "if True", "stage_3_gets"),
    "t of edits like those of captions":
        ("dit.py", "edit=source is not None", "edit=False", "stage_3_gets"),
    "held-out t from 0": ("dit.py", r"low = 1 \+", "low = 0 +", "t_is_1_to_T"),
    "gradients not averaged":
        ("data.py", r"(def distribute\((?:.*\n)+?        if )self.world == 1", r"\1True",
         "two_processes_take"),
    "micro-batches summed, not averaged":
        ("psvae.py", r'\(losses\["loss"\] / cfg.micro_batches\)', 'losses["loss"]',
         "two_processes_take"),
    "gradients not clipped":
        ("dit.py", r"model.parameters\(\), cfg.clip", "model.parameters(), 1e9", "stage_3_gets"),
    "encoder_lr_scale not in the optimizer":
        ("psvae.py", r'"scale": cfg.encoder_lr_scale', '"scale": 1.0', "stage_2_trains"),
    "Muon resumes without its momenta in stage 2":
        ("psvae.py", r"own.copy_\(kept\)", "pass", "stage_2_trains"),
    "Muon resumes without its momenta in stage 3":
        ("dit.py", r"own.copy_\(kept\)", "pass", "stage_3_gets"),
    "encoder_lr_scale not in the rate":
        ("data.py", r'self.rate \* group.get\("scale", 1.0\)', "self.rate", "stage_2_trains"),
    "the world flipped and cropped in stage 1":
        ("svae.py", r"augment=bool\(cfg.data\)", "augment=True", "stage_1_trains"),
    "the world flipped and cropped in stage 2":
        ("psvae.py", r"augment=bool\(cfg.data\)", "augment=True", "stage_2_trains"),
    "text never chosen to be dropped":
        ("dit.py", r"drop_both or bool\(drop\)", "False", "stage_3_gets"),
    "text chosen to be dropped, and kept":
        ("data.py", r"self.texts.null if drop_text else ", "", "stage_3_gets"),
    "source not normalised in training":
        ("dit.py", r"(?m)^( {12}source = )source if source is None.*", r"\1source",
         "stage_3_gets"),
    "held-out source not normalised":
        ("dit.py", r"(?m)^( {4}source = )source if source is None.*", r"\1source",
         "t_is_1_to_T"),
    "source not normalised in sampling":
        ("sample.py", r"normalise\((self.psvae.encode\(x\)\[0\]), self.mean, self.variance\)",
         r"\1", "a_picture_by_hand"),
    "latents not un-normalised before decoding":
        ("sample.py", r"z_0 \* self.variance.sqrt\(\) \+ self.mean", "z_0", "a_picture_by_hand"),
    "text and null exchanged in the batch":
        ("sample.py", r'\[\*prompts, \*\[""\] \* len\(prompts\)\]',
         '[*[""] * len(prompts), *prompts]', "a_picture_by_hand"),
    "text and null exchanged in the result":
        ("sample.py", r"eps_c, eps_null = ", "eps_null, eps_c = ", "a_picture_by_hand"),
    "text and null exchanged in an edit":
        ("sample.py", r"eps_sc, eps_s0 = ", "eps_s0, eps_sc = ", "a_picture_by_hand"),
    "averaged weights never move":
        ("dit.py", r"torch._foreach_lerp_\(.*\n?.*1 - decay\)", "pass", "stage_3_gets"),
}


def functions_with_equations(source: str):
    """(function node, its equation numbers) for every function with `# Eq. n` comments."""
    lines, out = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            text = "\n".join(lines[node.lineno - 1:node.end_lineno])
            found = re.findall(r"# (?:DEVIATION.*)?Eq\. (\d+(?:, \d+)*)", text)
            numbers = sorted({int(n) for group in found for n in group.split(", ")})
            if numbers and node.name != "train":               # loops: see FAULTS
                out.append((node, numbers))
    return out


def mutations(function: ast.FunctionDef):
    """(path to a node, what is done, replacement) for one change at a time."""
    def visit(node, path):
        if (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)):
            return                                              # a docstring
        said = ast.unparse(node) + "  ->  "
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            flipped = copy.deepcopy(node)
            flipped.op = OPERATORS[type(node.op)]()
            for new in (flipped, node.left, node.right):
                yield path, said + ast.unparse(new), new
        if (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
                and not isinstance(node.operand, ast.Constant)):
            yield path, said + ast.unparse(node.operand), node.operand
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            value = (node.value * 2 or 1.0) if isinstance(node.value, float) else node.value + 1
            yield path, f"{said}{value}", ast.Constant(value)
        if isinstance(node, ast.Call):
            if getattr(node.func, "attr", "") in EXCHANGE:
                swapped = copy.deepcopy(node)
                swapped.func.attr = EXCHANGE[node.func.attr]
                yield path, f"{said}.{swapped.func.attr}", swapped
            for i, keyword in enumerate(node.keywords):
                without = copy.deepcopy(node)
                del without.keywords[i]
                yield path, f"{said}without {keyword.arg}", without
        if isinstance(node, ast.IfExp):
            yield path, said + ast.unparse(node.orelse), node.orelse
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "defaults"):
                continue
            children = value if isinstance(value, list) else [value]
            for i, child in enumerate(children):
                if isinstance(child, ast.AST):
                    yield from visit(child, path + [(name, i if isinstance(value, list) else None)])
    yield from visit(function, [])


def replaced(tree: ast.Module, function: ast.FunctionDef, path, new):
    """The module's tree with one node of one function replaced."""
    tree = copy.deepcopy(tree)
    node = next(n for n in ast.walk(tree)
                if isinstance(n, ast.FunctionDef) and n.lineno == function.lineno)
    *way, (name, i) = path
    for step, at in way:
        node = getattr(node, step) if at is None else getattr(node, step)[at]
    if i is None:
        setattr(node, name, new)
    else:
        getattr(node, name)[i] = new
    return ast.fix_missing_locations(tree)


def red_tests(change, tests: str, seconds: int = 600) -> list[str]:
    """The tests that fail in a fork in which change() was made; [] if all pass or none is there."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        red = ["broken"]
        with contextlib.suppress(BaseException):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            change()
            red = []

            class Watch:
                def pytest_runtest_logreport(self, report):
                    if report.failed:
                        red.append(report.nodeid.split("::")[-1])
            code = pytest_main(["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", "-k", tests,
                                "test_all.py"], [Watch()])
            red = red or ["broken"] * (code not in (0, 5))      # 5: no test has such a name
        os.write(write, "\n".join(red).encode())
        os._exit(0)
    os.close(write)
    in_time, _, _ = select.select([read], [], [], seconds)
    said = os.read(read, 65536).decode().split() if in_time else ["endless"]
    if not in_time:
        os.kill(child, 9)
    os.close(read)
    _, status = os.waitpid(child, 0)
    return said or ["died"] * bool(status)


def is_killed(module, tree: ast.Module, numbers: list[int]) -> bool:
    """Runs the tests of these equations in a fork in which the module is the mutant."""
    def change():
        exec(compile(tree, module.__file__, "exec"), module.__dict__)
        if module.__name__ == "dit":                            # sample.py took these by name
            import sample
            sample.__dict__.update({name: module.__dict__[name] for name in ("DiT", "normalise")})
    return bool(red_tests(change, " or ".join(f"eq_{n}_" for n in numbers), 120))


def faults(only: str):
    """Puts each fault into a copy of the tree and runs its tests there; True if all went red."""
    survivors, begin = [], time.monotonic()
    with tempfile.TemporaryDirectory() as top:
        for number, (what, (name, old, new, tests)) in enumerate(FAULTS.items()):
            if only and only != name:
                continue
            tree = Path(top) / str(number)
            shutil.copytree(HERE, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "out"))
            text, count = re.subn(old, new, (tree / name).read_text(encoding="utf-8"))
            (tree / name).write_text(text, encoding="utf-8")

            def change():
                os.chdir(tree)
                sys.path[:] = [str(tree), *(path for path in sys.path if path != str(HERE))]
            red = red_tests(change, tests) if count == 1 else []
            survivors += [what] if not red else []
            said = ", ".join(red) if count == 1 else f"{count} places for {old}"
            print(f"{'red' if red else 'SURVIVED'}  {name}: {what}: {said}  "
                  f"({time.monotonic() - begin:.0f} s)", flush=True)
    print(f"{len(survivors)} survived")
    return not survivors


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one file, such as psvae.py")
    parser.add_argument("--equation", type=int, help="one equation")
    parser.add_argument("--faults", action="store_true", help="the faults in the wiring instead")
    args = parser.parse_args()
    os.chdir(HERE)
    import torch
    torch.set_num_threads(1)                                    # threads do not survive a fork
    os.environ["OMP_NUM_THREADS"] = "1"
    import importlib
    for heavy in ("pytest", "transformers", "transformers.models.dinov2.modeling_dinov2",
                  "transformers.models.t5.modeling_t5", "diffusers", "lpips", "matplotlib.pyplot",
                  "numpy.testing", "torch.distributions"):
        with contextlib.suppress(Exception):                    # loaded once, before the forks
            importlib.import_module(heavy)
    import pytest
    global pytest_main
    pytest_main = pytest.main
    if args.faults:
        sys.exit(0 if faults(args.only) else 1)
    tested, survivors, explained, begin = 0, [], 0, time.monotonic()
    for name in ("svae", "psvae", "dit", "sample", "notes.tiny.pretrain_tiny"):
        if args.only and not args.only.startswith(name.replace(".", "/")):
            continue
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            module = importlib.import_module(name)
        source = Path(module.__file__).read_text(encoding="utf-8")
        tree = ast.parse(source)
        for function, numbers in functions_with_equations(source):
            if args.equation and args.equation not in numbers:
                continue
            if is_killed(module, tree, numbers):
                print(f"{name}.{function.name}: its tests are red without a change", flush=True)
                survivors.append(function.name)
                continue
            kept = killed = 0
            for path, what, new in mutations(function):
                tested += 1
                if is_killed(module, replaced(tree, function, path, new), numbers):
                    killed += 1
                elif (function.name, what) in EXPLAINED:
                    explained += 1
                else:
                    kept += 1
                    survivors.append(what)
                    print(f"  SURVIVED {name}.{function.name}: {what}", flush=True)
            print(f"{name}.{function.name} (Eq. {', '.join(map(str, numbers))}): {killed} killed, "
                  f"{kept} survived, {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{tested} mutants: {tested - len(survivors) - explained} killed, {explained} explained, "
          f"{len(survivors)} unexplained")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
