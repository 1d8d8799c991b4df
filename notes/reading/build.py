"""Builds index.html: each equation of the guide on the left, the very line that computes it on the right.

    python notes/reading/build.py                 text and pictures, a minute on two cores
    python notes/reading/build.py --text          text alone, a second; the pictures stay as they are
    python notes/reading/build.py --screenshot    afterwards page.png, with chromium and playwright

Nothing on the page is written by hand: formulas, meanings, functions and tests come from notes/equations.md,
code from the files (by function name and `# Eq. n` mark), pictures from the model in notes/tiny. Text alone is
a function of the sources, byte for byte, so a test can tell whether the page is up to date.
Needs latex2mathml for formulas that the page does not have yet: pip install latex2mathml
"""

import argparse
import ast
import base64
import copy
import functools
import html
import io
import json
import re
import sys
import textwrap
import time
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
PAGE, EQUATIONS = HERE / "index.html", ROOT / "notes/equations.md"
UNMARKED = {"1", "3"}                       # claims: what measures them is shown, no line computes them
MARKED_AS = {}
LONG = 60                                   # a longer function shows only the block around its equation
MARKS = "<!-- pictures: begin -->\n", "<!-- pictures: end -->\n"


class Stale(Exception):
    """The page's sources do not fit together; says which line of which file."""


# ------------------------------------------------------------------------------------------------------------
# notes/equations.md
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    key: str                                # "11", or a word where the guide has no number
    name: str
    formulas: list[str]                     # LaTeX, one a line
    plain: str                              # the same for those who cannot see it
    words: str
    where: list[str]                        # module.function, the first is shown
    test: str                               # prefix of its tests' names, or ""
    shapes: str = ""

    @property
    def anchor(self) -> str:
        return f"eq-{self.key}" if self.key.isdigit() else self.key


@dataclass
class Loop:
    where: str
    title: str
    lines: list[tuple[str, str, str]]       # pseudo-code, equation's number, a piece of the line that does it

    @property
    def anchor(self) -> str:
        return "loop-" + self.where.split(".")[0]


@dataclass
class Section:
    title: str
    idea: str
    paths: list[str]
    items: list = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


def table(lines: list[str]) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines
            if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-: ")][1:]


def ticked(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def dollars(cell: str) -> list[str]:
    return re.findall(r"\$([^$]+)\$", cell)


def read_equations() -> list[Section]:
    """The sections of the page, each with its equations, extra rows and loops in order."""
    text = EQUATIONS.read_text(encoding="utf-8")
    first, mathematics, extra, loops = re.split(r"^## .*$", text, flags=re.M)
    said = {}
    for number, plain, words, where, test in table(first.splitlines()):
        said[number] = plain, words, ticked(where), (ticked(test) or [""])[0].rstrip("*")
    sections = []
    for part in re.split(r"^### ", mathematics, flags=re.M)[1:]:
        title, *lines = part.splitlines()
        prose = "\n".join(line for line in lines if not line.startswith("|")).strip().split("\n\n")
        paths = ticked(prose[0]) if prose[0].startswith("`") else []
        section = Section(title.strip(), prose[-1].replace("\n", " "), paths)
        for number, name, formula, shapes in table(lines):
            if number not in said:
                raise Stale(f"{EQUATIONS.name}: Eq. {number} has two formulas, or no line in the first table")
            plain, words, where, test = said.pop(number)
            section.items.append(Row(number, name, dollars(formula), plain, words, where, test, shapes))
        sections.append(section)
    if said:
        raise Stale(f"{EQUATIONS.name}: Eq. {', '.join(said)} have no formula")
    for after, key, name, formula, words, where, test in table(extra.splitlines()):
        row = Row(key, name, dollars(formula), "", words, ticked(where), ticked(test)[0].rstrip("*"))
        insert(sections, after, row)
    for where, after, title, block in re.findall(r"^`([\w.]+)`, after (\S+): ([^\n]*)\n+```\n(.*?)```", loops,
                                                 flags=re.M | re.S):
        lines = []
        for line in block.splitlines():
            pseudo, piece = line.split(" @ ")
            number = re.search(r"\((\d+)\)\s*$", pseudo)
            lines.append((pseudo[:number.start()].rstrip() if number else pseudo.rstrip(),
                          number[1] if number else "", piece.strip()))
        insert(sections, after, Loop(where, title, lines))
    return sections


def insert(sections: list[Section], after: str, item):
    for section in sections:
        for i, other in enumerate(section.items):
            if isinstance(other, Row) and other.key == after:
                while i + 1 < len(section.items) and isinstance(section.items[i + 1], Row) \
                        and not section.items[i + 1].key.isdigit():
                    i += 1
                return section.items.insert(i + 1, item)
    raise Stale(f"{EQUATIONS.name}: nothing has the key {after!r}")


# ------------------------------------------------------------------------------------------------------------
# The files: functions by name, equations by their marks
# ------------------------------------------------------------------------------------------------------------


class Source:
    """A Python file as lines, as a tree and as coloured tokens."""

    def __init__(self, name: str):
        self.name, self.path = name, ROOT / name
        if not self.path.exists():
            raise Stale(f"{name}: no such file, but {EQUATIONS.name} names it")
        self.text = self.path.read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        self.tree = ast.parse(self.text)

    def find(self, name: str):
        """The function or class of a dotted name."""
        node = self.tree
        for part in name.split("."):
            for child in node.body:
                if getattr(child, "name", None) == part:
                    node = child
                    break
            else:
                raise Stale(f"{self.name} has no {name}, but {EQUATIONS.name} names it")
        return node

    def span(self, node) -> tuple[int, int]:
        """First and last line, from 1, with decorators."""
        return min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])]), node.end_lineno

    def marks(self, node, number: str) -> list[tuple[int, int, int]]:
        """(comment's line, first, last) of the statements under each `# Eq. n` inside a node: the one that
        follows and its neighbours, up to an empty line, a comment or a block."""
        found = []
        for line in range(node.lineno, node.end_lineno + 1):
            if re.match(rf"\s*#.*\bEq\. {number}[:,]", self.lines[line - 1]):
                bodies = [body for parent in ast.walk(node) for body in (getattr(parent, "body", None),
                          getattr(parent, "orelse", None)) if isinstance(body, list)]
                after = [(body[i].lineno, body, i) for body in bodies for i in range(len(body))
                         if body[i].lineno > line]
                if not after:
                    raise Stale(f"{self.name}:{line}: no statement under Eq. {number}")
                first, body, i = min(after, key=lambda found: (found[0], -len(found[1])))
                last = body[i].lineno if hasattr(body[i], "body") else body[i].end_lineno
                while i + 1 < len(body) and body[i + 1].lineno == last + 1 and not any(
                        hasattr(one, "body") or isinstance(getattr(one, "value", None), ast.Dict)
                        for one in body[i:i + 2]):
                    i, last = i + 1, body[i + 1].end_lineno
                found.append((line, first, last))
        return found

    def block_around(self, node, line: int) -> tuple[int, int]:
        """The innermost with, for or if around a line."""
        around = [child for child in ast.walk(node) if isinstance(child, (ast.With, ast.For, ast.If))
                  and child.lineno < line <= child.end_lineno]
        inner = max(around, key=lambda child: child.lineno)
        return inner.lineno, inner.end_lineno

    @functools.cached_property
    def tokens(self) -> list[list[tuple]]:
        """For each line its (kind, text)."""
        lines = [[]]
        for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens(self.text):
            for i, piece in enumerate(value.split("\n")):
                if i:
                    lines.append([])
                if piece:
                    lines[-1].append((kind, piece))
        return lines


