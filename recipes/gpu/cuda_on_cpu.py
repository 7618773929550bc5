"""Run what is written for a GPU where there is none: a device `cuda:0` whose tensors are computed on the CPU.

    python recipes/gpu/cuda_on_cpu.py fit --config demo.yaml --trainer.accelerator gpu --trainer.max_steps 4
    python recipes/gpu/cuda_on_cpu.py recipes/gpu/parts.py correct --tiny --out /tmp/rows.jsonl

The first word is a verb of `koff` or a script; `DEVICES=2` before it plays two GPUs, for runs of several processes.
Tensors there refuse what a GPU refuses: tensors of the other device in one operation or sent by NCCL, a generator of
the other device, numpy. The code for CUDA runs (`is_cuda`, autocast of cuda, the flash kernels by the names and
arguments they have there), and its numbers are right. What it cannot tell: speed, memory, what the kernels themselves
do. Wants g++ and a torch built without CUDA; FSDP does not run there.
"""

import contextlib
import hashlib
import itertools
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from koff_lightning.support.files import own_cache, replacing

HOST, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
CPP = Path(__file__).with_suffix(".cpp")
OPENED = "/proc/self/fd/"  # the library is preloaded by the number of its open file: a path may not hold spaces there
# Operations that take tensors of both devices: copies, and indices of the host into tensors of the device.
NCCL: set[str] = set()  # names of the groups of processes that were to be NCCL's
SEEDS = itertools.count(1)
COPIES = {"copy_", "_to_copy"}
INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
ops = torch.ops.aten


class There(Tensor):
    """A tensor of the device; `here` is the one of the host that has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: Any, here: Tensor, requires_grad: bool = False) -> "There":
        """Of the same shape, strides and dtype."""
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        return Tensor._make_wrapper_subclass(cls, here.shape, device=DEVICE, requires_grad=requires_grad, **layout)

    def __init__(self, here: Tensor, requires_grad: bool = False) -> None:
        self.here = here

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A copy; a parameter's is one."""
        copy = There(self.here.clone(), self.requires_grad)
        return memo.setdefault(id(self), torch.nn.Parameter(copy, self.requires_grad) if _is_parameter(self) else copy)

    def __reduce_ex__(self, protocol: int) -> Any:
        """Files get a tensor of the host."""
        return self.here.detach().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        """With its numbers."""
        return f"There({self.here!r})"

    def tolist(self) -> Any:
        """Its numbers."""
        return self.here.tolist()

    def numpy(self, *_: object, **__: object) -> Any:
        """Refused, as by a GPU."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def untyped_storage(self) -> torch.UntypedStorage:
        """Tells which tensors share memory."""
        return self.here.untyped_storage()

    def storage(self) -> Any:
        """As above, by the old name."""
        return self.here.storage()

    def data_ptr(self) -> int:
        """As above."""
        return self.here.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Compute on the host."""
        return compute(func, args, kwargs or {})


def _is_parameter(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "_is_param", False))


class Generator(torch._C.Generator):
    """A generator of the host, of which is known for which device it was made."""

    known: ClassVar[dict[int, "Generator"]] = {}  # torch hands operations another object of the same address

    def __new__(cls, device: Any = "cpu") -> "Generator":
        """For a device."""
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device).type
        return cls.known.setdefault(made._cdata, made)

    @property
    def device(self) -> torch.device:
        """What was asked for."""
        return DEVICE if self.place == "cuda" else HOST


class Everywhere(TorchDispatchMode):
    """Takes what makes tensors on the device from nothing, or brings them there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Hand over what has to do with the device."""
        kwargs, given = kwargs or {}, tree_flatten((args, kwargs))[0]
        asked = kwargs.get("device")
        if any(map(_of_device, given)) or (asked is not None and torch.device(asked).type == "cuda"):
            return compute(func, args, kwargs)
        if func.namespace == "c10d" and _by_nccl(given) and any(isinstance(value, Tensor) for value in given):
            raise RuntimeError(f"No backend type associated with device type cpu, for {func}")
        return func(*args, **kwargs)


