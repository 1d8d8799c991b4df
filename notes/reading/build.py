"""Builds index.html: an equation on the left, the very line that computes it on the right.

    python notes/reading/build.py                 text and pictures, a minute on two cores
    python notes/reading/build.py --text          text alone, seconds; the pictures stay

page.png of the README is a screenshot of its #eq-22, 1280 by 720, by any browser.

Nothing on the page is copied by hand: formulas, meanings, functions and tests come from
notes/equations.md, code from the files (by function name and `# Eq. n` mark), pictures from the
model in notes/tiny. The text is a function of the sources, byte for byte, so a test can tell
whether the page is up to date. A formula that is new needs latex2mathml (pip install).
"""

import argparse
import ast
import base64
import functools
import html
import io
import itertools
import json
import math
import re
import sys
import time
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import dit  # noqa: E402
import sample  # noqa: E402
from notes.world import world  # noqa: E402

PAGE, EQUATIONS = HERE / "index.html", ROOT / "notes/equations.md"
UNMARKED = {"1", "3"}                       # claims: shown is what measures them
MARKS = "<!-- pictures: begin -->\n", "<!-- pictures: end -->\n"


class Stale(Exception):
    """The page's sources do not fit together; says which line of which file."""


# --- notes/equations.md ---------------------------------------------------------------------------

def anchor_of(key: str) -> str:
    return f"eq-{key}" if key.isdigit() else key


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
        return anchor_of(self.key)


@dataclass
class Loop:
    where: str
    title: str
    lines: list[tuple[str, str, str]]       # pseudo-code, Eq., a piece of our line

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


def ticked(cell: str, mark: str = "`") -> list[str]:
    return re.findall(f"[{mark}]([^{mark}]+)[{mark}]", cell)


def read_equations() -> list[Section]:
    """The sections of the page, each with its equations, extra rows and loops in order."""
    text = EQUATIONS.read_text(encoding="utf-8")
    first, mathematics, extra, loops, _ = re.split(r"^## .*$", text, flags=re.M)
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
                raise Stale(f"{EQUATIONS.name}: Eq. {number} has two formulas, or no line in the "
                            f"first table")
            plain, words, where, test = said.pop(number)
            section.items.append(Row(number, name, ticked(formula, "$"), plain, words, where, test,
                                     shapes))
        sections.append(section)
    if said:
        raise Stale(f"{EQUATIONS.name}: Eq. {', '.join(said)} have no formula")
    for after, key, name, formula, words, where, test in table(extra.splitlines()):
        insert(sections, after, Row(key, name, ticked(formula, "$"), "", words, ticked(where),
                                    ticked(test)[0].rstrip("*")))
    blocks = re.findall(r"^`([\w.]+)`, after (\S+): ([^\n]*)\n+```\n(.*?)```", loops,
                        flags=re.M | re.S)
    for where, after, title, block in blocks:
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


# --- The files: functions by name, equations by their marks ---------------------------------------

@functools.cache
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
            node = next((child for child in node.body if getattr(child, "name", "") == part), None)
            if node is None:
                raise Stale(f"{self.name} has no {name}, but {EQUATIONS.name} names it")
        return node

    def span(self, node) -> tuple[int, int]:
        """First and last line, from 1, with decorators."""
        decorators = [one.lineno for one in getattr(node, "decorator_list", [])]
        return min([node.lineno, *decorators]), node.end_lineno

    def marks(self, node, number: str) -> list[tuple[int, int, int]]:
        """(comment's line, first, last) of the statements under each `# Eq. n` inside a node: the
        one that follows and its neighbours, up to an empty line, a comment, an if or a with."""
        found = []
        for line in range(node.lineno, node.end_lineno + 1):
            if re.match(rf"\s*#.*\bEq\. {number}[:,]", self.lines[line - 1]):
                bodies = [body for parent in ast.walk(node) for name in ("body", "orelse")
                          if isinstance(body := getattr(parent, name, None), list)]
                after = [(body[i].lineno, body, i) for body in bodies for i in range(len(body))
                         if body[i].lineno > line]
                if not after:
                    raise Stale(f"{self.name}:{line}: no statement under Eq. {number}")
                first, body, i = min(after, key=lambda one: (one[0], -len(one[1])))
                last = first if hasattr(body[i], "body") else body[i].end_lineno
                for other in body[i + 1:] if not hasattr(body[i], "body") else ():
                    if (other.lineno != last + 1 or isinstance(other, (ast.If, ast.With))
                            or isinstance(getattr(other, "value", None), ast.Dict)):
                        break
                    last = other.end_lineno
                found.append((line, first, last))
        return found

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


