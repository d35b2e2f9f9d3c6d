"""The first GPU of this machine, as NVIDIA's driver describes it.

The driver is asked itself, because TensorRT ends the process that loads it where there is no GPU.
The functions and numbers are those of https://docs.nvidia.com/cuda/cuda-driver-api/.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

from gnet_opt.errors import BackendError

_DRIVER = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
_NAME_BYTES = 256
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU.

    Attributes:
        name: As the driver calls it.
        compute_capability: `8.7` for example.
        cuda: The latest version of CUDA that its driver runs, `12.6` for example.
    """

    name: str
    compute_capability: str
    cuda: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability})"


def require_gpu(outcome: str, advice: str) -> Gpu:
    """Describe the first GPU, or refuse where there is none that can be used.

    Args:
        outcome: What is not done without one, as a whole clause.
        advice: What the user can do, a full sentence.

    Raises:
        BackendError: The driver is missing or broken, or finds no GPU.
    """
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError as error:
        # A file that is there and cannot be loaded is another matter than none.
        missing = "No such file" in str(error) or os.name == "nt"
        how = "was not found" if missing else f"cannot be loaded: {error}"
        problem = f"the driver's {_DRIVER} {how}"
    else:
        try:
            return _described(driver)
        except AttributeError as error:
            problem = f"the driver's {_DRIVER} is incomplete: {error}"
        except RuntimeError as error:
            problem = f"the driver{error}"
    raise BackendError(
        f"{outcome}: this machine has no NVIDIA GPU that can be used ({problem}). {advice}"
    )


def _described(driver: Any) -> Gpu:
    """Ask the driver, a loaded library.

    Raises:
        AttributeError: It lacks a function.
        RuntimeError: It gives an error, or finds no GPU.
    """

    def ask(function: str, *arguments: object) -> None:
        code = getattr(driver, function)(*arguments)
        if code:
            raise RuntimeError(f"'s {function} gives the error {code}")

    def number(function: str, *arguments: object) -> int:
        found = ctypes.c_int()
        ask(function, ctypes.byref(found), *arguments)
        return found.value

    ask("cuInit", 0)
    if not number("cuDeviceGetCount"):
        raise RuntimeError(" finds none")
    device = number("cuDeviceGet", 0)
    name = ctypes.create_string_buffer(_NAME_BYTES)
    ask("cuDeviceGetName", name, _NAME_BYTES, device)
    major, minor = (
        number("cuDeviceGetAttribute", attribute, device)
        for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR)
    )
    cuda = number("cuDriverGetVersion")
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{major}.{minor}",
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
    )
