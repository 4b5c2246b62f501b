"""The kernel as a library: prebuilt in the package, or compiled at first use and kept in the user's cache.

The file's name holds a hash of the sources and the flags, and in the cache of the compiler's version too, so that none
of them is ever mistaken for another: a prebuilt library of other sources is not looked at. It is written under another
name and then renamed: several processes may do so at once.

The hook that builds wheels imports this file where neither torch nor any other dependency is installed.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sparlow.errors import InputError, first_line, reason

FOLDER = Path(__file__).parent / "kernel"
PATHS = ("plain", "avx2", "avx512", "neon", "dotprod")  # in the order of dispatch.c
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O2", "-ftree-vectorize", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w")
_X86: dict[str, tuple[str, ...]] = {
    "avx2.c": ("-mavx2", "-mfma", "-mf16c"),
    "avx512.c": ("-march=icelake-server",),
}
_ARM: dict[str, tuple[str, ...]] = {"dotprod.c": ("-march=armv8.2-a+dotprod",)}
EXTRA = "SPARLOW_KERNEL_FLAGS"  # more flags for the compiler, from the environment; then nothing prebuilt is taken
_PATIENCE = 600  # seconds for a file, which takes a few; on a busy machine more


class NoKernelError(InputError):
    """There is no kernel on this machine, and why."""


@dataclass(frozen=True)
class Library:
    """The compiled kernel.

    Attributes:
        functions: Its functions.
        paths: Those of ``PATHS`` that this processor has, the best last.
        origin: ``prebuilt`` or ``compiled``.
        file: Where it lies.
    """

    functions: ctypes.CDLL
    paths: tuple[str, ...]
    origin: str
    file: Path


@cache
def library() -> Library:
    """Return the kernel: prebuilt if there is one of these very sources that this system takes, else compiled.

    Raises:
        NoKernelError: There is none, and it cannot be compiled here.
    """
    problem = ""
    if (file := prebuilt()).exists() and not os.environ.get(EXTRA):
        try:
            return _loaded(file, "prebuilt")
        except OSError as found:  # as an older C library says
            problem = f"The prebuilt kernel cannot be loaded ({first_line(found)}). "
    try:
        return _compiled()
    except NoKernelError as found:
        raise NoKernelError(f"{problem}{found}") from None


def prebuilt() -> Path:
    """Return where a kernel of these sources lies that was built with the package, if there is one."""
    return FOLDER / f"prebuilt-{fingerprint()}.so"


def _compiled() -> Library:
    from sparlow.files import cache_folder

    compiler = _compiler()
    version = _run([compiler, "--version"]).splitlines()
    try:
        file = cache_folder() / f"kernel-{fingerprint(version[0] if version else compiler)}.so"
    except RuntimeError:  # as Python says that there is no home directory
        raise NoKernelError("There is no home directory to keep the kernel in. Set SPARLOW_CACHE.") from None
    if not file.exists():
        compile_to(file, compiler)
    try:
        return _loaded(file, "compiled")
    except OSError as problem:
        raise NoKernelError(
            f"The kernel in {file} cannot be loaded ({first_line(problem)}). Delete the file."
        ) from None


def _loaded(file: Path, origin: str) -> Library:
    functions = ctypes.CDLL(str(file))
    _declare(functions)
    there = functions.sparlow_paths()
    return Library(functions, tuple(name for i, name in enumerate(PATHS) if there >> i & 1), origin, file)


def _compiler() -> str:
    names = (os.environ["CC"],) if os.environ.get("CC") else COMPILERS
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None or sys.platform == "win32":
        raise NoKernelError(f"There is no C compiler ({' or '.join(names)}). Install one, such as gcc.")
    return found


def _sources() -> list[Path]:
    return sorted(path for path in FOLDER.iterdir() if path.suffix in (".c", ".h"))


def _flags(source: Path) -> tuple[str, ...]:
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return FLAGS + arm_flags(source)
    return FLAGS + (_X86.get(source.name, ()) if machine in ("x86_64", "amd64") else ())


def arm_flags(source: Path) -> tuple[str, ...]:
    """Return what a source needs beside ``FLAGS`` on 64-bit ARM."""
    return _ARM.get(source.name, ())


def _extra() -> list[str]:
    return os.environ.get(EXTRA, "").split()


def fingerprint(compiler: str = "") -> str:
    """Return the hash of all that decides what is compiled.

    Args:
        compiler: Its version. Left out for what is prebuilt, as whoever installs that may have another or none.
    """
    known = f"{compiler} {platform.machine()} {platform.libc_ver()} {_extra()}" if compiler else platform.machine()
    found = hashlib.sha256(known.encode())
    for source in _sources():
        found.update(f"\0{source.name} {' '.join(_flags(source))}\0".encode() + source.read_bytes())
    return found.hexdigest()[:24]


def compile_to(file: Path, compiler: str | None = None) -> None:
    """Compile the kernel.

    Args:
        file: Written beside and renamed; its directory is made.
        compiler: By default the one that is found.

    Raises:
        NoKernelError: There is no compiler, it fails, or the file cannot be written.
    """
    compiler = compiler or _compiler()
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            objects = []
            for source in _sources():
                if source.suffix == ".c":
                    objects.append(f"{folder}/{source.stem}.o")
                    _run([compiler, *_flags(source), *_extra(), "-c", str(source), "-o", objects[-1]])
            _run([compiler, "-shared", *_extra(), *objects, "-o", f"{folder}/kernel.so", "-lpthread", "-lm"])
            Path(f"{folder}/kernel.so").replace(file)
    except OSError as problem:
        raise NoKernelError(
            f"The kernel cannot be kept in {file.parent} ({reason(problem)}). Set SPARLOW_CACHE to another folder."
        ) from None


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PATIENCE)  # noqa: S603 - ours
    except subprocess.CalledProcessError as problem:
        said = next(
            (line for line in (problem.stderr or "").splitlines() if "error" in line), f"exit {problem.returncode}"
        )
        raise NoKernelError(
            f"The C compiler {command[0]} failed ({said.strip().rstrip('.')}). Install another."
        ) from None
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise NoKernelError(
            f"The C compiler {command[0]} cannot be run ({first_line(problem).rstrip('.')}). Install another."
        ) from None
    return done.stdout


def _declare(functions: ctypes.CDLL) -> None:
    pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    functions.sparlow_products.argtypes = [number, number, number, pointer, long, pointer, long, pointer, long]
    functions.sparlow_decode.argtypes = [number, number, pointer, long, long, number, pointer]
    functions.sparlow_rows.argtypes = [number, number, pointer, pointer, long, pointer]
    functions.sparlow_step.argtypes = [number, number, pointer, long, long, pointer, pointer]
    functions.sparlow_step_work.argtypes, functions.sparlow_step_work.restype = [pointer, long], long
    functions.sparlow_starts.argtypes = [pointer, long, long, long, pointer]
    functions.sparlow_openmp.argtypes = [pointer, pointer, pointer]
    for without in ("decode", "rows", "openmp"):
        getattr(functions, f"sparlow_{without}").restype = None