def locate(where: str):
    """"svae.Projector" or "notes/tiny/pretrain_tiny.contrastive_loss" -> (Source, name, node)."""
    file, name = re.fullmatch(r"((?:\w+/)*\w+)\.([\w.]+)", where).groups()
    return Source(file + ".py"), name, Source(file + ".py").find(name)


# --- Symbols, in formulas and in code -------------------------------------------------------------

# key: as it reads in a formula | names in the code
SYMBOLS = {}
for line in re.split(r"[;\n]+", """
x | x x_ijc | x x_part                        ; x_hat | x^ x^_ijc | x_hat
f | f f_ijk f_i | f                           ; f_hat | f^ f^_ijk | f_hat
f_plus | f_j^+ | f_plus                       ; f_target | f^target | f_target
tau | τ | tau                                 ; mu | μ μ_i^2 | mu
log_var | logσ^2 logσ_i^2 | log_var           ; sigma | σ σ_i^2 | exp
eps | ε | eps eps_part                        ; eps_hat | ε_θ | eps_hat
eps_theta | ε_θ | eps                         ; z | z z_t | z
z_0                                           ; z_t
z_prev | z_t−1 | z_prev                       ; v_pred | v_θ | v
signal | √α¯_t | signal                       ; z_t_mean | √α¯_tz_0 | mean
deviation | √1−α¯_t | deviation               ; target | ε | target
prediction | ε_θ | prediction                 ; linear | Linear | linear
pe | PE | position
e_frozen | E_φ^frozen E_φ_0^frozen | encoder frozen_encoder
e_train | E_φ^train | encoder                 ; text_encoder | TextEncoder | encoder
prompt | prompt | prompts                     ; alpha_bar | α¯_t | alpha_bar ab ab_t
ab_prev | α¯_t−1 | ab_prev                    ; alpha_t | α_t α_s | alpha
beta_t | β_t | beta                           ; sigma_t | σ_t σ_t^2 | sigma_t
noise | ε | noise                             ; t
t_emb                                         ; c
h | h h_0 | h                                 ; type | type | source_type
source | z_source | source                    ; gamma | γ | gamma
beta | β | beta                               ; q | Q | q
k | K | k                                     ; v | V | v
w_1 | W_1 | w_1                               ; w_2 | W_2 | w_2
gate | gate | gate gate_1 gate_2 gate_3       ; s
s_image                                       ; eps_null | ε_θ(z_t,t,∅) | eps_null
eps_c | ε_θ(z_t,t,c) | eps_c                  ; eps_00 | ε_∅∅ | eps_00
eps_s0 | ε_source | eps_s0                    ; eps_sc | ε_source,text | eps_sc
mean                                          ; variance
l_semantic | L_semantic | semantic            ; l_pixel | L_pixel | pixel
l_perceptual | L_perceptual | perceptual      ; l_kl | L_KL | kl
alpha_w | α | alpha                           ; lambda_w | λ | lpips_weight
l1 | L1 | l1                                  ; lpips | LPIPS | lpips
""".strip()):                               # one word alone: it reads the same everywhere
    key, *reading = (part.strip() for part in line.split("|"))
    SYMBOLS[key] = tuple(part.split() for part in reading or (key, key))


def mathml(latex: str, known: dict[str, str]) -> ElementTree.Element:
    """A formula as MathML, from the page where it is already there, else by latex2mathml."""
    if latex not in known:
        from latex2mathml.converter import convert
        known[latex] = convert(latex).replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")
    math = ElementTree.fromstring(known[latex])
    for element in math.iter():
        variant = element.attrib.pop("mathvariant", "").upper().replace("BOLD-", "BOLD ")
        if variant and variant != "NORMAL":            # browsers know letters, not the attribute
            element.text = "".join(letter(character, variant) for character in element.text)
        if element.text == "¯":
            element.set("stretchy", "false")
        elif element.text == "∅":                      # no operator with space around it
            element.tag = "mi"
    return math


def letter(character: str, variant: str) -> str:
    name = re.sub(r"GREEK |LATIN | LETTER|LUNATE ", "", unicodedata.name(character))
    for full in (f"MATHEMATICAL {variant} {name}", f"{variant} {name}"):
        try:
            return unicodedata.lookup(full)
        except KeyError:
            pass
    raise Stale(f"no {variant} {character!r}")


FORMS = {"msub": "{}_{}", "msup": "{}^{}", "msubsup": "{}_{}^{}", "msqrt": "√{}"}


