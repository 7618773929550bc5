"""The memories: domain -> (LoRA adapter, KV memory), attached to a frozen backbone, and which row reads which.

Each domain has parameters of its own. A domain that is absent from a batch therefore has no gradient and the optimizer
leaves it alone, and a domain can be added or removed without touching the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from koff_lightning.attention import LayerMemory
from koff_lightning.backbone import attention_modules, kv_shapes, layer_of
from koff_lightning.kv_memory import KVMemory, read_memories
from koff_lightning.lora import Mark, RoutedLinear, Routes, check_fit
from koff_lightning.placement import placed, shortest
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.support.errors import KoffError
from koff_lightning.support.in_force import InForce
from koff_lightning.support.names import check_name
from koff_lightning.units import LORA_TARGETS

SHARED = "shared"
Part = Literal["lora", "kv"]  # of a memory


class MemoryBank(nn.Module):
    """The memories of all domains, attached to a frozen backbone.

    Args:
        model: Backbone. Where a memory needs it, linears are wrapped to carry adapters and attention to read slots;
            this has no effect until `activate` is called.
        domains: Names of the domains to start with; `add` adds further ones.
        lora: Adapter of each of them; None for none.
        kv: KV memory of each of them; None for none.
        shared: All domains read and train one memory (the ablation).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        domains: Sequence[str] = (),
        lora: LoraSpec | None = None,
        kv: KVSpec | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.shared = shared
        self._in_force = InForce(Routes())
        self.domains: list[str] = []
        self.names: dict[str, str] = {}  # domain -> memory
        self.kv = nn.ModuleDict()
        self._lora: dict[str, LoraSpec | None] = {}  # memory -> its adapter
        self._marks: dict[str, Mark] = {}  # key of a memory -> its mark in routes
        self.__dict__["model"] = model  # not registered as a submodule: the backbone's weights are not the bank's
        linears = {path: m for path, m in model.named_modules() if path.rpartition(".")[2] in LORA_TARGETS}
        if any(isinstance(module, RoutedLinear) for module in linears.values()):
            raise KoffError("this model carries memories already: add further ones to the bank that it has")
        self.depth = len(attention_modules(model))  # layers
        self._paths = list(linears)
        self._linears: dict[str, RoutedLinear] = {}  # path -> linear that carries adapters
        for domain in domains:
            self.add(domain, lora, kv)

    @staticmethod
    def key(name: str) -> str:
        """Name of a memory inside the model; prefixed, since torch and peft reserve some plain names."""
        return f"koff_{name}"

    # ------------------------------------------------------------------------------------------ add, remove

    def add(
        self,
        domain: str,
        lora: LoraSpec | None,
        kv: KVSpec | KVMemory | None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add a memory. Its rank, targets and slots may differ from the others', and it may lack either part.

        Args:
            domain: Name of the domain.
            lora: Adapter of the domain; None for none.
            kv: Options of a fresh KV memory, or a filled one, which is taken as it is; None for none.
            weights: Matrices of the adapter, named as the method `weights` names them; they stay frozen. None for a
                fresh adapter, to be trained.

        Raises:
            KoffError: The name is unsafe or taken, or a part does not fit the backbone. Nothing is changed then.
        """
        check_name(domain)
        if domain in self.names:
            raise KoffError(f"there is a memory {domain!r} already: remove it first, or give this one another name")
        name = SHARED if self.shared else domain
        if name in self._lora and (weights is not None or isinstance(kv, KVMemory)):
            raise KoffError("the domains of this bank share one memory: it takes no further one")
        if name not in self._lora:
            if lora is not None:
                lora = replace(lora, layers=shortest(placed(lora.layers, self.depth, "lora.layers"), self.depth))
            paths = self.paths(lora)
            check_fit({path: self.model.get_submodule(path) for path in paths}, lora and lora.rank, weights)
            if kv is not None:
                self._attach_slots(self.key(name), kv)
            for path in paths:
                pair = None if weights is None else (weights[f"{path}.lora_A.weight"], weights[f"{path}.lora_B.weight"])
                self._linear(path).add(self.key(name), lora.rank, lora.alpha / lora.rank, pair)
            self._lora[name], self._marks[self.key(name)] = lora, Mark()
        self.domains.append(domain)
        self.names[domain] = name

    def remove(self, domain: str) -> None:
        """Remove a memory and free its tensors; a shared one goes with the last domain that reads it.

        Raises:
            KoffError: There is no such memory.
        """
        self._check_known([domain])
        self.domains.remove(domain)
        name = self.names.pop(domain)
        if name in self.names.values():
            return
        del self._lora[name]
        for linear in self._linears.values():
            linear.remove(self.key(name))
        if self.key(name) in self.kv:
            del self.kv[self.key(name)]
        self._marks.pop(self.key(name)).gone = True
        self.routes.forget()

    def paths(self, lora: LoraSpec | None) -> list[str]:
        """Paths of the linears that such an adapter hangs on."""
        if lora is None:
            return []
        layers = placed(lora.layers, self.depth, "lora.layers")
        return [path for path in self._paths if path.rpartition(".")[2] in lora.targets and layer_of(path) in layers]

    def _linear(self, path: str) -> RoutedLinear:
        """The linear at `path`, wrapped to carry adapters if it is not yet."""
        if path not in self._linears:
            parent, _, child = path.rpartition(".")
            self._linears[path] = RoutedLinear(self.model.get_submodule(path), self._in_force).eval()
            setattr(self.model.get_submodule(parent), child, self._linears[path])
        return self._linears[path]

    def _attach_slots(self, key: str, kv: KVSpec | KVMemory) -> None:
        memory = kv.to(self.model.device) if isinstance(kv, KVMemory) else self._fresh_slots(kv)
        memory.check_shapes(kv_shapes(self.model))
        if not self.kv:
            self.model.set_attn_implementation("koff")
        for layer, attention in enumerate(attention_modules(self.model)):
            if layer in memory.layers:  # the others stay on the plain path of attention
                attention.koff_memory = partial(self.read, layer)
        self.kv[key] = memory

    def _fresh_slots(self, kv: KVSpec) -> KVMemory:
        layers = placed(kv.layers, self.depth, "kv.layers")
        shapes = [shape if layer in layers else None for layer, shape in enumerate(kv_shapes(self.model))]
        with self.model.device:
            memory = KVMemory(shapes, kv.slots, kv.frozen_first)
        if kv.init == "normal":
            memory.fill_normal_(kv.std)
        return memory

    # ---------------------------------------------------------------------------------------------- placement

    @contextmanager
    def closed(self, part: Part, layer: int | None = None) -> Iterator[None]:
        """Inside the block no row reads its adapters (or its slots) in one layer, or (None) in all layers.

        Call `activate` or open a `scope` inside the block: routes from before it may have cached what is closed.
        """
        linears, attentions = [], []
        if part == "lora":
            linears = [linear for path, linear in self._linears.items() if layer in (None, layer_of(path))]
        else:
            modules = attention_modules(self.model)
            attentions = [m for m in (modules if layer is None else [modules[layer]]) if "koff_memory" in vars(m)]
        scalings = [linear.scaling for linear in linears]
        reads = [vars(attention).pop("koff_memory") for attention in attentions]
        for linear in linears:
            linear.scaling = {}
        try:
            yield
        finally:
            for linear, scaling in zip(linears, scalings, strict=True):
                linear.scaling = scaling
            for attention, read in zip(attentions, reads, strict=True):
                attention.koff_memory = read

    def keep_layers(self, part: Part, layers: Sequence[int]) -> None:
        """Delete the adapters (or the slots) of all memories in all other layers."""
        if part == "lora":
            for path, linear in self._linears.items():
                if layer_of(path) not in layers:
                    for name in self._lora:
                        linear.remove(self.key(name))
            for name, spec in self._lora.items():
                here = [layer for layer in placed(spec.layers, self.depth) if layer in layers] if spec else []
                self._lora[name] = spec and replace(spec, layers=shortest(here, self.depth))
        else:
            for memory in self.kv.values():
                memory.keep_layers(layers)
            for layer, attention in enumerate(attention_modules(self.model)):
                if layer not in layers:
                    vars(attention).pop("koff_memory", None)
        self.routes.forget()

    # ------------------------------------------------------------------------------------------------- read

    @property
    def routes(self) -> Routes:
        """The routes in force in this thread."""
        return self._in_force.value

    def activate(self, domains: Sequence[str | None]) -> None:
        """Let row b of the following forwards read the memory of domains[b]; None = no memory.

        It holds until the next call: inside of a `scope` for this thread, else for all. Training needs the latter: with
        activation checkpointing the backward, which may run in another thread, computes layers again and reads the
        routes. Without gradients the rows' matrices and slots are stacked once, in the first forward, and cached until
        the next call. Changes in place are noticed; if a memory's tensors were moved or replaced, call it again.

        Raises:
            KoffError: A domain that has no memory here.
        """
        self._in_force.set(self.routes_of(domains))

    def routes_of(self, domains: Sequence[str | None]) -> Routes:
        """The routes by which row b reads the memory of domains[b]; to be put in force by `scope`."""
        self._check_known([domain for domain in domains if domain is not None])
        keys = [None if d is None else self.key(self.names[d]) for d in domains]
        present = tuple(dict.fromkeys(key for key in keys if key is not None))  # in order of appearance
        places = {key: place for place, key in enumerate(present)} | {None: -1}
        marks = [self._marks[key] for key in present]
        return Routes(present, marks, [places[key] for key in keys], self.model.device)

    def scope(self, routes: Routes) -> AbstractContextManager[None]:
        """Inside the block, in this thread alone, rows read by `routes`; afterwards by those in force before."""
        return self._in_force.scope(routes)

    def off(self) -> AbstractContextManager[None]:
        """Inside the block, in this thread alone, no row reads a memory."""
        return self.scope(Routes())

    def _check_known(self, domains: Sequence[str]) -> None:
        unknown = sorted({str(d) for d in domains if d not in self.names})
        if unknown:
            known = f"domains with one: {', '.join(self.domains)}" if self.domains else "there is none at all"
            raise KoffError(f"no memory for domain {', '.join(unknown)}; {known}")

    def read(self, layer: int) -> LayerMemory | None:
        """The KV memories of the current rows at one layer."""
        routes = self.routes
        return routes.cached(layer, lambda: self._slots(routes, layer)) if routes.names else None

    def _slots(self, routes: Routes, layer: int) -> tuple[LayerMemory | None, list[Tensor]]:
        """What `read` returns, and the tensors that it is made of: as `Routes.cached` wants it."""
        names = routes.names
        memories = [self.kv[name] if name in self.kv and layer in self.kv[name].layers else None for name in names]
        slots = read_memories([None if row < 0 else memories[row] for row in routes.order], layer)
        parts = [part for m in memories if m is not None for part in (m.sink_key, m.sink_value, m.key, m.value)]
        return slots, [part[layer] for part in parts]

    # ---------------------------------------------------------------------------------------- what it holds

    def lora(self, domain: str) -> LoraSpec | None:
        """The adapter of a domain."""
        self._check_known([domain])
        return self._lora[self.names[domain]]

    def slots(self, domain: str) -> KVMemory | None:
        """The KV memory of a domain."""
        self._check_known([domain])
        key = self.key(self.names[domain])
        return self.kv[key] if key in self.kv else None  # noqa: SIM401 (a ModuleDict has no get)

    def weights(self, domain: str) -> dict[str, Tensor]:
        """Matrices of a domain's adapter: `<module path>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]."""
        self._check_known([domain])
        name = self.key(self.names[domain])
        own = {path: linear for path, linear in self._linears.items() if name in linear.scaling}
        return {
            f"{path}.{half}.weight": getattr(linear, half)[name].weight.detach()
            for path, linear in own.items()
            for half in ("lora_A", "lora_B")
        }

    def lora_parameters(self, domain: str | None = None) -> list[nn.Parameter]:
        """Adapter parameters of one domain, or of all."""
        names = dict.fromkeys(self.key(self.names[d]) for d in ([domain] if domain else self.domains))
        linears = [self._linears[path] for path in self._paths if path in self._linears]  # in the model's order
        parts = [part for linear in linears for part in (linear.lora_A, linear.lora_B)]
        return [p for part in parts for name in names if name in part for p in part[name].parameters()]

    def kv_parameters(self, domain: str | None = None) -> list[nn.Parameter]:
        """KV parameters of one domain, or of all; the frozen slots are buffers."""
        names = dict.fromkeys(self.key(self.names[d]) for d in ([domain] if domain else self.domains))
        return [p for name in names if name in self.kv for p in self.kv[name].parameters()]

    def sizes(self, domain: str) -> dict[tuple[Part, int], int]:
        """Parameters of a domain's memory by part and layer; `size` is their sum."""
        found: dict[tuple[Part, int], int] = {}
        for name, weight in self.weights(domain).items():
            place: tuple[Part, int] = "lora", layer_of(name)
            found[place] = found.get(place, 0) + weight.numel()
        if (slots := self.slots(domain)) is not None:
            found |= {("kv", layer): sum(part.numel() for part in slots.layer(layer)) for layer in slots.layers}
        return found

    def size(self, domain: str) -> int:
        """Parameters that a domain's memory adds to the model, the frozen KV slot included, since it is stored too."""
        return sum(self.sizes(domain).values())
