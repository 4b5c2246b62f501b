"""Puts the compiled kernel into a wheel, which then is one for this platform; without a compiler the wheel is pure.

``pip install -e .`` compiles nothing, and neither does the source distribution: there the kernel is compiled at first
use. All instruction sets of the processor's architecture are in one library, and the best is chosen when it runs.
"""

import re
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NEEDED = re.compile(rb"GLIBC_2\.(\d+)\b")  # the versions of the C library's symbols that a library uses


class KernelHook(BuildHookInterface):
    """Compiles the kernel with the compiler that is found as ``CC``, ``cc``, ``gcc`` or ``clang``."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the library and the platform's tag to what is built."""
        if self.target_name != "wheel" or version == "editable":
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        try:
            from sparlow.runtime import build
        finally:
            del sys.path[0]
        self.folder = tempfile.TemporaryDirectory()
        library = Path(self.folder.name) / build.prebuilt().name
        try:
            build.compile_to(library)
        except build.NoKernelError as problem:
            sys.stderr.write(f"The wheel is pure: the kernel will be compiled at first use. {problem}\n")
            return
        inside = build.prebuilt().relative_to(Path(self.root) / "src").as_posix()
        build_data["force_include"][str(library)] = inside
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_of(library)}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002 - hatch's
        """Remove what was compiled, which is in the wheel now."""
        if hasattr(self, "folder"):
            self.folder.cleanup()


def platform_of(library: Path) -> str:
    """Return the tag of the platforms that take a library: on Linux, from the C library's release that it needs."""
    own = re.sub(r"[-.]", "_", sysconfig.get_platform())
    needed = [int(release) for release in NEEDED.findall(library.read_bytes())]
    if not own.startswith("linux_") or not needed:
        return own  # on Linux with another C library, what is built here runs here
    return f"manylinux_2_{max(needed)}_{own.removeprefix('linux_')}"
