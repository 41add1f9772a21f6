"""A study on a cluster, through Ray Jobs: upload the working directory, follow the log, return the job's exit code.

Who reaches a cluster's dashboard can run code there. So an address other than loopback is refused unless a token is
set: with a tunnel (`ssh -L 8265:127.0.0.1:8265 HEAD`) the address is loopback, and the head needs no open port at all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from statespan.errors import UserError
from statespan.orchestration.addresses import is_loopback, token_source
from statespan.orchestration.ray_session import QUIET

EXCLUDES = (
    ".git/",
    ".venv/",
    "venv/",
    "runs/",
    "__pycache__/",
    "*.egg-info/",
    "build/",
    "dist/",
    ".mypy_cache/",
    ".ruff_cache/",
    ".pytest_cache/",
    ".hypothesis/",
    "mlflow.db*",
    "mlartifacts/",
    "*.nbi",
    "*.nbc",
)
"""Never uploaded, beside what .gitignore and .rayignore say. Patterns as in .gitignore."""

MAX_UPLOAD_BYTES = 256 * 1024 * 1024
RESULTS = "${HOME}/statespan-runs"
"""Where a submitted study writes, on the head node: its working directory is a copy that Ray may remove."""

FINAL = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What runs on the cluster."""

    entrypoint: str
    working_dir: Path
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables. Anyone who may see the dashboard sees them."""

    excludes: tuple[str, ...] = ()
    submission_id: str | None = None
    cpus: float = 0.0
    """Reserved for the driver. Above 0 it may be placed on a worker node."""


def check_address(address: str) -> None:
    """Raises UserError for an address that is none, or that says the cluster stands open."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--address must look like http://127.0.0.1:8265; got {address!r}")
    if not is_loopback(parts.hostname) and not (os.environ.get("RAY_AUTH_MODE") == "token" and token_source()):
        raise UserError(
            f"{address} is another machine and no token is set: a cluster that takes jobs without one takes anybody's; "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH here and on every node, or tunnel it "
            "(ssh -L 8265:127.0.0.1:8265 HEAD) and give http://127.0.0.1:8265"
        )


def sweep_entrypoint(study: Path, overrides: Sequence[str], results: str = RESULTS) -> str:
    """The command line of a sweep on the cluster; `results` may hold variables of its shell."""
    words = ["python", "-m", "statespan", "sweep", str(study), "--set", "cluster.address=auto"]
    line = " ".join(shlex.quote(word) for word in words)
    line += f' --set "output={results}"'
    return line + "".join(f" --set {shlex.quote(override)}" for override in overrides)


def uploaded(folder: Path, excludes: Sequence[str]) -> Iterator[tuple[Path, int]]:
    """Files that would be uploaded, links followed, with their bytes; .gitignore's own patterns are left to Ray."""

    def skipped(name: str) -> bool:
        return any(fnmatch(name, pattern.rstrip("/")) for pattern in excludes)

    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not skipped(name)]
        for name in files:
            path = Path(parent, name)
            if not skipped(name) and path.is_file():
                yield path, path.stat().st_size


def check_size(folder: Path, excludes: Sequence[str], limit: int = MAX_UPLOAD_BYTES) -> int:
    """Bytes to upload; a UserError names the largest files where they are too many."""
    files = sorted(uploaded(folder, excludes), key=lambda file: -file[1])
    total = sum(size for _, size in files)
    if total > limit:
        largest = ", ".join(f"{path.relative_to(folder)} ({size / 1e6:.0f} MB)" for path, size in files[:3])
        raise UserError(
            f"{folder} holds {total / 1e6:.0f} MB to upload, the limit is {limit / 1e6:.0f} MB; largest: {largest}; "
            "list what the cluster can do without in .rayignore or with --exclude (models: from a hub or a shared disk)"
        )
    return total


def submit(address: str, job: Job, on_log: Callable[[str], None], on_start: Callable[[str], None]) -> int:
    """Run a job and wait for its end.

    Args:
        address: of the dashboard, such as http://127.0.0.1:8265.
        on_log: gets the job's output as it comes.
        on_start: gets the submission id.

    Returns:
        The job's own exit code; 1 where it has none (stopped, or its node died).

    Raises:
        UserError: a bad or open address, nothing there, a wrong token, too much to upload.
    """
    check_address(address)
    excludes = [*EXCLUDES, *job.excludes]
    check_size(job.working_dir, excludes)
    client, submission_id = connect(address), job.submission_id or f"statespan-{secrets.token_hex(4)}"
    environment = {
        "working_dir": str(job.working_dir),
        "excludes": excludes,
        "env_vars": {**QUIET, **dict(job.env)},
    }
    try:
        client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=submission_id,
            runtime_env=environment,
            entrypoint_num_cpus=job.cpus or None,
        )
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the cluster at {address} did not take job {submission_id} ({_one_line(error)}); "
            "`ray job list` shows whether it runs all the same"
        ) from error
    on_start(submission_id)
    return follow(client, submission_id, on_log)


def connect(address: str) -> Any:
    """A Ray Jobs client, or a UserError in one line."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except (AuthenticationError, OSError, RuntimeError, ValueError) as error:
        reason = _one_line(error)
        if isinstance(error, AuthenticationError) or any(sign in reason for sign in ("401", "403", "nauthori")):
            raise UserError(
                f"the cluster at {address} refuses this token; set RAY_AUTH_MODE=token and the cluster's own "
                "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH)"
            ) from None
        raise UserError(
            f"no Ray dashboard answers at {address} ({reason}); is the head up, and the tunnel open?"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def follow(client: Any, submission_id: str, on_log: Callable[[str], None]) -> int:
    """Pass the log on until the job ends; its exit code. A connection that breaks is made again."""
    shown, failures = 0, 0
    while True:
        try:
            shown = asyncio.run(_tail(client, submission_id, shown, on_log))
            info = client.get_job_info(submission_id)
            failures = 0
        except (RuntimeError, OSError) as error:
            failures += 1
            if failures > 20:
                raise UserError(
                    f"the dashboard does not answer any more ({error}); job {submission_id} may still run: "
                    f"ray job status {submission_id}"
                ) from error
            time.sleep(min(failures, 10))
            continue
        if str(info.status) in FINAL:
            break
        time.sleep(0.5)
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if str(info.status) != "SUCCEEDED":
        on_log(f"{info.status}: {info.message}\n")
    return 0 if str(info.status) == "SUCCEEDED" else 1


async def _tail(client: Any, submission_id: str, shown: int, on_log: Callable[[str], None]) -> int:
    """The log from character `shown` on; how many characters there were. It always starts from the beginning."""
    seen = 0
    async for text in client.tail_job_logs(submission_id):
        new = text[max(shown - seen, 0) :]
        seen += len(text)
        if new:
            on_log(new)
    return max(seen, shown)