def _of_device(value: object) -> bool:
    return isinstance(value, There) or (isinstance(value, torch._C.Generator) and _place(value) == "cuda")


def _place(generator: torch._C.Generator) -> str:
    known = Generator.known.get(generator._cdata)
    return known.place if known is not None else "cpu"


def compute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Check what a GPU would check, compute on the host, and say that the result is there.

    Raises:
        RuntimeError: In the words of torch.
    """
    if func in KERNELS:
        return KERNELS[func](*args, **kwargs)
    given, shape = tree_flatten((args, kwargs))
    own = {id(value.here): value for value in given if isinstance(value, There)}
    asked = kwargs.get("device")
    place = torch.device(asked).type if asked is not None else "cuda" if own else "cpu"
    name = func.overloadpacket.__name__
    _check(name, args, given, place)
    args, kwargs = tree_unflatten([value.here if isinstance(value, There) else value for value in given], shape)
    if asked is not None:
        kwargs["device"] = HOST
    drawn = torch.Tag.nondeterministic_seeded in func.tags and not any(isinstance(x, torch._C.Generator) for x in given)
    with _own_numbers() if drawn and place == "cuda" else contextlib.nullcontext():
        found = func(*args, **kwargs | ({"pin_memory": False} if kwargs.get("pin_memory") else {}))
    if name == "copy_":  # returns its first argument, of whichever device that is
        return given[0]
    if place == "cpu":
        return found
    return tree_map(lambda x: own[id(x)] if id(x) in own else There(x) if isinstance(x, Tensor) else x, found)


@contextlib.contextmanager
def _own_numbers() -> Iterator[None]:
    """Draw as a device does that has random numbers of its own: no seed gives those of the host."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(next(SEEDS))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _check(name: str, args: tuple, given: list[Any], place: str) -> None:
    """Refuse what a GPU refuses."""
    matter = [args[0], *args[2:3]] if name in INDEXED and isinstance(args[0], There) else given
    tensors = [value for value in matter if isinstance(value, Tensor)]
    both = {isinstance(value, There) for value in tensors if isinstance(value, There) or value.ndim}
    if len(both) > 1 and name not in COPIES:
        shapes = [f"{value.device.type} {list(value.shape)}" for value in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} has {', '.join(shapes)}")
    for value in given:
        if isinstance(value, torch._C.Generator) and _place(value) != place:
            raise RuntimeError(f"Expected a {place!r} device type for generator in {name}")


def _flash(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, *_: object, scale: Any = None
) -> tuple[Any, ...]:
    """The flash kernel by its name on a GPU: half precision, rows of one length each, no mask."""
    for tensor in (query, key, value):
        if tensor.dtype not in (torch.bfloat16, torch.float16) or tensor.stride(-1) != 1:
            raise RuntimeError(f"FlashAttention only support fp16 and bf16 data type, got {tensor.dtype}")
        if len(tensor) != len(query) or tensor.shape[3] % 8 or tensor.shape[3] > 256:
            raise RuntimeError(f"FlashAttention cannot take {list(tensor.shape)} beside {list(query.shape)}")
    if causal and query.shape[2] != key.shape[2]:
        raise RuntimeError("which corner a causal mask begins in differs between kernels")
    out, lse = ops._scaled_dot_product_flash_attention_for_cpu(
        query.here, key.here, value.here, dropout, causal, scale=scale
    )
    seed = There(torch.zeros((), dtype=torch.int64))
    COUNTS["flash"] += 1
    return (
        There(out),
        There(lse.contiguous()),
        None,
        None,
        query.shape[2],
        key.shape[2],
        seed,
        seed,
        There(out.new_empty(0)),
    )


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, scale: Any = None) -> Any:
    """Its backward, of an output and a log-sum-exp that the caller gives."""
    out, lse, _, _, rows, columns, dropout, causal, *_ = rest
    right = lse.dtype == torch.float32 and lse.is_contiguous() and grad.stride(-1) == 1  # read without its strides
    if (rows, columns) != (query.shape[2], key.shape[2]) or not right:
        raise RuntimeError(f"{rows} x {columns}, {lse.dtype}, strides {grad.stride()}")
    tensors = (value.here for value in (grad, query, key, value, out, lse))
    found = ops._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, dropout, causal, scale=scale)
    COUNTS["flash backward"] += 1
    return tuple(map(There, found))


