import errno

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from sparlow.errors import InputError, RunError, as_input_error, is_out_of_memory, out_of_memory
from sparlow.files import replacing

HOST = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4398046511104 bytes. Error code 12 (Cannot allocate memory)"
)
FULL = [
    MemoryError(),
    RuntimeError(HOST),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
    RuntimeError("unable to mmap 4096 bytes from file </m/a.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnSsyevd`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("NCCL error in: x.cpp:1, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)."),
    RuntimeError("Invalid buffer size: 12.00 GiB"),  # MPS
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(handle)`"),
    RuntimeError("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),  # XPU
    RuntimeError("NCCL error in: x.cpp:1, unhandled cuda error\nLast error:\nFailed to CUDA calloc async 608 bytes"),
    RuntimeError("NCCL error in: x.cpp:1, unhandled system error\nLast error:\nFailed to malloc 123 bytes"),
    RuntimeError("can't start new thread"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    OSError("libgomp.so: failed to map segment from shared object"),
    SafetensorError("Error while deserializing header: I/O error: Cannot allocate memory (os error 12)"),
    Exception("Cannot allocate memory (os error 12)"),  # tokenizers
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:20] or "MemoryError")
def test_whoever_has_no_memory_it_is_one_sentence_and_what_to_do(error):
    assert is_out_of_memory(error)
    said = out_of_memory(error)
    assert "too little" in said
    assert "\n" not in said
    assert ".." not in said
    assert said.endswith("The same command resumes an unfinished run.")


def test_the_memory_that_is_named_is_the_one_that_is_full():
    assert "too little main memory (DefaultCPUAllocator: can't allocate memory: you tried" in out_of_memory(FULL[1])
    assert out_of_memory(FULL[6]).startswith("The accelerator has too little memory (CUDA out of memory). Reduce")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        OSError(errno.ENOSPC, "No space left on device"),
        RunError("Out of memory. Lower --batch."),  # has said by itself what to do
        ValueError("out of memory"),
        OSError("libx.so: failed to map segment from shared object: Operation not permitted"),  # no programs there
        SafetensorError("Error while deserializing header: header too large"),
    ],
    ids=str,
)
def test_what_is_no_lack_of_memory_is_not_taken_for_one(error):
    assert not is_out_of_memory(error)


def test_what_torch_and_numpy_raise_here_is_known():
    for take in (lambda: torch.empty(2**60), lambda: np.empty(2**59)):
        with pytest.raises((RuntimeError, MemoryError)) as found:
            take()
        assert is_out_of_memory(found.value)


def test_a_disk_is_not_blamed_for_memory_that_ran_out(tmp_path):
    for error in (OSError(errno.ENOMEM, "Cannot allocate memory"), SafetensorError("Cannot allocate memory")):
        with pytest.raises(type(error)), replacing(tmp_path / "file"):
            raise error
    with pytest.raises(RunError, match=r"Cannot write .*: No space left"), replacing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_not_blamed_for_memory_that_ran_out():
    with pytest.raises(MemoryError), as_input_error("The model cannot be opened"):
        raise MemoryError
    with pytest.raises(InputError, match="opened: no such shard"), as_input_error("The model cannot be opened"):
        raise OSError("no such shard")
