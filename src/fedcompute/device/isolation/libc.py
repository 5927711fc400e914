"""Calls into the C library for which Python has no function of its own."""

import ctypes
import os

Argument = int | ctypes.Array[ctypes.c_char] | None

_LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Argument) -> int:
    """Calls `name`; integers travel as unsigned long, buffers and None as pointers. Raises OSError with its errno."""
    function = _LIBC[name]
    function.restype = ctypes.c_long if name == "syscall" else ctypes.c_int
    result: int = function(*(ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def buffer(data: bytes) -> ctypes.Array[ctypes.c_char]:
    """A buffer of exactly `data` that the kernel may read or write."""
    return ctypes.create_string_buffer(data, len(data))
