"""Builds the C core, `tinygpt._core`, through cffi. Everything else about the package is in pyproject.toml.

The extension is optional: where no compiler is found the package installs all the same and runs on NumPy.
"""

import re
import sysconfig
from pathlib import Path

from cffi import FFI
from setuptools import setup

CSRC = Path("csrc")
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")  # one build for all Pythons, but free-threaded ones


def core():
    """The extension. cffi is given tinygpt.h itself, its preprocessor lines left out and pointers to numbers
    read as `void *`."""
    header = (CSRC / "tinygpt.h").read_text(encoding="utf-8")
    ops = re.findall(r"X\((\w+)\)", header)
    declarations = re.sub(r"^#(.*\\\n)*.*$", "", header, flags=re.MULTILINE)
    ffi = FFI()
    ffi.cdef(re.sub(r"\b(real|int32_t|double)(?= \*)", "void", declarations))
    ffi.cdef("enum {" + ", ".join(f"OP_{op}" for op in ops) + "};")
    ffi.set_source(
        "tinygpt._core",
        "typedef void real;\n#define ENTRY(op) OP_##op,\n#include <tinygpt.h>\nenum { OPS(ENTRY) };",
        sources=sorted(map(str, [CSRC / "threads.c", *(CSRC / "variants").glob("*.c")])),
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


setup(ext_modules=[core()], options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {})