def reads(element) -> str:
    """A piece of MathML as a plain string: z_t, μ_i^2, α¯_t."""
    inner = [reads(child) for child in element]
    if element.tag in FORMS:
        return FORMS[element.tag].format(*inner)
    own = "".join(unicodedata.normalize("NFKC", element.text or "").split())
    return own.replace("\u0304", "¯") + "".join(inner)


def symbols_of(formula) -> set[str]:
    """Which symbols a formula has; their elements are marked data-s on the way."""
    found = set()
    bases = {id(base) for hat in formula.iter("mover") for base in hat[0].iter()}   # f̂ is no f
    for element in formula.iter():
        text = reads(element) if id(element) not in bases else ""
        keys = [key for key, (shown, _) in SYMBOLS.items() if text in shown]
        if keys and element.tag in ("msub", "msubsup"):                     # and z_t is no z
            bases.add(id(element[0]))
        if keys and element.tag != "math" and not (element.tag == "mrow" and len(element) == 1):
            element.set("data-s", " ".join(keys))
            found |= set(keys)
    return found


# --- Code as HTML ---------------------------------------------------------------------------------

KINDS = ((Comment, "c"), (String, "s"), (Number, "n"), (Keyword, "k"), (Operator.Word, "k"),
         (Name.Function, "d"), (Name.Class, "d"))
escape = functools.partial(html.escape, quote=False)


def code_line(file: Source, number: int, indent: int, ties: set[str], classes: str = "",
              tie: str = "") -> str:
    """One line; `ties` are the symbols to mark, `tie` the lines of pseudo-code it belongs to."""
    out, rest, start = [], indent, True
    depth = len(file.lines[number - 1]) - len(file.lines[number - 1].lstrip()) - indent
    for kind, text in file.tokens[number - 1]:
        if rest:                                       # what the function is indented by
            cut = min(rest, len(text) - len(text.lstrip(" ")))
            text, rest = text[cut:], rest - cut
        if not text:
            continue
        css = next((css for one, css in KINDS if kind in one), "")
        keys = [key for key in SYMBOLS if key in ties and text in SYMBOLS[key][1]]
        if keys and kind in Name:
            out.append(f'<b data-s="{" ".join(keys)}">{escape(text)}</b>')
        elif css:
            text = escape(text).replace("DEVIATION", "<em>DEVIATION</em>")
            out.append(f'<i class="{css}">{text}</i>')
        elif text.isspace() and len(text) > (20 if start else 3):
            out.append(f'<i class="{"in" if start else "g"}">{text}</i>')  # short on narrow screens
        else:
            out.append(escape(text))
        start = False
    tied = f' data-s="{tie}"' if tie else ""
    return (f'<span class="{("l " + classes).strip()}" style="--i:{min(depth, 20)}"{tied}>'
            f'{"".join(out)}\n</span>')


def link(file: Source, line: int, label: str = "") -> str:
    return f'<a class="src" href="../../{file.name}#L{line}">{label or f"{file.name}:{line}"}</a>'


def code(file: Source, first: int, last: int, marks, ties: set[str], head: str) -> str:
    comments = {line for comment, start, _ in marks for line in range(comment, start)}
    equation = {line for _, start, end in marks for line in range(start, end + 1)}
    indent = len(file.lines[first - 1]) - len(file.lines[first - 1].lstrip())
    css = lambda n: "eq" if n in equation else "note" if n in comments else ""
    lines = "".join(code_line(file, n, indent, ties, css(n)) for n in range(first, last + 1))
    return f'<div class="code"><p class="at">{head}</p><pre><code>{lines}</code></pre></div>'


def units(row: Row) -> list[dict]:
    """What is shown of a row's functions, and where its equation stands in each."""
    shown = []
    for where in row.where:
        file, name, node = locate(where)
        (first, last), marks = file.span(node), file.marks(node, row.key)
        shown.append(dict(file=file, name=name, first=first, last=last, marks=marks,
                          text=ast.get_source_segment(file.text, node)))
    if row.key.isdigit() and row.key not in UNMARKED and not any(one["marks"] for one in shown):
        raise Stale(f"no `# Eq. {row.key}:` in {', '.join(row.where)}, where {EQUATIONS.name} says "
                    f"it stands")
    return shown


