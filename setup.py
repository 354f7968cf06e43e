"""Compiles the C++ kernels into the wheel where torch and a compiler are at hand; elsewhere they build on first use.

To find torch, build in the environment that has it: `pip install --no-build-isolation .`
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def kernels() -> list[Extension]:
    if "editable_wheel" in sys.argv:  # a library in the source tree would outlive the next change of csrc/
        return []
    sys.path.insert(0, str(ROOT))
    try:
        from swift_kernels import cpp

        cpp.find_compiler()
    except (ImportError, RuntimeError) as error:
        print(f"swift_kernels: the C++ kernels will be built on first use ({error})", file=sys.stderr)
        return []
    sources = [str(source.relative_to(ROOT)) for source in sorted((ROOT / "csrc").glob("*.cpp"))]
    # Optional: where compiling fails, the package installs all the same, and says why when it is first used.
    return [Extension("swift_kernels.libswift_kernels", sources, optional=True)]


class BuildKernels(build_ext):
    """Compiles with the compiler call and flags of the build on first use."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        from swift_kernels import cpp

        try:
            cpp.compile_library(Path(self.get_ext_fullpath(ext.name)))
        except cpp.BuildError as error:
            raise CompileError(str(error)) from error


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: the library uses no Python API, and torch's stable ABI alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPythonWheel})