@functools.cache
def source(name: str) -> Source:
    return Source(name)


def locate(where: str):
    """"svae.Projector" or "notes/tiny/pretrain_tiny.contrastive_loss" -> (Source, name, node)."""
    file, name = re.fullmatch(r"((?:\w+/)*\w+)\.([\w.]+)", where).groups()
    return source(file + ".py"), name, source(file + ".py").find(name)


# ------------------------------------------------------------------------------------------------------------
# Symbols, in formulas and in code
# ------------------------------------------------------------------------------------------------------------

# key: as it reads in a formula | names in the code
SYMBOLS = {key: (formula.split(), code.split()) for key, formula, code in (
    line.split("|") for line in re.sub(r" *\| *", "|", """
x | x x_ijc | x x_part
x_hat | x^ x^_ijc | x_hat
f | f f_ijk f_i | f
f_hat | f^ f^_ijk | f_hat
f_plus | f_j^+ | f_plus
f_target | f^target | f_target
tau | τ | tau
mu | μ μ_i^2 | mu
log_var | logσ^2 logσ_i^2 | log_var
sigma | σ σ_i^2 | exp
eps | ε | eps eps_part
eps_hat | ε_θ | eps_hat
eps_theta | ε_θ | eps
z | z | z
z_0 | z_0 | z_0
z_t | z_t | z_t
z_prev | z_t−1 | z_prev
v_pred | v_θ | v
alpha_bar | α¯_t | alpha_bar ab ab_t
ab_prev | α¯_t−1 | ab_prev
alpha_t | α_t α_s | alpha
beta_t | β_t | beta
sigma_t | σ_t σ_t^2 | sigma_t
noise | ε | noise
t | t | t
t_emb | t_emb | t_emb
c | c | c
h | h h_0 | h
pe | PE | position
type | type | source_type
source | z_source | source
gamma | γ | gamma
beta | β | beta
q | Q | q
k | K | k
v | V | v
w_1 | W_1 | w_1
w_2 | W_2 | w_2
gate | gate | gate gate_1 gate_2 gate_3
s | s | s
s_image | s_image | s_image
eps_null | ε_θ(z_t,t,∅) | eps_null
eps_c | ε_θ(z_t,t,c) | eps_c
eps_00 | ε_∅∅ | eps_00
eps_s0 | ε_source | eps_s0
eps_sc | ε_source,text | eps_sc
mean | mean | mean
variance | variance | variance
l_semantic | L_semantic | semantic
l_pixel | L_pixel | pixel
l_perceptual | L_perceptual | perceptual
l_kl | L_KL | kl
alpha_w | α | alpha
lambda_w | λ | lpips_weight
l1 | L1 | l1
lpips | LPIPS | lpips
""".strip()).splitlines())}


def mathml(latex: str, known: dict[str, str]) -> ElementTree.Element:
    """A formula as MathML, from the page where it is already there, else by latex2mathml."""
    if latex not in known:
        from latex2mathml.converter import convert
        known[latex] = convert(latex).replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")
    math = ElementTree.fromstring(known[latex])
    for element in math.iter():
        variant = element.attrib.pop("mathvariant", "").upper().replace("BOLD-", "BOLD ")
        if variant and variant != "NORMAL":            # today's browsers know these letters, not the attribute
            element.text = "".join(letter(character, variant) for character in element.text)
        if element.text == "¯":
            element.set("stretchy", "false")
        elif element.text == "∅":                      # a symbol, not an operator with space around it
            element.tag = "mi"
    return math


def letter(character: str, variant: str) -> str:
    name = re.sub(r"GREEK |LATIN | LETTER|LUNATE ", "", unicodedata.name(character)).replace("  ", " ")
    for full in (f"MATHEMATICAL {variant} {name}", f"{variant} {name}"):
        try:
            return unicodedata.lookup(full)
        except KeyError:
            pass
    raise Stale(f"no {variant} {character!r}")


def reads(element) -> str:
    """A piece of MathML as a plain string: z_t, μ_i^2, α¯_t."""
    inner = [reads(child) for child in element]
    if element.tag == "msub":
        return f"{inner[0]}_{inner[1]}"
    if element.tag == "msup":
        return f"{inner[0]}^{inner[1]}"
    if element.tag == "msubsup":
        return f"{inner[0]}_{inner[1]}^{inner[2]}"
    if element.tag == "msqrt":
        return f"√{inner[0]}"
    own = "".join(unicodedata.normalize("NFKC", element.text or "").split())
    return own.replace("\u0304", "¯") + "".join(inner)