def right_side(row: Row, shown: list[dict], ties: set[str]) -> str:
    out = ""
    for i, unit in enumerate(shown):
        file, marks = unit["file"], unit["marks"]
        name = f'<code>{escape(unit["name"])}</code>'
        at = link(file, marks[0][1] if marks else unit["first"])
        block = code(file, unit["first"], unit["last"], marks, ties, f"{name} {at}")
        if not i:
            out += block
        elif unit["text"] == shown[0]["text"]:
            out += f'<p class="at also">the same, word for word: {name} {at}</p>'
        else:
            out += f'<details><summary>also {name} in {file.name}</summary>{block}</details>'
    return out


def guarded(row: Row) -> str:
    """The first test whose name speaks of the row's equation, with its first line."""
    if not row.test:
        return ""
    file = Source("test_all.py")
    own, shared = row.test, row.test.removeprefix("test")       # test_eq_12_eq_13_… is of both
    tests = [node for node in file.tree.body if isinstance(node, ast.FunctionDef)
             and (node.name.startswith(own) or shared in node.name)]
    tests.sort(key=lambda node: not node.name.startswith(own))
    if not tests:
        raise Stale(f"test_all.py has no {row.test}*")
    test = tests[0]
    line = (ast.get_docstring(test) or file.lines[test.body[0].lineno - 1].strip()).splitlines()[0]
    claim = re.sub(r"^test_(eq_\d+_)*(to_\d+_)?", "", test.name).replace("_", " ")
    return (f'<p class="test"><span class="tag">test</span> '
            f'{link(file, test.lineno, escape(claim))}'
            f'<br><code class="first">{escape(line)}</code></p>')


# --- The page's text ------------------------------------------------------------------------------

def prose(text: str) -> str:
    """Markdown's backticks and links of equations.md."""
    text = re.sub(r"\[([^]]+)\]\(([^)]+)\)", r'<a href="../\2">\1</a>', escape(text))
    parts = re.split(r"`([^`]+)`", text)
    return "".join(f"<code>{part}</code>" if i % 2 else lowered(part)
                   for i, part in enumerate(parts))


def lowered(text: str) -> str:
    """z_t, f_target and z_{t−1} of prose with their indices lowered."""
    return re.sub(r"(?<!\w)(\w[\u0300-\u036f]?)_(?:\{([^}]*)\}|(\w+|∅))",
                  lambda m: f"{m[1]}<sub>{m[2] or m[3]}</sub>", text)


def path(text: str) -> str:
    """`x -4-> f` as x, an arrow that links to Eq. 4, f."""
    text = escape(text).replace("-&gt;", "->")
    def arrow(match):
        above = f"<sup>{match[1]}</sup>" if match[1].isdigit() else " "
        return f'<a href="#{anchor_of(match[1])}">{above}→</a>'
    return re.sub(r"-(\w+)->", arrow, lowered(text))


def equation(row: Row, known: dict[str, str]) -> str:
    formulas = [mathml(latex, known) for latex in row.formulas]
    shown = units(row)
    here = set().union(*map(symbols_of, formulas))
    names = {text for one in shown for line in one["file"].tokens[one["first"] - 1:one["last"]]
             for kind, text in line if kind in Name}
    here.discard("eps" if "noise" in names else "eps_theta")       # ddim_step's eps is ε_θ
    ties = {key for key in here if names & set(SYMBOLS[key][1])}
    for element in (one for formula in formulas for one in formula.iter()):
        keys = [key for key in element.attrib.pop("data-s", "").split() if key in ties]
        if keys:
            element.set("data-s", " ".join(keys))
    lines = "".join(f'<div><math display="block" alttext="{html.escape(latex)}">{inside(formula)}'
                    f'</math></div>' for latex, formula in zip(row.formulas, formulas))
    css = "" if row.key.isdigit() else " class=extra"
    return (f'<article id="{row.anchor}"{css}><div class="left">'
            f'<h3>{number(row.anchor, row.key if row.key.isdigit() else "·")}'
            f' {lowered(escape(row.name))}</h3><div class="formula" role="math" '
            f'aria-label="{html.escape(row.plain or row.name)}">{lines}</div>'
            f'<p>{prose(row.words[:1].upper() + row.words[1:])}.</p>'
            + (f'<p class="shapes">{lowered(escape(row.shapes))}</p>' if row.shapes else "")
            + guarded(row)
            + f'</div><div class="right">{right_side(row, shown, ties)}{figure(row.key)}</div>'
            f'</article>\n')


def number(anchor: str, shown: str) -> str:
    """What stands before a heading; a click copies the link."""
    return f'<a class="no" href="#{anchor}" title="copy the link">{shown}</a>'


def inside(math) -> str:
    return "".join(ElementTree.tostring(child, encoding="unicode", short_empty_elements=False)
                   for child in math)


