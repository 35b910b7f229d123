"""The shape of the code: direction of imports, public names, docstrings, sizes, documented commands."""

import ast
from pathlib import Path

import pytest

import whit
from whit.cli.app import VERBS

ROOT = Path(whit.__file__).parent
DOCS = ROOT.parent.parent / "docs"
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")

# Imports go to rooms with a lower number, or stay inside the room.
LAYERS = {
    "errors": -1,
    "numerics": 0, "parallel": 0, "devices": 0, "allocator": 0, "shape": 0, "products": 0, "native": 0,
    "grids": 1, "ranks": 1, "memory": 1,
    "kernels": 2, "rounding": 2, "layouts": 2,
    "checkpoints": 3, "calibration": 3, "transforms": 3,
    "models": 4, "web": 4,
    "recipes": 5,
    "evaluation": 6,
    "pipeline": 7,
    "live": 8, "report": 8,
    "quanto": 9, "tune": 9, "runtime": 9,
    "release": 10,
    "cli": 11,
}  # fmt: skip


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("whit.")}


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_imports_go_down(path: Path) -> None:
    mine = room(path)
    for other in imported_rooms(path):
        assert other == mine or LAYERS[other] < LAYERS[mine], f"{by_name(path)} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_every_module_and_public_function_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{by_name(path)} has no docstring"
    public = [
        node
        for parent in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]
        for node in parent.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    missing = [node.name for node in public if not ast.get_docstring(node)]
    assert not missing, f"{by_name(path)}: no docstring on {missing}"


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_no_file_grows_past_five_hundred_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_the_library_reads_no_environment_and_no_pickles(path: Path) -> None:
    text = path.read_text()
    for forbidden in (
        *(("os.environ",) if by_name(path) != "cli/app.py" else ()),  # it tells OpenMP how to wait
        "getenv",
        "torch.load",
        "import pickle",
        "trust_remote_code=True",
        "set_default_dtype",
    ):
        assert forbidden not in text


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) != "cli"], ids=by_name)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


def test_the_public_names_are_these() -> None:
    assert set(whit.__all__) == {
        "GRIDS", "Calibrated", "Comparison", "Model", "QuantizedCache", "QuantizedTensor", "QuantizedTraining",
        "Recipe", "Rule", "Tuning", "WhitError",
        "calibrate", "compare", "fp4", "freeze", "generate", "grouped", "load", "mxfp4", "nearest", "nf4", "nvfp4",
        "open_model",
        "qfloat8", "qint2", "qint3", "qint4", "qint8", "quantize", "recipe_named", "save", "search", "train",
        "write_gguf",
    }  # fmt: skip
    assert all(getattr(whit, name) is not None for name in whit.__all__)


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_is_documented(verb: str) -> None:
    texts = [path.read_text() for path in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]]
    assert any(f"whit {verb}" in text for text in texts)


def test_the_tests_mirror_the_source() -> None:
    tests = Path(__file__).parent
    strays = [
        path
        for path in tests.rglob("test_*.py")
        if path.name != Path(__file__).name
        and not (ROOT / path.relative_to(tests).with_name(path.name.removeprefix("test_"))).exists()
    ]
    assert set(strays) == {tests / "test_bad_input.py", tests / "test_docs.py"}