def symbols_of(math) -> dict[str, ElementTree.Element]:
    """Which symbols a formula has; their elements are marked data-s on the way."""
    found = {}
    for element in math.iter():
        text = reads(element)
        keys = [key for key, (formula, _) in SYMBOLS.items() if text in formula]
        if keys and element.tag != "math" and not (element.tag == "mrow" and len(element) == 1):
            element.set("data-s", " ".join(keys))
            for key in keys:
                found.setdefault(key, element)
    return found


def serialise(math) -> str:
    return ElementTree.tostring(math, encoding="unicode", short_empty_elements=False)


# ------------------------------------------------------------------------------------------------------------
# Code as HTML
# ------------------------------------------------------------------------------------------------------------

KINDS = ((Comment, "c"), (String, "s"), (Number, "n"), (Keyword, "k"), (Operator.Word, "k"),
         (Name.Function, "d"), (Name.Class, "d"))
escape = functools.partial(html.escape, quote=False)


def names_in(file: Source, first: int, last: int) -> set[str]:
    return {text for tokens in file.tokens[first - 1:last] for kind, text in tokens if kind in Name}


def code_line(file: Source, number: int, indent: int, ties: set[str], classes: str = "", tie: str = "") -> str:
    """One line; `ties` are the symbols to mark, `tie` a line of pseudo-code that it belongs to."""
    out, rest, start = [], indent, True
    depth = len(file.lines[number - 1]) - len(file.lines[number - 1].lstrip()) - indent
    for kind, text in file.tokens[number - 1]:
        if rest:                                       # what the function is indented by
            cut = min(rest, len(text) - len(text.lstrip(" ")))
            text, rest = text[cut:], rest - cut
        if not text:
            continue
        css = next((css for one, css in KINDS if kind in one), "")
        keys = [key for key in SYMBOLS if key in ties and text in SYMBOLS[key][1]] if kind in Name else []
        if keys:
            out.append(f'<b data-s="{" ".join(keys)}">{escape(text)}</b>')
        elif css:
            out.append(f'<i class="{css}">{escape(text)}</i>')
        elif text.isspace() and len(text) > (20 if start else 3):
            out.append(f'<i class="{"in" if start else "g"}">{text}</i>')   # narrow screens cut it short
        else:
            out.append(escape(text))
        start = False
    attributes = f' class="{("l " + classes).strip()}" style="--i:{min(depth, 20)}"'
    return f'<span{attributes}{f" data-s={chr(34)}{tie}{chr(34)}" if tie else ""}>{"".join(out)}\n</span>'


def link(file: Source, line: int, label: str = "") -> str:
    return f'<a class="src" href="../../{file.name}#L{line}">{label or f"{file.name}:{line}"}</a>'


def code(file: Source, first: int, last: int, marks, ties: set[str], head: str) -> str:
    comments = {line for comment, start, _ in marks for line in range(comment, start)}
    equation = {line for _, start, end in marks for line in range(start, end + 1)}
    indent = len(file.lines[first - 1]) - len(file.lines[first - 1].lstrip())
    lines = "".join(code_line(file, n, indent, ties, "eq" if n in equation else "note" if n in comments else "")
                    for n in range(first, last + 1))
    return f'<div class="code"><p class="at">{head}</p><pre><code>{lines}</code></pre></div>'


def units(row: Row) -> list[dict]:
    """What is shown of a row's functions, and where its equation stands in each."""
    shown = []
    for where in row.where:
        file, name, node = locate(where)
        first, last = file.span(node)
        marks = file.marks(node, MARKED_AS.get(row.key, row.key))
        if last - first >= LONG and marks:
            first, last = file.block_around(node, marks[0][1])
        shown.append(dict(file=file, name=name, node=node, first=first, last=last, marks=marks,
                          text=ast.get_source_segment(file.text, node)))
    if row.key.isdigit() and row.key not in UNMARKED and not any(unit["marks"] for unit in shown):
        raise Stale(f"no `# Eq. {row.key}:` in {', '.join(row.where)}, where {EQUATIONS.name} says it stands")
    return shown


def right_side(row: Row, shown: list[dict], ties: set[str]) -> str:
    out = []
    for i, unit in enumerate(shown):
        file, name = unit["file"], unit["name"]
        line = unit["marks"][0][1] if unit["marks"] else unit["first"]
        head = f'<code>{escape(name)}</code> {link(file, line)}'
        if i and unit["text"] == shown[0]["text"]:
            out.append(f'<p class="at also">the same, word for word: <code>{escape(name)}</code> '
                       f'{link(file, line)}</p>')
            continue
        block = code(file, unit["first"], unit["last"], unit["marks"], ties, head)
        out.append(block if not i else
                   f'<details><summary>also <code>{escape(name)}</code> in {file.name}</summary>{block}</details>')
    return "".join(out)


def guarded(row: Row) -> str:
    """The tests whose names begin as the row says, the first with its first line."""
    if not row.test:
        return ""
    file = source("test_all.py")
    tests = [node for node in file.tree.body if isinstance(node, ast.FunctionDef)
             and node.name.startswith(row.test)]
    if not tests:
        raise Stale(f"test_all.py has no {row.test}*")
    test = tests[0]
    docstring = ast.get_docstring(test)
    line = docstring.splitlines()[0] if docstring else file.lines[test.body[0].lineno - 1].strip()
    claim = test.name.removeprefix("test_").removeprefix(f"eq_{row.key}_").replace("_", " ")
    more = "".join(f', {link(file, other.lineno, str(other.lineno))}' for other in tests[1:])
    return (f'<p class="test"><span class="tag">test</span> {link(file, test.lineno, escape(claim))}'
            f'{f" <small>and line{chr(115) * (len(tests) > 2)} {more[2:]}</small>" if more else ""}'
            f'<br><code class="first">{escape(line)}</code></p>')


# ------------------------------------------------------------------------------------------------------------
# The page's text
# ------------------------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """Markdown's backticks and links of equations.md."""
    text = re.sub(r"\[([^]]+)\]\(([^)]+)\)", r'<a href="../\2">\1</a>', escape(text))
    parts = re.split(r"`([^`]+)`", text)
    return "".join(f"<code>{part}</code>" if i % 2 else lowered(part) for i, part in enumerate(parts))


def lowered(text: str) -> str:
    """z_t, f_target and z_{t−1} of prose with their indices lowered."""
    return re.sub(r"(?<!\w)(\w[\u0300-\u036f]?)_(?:\{([^}]*)\}|(\w+|∅))", lambda m: f"{m[1]}<sub>{m[2] or m[3]}</sub>",
                  text)


