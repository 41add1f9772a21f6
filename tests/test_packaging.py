"""What a user installs: a wheel with real files, pinned locks, one Makefile."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOCKS = ["requirements.lock", "requirements-dev.lock"]
# these tests may themselves run under `make test VENV=...`, whose settings a make started here would inherit
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES", "VENV")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from what git tracks, without isolation: setuptools is in the lock."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip("not a git checkout")
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive.stdout, check=True)
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def tracked(under, *endings):
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "HEAD", under], cwd=ROOT, capture_output=True, text=True
    )
    return {name for name in listed.stdout.splitlines() if name.endswith(endings)}


def test_the_wheel_holds_real_files_where_the_checkout_has_links(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        links = [info.filename for info in archive.infolist() if (info.external_attr >> 16) & 0o170000 == 0o120000]
    assert not links
    for folder in ("kernels", "methods", "orchestration", "search_spaces"):
        for name in tracked(f"{folder}/", ".py", ".yaml"):
            assert f"statespan/{name}" in names, name
    top = {name.split("/")[0] for name in names}
    assert top == {"statespan", next(name for name in top if name.endswith(".dist-info"))}


def test_the_wheel_holds_checkpoints_texts_and_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in ("statespan/checkpoints/", "statespan/benchmarks/data/"):
        missing = tracked(folder, "") - names
        assert not missing, sorted(missing)[:5]
    assert "statespan/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_everything_to_a_version_and_nothing_to_a_machine(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.lstrip().startswith("#")]
    for line in lines:
        assert re.match(r"^[a-z0-9][a-z0-9._-]*(\[[a-z,]+\])?==[0-9][^ +]*( ;[^#]+)?( +#.*)?$", line), line
    names = {line.split("==")[0] for line in lines}
    assert not [one for one in names if one.startswith(("nvidia", "cuda"))]
    assert "torch==2.13.0" in {line.split(" ")[0] for line in lines}


def test_the_locks_hold_what_pyproject_asks_for_and_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runtime, dev = (dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", (ROOT / name).read_text(), re.M)) for name in LOCKS)
    assert runtime.items() <= dev.items()

    def name(requirement):
        return re.split(r"[\[<>=!;~ ]", requirement)[0].lower().replace("_", "-")

    assert {name(one) for one in project["dependencies"]} <= runtime.keys()
    assert {name(one) for one in project["optional-dependencies"]["dev"]} <= dev.keys()


def test_make_installs_once_for_each_content_of_the_locks(tmp_path):
    """The stamp's name holds the checksum: a second make has nothing to do, a changed lock has."""
    for name in ("Makefile", "requirements.lock", "requirements-dev.lock", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())

    def plan(*targets):
        return subprocess.run(
            ["make", "-n", *targets], cwd=tmp_path, capture_output=True, text=True, check=True, env=ENVIRONMENT
        ).stdout

    wanted = re.search(r"touch (\S+)", plan("install"))[1]
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "uv").touch()
    (tmp_path / wanted).touch()
    assert "pip install" not in plan("install") and "pip install" not in plan("quickstart")
    assert "requirements-dev.lock" in plan("test")
    (tmp_path / "requirements.lock").write_text("changed==1\n")
    assert "pip install" in plan("install")


def test_make_takes_torch_first_and_refuses_an_old_python(tmp_path):
    for name in ("Makefile", "requirements.lock", "requirements-dev.lock", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    plan = subprocess.run(
        ["make", "-n", "quickstart"], cwd=tmp_path, capture_output=True, text=True, check=True, env=ENVIRONMENT
    ).stdout
    steps = [
        plan.index(part) for part in ("torch==2.13.0", "uv==", "requirements.lock", "--editable", "statespan sweep")
    ]
    assert steps == sorted(steps)
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    made = subprocess.run(
        ["make", "install", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert made.returncode != 0 and "needs Python 3.11 or later" in made.stderr
    assert not (tmp_path / ".venv").exists()