def _flash_documents(query: Tensor, key: Tensor, value: Tensor, *rest: Any, scale: Any = None) -> tuple[Any, ...]:
    """The flash kernel of documents of several lengths, [N, H, dh], whose bounds are int32 [D + 1]."""
    bounds = _bounds(query, key, rest)
    parts = [
        _flash(*(_part(tensor, *ends) for tensor in (query, key, value)), 0.0, True, scale=scale) for ends in bounds
    ]
    out = torch.cat([part[0].here[0].transpose(0, 1) for part in parts])  # [N, H, dh]
    lse = torch.cat([part[1].here[0] for part in parts], dim=1)  # [H, N]
    seed = There(torch.zeros(2, dtype=torch.uint64))
    return There(out), There(lse), seed, There(torch.zeros((), dtype=torch.uint64)), There(out.new_empty(0))


def _flash_documents_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, scale: Any = None
) -> Any:
    """Its backward."""
    out, lse, *rest = rest
    if not lse.is_contiguous():
        raise RuntimeError("the log-sum-exp is read without its strides")
    found = []
    for ends in _bounds(query, key, rest):
        tensors = [_part(tensor, *ends) for tensor in (grad, query, key, value, out)]
        more = There(lse.here[None, :, slice(*ends)].contiguous()), None, None, *[ends[1] - ends[0]] * 2, 0.0, True
        found.append([each.here[0].transpose(0, 1) for each in _flash_backward(*tensors, *more, scale=scale)])
    return tuple(There(torch.cat(each)) for each in zip(*found, strict=True))


def _bounds(query: Tensor, key: Tensor, rest: Any) -> list[tuple[int, int]]:
    """Where documents begin and end, of arguments of which there is one form."""
    bounds, same, longest, also, dropout, causal, *_ = rest
    ends = bounds.tolist()
    if bounds.dtype != torch.int32 or same is not bounds or ends[0] or ends[-1] != len(query) or len(key) != len(query):
        raise RuntimeError(f"bounds {ends} of {len(query)} tokens")
    if not (causal is True and dropout == 0.0 and longest == also >= max(b - a for a, b in itertools.pairwise(ends))):
        raise RuntimeError(f"longest {longest} of bounds {ends}")
    return list(itertools.pairwise(ends))


def _part(tensor: Tensor, begin: int, end: int) -> Tensor:
    """A document's part of [N, H, dh] as [1, H, T, dh]."""
    return There(tensor.here[None, begin:end].transpose(1, 2))


COUNTS = {"flash": 0, "flash backward": 0}
KERNELS = {
    ops._flash_attention_forward.default: _flash_documents,
    ops._flash_attention_backward.default: _flash_documents_backward,
    ops._scaled_dot_product_flash_attention.default: _flash,
    ops._scaled_dot_product_flash_attention_backward.default: _flash_backward,
}