def path(text: str) -> str:
    """`x -4-> f` as x, an arrow that links to Eq. 4, f."""
    def arrow(match):
        key = match[1]
        return f'<a href="#{"eq-" * key.isdigit()}{key}"><sup>{key if key.isdigit() else ""}</sup>→</a>'
    return re.sub(r"-(\w+)->", arrow, lowered(text))


def equation(row: Row, known: dict[str, str]) -> str:
    formulas = [mathml(latex, known) for latex in row.formulas]
    shown = units(row)
    here = {}
    for math in formulas:
        here |= {key: element for key, element in symbols_of(math).items() if key not in here}
    names = set().union(*(names_in(unit["file"], unit["first"], unit["last"]) for unit in shown))
    here.pop("eps" if "noise" in names else "eps_theta", None)     # ddim_step's eps is the network's
    ties = {key for key in here if names & set(SYMBOLS[key][1])}
    chips = {}                                         # a symbol once, whatever keys it carries
    for key, element in here.items():
        if key in ties:
            chips.setdefault(serialise(element), []).append(key)
    for math in formulas:
        for element in math.iter():
            keys = [key for key in element.attrib.pop("data-s", "").split() if key in ties]
            if keys:
                element.set("data-s", " ".join(keys))
    legend = "".join(
        f'<button type="button" data-s="{" ".join(keys)}"><math>{strip(text)}</math> '
        f'<code>{" ".join(sorted({name for key in keys for name in SYMBOLS[key][1] if name in names}))}</code>'
        f'</button>' for text, keys in chips.items())
    plain = html.escape(row.plain or row.name)
    lines = "".join(f'<div><math display="block" alttext="{html.escape(latex)}">{inside(math)}</math></div>'
                    for latex, math in zip(row.formulas, formulas))
    number = f'<a class="no" href="#{row.anchor}" title="copy the link">{row.key if row.key.isdigit() else "·"}</a>'
    return (f'<article id="{row.anchor}"{"" if row.key.isdigit() else " class=extra"}><div class="left">'
            f'<h3>{number} {lowered(escape(row.name))}</h3>'
            f'<div class="formula" role="math" aria-label="{plain}">{lines}</div>'
            f'<p>{prose(row.words[:1].upper() + row.words[1:])}.</p>'
            + (f'<p class="shapes">{lowered(escape(row.shapes))}</p>' if row.shapes else "")
            + (f'<p class="ties">{legend}</p>' if legend else "") + guarded(row)
            + f'</div><div class="right">{right_side(row, shown, ties)}{figure(row.key)}</div></article>\n')


def strip(text: str) -> str:
    return re.sub(r' data-s="[^"]*"', "", text)


def inside(math) -> str:
    return "".join(serialise(child) for child in math)


def loop(item: Loop) -> str:
    """Pseudo-code on the left, on the right the function, folded where no line of it is spoken of."""
    file, name, node = locate(item.where)
    first, last = file.span(node)
    ties, left, after = {}, [], first
    for i, (pseudo, number, piece) in enumerate(item.lines):
        hits = [n for n in range(first, last + 1) if piece in file.lines[n - 1]]
        hits = [n for n in hits if n >= after] or hits
        if not hits:
            raise Stale(f"{file.name}: no line of {name} has {piece!r}, which {EQUATIONS.name} speaks of")
        after = hits[0]
        ties.setdefault(after, []).append(f"line-{i}")
        ref = f'<a href="#eq-{number}">({number})</a>' if number else ""
        left.append(f'<span class="l" data-s="line-{i}" tabindex="0">{escape(pseudo)}{ref}\n</span>')
    loops = [child for child in ast.walk(node) if isinstance(child, ast.For)
             and any(child.lineno == line for line in ties)]
    start = loops[0].lineno
    keep = set(range(start, max(ties) + 1)) | set(ties)
    while file.lines[min(keep) - 2].strip().startswith("#"):
        keep.add(min(keep) - 1)
    indent, out, n = node.col_offset, [], first
    while n <= last:
        m = n
        while m <= last and m not in keep:
            m += 1
        run = "".join(code_line(file, k, indent, set()) for k in range(n, m))
        if m - n > 3 and n > first:
            out.append(f'<details class="fold"><summary>{m - n} lines</summary>{run}</details>')
        elif m - n > 3:
            out.append("".join(code_line(file, k, indent, set()) for k in range(n, n + 1))
                       + f'<details class="fold"><summary>{m - n - 1} lines</summary>'
                       + "".join(code_line(file, k, indent, set()) for k in range(n + 1, m)) + '</details>')
        else:
            out.append(run)
        while m <= last and m in keep:
            out.append(code_line(file, m, indent, set(), "eq" if m in ties else "", " ".join(ties.get(m, []))))
            m += 1
        n = m
    return (f'<article id="{item.anchor}" class="extra loop"><div class="left">'
            f'<h3><a class="no" href="#{item.anchor}" title="copy the link">↻</a> {escape(item.title)}</h3>'
            f'<pre class="pseudo"><code>{"".join(left)}</code></pre></div><div class="right">'
            f'<div class="code"><p class="at"><code>{escape(name)}</code> {link(file, start)}</p>'
            f'<pre><code>{"".join(out)}</code></pre></div></div></article>\n')


