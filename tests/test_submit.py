"""A study as a Ray job: what is refused before anything is sent, the log, the exit code, a head with a token."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from statespan import cli
from statespan.errors import UserError
from statespan.orchestration import jobs
from statespan.orchestration.addresses import port_is_free

ROOT = Path(__file__).parent.parent
TOKEN = "a-token-of-thirty-two-characters"
STUDY = """\
study: tiny
model: mamba1-5m
benchmarks: {passkey: {}}
methods: [decimamba]
"""


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "", "http://"])
def test_an_address_that_is_no_url_is_refused(address):
    with pytest.raises(UserError, match=r"must look like http://127\.0\.0\.1:8265"):
        jobs.check_address(address)


@pytest.mark.parametrize("address", ["http://10.0.0.7:8265", "https://ray.example", "http://0.0.0.0:8265"])
def test_another_machine_is_refused_without_a_token_and_the_way_out_is_named(address, no_token, monkeypatch):
    with pytest.raises(UserError, match=r"takes anybody's; set RAY_AUTH_MODE=token .* or tunnel it"):
        jobs.check_address(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with pytest.raises(UserError, match="RAY_AUTH_MODE"):
        jobs.check_address(address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    jobs.check_address(address)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "http://localhost:8265", "http://[::1]:8265"])
def test_loopback_needs_no_token(address, no_token):
    jobs.check_address(address)


def test_the_command_on_the_cluster_is_quoted_but_for_the_heads_own_home():
    line = jobs.sweep_entrypoint(Path("my study.yaml"), ["search.trials=8", "model=a b;rm"])
    assert line == (
        "python -m statespan sweep 'my study.yaml' --set cluster.address=auto "
        "--set \"output=${HOME}/statespan-runs\" --set search.trials=8 --set 'model=a b;rm'"
    )


def test_what_is_too_large_is_refused_and_the_largest_files_are_named(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "data.bin").write_bytes(b"x" * 3_000)
    (tmp_path / "runs" / "old.bin").write_bytes(b"x" * 9_000)
    (tmp_path / "linked").symlink_to(tmp_path / "runs", target_is_directory=True)
    assert jobs.check_size(tmp_path, [*jobs.EXCLUDES, "linked"]) == 3_000
    with pytest.raises(UserError, match=r"linked/old\.bin \(0 MB\), data\.bin .*\.rayignore or with --exclude"):
        jobs.check_size(tmp_path, jobs.EXCLUDES, limit=10_000)


class FakeClient:
    """Breaks the log's connection in the middle, then ends with what it was given."""

    def __init__(self, status, code, message=""):
        self.info, self.calls = SimpleNamespace(status=status, driver_exit_code=code, message=message), 0

    async def tail_job_logs(self, submission_id):
        self.calls += 1
        yield "one\n"
        if self.calls == 1:
            raise RuntimeError("connection lost")
        yield "two\n"

    def get_job_info(self, submission_id):
        return self.info


@pytest.mark.parametrize(
    "status, code, expected", [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", None, 1), ("STOPPED", None, 1)]
)
def test_the_log_goes_on_after_a_broken_connection_and_the_exit_code_is_the_jobs(status, code, expected, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    shown = []
    assert jobs.follow(FakeClient(status, code, "gone"), "job", shown.append) == expected
    text = "".join(shown)
    assert text.count("two\n") == 1 and ("gone" in text) == (code is None)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.yaml"], "no study file 'nowhere.yaml'"),
        (["study.yaml", "--set", "serch.trials=1"], "did you mean 'search'"),
        (["study.yaml", "--env", "A"], "--env must look like NAME=VALUE"),
        (["study.yaml", "--working-dir", "elsewhere"], "is not inside"),
        (["study.yaml", "--address", "http://10.0.0.7:8265"], "set RAY_AUTH_MODE=token"),
    ],
)
def test_a_wrong_command_ends_with_2_and_sends_nothing(arguments, message, tmp_path, monkeypatch, capsys, no_token):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY)
    (tmp_path / "elsewhere").mkdir()
    assert cli.run(["submit", *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_nobody_at_the_address_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY)
    assert cli.run(["submit", "study.yaml", "--address", f"http://127.0.0.1:{free_ports(1)[0]}"]) == 2
    assert "no Ray dashboard answers at" in capsys.readouterr().err


def test_a_dry_run_shows_the_command_and_sends_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY)
    assert cli.run(["submit", "study.yaml", "--dry-run", "--results", "/results"]) == 0
    shown = capsys.readouterr().out
    assert "python -m statespan sweep study.yaml" in shown and '"output=/results"' in shown


