"""A GPU that is not there: torch's fake CUDA tensors, and what they need on a machine and a torch build without CUDA.

A fake tensor has a shape, a dtype and a device, and no memory. torch's CPU build knows no CUDA device at all, and its
CUDA build none without a driver: autograd asks for its guard and its hooks. A few lines of C++ give it both; they are
compiled once, with the compiler that torch's own extensions need. Libraries ask `torch.cuda`: inside `fake_cuda` it
answers as one GPU would.

A process that has installed this has a CUDA device for good, and may have run no backward pass before: rehearsals have
processes of their own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorConverter, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from phi3_dist.errors import MachineError, Problem

__all__ = ["CAPABILITY", "MEMORY_GIB", "NAME", "FakeDevices", "fake_cuda", "fake_group", "install"]

NAME, CAPABILITY, MEMORY_GIB = "rehearsed H100", (9, 0), 80.0
"""The GPU that is played."""

_SHIM = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <new>
#ifdef CUDA_BUILD
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#endif

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
constexpr auto CUDA = c10::DeviceType::CUDA;

// one device, one stream, events that have always happened
struct Guard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  static Stream stream() { return Stream(Stream::DEFAULT, Device(CUDA, 0)); }
  Device exchangeDevice(Device) const override { return Device(CUDA, 0); }
  Device getDevice() const override { return Device(CUDA, 0); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};

// isAvailable stays false: torch would make a first tensor on the device, in memory
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(DeviceIndex) const override {}
  // not `override`: which of them there are differs from torch to torch
  long versionCuDNN() const { return 0; }
  long versionRuntimeCuDNN() const { return 0; }
  long versionCuDNNFrontend() const { return 0; }
};
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface), "it takes the place of torch's own");

#ifdef CUDA_BUILD
// DDP's reducer times its steps with CUDA's events
struct Untimed final : c10d::Timer {
  std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};
static void replace_timers() {
  auto made = [](Device) -> std::unique_ptr<c10d::Timer> { return std::make_unique<Untimed>(); };
  c10d::TimerRegistry()->Register(CUDA, made, c10::REGISTRY_PREFERRED);
}
#else
static void replace_timers() {}
#endif

extern "C" int install() {
  auto& held = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  static bool done = false;
  if (done) return 1;
  done = true;
  new (&held) Hooks();
  replace_timers();
  c10::impl::registerDeviceGuard(CUDA, new Guard());
  return 0;
}
"""


def _compiled(cache: Path) -> Path:
    """The shared library for this torch, compiled if it is not in `cache`. Raises MachineError without a compiler."""
    digest = hashlib.sha256(f"{torch.__version__}{_SHIM}".encode()).hexdigest()[:16]
    library = cache / f"fake-cuda-{digest}.so"
    if library.is_file():
        return library
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        what = "without a GPU torch needs some lines of C++ to take fake CUDA tensors, and there is no compiler"
        raise MachineError(Problem("rehearsal", what, "install g++, or name one in CXX"))
    cache.mkdir(parents=True, exist_ok=True)
    source, partial = (library.with_suffix(f".{os.getpid()}{end}") for end in (".cpp", ".tmp"))
    source.write_text(_SHIM, encoding="utf-8")
    folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{folder / 'include'}", f"-L{folder / 'lib'}"]
    flags += ["-DCUDA_BUILD"] if torch.version.cuda or torch.version.hip else []
    command = [compiler, *flags, str(source), "-o", str(partial), "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    source.unlink()
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        what = f"torch {torch.__version__} does not take what fake CUDA tensors need of it: {first}"
        raise MachineError(Problem("rehearsal", what, "rehearse with torch 2.13"))
    partial.replace(library)
    return library


def install(cache: Path) -> None:
    """Make autograd take fake CUDA tensors in this process. A CUDA build of torch does by itself where it has a GPU.

    Without one its own guard asks a driver that is not there, so that the stand-in takes its place as in a CPU build.
    Raises MachineError where the library can't be compiled.
    """
    if not torch.cuda.is_available():
        ctypes.CDLL(str(_compiled(cache))).install()


class _EachAnew(FakeTensorConverter):
    """Remembers no tensor: a remembered one has a weak reference, and torch moves no module whose tensors have one."""

    def set_tensor_memo(self, t: Tensor, v: FakeTensor) -> None:
        pass


class FakeDevices(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Every tensor made inside is fake, and real ones that come in are taken as fake."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.fake_tensor_converter = _EachAnew(copy_data=False, export=False)

    @property
    def avoid_device_init(self) -> bool:
        return True  # whatever torch.cuda answers in here


class _Properties:
    name, (major, minor), total_memory = NAME, CAPABILITY, int(MEMORY_GIB * 2**30)
    multi_processor_count, warp_size = 132, 32
    gcnArchName = ""


def _events_and_streams(on_wait: Callable[[str], None]) -> tuple[Any, Any]:
    """`torch.cuda.Event` and `torch.cuda.Stream` where all has always been done."""

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def record(self, *_: Any) -> None: ...

        def wait(self, *_: Any) -> None: ...

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            on_wait("torch.cuda.Event.synchronize")

        def elapsed_time(self, _: Any) -> float:
            return 0.0

    class Stream(torch.Stream):
        cuda_stream = 0

        def __new__(cls, *_: Any, **__: Any) -> Stream:
            return super().__new__(cls, device=torch.device("cuda", 0))

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def wait_stream(self, _: Any) -> None: ...

        def wait_event(self, _: Any) -> None: ...

        def record_event(self, event: Any = None) -> Any:
            return event or Event()

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            on_wait("torch.cuda.Stream.synchronize")

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: Any) -> None: ...

    return Event, Stream


def _stand_ins(on_wait: Callable[[str], None]) -> dict[str, Any]:
    """What `torch.cuda` answers for one idle GPU; whatever waits for it is told to `on_wait`."""
    event, stream_class = _events_and_streams(on_wait)
    stream = stream_class()
    answers: Mapping[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": CAPABILITY,
        "get_device_properties": _Properties,
        "get_device_name": NAME,
        "is_bf16_supported": True,
        "current_stream": stream,
        "default_stream": stream,
        "is_current_stream_capturing": False,
        "mem_get_info": (_Properties.total_memory, _Properties.total_memory),
        "_is_in_bad_fork": False,
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0),
        **dict.fromkeys(("set_device", "manual_seed", "manual_seed_all", "empty_cache", "_lazy_init", "init")),
        **dict.fromkeys(("reset_peak_memory_stats", "reset_accumulated_memory_stats", "set_stream", "ipc_collect")),
    }
    fixed: dict[str, Any] = {name: lambda *_, _answer=answer, **__: _answer for name, answer in answers.items()}
    return fixed | {
        "Stream": stream_class,
        "Event": event,
        "stream": lambda *_: nullcontext(),
        "device": lambda *_: nullcontext(),
        "synchronize": lambda *_: on_wait("torch.cuda.synchronize"),
        "memory_stats": lambda *_: {},
    }