def text_part() -> tuple[str, str]:
    """The page before and after its pictures: a function of the sources alone."""
    known = formulas_of(PAGE)
    sections = read_equations()
    numbers = [item.key for s in sections for item in s.items if isinstance(item, Row) and item.key.isdigit()]
    if numbers != [str(n) for n in range(1, 35)]:
        raise Stale(f"{EQUATIONS.name}: the equations are {numbers}, not 1 to 34 in order")
    contents = body = ""
    for section in sections:
        entries = "".join(
            f'<li><a href="#{item.anchor}">'
            + (f"<b>{item.key}</b> <span>{lowered(escape(item.name))}</span>"
               if isinstance(item, Row) and item.key.isdigit() else f"<b>·</b> {escape(item.name)}"
               if isinstance(item, Row) else f"<b>↻</b> {escape(item.title)}")
            + "</a></li>" for item in section.items)
        way = "".join(f"<span>{path(escape(one).replace('-&gt;', '->'))}</span>" for one in section.paths)
        contents += (f'<section><h2><a href="#{section.anchor}">{escape(section.title)}</a></h2><ol>{entries}</ol>'
                     f'</section>')
        body += (f'<section id="{section.anchor}"><header><h2>{escape(section.title)}</h2>'
                 f'{f"<p class=path>{way}</p>" if way else ""}<p>{prose(section.idea)}</p></header>\n'
                 + "".join(equation(item, known) if isinstance(item, Row) else loop(item)
                           for item in section.items) + "</section>\n")
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    stages = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    before = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<title>PS-VAE: every equation, and the line that computes it</title>
<style>
{style}</style></head><body>
<nav aria-label="sections"><a href="#top">PS-VAE</a>{stages}</nav>
<main id="top"><header class="top"><div><h1>Every equation, and the line that computes it</h1>
<p>On the left stand the 34 equations of the PS-VAE guide, in its order. On the right stands the function of this
repository that computes each, read from the files when the page was built; the line itself is marked. Point at a
symbol to see it on the other side. Under each formula is the test that guards it, and
<a href="../README.md">the notebook</a> says what was measured.</p></div>{opening()}</header>
<nav class="contents" aria-label="equations">{contents}</nav>
{body}<footer><p>Made by <code>python notes/reading/build.py</code> from <a href="../equations.md">notes/equations.md</a>,
the source files and the small model in notes/tiny. <span data-say="model"></span></p></footer></main>
"""
    return before, f"<script>\n{script}</script>\n</body></html>\n"


def formulas_of(page: Path) -> dict[str, str]:
    """{LaTeX: MathML} of a page that is there: a formula that has not changed needs no latex2mathml."""
    if not page.exists():
        return {}
    kept = re.findall(r'<math display="block" alttext="([^"]*)">(.*?)</math>', page.read_text(encoding="utf-8"))
    return {html.unescape(latex): f'<math>{strip(text)}</math>' for latex, text in kept}


def split(page: str) -> tuple[str, str, str]:
    """Text before the pictures, pictures, text after them."""
    before, rest = page.split(MARKS[0])
    pictures, after = rest.split(MARKS[1])
    return before, pictures, after


# ------------------------------------------------------------------------------------------------------------
# Figures: the frame is text, what moves in it is a strip of pictures
# ------------------------------------------------------------------------------------------------------------

PROMPTS = ("a large red circle on a gray background", "a small blue square above a large yellow star",
           "three green triangles on a pink background", "an outlined purple diamond left of an orange cross")
TIMES = [50 * i for i in range(21)]                    # t of the figures at Eq. 22 and 32
SCALES = list(range(1, 11))                           # s of the figure at Eq. 33
SCHEDULES = ("scaled_linear", "linear")


def tile(strip: str, row: int, what: str, caption: str = "", k: str = "var(--k)") -> str:
    """A window onto row `row` of a strip of pictures; the figure's --k is the column."""
    under = f"<span>{lowered(caption)}</span>" if caption else ""
    return (f'<div class="tile"><div class="pic {strip}" role="img" aria-label="{html.escape(what)}" '
            f'style="--r:{row};--c:{k}"></div>{under}</div>')


def moving(name: str, label: str, count: int, start: int, tiles: str, caption: str, more: str = "",
           play: bool = False) -> str:
    """A figure with a slider; page.js moves --k and says what the position means."""
    button = '<button type="button" class="play" aria-label="play">▶</button>' if play else ""
    return (f'<figure class="moving" id="fig-{name}" style="--k:{start}">{more}<div class="tiles">{tiles}</div>'
            f'<p class="move"><label for="move-{name}">{label}</label>{button}'
            f'<input type="range" id="move-{name}" min="0" max="{count - 1}" value="{start}">'
            f'<output for="move-{name}"></output></p><figcaption>{lowered(caption)}</figcaption></figure>')


def figure(key: str) -> str:
    return {"7": features_figure, "11": kl_figure, "14": spread_figure, "15": gradient_figure,
            "22": noise_figure, "32": guess_figure, "33": guidance_figure, "34": film_figure,
            "edit-guidance": edit_figure}.get(key, str)()


def opening() -> str:
    """Six moments of the film at Eq. 34."""
    tiles = "".join(tile("p-film", 5, f"step {k + 1} of 50", k=str(k)) for k in (0, 6, 12, 18, 27, 49))
    return f'<a class="opening" href="#eq-34" title="{PROMPTS[1]}: Eq. 34, step by step">{tiles}</a>'


def features_figure() -> str:
    names = ("x", "a held-out picture"), ("f", "its frozen features, the first three principal components as "
             "colours"), ("μ", "its latent as colours"), ("f̂", "the features out of the latent, as colours"), \
            ("x̂", "the picture out of the latent")
    tiles = "".join(tile("p-features", row, what, f"<b>{name}</b>") for row, (name, what) in enumerate(names))
    return moving("features", "picture", 8, 0, tiles,
                  "A held-out picture x; its frozen features f (the first three principal components of each "
                  "cell as colours); the latent μ; and what the two decoders make of it, f̂ (Eq. 7) and x̂ (Eq. 14).")


def spread_figure() -> str:
    tiles = "".join(tile("p-spread", row, "a held-out picture, decoded from a sample of its latent") for row in
                    range(5))
    return moving("spread", "noise", 9, 1, tiles,
                  "x̂ = D<sub>pixel</sub>(μ + k σ ⊙ ε) of five held-out pictures. At k = 1 this is Eq. 6, as in "
                  "training: the KL term made σ wide, and the decoder forgives it.")


KL_BOX, CURVE_BOX = (440, 150), (440, 120)             # of the figures at Eq. 11 (z from -5 to 5) and 22


def bell(mu: float, sigma: float) -> str:
    """N(mu, sigma^2) as an SVG path; page.js draws the same."""
    import math
    width, height = KL_BOX
    points = []
    for i in range(0, 201):
        z = -5 + i / 20
        density = math.exp(-((z - mu) / sigma) ** 2 / 2) / sigma / math.sqrt(2 * math.pi)
        points.append(f"{i * width / 200:.1f},{height - 10 - min(density, 1.1) * 120:.1f}")
    return "M" + "L".join(points)