def loop(item: Loop) -> str:
    """Pseudo-code, and our function, folded where no line of the pseudo-code speaks of it."""
    file, name, node = locate(item.where)
    first, last = file.span(node)
    ties, left, after = {}, "", first
    for i, (pseudo, key, piece) in enumerate(item.lines):
        hits = [n for n in range(first, last + 1) if piece in file.lines[n - 1]]
        hits = [n for n in hits if n >= after] or hits
        if not hits:
            raise Stale(f"{file.name}: no line of {name} has {piece!r}, which {EQUATIONS.name} "
                        f"speaks of")
        after = hits[0]
        ties.setdefault(after, []).append(f"line-{i}")
        ref = f'<a href="#eq-{key}">({key})</a>' if key else ""
        left += (f'<span class="l" data-s="line-{i}" tabindex="0">{escape(pseudo)}{ref}\n</span>')
    start = next(child.lineno for child in ast.walk(node)
                 if isinstance(child, ast.For) and child.lineno in ties)
    signature = range(first, node.body[0].lineno)
    keep = {*signature, *ties, *range(start, max(ties) + 1)}
    while file.lines[start - 2].strip().startswith("#"):
        start -= 1
        keep.add(start)
    out = ""
    for kept, group in itertools.groupby(range(first, last + 1), keep.__contains__):
        lines = [code_line(file, n, node.col_offset, set(), "eq" if n in ties else "",
                           " ".join(ties.get(n, []))) for n in group]
        out += ("".join(lines) if kept or len(lines) < 4 else
                f'<details class="fold"><summary>{len(lines)} lines</summary>{"".join(lines)}'
                f'</details>')
    return (f'<article id="{item.anchor}" class="extra loop"><div class="left">'
            f'<h3>{number(item.anchor, "↻")} {escape(item.title)}</h3>'
            f'<pre class="pseudo"><code>{left}</code></pre></div><div class="right">'
            f'<div class="code"><p class="at"><code>{escape(name)}</code> {link(file, start)}</p>'
            f'<pre><code>{out}</code></pre></div></div></article>\n')


def entry(item) -> str:
    """An item's line in the table of contents."""
    sign, name = (("↻", item.title) if isinstance(item, Loop) else
                  (item.key if item.key.isdigit() else "·", item.name))
    return (f'<li><a href="#{item.anchor}"><b>{sign}</b> <span>{lowered(escape(name))}</span></a>'
            f'</li>')


def text_part() -> tuple[str, str]:
    """The page before and after its pictures: a function of the sources alone."""
    known = formulas_of(PAGE)
    sections = read_equations()
    contents = body = ""
    for section in sections:
        entries = "".join(entry(item) for item in section.items)
        contents += (f'<section><h2><a href="#{section.anchor}">{escape(section.title)}</a></h2>'
                     f'<ol>{entries}</ol></section>')
        way = "".join(f"<span>{path(one)}</span>" for one in section.paths)
        body += (f'<section id="{section.anchor}"><header><h2>{escape(section.title)}</h2>'
                 f'{f"<p class=path>{way}</p>" if way else ""}<p>{prose(section.idea)}</p></header>'
                 + "\n" + "".join(equation(item, known) if isinstance(item, Row) else loop(item)
                                  for item in section.items) + "</section>\n")
    asked = re.findall(r"^- (.*\?) \((\w+)\)$", EQUATIONS.read_text(encoding="utf-8"), flags=re.M)
    questions = "".join(f'<li><a href="#{anchor_of(key)}">{prose(question)}</a></li>'
                        for question, key in asked)
    stages = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    frame, style, script = ((HERE / f"page.{end}").read_text(encoding="utf-8")
                            for end in ("html", "css", "js"))
    before = frame.format(style=style, stages=stages, contents=contents, body=body,
                          questions=questions)
    return before, f"<script>\n{script}</script>\n</body></html>\n"


def formulas_of(page: Path) -> dict[str, str]:
    """{LaTeX: MathML} of a page that is there: what has not changed needs no latex2mathml."""
    if not page.exists():
        return {}
    kept = re.findall(r'<math display="block" alttext="([^"]*)">(.*?)</math>',
                      page.read_text(encoding="utf-8"))
    return {html.unescape(latex): re.sub(r' data-s="[^"]*"', "", f"<math>{text}</math>")
            for latex, text in kept}


def split(page: str) -> tuple[str, str, str]:
    """Text before the pictures, pictures, text after them."""
    before, rest = page.split(MARKS[0])
    pictures, after = rest.split(MARKS[1])
    return before, pictures, after