def free_ports(n):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def dashboard_answers(url, token):
    request = urllib.request.Request(
        f"{url}/api/version", headers={"Authorization": f"Bearer {token}"} if token else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def start_head(home, attempt):
    """The head's process and its dashboard's address; None where it ended by itself."""
    gcs, dashboard, client, agent = free_ports(4)
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
        *(f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={home}"),
        *("--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats"),
    ]
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_TMPDIR": home, "HOME": home}
    # jobs run the `python` of the head's PATH; the cluster files put the environment's first, too
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env.pop("RAY_ADDRESS", None)
    with open(Path(home, f"head{attempt}.log"), "wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{dashboard}"
    while process.poll() is None:
        # the client server is the last that starts
        if dashboard_answers(url, TOKEN) == 200 and not port_is_free("127.0.0.1", client):
            return process, SimpleNamespace(url=url, env=env)
        time.sleep(0.5)
    return process, None


@pytest.fixture(scope="module")
def head():
    """A head node of its own, as an operator starts it: a child in the foreground, token on, ended by its pid."""
    home = tempfile.mkdtemp(prefix="ss")  # short: a socket's path has 107 characters
    try:
        for attempt in range(3):  # Ray gives up by itself when a busy machine needs over 30 s for one of its processes
            process, found = start_head(home, attempt)
            if found is not None:
                break
        assert found is not None, Path(home, "head0.log").read_text()[-2000:]
        yield found
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        if process.poll() is None:
            process.kill()
        shutil.rmtree(home, ignore_errors=True)


SCRIPT = """
import sys
from pathlib import Path
from statespan.orchestration.jobs import Job, submit
job = Job(entrypoint=sys.argv[2], working_dir=Path(), excludes=("*.safetensors", "tests"))
sys.exit(submit(sys.argv[1], job, sys.stdout.write, lambda name: None))
"""


LEAVE_OUT = ("--exclude", "*.safetensors", "--exclude", "tests")


@pytest.fixture
def checkout(tmp_path):
    """What git tracks, with a study beside it."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip("not a git checkout")
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=archive.stdout, check=True)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path


def run(head, folder, *arguments, token=TOKEN):
    env = {**head.env, "RAY_AUTH_TOKEN": token}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_head_with_a_token_runs_what_was_uploaded_and_its_exit_code_comes_back(head, checkout):
    assert dashboard_answers(head.url, None) == 401
    where = "python -c 'import os, statespan; print(os.path.dirname(statespan.__file__)); raise SystemExit(7)'"
    job = run(head, checkout, "-c", SCRIPT, head.url, where)
    assert job.returncode == 7, job.stdout + job.stderr
    assert "working_dir_files" in job.stdout  # the uploaded copy, not the installed one
    submit = ["-m", "statespan", "submit", "study.yaml", "--address", head.url]
    sweep = run(head, checkout, *submit, *LEAVE_OUT, "--set", "model=nowhere")
    assert sweep.returncode == 2, sweep.stdout + sweep.stderr
    assert "named 'nowhere'" in sweep.stdout and "submitted as" in sweep.stderr
    wrong = run(head, checkout, *submit, token="b" * 32)
    assert wrong.returncode == 2 and "refuses this token" in wrong.stderr, wrong.stderr