def kl_figure() -> str:
    width, height = KL_BOX
    ticks = "".join(f'<text x="{(z + 5) * width / 10:.0f}" y="{height + 6}">{z}</text>'.replace("-", "−")
                    for z in (-4, -2, 0, 2, 4))
    sliders = "".join(
        f'<p class="move"><label for="kl-{name}">{symbol}</label><input type="range" id="kl-{name}" min="{low}" '
        f'max="{high}" step="0.05" value="{value}"><output for="kl-{name}">{value:.2f}</output></p>'
        for name, symbol, low, high, value in (("mu", "μ", -3, 3, 1.0), ("sigma", "σ", 0.05, 3, 0.5)))
    return (f'<figure id="fig-kl"><svg viewBox="0 0 {width} {height + 10}" role="img" aria-label="the bell curves '
            f'of N(0, 1) and of N(mu, sigma squared)"><path class="axis" d="M0,{height - 10}H{width}"/>{ticks}'
            f'<path class="prior" d="{bell(0, 1)}"/><path class="posterior" d="{bell(1, 0.5)}"/></svg>{sliders}'
            f'<p class="sum" aria-live="polite">KL = −½ (1 + log σ² − μ² − σ²) = '
            f'<output id="kl-value">0.818 nats</output></p><figcaption>One channel: p(z) = N(0, 1) in grey, '
            f'q(z | x) = N(μ, σ²) in colour. 0 at μ = 0, σ = 1 alone; a small σ costs as much as a far μ.'
            f'</figcaption></figure>')


def gradients() -> dict[str, dict[str, bool]]:
    """{term: {part: whether it gets a gradient}}, from the table above psvae_loss."""
    lines = source("psvae.py").lines
    top = next((i for i, line in enumerate(lines) if "who gets a gradient" in line), None)
    if top is None:
        raise Stale("psvae.py has no table of who gets a gradient")
    columns = {m.start(): m[0] for m in re.finditer(r"\S+( \S+)*", lines[top].replace("who gets a gradient",
                                                                                      " " * 19).lstrip("#"))}
    found = {}
    for line in lines[top + 1:]:
        if not line.lstrip("# ").strip():
            break
        name = re.match(r"#\s+(\S+(?: \S+)*)", line)[1]
        marks = [m.start() - 1 for m in re.finditer(r"(?<= )x(?= |$)", line)]
        found[name] = {part: any(start <= at < start + len(part) for at in marks)
                       for start, part in columns.items()}
    return found


def gradient_figure() -> str:
    table = gradients()
    parts = list(next(iter(table.values())))
    terms = {part: " ".join(slug(term) for term in table if table[term][part]) for part in parts}
    boxes = (("encoder", 70, 20), ("projector", 70, 86), ("semantic decoder", 70, 152), ("pixel decoder", 226, 152))
    drawn = "".join(f'<g class="part" data-terms="{terms[name]}"><rect x="{x}" y="{y}" width="140" height="34" '
                    f'rx="4"/><text x="{x + 70}" y="{y + 22}">{name}</text></g>' for name, x, y in boxes)
    frozen = "".join(f'<g class="frozen"><rect x="{x}" y="{y}" width="140" height="34" rx="4"/><text x="{x + 70}" '
                     f'y="{y + 22}">{name}</text></g>' for name, x, y in (("frozen copy", 226, 20),))
    arrows = ("M140,0V16", "M140,54V82", "M140,120V148", "M150,120V132H296V148", "M140,186V206", "M296,186V206")
    lines = "".join(f'<path class="arrow" d="{d}"/>' for d in arrows)
    words = "".join(f'<text class="word" x="{x}" y="{y}">{text}</text>' for text, x, y in (
        ("x", 128, 9), ("f", 128, 73), ("z", 128, 139), ("f̂", 140, 222), ("x̂", 296, 222), (f"f<tspan dy={chr(34)}4{chr(34)} font-size={chr(34)}10{chr(34)}>target</tspan>", 296, 70)))
    losses = "".join(f'<text class="loss" data-terms="{term}" x="{x}" y="{y}">{text}</text>' for term, text, x, y in (
        ("semantic", "semantic", 140, 240), ("pixel-perceptual", "pixel, perceptual", 296, 240), ("kl", "KL", 40, 108)))
    radios = "".join(f'<label><input type="radio" name="term" value="{slug(term)}"{" checked" * (i == 0)}> {term}'
                     f'</label>' for i, term in enumerate(table))
    head = "".join(f'<th scope="col">{part}</th>' for part in parts)
    rows = "".join(f'<tr data-terms="{slug(term)}"><th scope="row">{term}</th>' + "".join(
        f"<td>{'●' if got else ''}</td>" for got in row.values()) + "</tr>" for term, row in table.items())
    return (f'<figure id="fig-gradients" class="gradients"><fieldset><legend>the gradient of</legend>{radios}'
            f'</fieldset><svg viewBox="0 0 400 250" role="img" aria-label="the parts of PS-VAE; those that the '
            f'chosen term teaches are lit">{lines}{drawn}{frozen}{words}{losses}</svg><table><thead><tr><td></td>'
            f'{head}</tr></thead><tbody>{rows}</tbody></table><figcaption>Choose a term to see who learns from it. The '
            f'frozen copy and LPIPS never do.</figcaption></figure>')


def slug(term: str) -> str:
    return re.sub(r"\W+", "-", term.lower())


