"""What NVIDIA's management library says of this machine's GPUs, before CUDA starts, which it does not need."""

from __future__ import annotations

import ctypes

LIBRARY = "libnvidia-ml.so.1"


def oldest_architecture(library: str = LIBRARY) -> int | None:
    """Major compute capability of the oldest GPU here: 8 is an A100's, 9 an H100's, 10 and above Blackwell's.

    Args:
        library: the shared library, which comes with the driver.

    Returns:
        None where there is no driver, no GPU, or no answer.
    """
    try:
        nvml = ctypes.CDLL(library)
        if nvml.nvmlInit_v2() != 0:
            return None
    except (OSError, AttributeError):
        return None
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return None
        found = [_architecture(nvml, index) for index in range(count.value)]
    except AttributeError:  # a library that lacks a function
        return None
    finally:
        nvml.nvmlShutdown()
    return min((major for major in found if major is not None), default=None)


def _architecture(nvml: ctypes.CDLL, index: int) -> int | None:
    handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
        return None
    if nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) != 0:
        return None
    return major.value
