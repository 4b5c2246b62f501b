"""Lets the kernel compute in the threads that torch computes in.

Two kinds of threads on the same cores wait for each other: after each operation of torch, the threads of its OpenMP
keep their cores busy for a while, in case another one comes.
"""

import ctypes
from functools import cache

import torch

from sparlow.runtime.build import Library

_FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")  # of GNU's, and of LLVM's and Intel's too


@cache
def use_torchs_threads(lib: Library) -> bool:
    """Give the kernel the OpenMP of this process, if torch has one; else it goes on with threads of its own.

    Returns:
        Whether there is one.
    """
    if not torch.backends.openmp.is_available():
        return False
    try:
        process = ctypes.CDLL(None)  # torch loads it where all can see it, and so does whoever preloads another
        found = [ctypes.cast(getattr(process, name), ctypes.c_void_p) for name in _FUNCTIONS]
    except (AttributeError, OSError, TypeError):  # Windows has no such place
        return False
    lib.functions.sparlow_openmp(*found)
    return True
