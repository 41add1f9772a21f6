"""What `statespan doctor` looks at: each check says what it found and, where that is bad, what to do.

`warn` works but costs time or surprises; `fail` will not work, or lets strangers run code.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from statespan.orchestration.addresses import is_loopback, port_is_free, token_source

GIB = 1024**3
SOCKET_PATH_LIMIT = 107
RAY_SOCKET_SUFFIX = len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


Check = Callable[[], Iterator[Finding]]


def _ok(name: str, found: str) -> Finding:
    return Finding(name=name, state="ok", found=found)


def _warn(name: str, found: str, fix: str) -> Finding:
    return Finding(name=name, state="warn", found=found, fix=fix)


def _fail(name: str, found: str, fix: str) -> Finding:
    return Finding(name=name, state="fail", found=found, fix=fix)


def python() -> Iterator[Finding]:
    yield _ok("python", f"{platform.python_version()} at {sys.executable}")


def machine() -> Iterator[Finding]:
    import torch

    from statespan.orchestration.ray_session import cpu_cores

    yield _ok("cpu", f"{cpu_cores()} cores, torch uses {torch.get_num_threads()} threads in this process")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield _ok("torch", f"{torch.__version__}; {names}")
    elif torch.version.cuda is not None:
        what = f"{torch.__version__} is a CUDA build and finds no GPU"
        yield _warn(
            "torch", what, "install NVIDIA's driver, or a CPU build of torch, which is smaller (make TORCH_ARGS=…)"
        )
    else:
        yield _ok("torch", f"{torch.__version__}, CPU only")


def packages() -> Iterator[Finding]:
    """Versions of what else is needed, and what must not be there."""
    import torch

    for name in ("ray", "optuna", "mlflow", "pyarrow", "datasets"):
        try:
            yield _ok(name, version(name))
        except PackageNotFoundError:
            yield _fail(name, "not installed", "make install, or pip install -r requirements.lock")
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            yield _fail("triton", "not installed on a GPU host", "pip install triton: the GPU kernels need it")
        else:
            yield _ok("triton", version("triton"))
    elif importlib.util.find_spec("mamba_ssm") is not None:
        fix = "pip uninstall mamba-ssm causal-conv1d here: transformers' Mamba picks them up and breaks without a GPU"
        yield _warn("mamba_ssm", "installed on a host without a GPU", fix)


def kernels() -> Iterator[Finding]:
    """One small scan by the kernel that will be used, against the definition."""
    import torch

    from statespan.kernels.selective_scan import selective_scan, selective_scan_ref

    make = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, dt = torch.randn(2, 1, 33, 24, generator=make).to(device)
    B, C = torch.randn(2, 1, 33, 8, generator=make).to(device)
    A = -torch.rand(24, 8, generator=make).to(device)
    try:
        difference = float((selective_scan(x, dt, A, B, C)[0] - selective_scan_ref(x, dt, A, B, C)[0]).abs().max())
    except (RuntimeError, OSError, ImportError) as error:
        yield _fail(
            "kernels", f"{type(error).__name__}: {error}", "reinstall (make clean install); report it if it stays"
        )
        return
    if difference < 1e-3:
        yield _ok("kernels", f"selective scan on {device} agrees with its definition ({difference:.0e})")
    else:
        yield _fail(
            "kernels", f"selective scan on {device} is off by {difference:.1e}", "report it: results would be wrong"
        )


def cache() -> Iterator[Finding]:
    """Compiled kernels and artifacts are kept there."""
    folder = Path(os.environ.get("STATESPAN_CACHE") or Path.home() / ".cache" / "statespan")
    yield _writable(
        "cache", folder, "set STATESPAN_CACHE to a folder you may write; without one kernels compile every time"
    )


def disk(output: Path) -> Iterator[Finding]:
    writable = _writable("results", output, "give another folder as `output` of the study")
    free = shutil.disk_usage(_existing(output)).free / GIB
    if writable.state == "ok" and free < 2:
        yield _warn(
            "results", f"{free:.1f} GiB free in {output}", "make room: a study with its model needs about 1 GiB"
        )
    else:
        yield writable


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _writable(name: str, folder: Path, fix: str) -> Finding:
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return _ok(name, f"{folder} can be written, {shutil.disk_usage(place).free / GIB:.0f} GiB free")
    except OSError as error:
        return _fail(name, f"{folder} cannot be written ({error.strerror})", fix)


def ray() -> Iterator[Finding]:
    """Who may use the cluster this process would join."""
    address, mode = os.environ.get("RAY_ADDRESS", ""), os.environ.get("RAY_AUTH_MODE", "")
    token = token_source() is not None
    host = urlsplit(address if "//" in address else f"//{address}").hostname or ""
    if address and address not in ("local", "auto") and not is_loopback(host) and (mode != "token" or not token):
        fix = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH on all nodes and here: else anybody can run code there"
        yield _fail("ray security", f"RAY_ADDRESS={address} and no token", fix)
    elif mode == "token" and not token:
        fix = "set RAY_AUTH_TOKEN_PATH, or make one with `ray get-auth-token --generate`"
        yield _fail("ray security", "RAY_AUTH_MODE=token and no token", fix)
    else:
        yield _ok("ray security", f"RAY_AUTH_MODE={mode or 'not set'}, {'with' if token else 'without'} a token")
    temporary = os.environ.get("RAY_TMPDIR") or "/tmp"
    if len(temporary) + RAY_SOCKET_SUFFIX > SOCKET_PATH_LIMIT:
        yield _fail(
            "ray sockets", f"RAY_TMPDIR={temporary} is too long for a socket's path", "set a shorter RAY_TMPDIR"
        )


def mlflow() -> Iterator[Finding]:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    scheme = urlsplit(uri).scheme
    if not uri:
        yield _ok("mlflow", "MLFLOW_TRACKING_URI not set: SQLite beside the studies")
    elif scheme in ("http", "https"):
        yield _mlflow_server(uri)
    elif scheme in ("", "file"):
        fix = "use sqlite:///mlflow.db: MLflow refuses to write to a folder"
        yield _fail("mlflow", f"MLFLOW_TRACKING_URI={uri} is a folder", fix)
    else:
        yield _ok("mlflow", f"MLFLOW_TRACKING_URI uses {scheme}")


def _mlflow_server(uri: str) -> Finding:
    parts = urlsplit(uri)
    named = f"{parts.scheme}://{parts.hostname}:{parts.port or ''}".rstrip(":")
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=3):
            pass
    except (OSError, ValueError) as error:
        fix = "start it, or go on: a sweep does not wait for MLflow, `statespan repair` fills it later"
        return _warn("mlflow", f"{named} does not answer ({error})", fix)
    open_to_all = not is_loopback(parts.hostname or "") and not os.environ.get("MLFLOW_TRACKING_USERNAME")
    if open_to_all and not os.environ.get("MLFLOW_TRACKING_TOKEN"):
        fix = "run it with --app-name basic-auth and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return _warn("mlflow", f"{named} takes requests without credentials", fix)
    return _ok("mlflow", f"{named} answers")


def ports() -> Iterator[Finding]:
    for port, what in ((8000, "serve"), (8265, "Ray's dashboard")):
        if port_is_free("127.0.0.1", port):
            yield _ok(f"port {port}", f"free, for {what}")
        else:
            yield _warn(
                f"port {port}", "taken", "serve on another one with --port" if port == 8000 else "a Ray may run here"
            )


def key() -> Iterator[Finding]:
    secret = os.environ.get("STATESPAN_API_KEY")
    if secret is not None and len(secret) < 16:
        yield _fail("api key", f"STATESPAN_API_KEY has {len(secret)} characters", "take 32: openssl rand -hex 16")
    elif secret is not None:
        yield _ok("api key", "STATESPAN_API_KEY is set")


def models() -> Iterator[Finding]:
    from statespan.models.checkpoint import shipped

    names = shipped()
    if names:
        yield _ok("models", ", ".join(names))
    else:
        yield _fail("models", "no shipped checkpoint", "the checkout is incomplete: clone it again")
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True", "TRUE"):
        yield _ok("hub", "HF_HUB_OFFLINE is set: only folders and what the cache holds")


def hostname() -> Iterator[Finding]:
    """Ray looks its own name up when it starts."""
    try:
        socket.gethostbyname(socket.gethostname())
        yield _ok("hostname", socket.gethostname())
    except OSError:
        fix = "add a line '127.0.0.1 HOSTNAME' to the hosts file"
        yield _warn("hostname", f"{socket.gethostname()} has no address", fix)


def examine(output: Path) -> Iterator[Finding]:
    """All checks, one after the other; one that breaks is a finding too."""
    checks: list[Check] = [python, machine, packages, kernels, cache, lambda: disk(output), ray, mlflow, ports, key]
    for check in [*checks, models, hostname]:
        try:
            yield from check()
        except Exception as error:
            name = getattr(check, "__name__", "check")
            yield _fail(name, f"the check itself failed: {type(error).__name__}: {error}", "report it")
