"""What glibc's allocator keeps of freed memory. With another C library nothing happens here."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt's names for them
_MOST = 2**31 - 1


@cache
def _libc() -> Any:
    """glibc, or None."""
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
    except (OSError, TypeError):
        return None


def return_freed_memory() -> None:
    """Returns freed memory to the system, the gaps between pieces in use as well."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


def keep_freed_memory() -> None:
    """From now on this process keeps what it frees, for its next tensors.

    By itself glibc maps large tensors one by one and unmaps them at once. Packs whose sizes change at every step then
    fault their pages in anew, which cost a tenth of a training step of a small denoiser on a CPU.
    """
    if (libc := _libc()) is not None:
        libc.mallopt(_MMAP_THRESHOLD, _MOST)
        libc.mallopt(_TRIM_THRESHOLD, _MOST)