# --- Figures: the frame is text, what moves in it is a strip of pictures --------------------------

PROMPTS = ("a large red circle on a gray background",
           "a small blue square above a large yellow star",
           "three green triangles on a pink background",
           "an outlined purple diamond left of an orange cross")
TIMES = [50 * i for i in range(21)]                    # t of the figures at Eq. 22 and 32
SCALES = list(range(1, 11))                            # s of the figure at Eq. 33
KL_BOX = 440, 150                                      # figure at Eq. 11, z from -5 to 5


def tile(strip: str, row: int, what: str, caption: str = "", k: str = "var(--k)") -> str:
    """A window onto row `row` of a strip of pictures; the figure's --k is the column."""
    under = f"<span>{lowered(caption)}</span>" if caption else ""
    return (f'<div class="tile"><div class="pic {strip}" role="img" '
            f'aria-label="{html.escape(what)}" style="--r:{row};--c:{k}"></div>{under}</div>')


def moving(name: str, label: str, count: int, start: int, rows, caption: str,
           play: bool = False) -> str:
    """A figure with a slider; page.js moves --k and says what the position means.

    rows: for each row of its strip what it is and what is written below; or the tiles as they are.
    """
    if not isinstance(rows, str):
        rows = "".join(tile(f"p-{name}", i, *row) for i, row in enumerate(rows))
    button = '<button type="button" class="play" aria-label="play">▶</button>' if play else ""
    return (f'<figure class="moving" id="fig-{name}" style="--k:{start}">'
            f'<div class="tiles">{rows}</div>'
            f'<p class="move"><label for="move-{name}">{label}</label>{button}'
            f'<input type="range" id="move-{name}" min="0" max="{count - 1}" value="{start}">'
            f'<output for="move-{name}"></output></p>'
            f'<figcaption>{lowered(caption)}</figcaption></figure>')


PLAIN = {                   # by equation: arguments of moving()
    "7": ("features", "picture", 8, 0,
          (("a held-out picture", "<b>x</b>"),
           ("its frozen features, three principal components as colours", "<b>f</b>"),
           ("its latent as colours", "<b>μ</b>"),
           ("the features out of the latent, as colours", "<b>f̂</b>"),
           ("the picture out of the latent", "<b>x̂</b>")),
          "A held-out picture x; its frozen features f (the first three principal components of "
          "each cell as colours); the latent μ; and what the two decoders make of it, f̂ (Eq. 7) "
          "and x̂ (Eq. 14)."),
    "22": ("noise", "t", len(TIMES), 6,
           (("z_t as colours", "<b>z_t</b> as colours"),
            ("z_t, decoded", "<b>z_t</b> decoded")),
           "How much of z_0 is left at t: ᾱ, z_t (three principal components of each cell), and "
           "what the pixel decoder makes of it, which has learned no noise but that of Eq. 6."),
    "32": ("guess", "t", len(TIMES), 14,
           (("z_t, decoded", "z_t decoded"),
            ("the network's guess of z_0 from this z_t, decoded", "ẑ_0 decoded"),
            ("the true picture", "x")),
           'One look of the network, no sampling: from z_t and the caption “<span '
           'data-say="guess"></span>” it predicts ε, and Eq. 22 solved for z_0 gives its guess of '
           'the picture. At small t everything is still there; near T the caption is all it has.'),
    "33": ("guidance", "s", len(SCALES), 2, [(prompt, prompt) for prompt in PROMPTS],
           "The same noise (seed 0, nothing picked by hand) with another guidance scale; 25 steps, "
           "η = 1."),
    "34": ("film", "step", 50, 20,
           [(f"{prompt}, eta {eta}", prompt * eta) for eta in (0, 1) for prompt in PROMPTS],
           "The predicted z_0 of every step, decoded; seed 0, s as in sample.py. Upper row η = 0: "
           "σ_t = 0, the noise of z_T decides everything. Lower row η = 1: fresh noise at each "
           "step.", True),
}


def figure(key: str) -> str:
    return moving(*PLAIN[key]) if key in PLAIN else {
        "11": kl_figure, "15": gradient_table,
        "edit-guidance": edit_figure}.get(key, str)()


def bell(mu: float, sigma: float) -> str:
    """N(mu, sigma^2) as an SVG path; page.js draws the same."""
    width, height = KL_BOX
    z = -5 + np.arange(201) / 20
    density = np.exp(-((z - mu) / sigma) ** 2 / 2) / sigma / math.sqrt(2 * math.pi)
    y = height - 10 - density.clip(max=1.1) * 120
    return "M" + "L".join(f"{i * width / 200:.1f},{one:.1f}" for i, one in enumerate(y))


