"""The rules of the source tree. Each is a function from files to complaints, tried on bad ones too."""

import ast
import inspect
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import stochdyn as sd
from stochdyn.errors import StochdynError

ROOT = Path(__file__).parents[1]
MAX_FILE, MAX_FUNCTION, MAX_NESTING, MAX_POSITIONAL = 500, 60, 3, 6
ORDER = (
    {"errors", "shapes", "device"},
    {"likelihoods"},
    {"data"},
    {"fields"},
    {"solvers"},
    {"paths"},
    {"processes"},
    {"encoders", "decoders"},
    {"guides", "testing"},
    {"models"},
    {"inference"},
    {"diagnostics"},
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
INSIDE_FUNCTIONS = {"matplotlib", "pandas", "zuko", "scipy", "torchdiffeq", "torchsde"}
ONLY_IN = {
    "arviz": "stochdyn/diagnostics/arviz.py",
    "torchsde": "stochdyn/solvers/backends/torchsde.py",
    "torchdiffeq": "stochdyn/solvers/backends/torchdiffeq.py",
}
WITHOUT_TEST = {"__init__.py", "errors.py", "shapes.py"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib"}
WORDS = re.compile(r"\b(?:se" r"ssions?|ag" r"ents?)\b|/wo" r"rk/|/ro" r"ot/", re.IGNORECASE)
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match, ast.AsyncFor, ast.AsyncWith)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

Complaints = Iterator[str]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


def length(function: ast.FunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    doc = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
    return function.end_lineno - function.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)


def depth(node: ast.AST) -> int:
    """Blocks within blocks; `elif` is as deep as its `if`, a nested function starts again at 0."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            continue
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not chained))
    return deepest


def positional(function: ast.FunctionDef) -> int:
    names = [argument.arg for argument in function.args.posonlyargs + function.args.args]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def imports(tree: ast.AST, path: str) -> Iterator[tuple[str, ast.AST]]:
    """Full dotted names of what is imported; for `from a import b` both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            here = path.split("/")[: -node.level] if node.level else []
            base = ".".join([*here, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node) for alias in node.names)


def sizes(path: str, source: str, tree: ast.AST) -> Complaints:
    lines = len(source.splitlines())
    if lines > MAX_FILE:
        yield f"{path}: {lines} lines, at most {MAX_FILE}"
    for f in functions(tree):
        for what, got, most in (
            ("lines", length(f), MAX_FUNCTION),
            ("nested blocks", depth(f), MAX_NESTING),
            ("positional arguments", positional(f), MAX_POSITIONAL),
        ):
            if got > most:
                yield f"{path}:{f.lineno}: {f.name} has {got} {what}, at most {most}"


def direction(path: str, source: str, tree: ast.AST) -> Complaints:
    if not path.startswith("stochdyn/") or path == "stochdyn/__init__.py":
        return
    room = path.split("/")[1].removesuffix(".py")
    if room not in RANK:
        yield f"{path}: the room {room!r} has no place in the order of imports"
        return
    for name, node in imports(tree, path):
        parts = name.split(".")
        if parts[0] != "stochdyn":
            continue
        other = parts[1] if len(parts) > 1 else ""
        if other not in RANK:
            yield f"{path}:{node.lineno}: imports {name}; import it from the room it lives in"
        elif other != room and RANK[other] > RANK[room]:
            yield f"{path}:{node.lineno}: {room} imports {name}, which comes later"


def import_places(path: str, source: str, tree: ast.AST) -> Complaints:
    inside = {id(node) for f in functions(tree) for node in ast.walk(f)}
    for name, node in imports(tree, path):
        top = name.split(".")[0]
        if name == "__future__.annotations":
            yield f"{path}:{node.lineno}: `from __future__ import annotations` is not needed"
        if not path.startswith("stochdyn/"):
            continue
        if id(node) in inside and top not in INSIDE_FUNCTIONS:
            yield f"{path}:{node.lineno}: imports {top} inside a function"
        if ONLY_IN.get(top, path) != path:
            yield f"{path}:{node.lineno}: only {ONLY_IN[top]} may import {top}"


def banned(path: str, source: str, tree: ast.AST) -> Complaints:
    if not path.startswith("stochdyn/"):
        return
    for name, node in imports(tree, path):
        if name.split(".")[0] in PICKLES:
            yield f"{path}:{node.lineno}: imports {name}; files hold tensors and JSON only"
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield f"{path}:{node.lineno}: `assert` vanishes under python -O; raise from stochdyn.errors"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{path}:{node.lineno}: print"
        if isinstance(node, ast.keyword) and node.arg == "weights_only" and not is_true(node.value):
            yield f"{path}:{node.value.lineno}: weights_only must be True"
        if is_torch_load(node) and not any(k.arg == "weights_only" for k in node.keywords):
            yield f"{path}:{node.lineno}: torch.load without weights_only=True"


def is_torch_load(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"


def is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


SOURCE_CHECKS = (sizes, direction, import_places, banned)


def mirrors(paths: set[str]) -> Complaints:
    """Each stochdyn/x/y.py has its tests/x/test_y.py."""
    for path in sorted(paths):
        folder, _, name = path.rpartition("/")
        test = f"tests{folder.removeprefix('stochdyn')}/test_{name}"
        if path.startswith("stochdyn/") and name not in WITHOUT_TEST and test not in paths:
            yield f"{path}: has no {test}"


def public_names(module: ModuleType) -> Complaints:
    """Each public class, function and module says in an example how to use it; errors share the base's."""
    if not getattr(module, "__all__", ()):
        yield f"{module.__name__}: has no __all__"
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if inspect.isclass(value) and issubclass(value, StochdynError) and value is not StochdynError:
            continue
        if (isinstance(value, ModuleType) or callable(value)) and ">>>" not in (value.__doc__ or ""):
            yield f"{module.__name__}.{name}: its docstring has no >>> example"


def words(path: str, text: str) -> Complaints:
    for number, line in enumerate(text.splitlines(), 1):
        for found in WORDS.findall(line):
            yield f"{path}:{number}: says {found!r}"


@cache
def python_files() -> dict[str, tuple[str, ast.AST]]:
    files = (file for top in ("stochdyn", "tests") for file in (ROOT / top).rglob("*.py"))
    sources = {file.relative_to(ROOT).as_posix(): file.read_text() for file in sorted(files)}
    return {path: (source, ast.parse(source, path)) for path, source in sources.items()}


def tracked_files() -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = (ROOT / name for name in listed.stdout.split("\0") if name)
    return {f.relative_to(ROOT).as_posix(): f.read_text(errors="ignore") for f in files if f.is_file()}


def none(complaints: Complaints) -> None:
    found = list(complaints)
    if found:
        pytest.fail(f"{len(found)} violations:\n" + "\n".join(found), pytrace=False)


@pytest.mark.parametrize("check", SOURCE_CHECKS)
def test_source(check):
    none(c for path, (source, tree) in python_files().items() for c in check(path, source, tree))


def test_every_module_has_its_test():
    none(mirrors(set(python_files())))


def test_public_names_have_examples():
    none(public_names(sd))


def test_the_repository_speaks_of_the_project_alone():
    none(c for path, text in tracked_files().items() for c in words(path, text))


LONG = "def f():\n" + "    x = 1\n" * 61
DEEP = "def f():\n  for i in a:\n    if i:\n      while i:\n        with i:\n          pass\n"
ELIF = "def f():\n  for i in a:\n    if i:\n      pass\n    elif j:\n      while i:\n        pass\n"
METHOD = "class A:\n  def f(self, a, b, c, d, e, g, *, h, i):\n    pass\n"


@pytest.mark.parametrize(
    ("check", "path", "source", "complaint"),
    [
        (sizes, "tests/test_a.py", "x = 1\n" * 501, "501 lines, at most 500"),
        (sizes, "stochdyn/data/a.py", LONG, ":1: f has 62 lines"),
        (sizes, "stochdyn/data/a.py", 'def f():\n    """' + "a\n" * 61 + '"""\n', None),
        (sizes, "stochdyn/data/a.py", DEEP, "f has 4 nested blocks"),
        (sizes, "stochdyn/data/a.py", ELIF, None),
        (sizes, "stochdyn/data/a.py", "def f(a, b, c, d, e, g, h): ...", "7 positional arguments"),
        (sizes, "stochdyn/data/a.py", METHOD, None),
        (
            direction,
            "stochdyn/data/a.py",
            "from stochdyn.paths.sde import SDEPath",
            "data imports stochdyn.paths",
        ),
        (direction, "stochdyn/solvers.py", "import stochdyn.guides", "solvers imports stochdyn.guides"),
        (direction, "stochdyn/data/a.py", "from ..paths import sde", "data imports stochdyn.paths.sde"),
        (direction, "stochdyn/data/a.py", "from . import b", None),
        (direction, "stochdyn/paths/a.py", "from stochdyn.errors import E\nfrom stochdyn import paths", None),
        (direction, "stochdyn/paths/a.py", "def f():\n  from stochdyn import fit", "imports stochdyn.fit"),
        (direction, "stochdyn/paths/a.py", "import stochdyn as sd", "imports stochdyn; import it from"),
        (direction, "stochdyn/utils.py", "", "'utils' has no place"),
        (import_places, "tests/a.py", "from __future__ import annotations", "is not needed"),
        (import_places, "stochdyn/data/a.py", "def f():\n  import json", "imports json inside"),
        (import_places, "stochdyn/data/a.py", "def f():\n  import matplotlib.pyplot as plt", None),
        (import_places, "stochdyn/data/a.py", "import arviz as az", "only stochdyn/diagnostics/arviz.py"),
        (
            import_places,
            "stochdyn/solvers/milstein.py",
            "from torchsde import sdeint",
            "backends/torchsde.py",
        ),
        (import_places, "stochdyn/solvers/backends/torchsde.py", "import torchsde", None),
        (banned, "stochdyn/data/a.py", "import pickle", "imports pickle"),
        (banned, "stochdyn/data/a.py", "load(x, weights_only=False)", "weights_only must be True"),
        (banned, "stochdyn/data/a.py", "torch.load(x)", "without weights_only"),
        (banned, "stochdyn/data/a.py", "torch.load(x, weights_only=True)", None),
        (banned, "stochdyn/data/a.py", "assert x", "`assert` vanishes"),
        (banned, "stochdyn/data/a.py", "print(x)", "print"),
        (banned, "tests/a.py", "assert x", None),
    ],
)
def test_the_checks_see(check, path, source, complaint):
    found = "\n".join(check(path, source, ast.parse(source)))
    assert complaint in found if complaint else not found


def test_the_other_checks_see():
    assert list(mirrors({"stochdyn/a/b.py"})) == ["stochdyn/a/b.py: has no tests/a/test_b.py"]
    assert list(mirrors({"stochdyn/b.py"})) == ["stochdyn/b.py: has no tests/test_b.py"]
    assert not list(mirrors({"stochdyn/a/b.py", "tests/a/test_b.py", "stochdyn/a/__init__.py"}))
    module = ModuleType("bad")
    assert list(public_names(module)) == ["bad: has no __all__"]
    module.__all__, module.f = ["f"], lambda: None
    assert list(public_names(module)) == ["bad.f: its docstring has no >>> example"]
    bad = "an AG" + "ENT\nthe ses" + "sion\nreagent\nsee /wo" + "rk/notes\n"
    assert [c.split(": ")[0] for c in words("a.md", bad)] == ["a.md:1", "a.md:2", "a.md:4"]
