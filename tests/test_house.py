"""The house rules that a machine can check."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGES = ["tokenizer", "pretrain", "sft", "rlhf"]  # data flows right, imports point left
FILES = sorted(
    path
    for folder in ["", *PACKAGES, "data", "scripts", "tests"]
    for path in (ROOT / folder).glob("*.py")
)
STAGE_FILES = [path for path in FILES if path.parent.name in PACKAGES]
DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc"}
SHADOWS = {"datasets", "evaluate", "profile", "tokenize", "types", "tokenizers", "logging"}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def named(path):
    return str(path.relative_to(ROOT))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize("path", STAGE_FILES, ids=named)
def test_imports_point_left(path):
    own = PACKAGES.index(path.parent.name)
    for module in imported(parse(path)):
        package = module.split(".")[0]
        if package in PACKAGES:
            assert PACKAGES.index(package) <= own, f"{named(path)} imports {module}, to its right"
        assert package not in ("scripts", "tests", "data"), f"{named(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_files_and_functions_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name
            if node.name == "main" and path.parent.name in PACKAGES:
                assert node.end_lineno - node.lineno < 60, "a main reads like a table of contents"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_forbidden_calls_and_names(path):
    assert path.stem not in DRAWERS | SHADOWS
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("exec", "eval", "pickle.load", "pickle.loads", "os.system"), name
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                assert not (keyword.arg in ("trust_remote_code", "shell") and value), name
        if isinstance(node, ast.Attribute) and path.parent.name != "tests":
            assert ast.unparse(node) != "sys.path"


@pytest.mark.parametrize("path", STAGE_FILES, ids=named)
def test_importing_does_nothing(path):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    allowed += (ast.AugAssign,)
    for node in parse(path).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        registers = path.name == "attention.py" and "Interface.register(" in ast.unparse(node)
        fine = is_docstring or is_main or registers or isinstance(node, allowed)
        assert fine, ast.unparse(node)[:80]


@pytest.mark.parametrize("path", STAGE_FILES, ids=named)
def test_public_things_are_documented(path):
    tree = parse(path)
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            is_reader = path.name == "data.py" or path.name == "corpus.py"
            assert ast.get_docstring(node) or is_reader, f"{named(path)}: {node.name}"


def test_training_stages_have_one_silhouette():
    for path in sorted(ROOT.glob("*/train*.py")):
        if path.parent.name not in PACKAGES:
            continue
        text, tree = path.read_text(encoding="utf-8"), parse(path)
        assert [n.name for n in tree.body if isinstance(n, ast.FunctionDef)][0] == "main"
        docstring = ast.get_docstring(tree)
        module = f"{path.parent.name}.{path.stem}"
        assert "Reads " in docstring and "Writes " in docstring and f"-m {module} " in docstring
        if path.parent.name != "tokenizer":
            assert "accelerate launch" in docstring and "deepspeed --num_gpus" in docstring
        assert "stages.parse_args" in text and "start_run" in text and "run.finish" in text
        arguments = next(n for n in tree.body if isinstance(n, ast.ClassDef))
        assert sum(isinstance(n, ast.AnnAssign) for n in arguments.body) <= 10


COMMANDS = [path for path in FILES if path.parent.name in (*PACKAGES, "scripts")]


@pytest.mark.parametrize("path", COMMANDS, ids=named)
def test_every_command_speaks_to_its_user(path):
    text = path.read_text(encoding="utf-8")
    if '__name__ == "__main__"' in text and not path.stem.startswith("benchmark"):
        assert "    with stages.plain_errors():" in text.split('__name__ == "__main__"')[1]


def test_stages_imports_light():
    code = "import stages, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


def test_lines_that_must_not_be_committed():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    assert not [f for f in files.splitlines() if f.startswith(("output/", "data/generated/"))]
