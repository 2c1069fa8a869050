"""Memory allocation of this process, set once at the start of a program that trains on the CPU."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_BLOCK = 32 * 2**20  # bytes; glibc takes no larger threshold


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks of up to 32 MB for the next allocation. Return whether that was possible.

    Otherwise it returns them to the system, which provides zeroed pages again a moment later: 5 to 10 % of the time of
    a training step on the CPU. The process then keeps its largest size.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc: macOS, musl, Windows
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK) and mallopt(M_TRIM_THRESHOLD, -1))
