"""CPU kernels as machine code: from the cache on disk or compiled once, and run on as many threads as torch has.

A kernel is a Python function on pointers, sizes and strides whose last three parameters are `scratch, first, last`:
it does the tasks first..last and may use `scratch` as it likes. Its annotations are its C signature, read as written
(hence `from __future__ import annotations` in its module). Threads are our own, for numba's thread layers either
die when two threads of one process call them or do not survive a fork, and both happen in a server; calls through
ctypes leave the interpreter's lock, so plain threads are enough.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import llvmlite.binding as llvm

C_TYPES = {"Real": ctypes.c_void_p, "Ints": ctypes.c_void_p, "Int": ctypes.c_int64, "Float": ctypes.c_double}
REALS = {torch.float32: "float32", torch.float64: "float64"}
SMALL = 1 << 17
"""Element operations below which waking a second thread costs more than it saves."""

_loading = threading.Lock()
_kept = threading.local()
_pool: ThreadPoolExecutor | None = None


class Kernel:
    """A kernel's machine code for float32 and float64, loaded or compiled at the first call of each."""

    def __init__(self, source: Callable[..., None]) -> None:
        self.source = source
        self.kinds = [str(kind) for kind in source.__annotations__.values() if kind not in (None, "None")]
        self._entries: dict[torch.dtype, Callable[..., None]] = {}

    def entry(self, dtype: torch.dtype) -> Callable[..., None]:
        """The C function, its pointers to numbers of this dtype."""
        if dtype not in self._entries:
            with _loading:
                self._entries[dtype] = self._load(REALS[dtype])
        return self._entries[dtype]

    def __call__(self, dtype: torch.dtype, tasks: int, work: int, scratch: int, *args: int | float | None) -> None:
        """Do all tasks; `work` in element operations decides on threads, each of which gets `scratch` numbers."""
        entry = self.entry(dtype)
        threads = min(torch.get_num_threads(), tasks) if work > SMALL else 1
        step = -(-scratch // 16) * 128  # bytes, enough for float64; whole cache lines
        at = _scratch(threads * step)
        if threads == 1:
            entry(*args, at, 0, tasks)
            return
        bounds = [tasks * i // threads for i in range(threads + 1)]
        others = [_workers().submit(entry, *args, at + i * step, bounds[i], bounds[i + 1]) for i in range(1, threads)]
        entry(*args, at, 0, bounds[1])
        for other in others:
            other.result()

    def _load(self, real: str) -> Callable[..., None]:
        path = cache_folder() / f"{self.source.__name__.strip('_')}-{real}-{_fingerprint()}.o"
        code = _read(path)
        if code is None:
            with _alone(path.with_suffix(".lock")):
                code = _read(path) or self._compile(real, path)
        address = _link(code, self.source.__name__)
        return ctypes.CFUNCTYPE(None, *(C_TYPES[kind] for kind in self.kinds))(address)

    def _compile(self, real: str, path: Path) -> bytes:
        from statespan.kernels.numba_build import build  # numba's import is slow and rarely needed

        code = build(self.source, self.kinds, real, _machine())
        _write(path, code)
        return code


def rows(tensor: Any, dtype: torch.dtype) -> Any:
    """The tensor in this dtype with its last axis contiguous, itself where that holds already; None for None."""
    if tensor is None:
        return None
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def settled(tensor: Any, dtype: torch.dtype) -> Any:
    """The tensor in this dtype and contiguous, itself where that holds already; None for None."""
    if tensor is None:
        return None
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers begin; None for no tensor."""
    return None if tensor is None else tensor.data_ptr()


def _scratch(size: int) -> int:
    """Where `size` bytes lie that belong to this thread until its next call."""
    room = getattr(_kept, "room", None)
    if room is None or room.numel() < size:
        room = _kept.room = torch.empty(max(size, 1 << 16), dtype=torch.uint8)
    return int(room.data_ptr())


@cache
def cache_folder() -> Path:
    """NUMBA_CACHE_DIR, else the user's cache folder; where neither can be written, a folder of this process."""
    own = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for parent in (os.environ.get("NUMBA_CACHE_DIR"), own):
        folder = Path(parent or own) / "statespan" / "kernels"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="statespan-kernels-"))


@cache
def _fingerprint() -> str:
    """All that the machine code hangs on: the kernels' sources, the compiler, the processor."""
    import llvmlite.binding as llvm

    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.glob("*_numba.py"), here / "fast_math.py", here / "numba_build.py"]):
        digest.update(path.read_bytes())
    features = llvm.get_host_cpu_features().flatten()
    digest.update(f"{version('numba')} {version('llvmlite')} {llvm.get_host_cpu_name()} {features}".encode())
    return digest.hexdigest()[:16]


@cache
def _machine() -> llvm.TargetMachine:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, reloc="static", jit=True
    )


@cache
def _engine() -> llvm.ExecutionEngine:
    """Holds the loaded code for as long as the process lives."""
    import llvmlite.binding as llvm

    machine = _machine()
    empty = llvm.parse_assembly("")
    empty.triple = machine.triple
    return llvm.create_mcjit_compiler(empty, machine)


def _link(code: bytes, name: str) -> int:
    import llvmlite.binding as llvm

    _engine().add_object_file(llvm.ObjectFileRef.from_data(code))
    _engine().finalize_object()
    return int(_engine().get_function_address(name))


def _read(path: Path) -> bytes | None:
    """The code in a cache file; None where it is missing or was damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time: of workers that start together one compiles and the others read what it wrote."""
    with path.open("w") as file:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, code: bytes) -> None:
    """Under a name of its own first, so that no other process sees half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(hashlib.sha256(code).digest() + code)
    os.replace(file.name, path)


def _workers() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="statespan-kernel")
    return _pool


def _forget_workers() -> None:
    """A fork does not copy threads: the child must start its own."""
    global _pool, _loading
    _pool, _loading = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)
