"""A small kernel in PTX, loaded and launched by the driver: nothing to install, nothing to compile."""

from __future__ import annotations

import ctypes
from typing import Any

from .nvml import Absent


class DriverKernel:
    """The entry `name` of `ptx`, in the current context of the process. `library` stands in for the driver. Raises Absent."""

    def __init__(self, ptx: str, name: str, library: Any = None):
        self._library = library or driver()
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._ask("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(ptx.encode()))
        self._ask("cuModuleGetFunction", ctypes.byref(self._function), module, ctypes.c_char_p(name.encode()))

    def launch(self, stream: int, blocks: int, threads: int, *values: int) -> None:
        """`values`: its parameters, 64 bits each."""
        held = [ctypes.c_uint64(value) for value in values]
        arguments = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        shape = [ctypes.c_uint(n) for n in (blocks, 1, 1, threads, 1, 1, 0)]
        self._ask("cuLaunchKernel", self._function, *shape, ctypes.c_void_p(stream), arguments, None)

    def _ask(self, function: str, *arguments: Any) -> None:
        if code := getattr(self._library, function)(*arguments):
            raise Absent(f"the driver's {function} returned {code}")


def driver() -> Any:
    """The driver's library. Raises Absent."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Absent(str(error)) from error
