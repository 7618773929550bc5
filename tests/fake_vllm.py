"""What koff_lightning.serving.vllm uses of vLLM: names, and an engine that keeps what it is asked."""

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

CONNECTOR = "vllm.distributed.kv_transfer.kv_connector"


class Base:
    """Of connectors."""

    def __init__(self, vllm_config, role, kv_cache_config):
        self._kv_transfer_config = SimpleNamespace(
            get_from_extra_config=lambda name, default: vllm_config.extra.get(name, default)
        )

    def bind(self, metadata):
        self._get_connector_metadata = lambda: metadata


class Wrapper:
    """Adapters by plain torch, as vLLM computes them on a CPU: a row without one has the index -1."""

    def __init__(self, indices):
        self.token_lora_indices = indices

    def _apply_shrink(self, y, x, w_t_all, scale):
        y += scale * (w_t_all[self.token_lora_indices] @ x[:, :, None])[..., 0]


@dataclass
class Llm:
    """In the place of `AsyncLLM`: gives what `script` says and keeps what it is asked."""

    settings: Any = None
    script: Any = None
    asked: list = field(default_factory=list)
    adapters: list = field(default_factory=list)
    closed: bool = False
    errored: bool = False

    def __post_init__(self):
        self.model_config = SimpleNamespace(max_model_len=512)

    async def generate(self, prompt, parameters, name, lora_request=None):
        self.asked.append((prompt, parameters, lora_request))
        for output in self.script(prompt, parameters):
            yield SimpleNamespace(outputs=[output])

    async def add_lora(self, request):
        self.adapters.append(request.lora_int_id)

    async def remove_lora(self, number):
        self.adapters.remove(number)

    def shutdown(self):
        self.closed = True


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(content)
    return made


def install(monkeypatch, release: str = "0.32.0", cpu: bool = False) -> SimpleNamespace:
    """Let `import vllm` find this; gives what was registered."""
    models, connectors = {}, {}
    llm = Llm()
    registry = SimpleNamespace(register_model=models.__setitem__)
    factory = SimpleNamespace(_registry=connectors)
    factory.register_connector = lambda name, path, kind: connectors.__setitem__(name, (path, kind))
    kinds = {"SCHEDULER": "scheduler", "WORKER": "worker"}

    def start(arguments):
        llm.settings = arguments
        return llm

    dead, failed = type("EngineDeadError", (Exception,), {}), type("EngineGenerateError", (Exception,), {})
    wrapper = type("PunicaWrapperCPU", (Wrapper,), {})
    made = [
        module("vllm", __version__=release, ModelRegistry=registry, SamplingParams=SimpleNamespace),
        module(f"{CONNECTOR}.factory", KVConnectorFactory=factory),
        module(
            f"{CONNECTOR}.v1.base",
            KVConnectorBase_V1=Base,
            KVConnectorMetadata=object,
            KVConnectorRole=SimpleNamespace(**kinds),
            SupportsHMA=object,
        ),
        module(
            "vllm.distributed.parallel_state",
            get_tensor_model_parallel_rank=lambda: 0,
            get_tensor_model_parallel_world_size=lambda: 1,
        ),
        module(
            "vllm.model_executor.models.utils",
            extract_layer_index=lambda name: next(int(part) for part in name.split(".") if part.isdigit()),
        ),
        module("vllm.lora.punica_wrapper.punica_cpu", PunicaWrapperCPU=wrapper),
        module(
            "vllm.lora.request",
            LoRARequest=lambda name, number, path: SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path),
        ),
        module("vllm.sampling_params", RequestOutputKind=SimpleNamespace(DELTA="delta")),
        module("vllm.v1.engine.exceptions", EngineDeadError=dead, EngineGenerateError=failed),
        module("vllm.v1.engine.async_llm", AsyncLLM=SimpleNamespace(from_engine_args=start)),
        module("vllm.engine.arg_utils", AsyncEngineArgs=SimpleNamespace),
        module("vllm.v1.sample.logits_processor", LogitsProcessor=object),
        module("vllm.platforms", current_platform=SimpleNamespace(is_cpu=lambda: cpu)),
    ]
    for one in made:
        parts = one.__name__.split(".")
        for end in range(1, len(parts)):
            parent = ".".join(parts[:end])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, module(parent, __path__=[]))
        monkeypatch.setitem(sys.modules, one.__name__, one)
    sys.modules["vllm"].__path__ = []
    sys.modules["vllm"].__spec__ = SimpleNamespace(name="vllm")  # `find_spec` looks here
    for ours in ("connector", "refusal"):
        monkeypatch.delitem(sys.modules, f"koff_lightning.serving.vllm.{ours}", raising=False)
    return SimpleNamespace(models=models, connectors=connectors, wrapper=wrapper, llm=llm, dead=dead)
