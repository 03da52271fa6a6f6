"""A driver that claims to have a GPU of some architecture, for Triton on a machine without one.

Kernels are compiled for that architecture as ever, from tensors on the CPU. Where the driver would load and start them,
nothing happens. kernel_resources.py reads what was compiled, and bench_host_cost.py times the Python before that point.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MOST_SHARED_BYTES = 232_448  # of a program on sm_90; more than any of our kernels wants


class _Utils:
    """What Triton asks of the CUDA library."""

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": _MOST_SHARED_BYTES}


class _Launcher:
    """In the place of the C function that puts a kernel into a stream."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass


class _Driver:
    launcher_cls = _Launcher
    utils = _Utils()

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # so that each keeps a cache of its own

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def pretending(architecture: int) -> Iterator[list[Any]]:
    """Within the block kernels on CPU tensors compile for `architecture` and start nothing; yields the compiled ones.

    Needs a process whose kernels are not interpreted.
    """
    import triton

    from rlcm_fast.kernels.triton_ops import launches

    # Note what each kernel compiles.
    compiled: list[Any] = []
    run = triton.JITFunction.run

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **kwargs)
        compiled.append(kernel)
        return kernel

    # Take the driver's and the launch's places until the block ends.
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(architecture))  # pyright: ignore[reportArgumentType]
    triton.JITFunction.run = noting
    launches.forget_plans()
    try:
        yield compiled
    finally:
        triton.JITFunction.run = run
        triton.runtime.driver._active = active
        launches.forget_plans()