def noise_figure() -> str:
    width, height = CURVE_BOX
    curves = "".join(f'<use class="curve {schedule}" href="#curve-{schedule}"/>' for schedule in SCHEDULES)
    svg = (f'<svg viewBox="-18 -8 {width + 22} {height + 26}" role="img" aria-label="alpha bar over t, falling from '
           f'1 to 0, for the scaled linear and the linear schedule"><path class="axis" d="M0,0V{height}H{width}"/>'
           f'<text x="-10" y="4">1</text><text x="-10" y="{height}">0</text><text x="{width - 12}" '
           f'y="{height + 15}">t = 1000</text><text x="12" y="14">ᾱ</text>{curves}<path class="now" '
           f'd="M0,0V{height}" style="transform:translateX(calc(var(--k)*{width / (len(TIMES) - 1)}px))"/></svg>')
    radios = "".join(f'<label><input type="radio" name="schedule" value="{schedule}"{" checked" * (i == 0)}> '
                     f'{schedule.replace("_", " ")}</label>' for i, schedule in enumerate(SCHEDULES))
    tiles = "".join(
        f'<div class="only {schedule}">' + tile("p-noise", 2 * i, "z_t as colours", "<b>z_t</b> as colours")
        + tile("p-noise", 2 * i + 1, "what the pixel decoder makes of z_t", "<b>z_t</b> decoded") + "</div>"
        for i, schedule in enumerate(SCHEDULES))
    return moving("noise", "t", len(TIMES), 6, tiles, "How much of z_0 is left at t, what z_t looks like (three "
                  "principal components of each cell), and what the pixel decoder makes of it: it was never taught "
                  "noise.", f"<fieldset><legend>schedule</legend>{radios}</fieldset>{svg}")


def guess_figure() -> str:
    names = ("z_t decoded", "z_t, decoded"), ("ẑ_0 decoded", "the network's guess of z_0 from this z_t, decoded"), \
        ("x", "the true picture")
    tiles = "".join(tile("p-guess", row, what, name) for row, (name, what) in enumerate(names))
    return moving("guess", "t", len(TIMES), 14, tiles, 'One look of the network, no sampling: from z_t and the '
                  'caption “<span data-say="guess"></span>” it predicts ε, and Eq. 22 solved for z_0 gives its '
                  'guess of the picture. At small t everything is still there; near T the caption is all it has.')


def guidance_figure() -> str:
    tiles = "".join(tile("p-guidance", row, prompt, prompt) for row, prompt in enumerate(PROMPTS))
    return moving("guidance", "s", len(SCALES), 2, tiles, "The same noise (seed 0, nothing picked by hand) with "
                  "another guidance scale; 25 steps, η = 1.")


def film_figure() -> str:
    tiles = "".join(tile("p-film", row + 4 * eta, f"{prompt}, eta {eta}", prompt if eta else "")
                    for eta in (0, 1) for row, prompt in enumerate(PROMPTS))
    return moving("film", "step", 50, 20, tiles, "The predicted z_0 of every step, decoded; seed 0, s = 3. Upper "
                  "row η = 0: σ_t = 0, the noise of z_T decides everything. Lower row η = 1: fresh noise at each step.",
                  play=True)


def edit_figure() -> str:
    import notes.world.world as world                  # the kinds of edits, one column each
    pairs = "".join(f'<div class="pair">{tile("p-edit", row, "the source", k="0")}'
                    f'{tile("p-edit", row, "the edited picture", k="calc(var(--k) + 1)")}'
                    f'<span data-say="edit-{row}">{kind}</span></div>' for row, kind in enumerate(world.KINDS))
    return moving("edit", "step", 50, 49, pairs, "Source and result: the predicted z_0 of every step, decoded. The "
                  "first edit of each kind of the held-out split, seed 0, nothing picked by hand.", play=True)


# ------------------------------------------------------------------------------------------------------------
# The pictures, from the model that ships
# ------------------------------------------------------------------------------------------------------------