def _swap(held: Tensor, fresh: Tensor, swap: Callable[[Tensor, Tensor], None] = torch.utils.swap_tensors) -> None:
    """A module's fake tensor moved or cast. On its own device it stays: DeepSpeed has weak references to it."""
    if held.device != fresh.device:
        swap(held, fresh)
    elif held.dtype != fresh.dtype:
        held.data = fresh


def _in_memory(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with real tensors."""

    def call(*args: Any, **options: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **options)

    return call


@contextmanager
def fake_cuda(on_wait: Callable[[str], None]) -> Iterator[FakeDevices]:
    """One GPU inside, with fake tensors. Import every library before: some load CUDA's own where they find one.

    The one place of this package that puts other functions into a library: there is no device to answer.
    """
    from torch.distributed import device_mesh
    from torch.nn.parallel import distributed
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    with ExitStack() as stack:
        for name in ("range_push", "range_pop", "mark"):
            stack.enter_context(patch.object(torch.cuda.nvtx, name, lambda *_: 0))
        # these read numbers out of small tensors, of which the first are real and the others' ranks are not there
        real = _in_memory(device_mesh.init_device_mesh)
        stack.enter_context(patch.object(device_mesh, "init_device_mesh", real))
        for name in ("_verify_param_shape_across_processes", "_sync_module_states"):
            stack.enter_context(patch.object(distributed, name, lambda *_, **__: None))
        for name, stand_in in _stand_ins(on_wait).items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in, create=True))
        stack.enter_context(patch.object(torch.utils, "swap_tensors", _swap))
        # torch takes several tensors in one launch where it knows their class
        for known in (optimizer._foreach_supported_types, _foreach_utils._foreach_supported_types):
            known.append(FakeTensor)
            stack.callback(known.remove, FakeTensor)
        yield stack.enter_context(FakeDevices())


@contextmanager
def _ranks_agree() -> Iterator[None]:
    """DeepSpeed compares numbers of all ranks before the first step, of which there is one here."""
    if find_spec("deepspeed") is None:
        yield
        return
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    with patch.object(coordinator, "assert_ints_same_as_other_ranks", lambda _: None):
        yield


@contextmanager
def fake_group(world: int) -> Iterator[None]:
    """A process group of `world` ranks of which this is rank 0 and the only one; collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 29500}
    environment = {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "localhost"}
    with patch.dict(os.environ, environment if world > 1 else {}):
        if world > 1:
            torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        try:
            with _ranks_agree():
                yield
        finally:
            if world > 1:
                torch.distributed.destroy_process_group()
