"""Builds the C core, `tinygpt._core`, through cffi. Everything else about the package is in pyproject.toml.

The extension is optional: without it the package installs all the same and runs on NumPy. If there is a
compiler and the build fails, the file BUILD_ERROR in the package makes the first run say so.
"""

import re
import shutil
import sysconfig
from pathlib import Path

from cffi import FFI
from setuptools import setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")  # one build for all Pythons, but free-threaded ones
BUILD_ERROR = "_build_error.txt"  # in the package; read by tinygpt/core/kernels.py


def core():
    """The extension. Python only passes addresses, so pointers to numbers become `void *`: in what cffi is
    told and in what the compiler sees. GCC 14 and newer refuse a difference between the two."""
    header = (CSRC / "tinygpt.h").read_text(encoding="utf-8")
    header = re.sub(r"\b(real|int32_t|int64_t|double)(?= \*)", "void", header)
    ops = re.findall(r"X\((\w+)\)", header)
    ffi = FFI()
    ffi.cdef(re.sub(r"^#(.*\\\n)*.*$", "", header, flags=re.MULTILINE))
    ffi.cdef("enum {" + ", ".join(f"OP_{op}" for op in ops) + "};")
    ffi.set_source(
        "tinygpt._core",
        header + "#define ENTRY(op) OP_##op,\nenum { OPS(ENTRY) };",
        sources=sorted(map(str, [CSRC / "memory.c", CSRC / "threads.c", *(CSRC / "variants").glob("*.c")])),
        depends=sorted(map(str, [*CSRC.glob("*"), CSRC / "variants" / "kernels.inc"])),
        include_dirs=[str(CSRC)],
        define_macros=[("Py_LIMITED_API", "0x030A0000")] if ABI3 else [],
        py_limited_api=ABI3,
        # No math errno: sqrt becomes one instruction. Not -ffast-math: NaN and infinity keep their meaning.
        extra_compile_args=[
            "-std=gnu11",
            "-O3",
            "-ffp-contract=fast",
            "-fno-math-errno",
            "-pthread",
            "-Wno-psabi",
        ],
        extra_link_args=["-pthread"],
        libraries=["m"],
    )
    extension = ffi.distutils_extension("build")
    extension.optional = True
    return extension


class Build(build_ext):
    """Leaves word where there is a compiler and the build fails."""

    def build_extension(self, ext):
        packages = [Path(self.get_ext_fullpath(ext.name)).parent]
        if self.editable_mode:
            packages.append(Path("tinygpt"))
        for package in packages:
            (package / BUILD_ERROR).unlink(missing_ok=True)
        try:
            super().build_extension(ext)
        except Exception:
            compiler = getattr(self.compiler, "compiler", [""])[0]
            for package in packages if shutil.which(compiler) else ():
                package.mkdir(parents=True, exist_ok=True)
                (package / BUILD_ERROR).write_text(compiler, encoding="utf-8")
            raise  # setuptools goes on without an optional extension


setup(
    ext_modules=[core()],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
)
