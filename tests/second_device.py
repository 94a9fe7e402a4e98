"""A device that computes on the CPU and yet, like CUDA, refuses to meet it.

    register()   torch knows the device "second" from here on, in this process
    WAITS        how often the host waited for it, {operation and the lines of ours: times}

Its tensors wrap tensors of the CPU. What a GPU would refuse is refused: an operation over tensors
of both devices, NumPy on one of its own. What would stop the host until a GPU is done is counted.
"""

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree, backend_registration

WAITS: Counter = Counter()
UNKNOWN: set = set()  # kinds of numbers that it lacks, as Apple's GPUs lack float64
ROOT = str(Path(__file__).parents[1])
MAY_MIX = {"aten::copy_", "aten::index", "aten::index_put_"}
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
needed = pytest.mark.skipif(not AVAILABLE, reason="needs a torch whose backends can be in Python")


class Second(torch.Tensor):
    """A tensor of the device; `raw` is the one of the CPU that it wraps."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw, requires_grad=False):
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        options = {"dtype": raw.dtype, "device": "second:0", "requires_grad": requires_grad}
        return torch.Tensor._make_wrapper_subclass(cls, raw.shape, **layout, **options)

    def __init__(self, raw, requires_grad=False):
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return compute(op, *args, **(kwargs or {}))

    def __deepcopy__(self, memo):
        return Second(self.raw.clone(), self.requires_grad)

    def tolist(self):
        wait("tolist")
        return self.raw.tolist()

    def numpy(self, *_, **__):
        raise TypeError("NumPy cannot read the second device; copy the tensor to the CPU first")

    __array__ = numpy


def wait(what: str) -> None:
    """Count that the host waits, by the last lines of ours."""
    stack = [frame for frame in traceback.extract_stack() if frame.filename.startswith(ROOT)]
    ours = [frame for frame in stack if not frame.filename.startswith(f"{ROOT}/tests")]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours[::-1][:3]]
    WAITS[f"{what} at {' < '.join(places)}"] += 1


def compute(op, *args, **kwargs):
    """Run an operation on the CPU, as the device would."""
    name, (leaves, tree) = op._schema.name, _pytree.tree_flatten((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    inside = {id(x.raw): x for x in tensors if isinstance(x, Second)}
    outside = [x for x in tensors if not isinstance(x, Second)]
    if inside and any(x.ndim for x in outside) and name not in MAY_MIX:
        shapes = [(tuple(x.shape), x.device.type) for x in tensors]
        raise RuntimeError(f"{name} over tensors of two devices: {shapes}")
    to = {x.type for x in leaves if isinstance(x, torch.device)}
    copies = name == "aten::_to_copy" and to == {"cpu" if inside else "second"}
    copies |= name in MAY_MIX and inside and bool(outside)
    if name in READS or (copies and True not in (kwargs.get("non_blocking"), *args[2:])):
        wait(name)
    plain = [x.raw if isinstance(x, Second) else x for x in leaves]
    plain = [torch.device("cpu") if isinstance(x, torch.device) else x for x in plain]
    args, kwargs = _pytree.tree_unflatten(plain, tree)
    op = torch.ops.aten.conj_physical.default if name == "aten::_conj" else op  # lazy ones get lost
    with torch.no_grad():
        out = op(*args, **{**kwargs, "pin_memory": None} if "pin_memory" in kwargs else kwargs)
    if name == "aten::copy_":
        return leaves[0]
    if to == {"cpu"} or not (inside or to):
        return out
    if UNKNOWN & {x.dtype for x in _pytree.tree_leaves(out) if isinstance(x, torch.Tensor)}:
        raise TypeError(f"{name}: the second device does not know numbers of {UNKNOWN}")

    def wrap(x):  # what is changed in place stays the tensor that it is
        return inside.get(id(x), Second(x)) if isinstance(x, torch.Tensor) else x

    return _pytree.tree_map(wrap, out)


class Backend(backend_registration._DummyBackendModule if AVAILABLE else object):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class Generator(torch.Generator):
    """A generator of the CPU that says it is on the device it was made for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        self.named = torch.device(device)

    @property
    def device(self):
        return self.named


def copy_from(source, target, non_blocking=False):
    """Be what torch copies with from or to the device."""
    return compute(torch.ops.aten.copy_.default, target, source, non_blocking)


def made(factory):
    """Make a factory whose results lie on the device."""

    def make(*args, dtype=None, **_):
        return Second(factory(*args, dtype=dtype))

    return make


LIBRARIES = []  # as long as they live, so do their kernels


def register() -> None:
    """Tell torch of the device."""
    backend_registration._setup_privateuseone_for_python_backend("second", Backend())
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.Generator = Generator
    rest, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    rest.fallback(lambda op, *args, **kwargs: compute(op, *args, **kwargs), "PrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    factories = {"empty.memory_format": torch.empty, "empty_strided": torch.empty_strided}
    factories |= {f"arange{form}": torch.arange for form in ("", ".start", ".start_step")}
    factories |= {"linspace": torch.linspace}
    for name, factory in factories.items():
        aten.impl(name, made(factory), "PrivateUse1")
    aten.impl("_copy_from", copy_from, "PrivateUse1")
    LIBRARIES.extend((rest, aten))