def strip_of(rows: list) -> str:
    """rows[r][k], uint8 (H, W, 3), as one lossless WebP in a data URI."""
    import numpy as np
    from PIL import Image
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    out = io.BytesIO()
    Image.fromarray(sheet).save(out, "WEBP", lossless=True, quality=60, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def pictures_part() -> str:
    """A style sheet of strips and a few words about them, drawn by the shipped model."""
    import numpy as np
    import torch
    import data
    import dit
    import sample
    import notes.world.world as world
    torch.manual_seed(0)
    pipe = sample.Pipeline(sample.SHIPPED, torch.device("cpu"))
    frozen = data.load_image_encoder(data.TINY_IMAGE_ENCODER)
    scenes = [world.scene(i, "val") for i in range(64)]
    pixels = np.stack([np.asarray(world.draw(scene)) for scene in scenes])
    strips, facts = {}, {"model": f"Pictures: {pipe.step:,} steps of stage 3, {pipe.size} px."}
    decode = lambda z: pipe.decode(z)
    with torch.no_grad():
        x = data.to_float(torch.from_numpy(pixels).permute(0, 3, 1, 2), pipe.device)
        f, (mu, log_var) = frozen(x), pipe.psvae.encode(x)
        f_hat, x_hat = pipe.psvae.semantic_decoder(mu), data.to_uint8(pipe.psvae.decode(mu))
        colours, colours_hat = data.pca_colours(f, f_hat, size=64)
        of_mu, = data.pca_colours(mu, size=64)
        strips["features"] = [part[:8] for part in (pixels, colours, of_mu, colours_hat, x_hat)]
        facts["features"] = [f"{i + 1} of 8" for i in range(8)]

        g = data.generator(0, "page", 0, "eps")
        eps = torch.randn(mu.shape, generator=g)
        spread = range(9)
        strips["spread"] = list(zip(*(data.to_uint8(pipe.psvae.decode(
            (mu + k * torch.exp(0.5 * log_var) * eps)[:5])) for k in spread)))
        facts["spread"] = [f"k = {k}" for k in spread]

        z_0 = dit.normalise(mu, pipe.mean, pipe.variance)
        rows, saying, curves = [], [], ""
        for schedule in SCHEDULES:
            alpha_bar = dit.noise_schedule(1000, 1e-4, 0.02, schedule)
            curves += f'<symbol id="curve-{schedule}" overflow="visible"><path fill="none" d="M' + "L".join(
                f"{t * CURVE_BOX[0] / 1000:.1f},{(1 - alpha_bar[t].item()) * CURVE_BOX[1]:.1f}"
                for t in range(0, 1001, 10)) + '"/></symbol>'
            z_t = torch.cat([dit.add_noise(z_0[:1], torch.tensor([t]), eps[:1], alpha_bar) for t in TIMES])
            rows += [data.pca_colours(z_0, z_t, size=64)[1], decode(z_t)]
            saying.append([f"{alpha_bar[t].item():.2g}" for t in TIMES])
        strips["noise"] = rows
        facts["noise"] = [f"{t}, ᾱ = {a} (scaled linear), {b} (linear)" for t, a, b in zip(TIMES, *saying)]

        caption = world.caption(scenes[0], world.generator("caption", 0, "page", 0))
        facts["guess-said"] = caption
        c, mask = pipe.text_encoder([caption, ""])
        alpha_bar, T = pipe.alpha_bar, pipe.config["T"]
        z_t, guesses = [], []
        for t in TIMES:
            t = torch.tensor([t * T // 1000])
            z_t.append(dit.add_noise(z_0[:1], t, eps[:1], alpha_bar))
            one = []
            denoised(pipe, z_t[-1], c, mask, [max(1, t.item()), 0], 1.0, frames=one)
            guesses.append(one[0][1])
        strips["guess"] = [decode(torch.cat(z_t)), decode(torch.cat(guesses)), [pixels[0]] * len(TIMES)]
        facts["guess"] = [str(t) for t in TIMES]

        preset = sample.PRESETS.get(pipe.config["preset"], {})
        films = [film(pipe, PROMPTS, None, preset.get("guidance", 7.5), eta) for eta in (0.0, 1.0)]
        times = sample.sampling_times(T, 50)
        strips["film"] = [row for one in films for row in one]
        facts["film"] = [f"{i + 1} of 50, t = {t}" for i, t in enumerate(times[:-1])]
        drawn = [pipe(list(PROMPTS), [0] * len(PROMPTS), steps=25, guidance=s, eta=1.0) for s in SCALES]
        strips["guidance"] = list(zip(*drawn))
        facts["guidance"] = [f"{s:g}" for s in SCALES]

        edits = [next(e for e in (world.edit(i, "val") for i in range(k, 700, 7)) if e[3] == kind)
                 for k, kind in enumerate(world.KINDS)]
        sources = np.stack([np.asarray(world.draw(before)) for before, *_ in edits])
        moved = film(pipe, [text for _, text, _, _ in edits], sources, preset.get("guidance", 7.5), 1.0)
        strips["edit"] = [[before, *row] for before, row in zip(sources, moved)]
        facts["edit"] = facts["film"]
        facts |= {f"edit-{i}": text for i, (_, text, _, _) in enumerate(edits)}
    check_gradients(pipe, x[:8])
    css = "".join(f".p-{name}{{--n:{len(rows[0])};--m:{len(rows)};background-image:url({strip_of(rows)})}}\n"
                  for name, rows in strips.items())
    return (f"<style>\n{css}</style>\n<svg width=\"0\" height=\"0\" aria-hidden=\"true\">{curves}</svg>\n<script type=\"application/json\" id=\"facts\">"
            f"{json.dumps(facts, ensure_ascii=False)}</script>\n")


def denoised(pipe, z_T, c, mask, times, s, s_image=1.0, eta=0.0, source=None, generators=(), frames=None):
    import sample
    return sample.ddim(pipe.dit, z_T, c, mask, pipe.alpha_bar, times, s, s_image, eta, source, generators, frames,
                       pipe.config["predict"])


def film(pipe, prompts, sources, guidance: float, eta: float, steps: int = 50) -> list:
    """rows[prompt][step]: the predicted z_0 of each step, decoded; the last is the picture itself."""
    import torch
    import data
    import dit
    import sample
    c, mask = pipe.text_encoder([*prompts, *[""] * len(prompts)])
    generators = [data.generator(0, "sample", 0, "z_T") for _ in prompts]
    z_T = sample.draw(generators, torch.empty(len(prompts), *pipe.latent_shape))
    source = None
    if sources is not None:
        x = data.to_float(torch.from_numpy(sources).permute(0, 3, 1, 2), pipe.device)
        source = dit.normalise(pipe.psvae.encode(x)[0], pipe.mean, pipe.variance)
    frames = []
    denoised(pipe, z_T, c, mask, sample.sampling_times(pipe.config["T"], steps), guidance,
             1.5 if sources is not None else 1.0, eta, source, generators, frames)
    return list(zip(*(pipe.decode(z_0) for _, z_0 in frames)))


def check_gradients(pipe, x):
    """The table above psvae_loss, tried out: each term's gradient reaches the parts that it names, no others."""
    import torch
    import data
    import psvae
    model = copy.deepcopy(pipe.psvae).requires_grad_(True)
    f_target = data.load_image_encoder(data.TINY_IMAGE_ENCODER)(x).detach()
    x_hat, f_hat, mu, log_var = model(x, torch.zeros(1))
    terms = {"semantic": psvae.semantic_loss(f_hat, f_target), "pixel, perceptual": psvae.pixel_loss(x_hat, x),
             "KL": psvae.kl_divergence(mu, log_var)}
    for term, row in gradients().items():
        for part, said in row.items():
            weights = [p for p in getattr(model, part.replace(" ", "_")).parameters() if p.requires_grad]
            reached = any(g is not None for g in torch.autograd.grad(terms[term], weights, retain_graph=True,
                                                                     allow_unused=True))
            if reached != said:
                raise Stale(f"psvae.py says {said} of the gradient of {term} at the {part}; it is {reached}")


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------


def screenshot(to: Path):
    """A picture of the page for the README."""
    from playwright.sync_api import sync_playwright
    import shutil
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1360, "height": 850})
        page.goto(PAGE.as_uri() + "#eq-11")
        page.screenshot(path=to)
        browser.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", action="store_true", help="text alone; the pictures stay as they are")
    parser.add_argument("--screenshot", action="store_true", help="also write page.png")
    args = parser.parse_args()
    start = time.time()
    try:
        before, after = text_part()
        pictures = split(PAGE.read_text(encoding="utf-8"))[1] if args.text else pictures_part()
    except Stale as error:
        sys.exit(f"error: {error}")
    PAGE.write_text(before + MARKS[0] + pictures + MARKS[1] + after, encoding="utf-8")
    print(f"wrote {PAGE}: {PAGE.stat().st_size / 1e6:.2f} MB in {time.time() - start:.0f} s")
    if args.screenshot:
        screenshot(HERE / "page.png")


if __name__ == "__main__":
    main()
