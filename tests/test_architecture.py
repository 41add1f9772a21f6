"""The house holds: imports point one way, heavy ones stay where they belong, nothing names a machine or a host."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# lowest first: a layer imports from itself and from those before it
LAYERS = ("kernels", "models", "methods", "benchmarks", "training", "search_spaces", "analysis", "orchestration")
LAYERS += ("commands",)
REAL = {"kernels": "kernels", "methods": "methods", "search_spaces": "search_spaces", "orchestration": "orchestration"}
FOUNDATION = {"errors", "stats"}  # may be imported by everybody, import no layer
ENGINES = {"ray", "mlflow", "optuna"}


def modules(layer):
    return sorted((ROOT / REAL.get(layer, f"statespan/{layer}")).rglob("*.py"))


def imported(path):
    """Dotted names of everything a module imports, also inside functions; not what is only for type checkers."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tracked(*patterns):
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_downwards(layer):
    above = {f"statespan.{name}" for name in LAYERS[LAYERS.index(layer) + 1 :]} | {"statespan.cli"}
    bad = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(layer)
        for name in imported(path)
        if any(name == up or name.startswith(up + ".") for up in above)
    ]
    assert not bad


@pytest.mark.parametrize("name", sorted(FOUNDATION))
def test_the_foundation_stands_on_nothing(name):
    path = ROOT / "statespan" / f"{name}.py"
    if path.exists():
        layers = tuple(f"statespan.{layer}" for layer in LAYERS)
        assert not [one for one in imported(path) if one.startswith(layers)]


@pytest.mark.parametrize("layer", LAYERS[:-2])
def test_only_orchestration_and_commands_know_ray_mlflow_or_optuna(layer):
    bad = [(path.name, name) for path in modules(layer) for name in imported(path) if name.split(".")[0] in ENGINES]
    assert not bad


def test_the_linked_folders_are_imported_by_their_full_name_and_hide_no_package():
    for name, folder in REAL.items():
        assert (ROOT / "statespan" / name).readlink() == Path("..") / folder
        # kernels/__init__.py would be imported by transformers in place of the package of that name
        assert not (ROOT / folder / "__init__.py").exists()
    bare = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in tracked("*.py")
        if path.exists()
        for name in imported(path)
        if name.split(".")[0] in REAL
    ]
    assert not bare


def test_help_needs_no_heavy_import():
    code = (
        "import sys, statespan.cli\n"
        "statespan.cli.build_app()\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'optuna', 'fastapi') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_what_runs_on_a_bare_gpu_host_imports_no_engine():
    code = (
        "import sys\n"
        "import statespan.models.runner, statespan.methods.table, statespan.benchmarks.table\n"
        "print([m for m in ('ray', 'mlflow', 'optuna', 'datasets', 'fastapi', 'triton') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


# a path of somebody's machine; the examples' own are ~/…, $HOME/… and {placeholders}
MACHINE_PATH = re.compile(r"(?<![\w.$~}/-])/(?:root|work|home/\w+|tmp/\w|opt/\w+|Users/\w+|mnt/\w+|data/\w+)\b")
REGISTRY = re.compile(r"pypi\.org|pythonhosted|download\.pytorch\.org|registry\.npmjs|huggingface\.co/simple", re.I)
TEXT = ("*.py", "*.md", "*.toml", "*.yaml", "*.yml", "*.lock", "*.txt", "Makefile", ".ci/run", ".gitignore", "*.json")
OTHERS_TEXT = ("tests/parity/", "statespan/benchmarks/data/", "statespan/checkpoints/")


def test_no_file_names_a_path_of_one_machine_or_a_registrys_host():
    bad = []
    for path in tracked(*TEXT):
        name = path.relative_to(ROOT).as_posix()
        if not path.is_file() or name.startswith(OTHERS_TEXT) or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if MACHINE_PATH.search(line) or REGISTRY.search(line):
                bad.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "text, found", [("open('/root/a')", True), ("in /home/ann/x", True), ("~/x, $HOME/tmp/a", False)]
)
def test_the_scan_knows_a_machines_path(text, found):
    assert bool(MACHINE_PATH.search(text)) is found


def test_modules_open_with_what_they_are():
    files = [path for layer in LAYERS for path in modules(layer) if path.stat().st_size]
    assert not [path.name for path in files if ast.get_docstring(ast.parse(path.read_text())) is None]


def test_checkpoints_are_never_unpickled():
    for layer in LAYERS:
        for path in modules(layer):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert safe.get("weights_only") == "True", f"{path.name}:{node.lineno}"