def kl_figure() -> str:
    width, height = KL_BOX
    ticks = "".join(f'<text x="{(z + 5) * width / 10:g}" y="{height + 6}">{shown}</text>'
                    for z, shown in ((-4, "−4"), (-2, "−2"), (0, "0"), (2, "2"), (4, "4")))
    drawn = (f'<svg viewBox="0 0 {width} {height + 10}" role="img" aria-label="the bell curves of '
             f'N(0, 1) and of N(mu, sigma squared)"><path class="axis" d="M0,{height - 10}H{width}"/>'
             f'{ticks}<path class="prior" d="{bell(0, 1)}"/>'
             f'<path class="posterior" d="{bell(1, 0.5)}"/></svg>')
    sliders = "".join(
        f'<p class="move"><label for="kl-{name}">{symbol}</label><input type="range" '
        f'id="kl-{name}" min="{low}" max="3" step="0.05" value="{value}">'
        f'<output for="kl-{name}">{value:.2f}</output></p>'
        for name, symbol, low, value in (("mu", "μ", -3, 1.0), ("sigma", "σ", 0.05, 0.5)))
    return (f'<figure id="fig-kl">{drawn}{sliders}<p class="sum" aria-live="polite">'
            f'KL = −½ (1 + log σ² − μ² − σ²) = <output id="kl-value">0.818 nats</output></p>'
            f'<figcaption>One channel: p(z) = N(0, 1) in grey, q(z | x) = N(μ, σ²) in colour. It '
            f'is 0 at μ = 0, σ = 1 alone; a small σ costs as much as a far μ.</figcaption>'
            f'</figure>')


def gradient_table() -> str:
    """The comment above psvae_loss that says which term teaches which part."""
    lines, title = Source("psvae.py").lines, "who gets a gradient"
    top = next((i for i, line in enumerate(lines) if title in line), None)
    if top is None:
        raise Stale(f"psvae.py has no table of {title}")
    rows = itertools.takewhile(lambda line: line != "#", lines[top:])
    return ('<div class="code"><pre><code>' + "".join(f'<span class="l">{escape(row[6:])}\n</span>'
                                                      for row in rows) + "</code></pre></div>")


def edit_figure() -> str:
    pairs = "".join(f'<div class="pair">{tile("p-edit", row, "the source", k="0")}'
                    f'{tile("p-edit", row, "the edited picture", k="calc(var(--k) + 1)")}'
                    f'<span data-say="edit-{row}">{kind}</span></div>'
                    for row, kind in enumerate(world.KINDS))
    return moving("edit", "step", 50, 49, pairs,
                  "Source and result: the predicted z_0 of every step, decoded. The first edit of "
                  "each kind of the held-out split, seed 0, nothing picked by hand.", play=True)


# --- The pictures, from the model that ships ------------------------------------------------------