def install() -> None:
    """Have torch take the device for there, in this thread and those that it begins."""
    import lightning  # noqa: F401 -- these look for GPUs while they load, by ways that are not played here
    import peft  # noqa: F401
    import transformers  # noqa: F401

    properties = SimpleNamespace(
        name="CUDA on the CPU", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132
    )
    answers = {"is_available": True, "is_initialized": True, "is_bf16_supported": True}
    answers |= {"device_count": int(os.environ.get("DEVICES", "1"))}
    answers |= {"current_device": 0, "get_device_name": properties.name, "get_device_properties": properties}
    answers |= {"get_device_capability": (9, 0), "mem_get_info": (80 * 2**30, 80 * 2**30), "memory_stats": {}}
    answers |= dict.fromkeys(["max_memory_allocated", "memory_allocated", "max_memory_reserved", "memory_reserved"], 0)
    answers |= {
        "get_rng_state_all": [],
        "get_rng_state": torch.zeros(0, dtype=torch.uint8),
        "is_current_stream_capturing": False,
    }
    done = ["set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all"]
    answers |= dict.fromkeys([*done, "init", "_lazy_init", "set_rng_state", "set_rng_state_all", "ipc_collect"])
    for name, answer in answers.items():
        setattr(torch.cuda, name, _always(answer))
    torch._C._cuda_clearCublasWorkspaces = _always(None)
    torch.Generator = Generator
    _play_nccl()
    torch.inference_mode = _no_grad  # tensors of inference cannot be wrapped
    torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to keeps which parameters are shared
    plain = threading.Thread.run
    threading.Thread.run = lambda thread: _begin() and plain(thread)
    _begin()


def _play_nccl() -> None:
    """Have gloo do what NCCL would, for tensors of the device alone."""
    begin = dist.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **options: Any) -> None:
        begin("cpu:gloo,cuda:gloo" if backend == "nccl" else backend, *args, **options | {"device_id": None})
        if backend == "nccl":
            NCCL.add(dist.group.WORLD.group_name)

    dist.init_process_group = init_process_group
    device_of = dist.distributed_c10d._get_object_coll_device
    dist.distributed_c10d._get_object_coll_device = lambda group=None: (
        "cuda" if (group or dist.group.WORLD).group_name in NCCL else device_of(group)
    )
    dist.get_backend = _always("gloo")  # Lightning makes a sum of a mean then, which gloo lacks


def _by_nccl(given: list[Any]) -> bool:
    """Whether an operation between processes goes by a group that was to be NCCL's."""
    for value in given:
        with contextlib.suppress(TypeError, RuntimeError):
            return dist.ProcessGroup.unbox(value).group_name in NCCL
    return False


def _always(answer: object) -> Callable[..., Any]:
    return lambda *_, **__: answer


def _no_grad(mode: Any = True) -> Any:
    return mode if callable(mode) else torch.no_grad() if mode else contextlib.nullcontext()


def _begin() -> bool:
    """In each thread of its own, as torch keeps its modes."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made here and brought there
    Everywhere().__enter__()
    return True


def built() -> Path:
    """The library that answers torch's C++ side, compiled once for this torch: it names the folder it was built for."""
    root = Path(torch.__file__).parent
    known = hashlib.sha256(f"{root} {torch.__version__} {CPP.read_text()}".encode()).hexdigest()[:12]
    library = own_cache() / "cuda_on_cpu" / f"{known}.so"  # where nobody else writes: it runs with our rights
    if not library.exists():
        with replacing(library) as new:
            words = ["g++", "-std=c++20", "-O0", "-fPIC", "-shared", str(CPP), "-o", str(new), "-ltorch_cpu", "-lc10"]
            words += [f"-I{root / 'include'}", f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}"]
            subprocess.run(words, check=True)
    return library


def main() -> int:
    """Run a verb or a script on the device; the exit status."""
    if torch.version.cuda is not None:
        raise SystemExit("this torch has CUDA: use it")
    if OPENED not in os.environ.get("LD_PRELOAD", ""):
        library = os.open(built(), os.O_RDONLY)
        os.set_inheritable(library, True)
        environment = os.environ | {"LD_PRELOAD": f"{OPENED}{library}"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    del os.environ["LD_PRELOAD"]  # what this process begins is plain
    install()
    words = sys.argv[1:]
    if words[0].endswith(".py"):
        sys.argv = words
        sys.modules["cuda_on_cpu"] = sys.modules["__main__"]  # for scripts that ask for COUNTS
        runpy.run_path(words[0], run_name="__main__")
        return 0
    from koff_lightning.cli import main as koff

    return koff(words)


if __name__ == "__main__":
    status = main()
    print(f"kernels: {COUNTS}", file=sys.stderr)
    sys.exit(status)
