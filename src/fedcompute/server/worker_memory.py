"""Memory of worker processes: what one upload's job gives back, the next one's takes."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt
_KEPT_BYTES = 512 << 20


def keep_freed_memory() -> bool:
    """Lets this process keep up to 512 MiB that it has freed; returns whether its C library knows how (glibc does).

    To unpack an update takes several blocks as large as the update. By its defaults the library gives such blocks back
    to the system one by one, which then clears each page anew for the next upload: up to a third of a worker's time.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))