def strip_of(rows: list) -> str:
    """rows[r][k], uint8 (H, W, 3), as one lossless WebP in a data URI."""
    sheet = np.vstack([np.hstack(list(row)) for row in rows])
    out = io.BytesIO()
    Image.fromarray(sheet).save(out, "WEBP", lossless=True, quality=60, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


class Studio:
    """The model that ships, and eight held-out pictures of its world.

    Each method draws a figure: rows[r][k] of its strip, and a word for each k.
    """

    def __init__(self):
        self.pipe = sample.Pipeline(sample.SHIPPED, torch.device("cpu"))
        scenes = [world.scene(i, "val") for i in range(64)]
        self.caption = world.caption(scenes[0], world.generator("caption", 0, "page", 0))
        edits = {edit[3]: edit for edit in (world.edit(i, "val") for i in reversed(range(100)))}
        self.edits = [edits[kind] for kind in world.KINDS]          # the first of each kind
        self.pixels = self.drawn(scenes)
        self.x = self.tensor(self.pixels)
        self.mu, _ = self.pipe.psvae.encode(self.x)
        g = data.generator(0, "page", 0, "eps")
        self.eps = torch.randn(self.mu.shape, generator=g)
        self.z_0 = dit.normalise(self.mu, self.pipe.mean, self.pipe.variance)

    def drawn(self, scenes):
        return np.stack([np.asarray(world.draw(scene)) for scene in scenes])

    def tensor(self, pixels):
        return data.to_float(torch.from_numpy(pixels).permute(0, 3, 1, 2), "cpu")

    def features(self):
        f = data.load_image_encoder(data.TINY_IMAGE_ENCODER)(self.x)
        f_hat = self.pipe.psvae.semantic_decoder(self.mu)
        x_hat = data.to_uint8(self.pipe.psvae.decode(self.mu))
        colours, colours_hat = data.pca_colours(f, f_hat, size=64)
        of_mu, = data.pca_colours(self.mu, size=64)
        rows = [part[:8] for part in (self.pixels, colours, of_mu, colours_hat, x_hat)]
        return rows, [f"{i + 1} of 8" for i in range(8)]

    def noised(self, t: int, alpha_bar):
        return dit.add_noise(self.z_0[:1], torch.tensor([t]), self.eps[:1], alpha_bar)

    def noise(self):
        z_t = torch.cat([self.noised(t, self.pipe.alpha_bar) for t in TIMES])
        words = [f"{t}, ᾱ = {self.pipe.alpha_bar[t].item():.2g}" for t in TIMES]
        return [data.pca_colours(self.z_0, z_t, size=64)[1], self.pipe.decode(z_t)], words

    def guess(self):
        pipe, z_t, guesses = self.pipe, [], []
        c, mask = pipe.text_encoder([self.caption, ""])
        for t in (t * pipe.config["T"] // 1000 for t in TIMES):
            z_t.append(self.noised(t, pipe.alpha_bar))
            guesses.append(sample.ddim(pipe.dit, z_t[-1], c, mask, pipe.alpha_bar, [max(1, t), 0],
                                       1.0, predict=pipe.config["predict"]))
        decoded = [pipe.decode(torch.cat(one)) for one in (z_t, guesses)]
        return [*decoded, [self.pixels[0]] * len(TIMES)], [str(t) for t in TIMES]

    def steps(self, prompts, eta: float, sources=None):
        """rows[prompt][step]: the predicted z_0 of each step, decoded; the last is the picture."""
        film = []
        self.pipe(list(prompts), [0] * len(prompts), sources, eta=eta, film=film)
        words = [f"{i + 1} of {len(film)}, t = {t}" for i, (t, _) in enumerate(film)]
        return list(zip(*(self.pipe.decode(z_0) for _, z_0 in film))), words

    def film(self):
        rows, words = self.steps(PROMPTS, 0.0)
        return rows + self.steps(PROMPTS, 1.0)[0], words

    def scales(self):
        seeds = [0] * len(PROMPTS)
        drawn = [self.pipe(list(PROMPTS), seeds, steps=25, guidance=s, eta=1.0) for s in SCALES]
        return list(zip(*drawn)), [str(s) for s in SCALES]

    def edit(self):
        sources = self.drawn([before for before, *_ in self.edits])
        rows, words = self.steps([text for _, text, *_ in self.edits], 1.0, sources)
        return [[before, *row] for before, row in zip(sources, rows)], words


def pictures_part() -> str:
    """A style sheet of strips and a few words, drawn by the shipped model."""
    with torch.no_grad():
        studio = Studio()
        figures = {"features": studio.features(), "noise": studio.noise(),
                   "guess": studio.guess(), "film": studio.film(), "guidance": studio.scales(),
                   "edit": studio.edit()}
    facts = {name: words for name, (_, words) in figures.items()}
    facts |= {f"edit-{i}": text for i, (_, text, *_) in enumerate(studio.edits)}
    facts |= {"guess-said": studio.caption, "model": f"Pictures: {studio.pipe.step:,} steps of "
                                                       f"stage 3, {studio.pipe.size} px."}
    css = "".join(f".p-{name}{{--n:{len(rows[0])};--m:{len(rows)};"
                  f"background-image:url({strip_of(rows)})}}\n"
                  for name, (rows, _) in figures.items())
    return (f'<style>\n{css}</style>\n<script type="application/json" id="facts">'
            f'{json.dumps(facts, ensure_ascii=False)}</script>\n')


# --- The command ----------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", action="store_true", help="text alone; the pictures stay")
    args = parser.parse_args()
    start = time.time()
    try:
        before, after = text_part()
        pictures = split(PAGE.read_text(encoding="utf-8"))[1] if args.text else pictures_part()
    except Stale as error:
        sys.exit(f"error: {error}")
    PAGE.write_text(before + MARKS[0] + pictures + MARKS[1] + after, encoding="utf-8")
    print(f"wrote {PAGE}: {PAGE.stat().st_size / 1e6:.2f} MB in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
