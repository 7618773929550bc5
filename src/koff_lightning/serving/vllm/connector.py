"""KV memories for vLLM, chosen per request: a connector that only loads.

    --kv-transfer-config '{"kv_connector": "KoffMemories", "kv_role": "kv_consumer",
                           "kv_connector_extra_config": {"koff_memories": "ARTIFACT/memories"}}'

A request names its memory in kv_transfer_params, begins with a token for each slot, and has the memory's cache salt
(slots.py). What cannot be done for one request fails that request and says why in the log: an exception would end the
engine, and an answer without the memory would be a wrong one.
"""

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index

from koff_lightning.artifact.memory_files import read_memory
from koff_lightning.serving.vllm.slots import FOLDER, Held, asked, check_layers, find, inv_freq, is_salt, placed
from koff_lightning.support.errors import KoffError

_MOST = 64  # memories that a worker keeps
_log = logging.getLogger("vllm.koff")


@dataclass
class Load:
    """Slots to write into the blocks of a request.

    Args:
        held: The memory; None lets the request fail.
        first: Slot from which on they are missing.
        end: Slot behind the last one.
        blocks: Blocks of the request, in the order of its tokens.
    """

    held: Held | None
    first: int
    end: int
    blocks: list[int] = field(default_factory=list)


@dataclass
class Loads(KVConnectorMetadata):
    """What a step of the engine has to load."""

    loads: list[Load] = field(default_factory=list)


class KoffMemories(KVConnectorBase_V1, SupportsHMA):
    """One of these stands beside the scheduler, one in each worker."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        folder = self._kv_transfer_config.get_from_extra_config(FOLDER, None)
        if folder is None or not Path(folder).is_dir():
            raise KoffError(f"kv_connector_extra_config wants {FOLDER!r}, a folder of memories; got {folder!r}")
        if kv_cache_config is not None and len(kv_cache_config.kv_cache_groups) > 1:
            raise KoffError(
                "memories need layers that all see the whole text: keep --max-model-len within the sliding window, or "
                "give --disable-sliding-window"
            )
        self._folder, self._config = Path(folder), vllm_config.model_config.hf_config
        self._dtype: torch.dtype = vllm_config.model_config.dtype  # of keys before a cache of 8 bits scales them
        self._block: int = vllm_config.cache_config.block_size
        self._salted: bool = vllm_config.cache_config.enable_prefix_caching
        self._freq = inv_freq(self._config)
        self._due: dict[str, Load] = {}  # request -> what is to be loaded once its blocks are known
        self._told: dict[str, Load] = {}  # request -> what was found about it before
        self._kept: OrderedDict[str, list[list[Tensor]]] = OrderedDict()  # salt -> tensors of each layer
        self._failed: set[int] = set()  # blocks

    # ------------------------------------------------------------------------------------ beside the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens from `num_computed_tokens` on are slots."""
        before = self._told.get(request.request_id)
        try:
            if before is not None and before.held is None:
                raise KoffError("it was refused before")
            held = self._wanted(request)
        except (KoffError, OSError) as error:
            return self._refused(request, num_computed_tokens, error), False
        if held is None:
            return 0, False
        count = max(held.slots - num_computed_tokens, 0)
        self._told[request.request_id] = Load(held, held.slots - count, held.slots)
        return count, False

    def _wanted(self, request: Any) -> Held | None:
        """The memory that a request reads.

        Raises:
            KoffError: It cannot be read.
        """
        name = asked(request.kv_transfer_params)
        if name is None:
            if is_salt(request.cache_salt):
                raise KoffError("it has a memory's cache_salt, and names none in kv_transfer_params")
            return None
        held = find(self._folder, name)
        if self._salted and request.cache_salt != held.salt:
            raise KoffError(f"memory {name!r} wants cache_salt {held.salt!r}; got {request.cache_salt!r}")
        if request.num_prompt_tokens <= held.slots:
            raise KoffError(f"memory {name!r} wants {held.slots} tokens in the places of its slots, and then the text")
        if request.sampling_params is not None and request.sampling_params.prompt_logprobs is not None:
            raise KoffError("prompt_logprobs are not told with a memory: vLLM would leave the memory out")
        return held

    def _refused(self, request: Any, computed: int, error: Exception) -> int:
        """Let a request fail: one token is promised that will not come."""
        can_fail = request.num_tokens - computed > 1
        if request.request_id not in self._told:  # while it waits, the scheduler asks again and again
            what = "fails" if can_fail else "is ANSWERED WITHOUT A MEMORY"
            _log.error("request %s %s: %s", request.request_id, what, error)
        if not can_fail:
            return 0
        request.skip_reading_prefix_cache = False  # with it nothing is loaded, so nothing could fail
        if request.sampling_params is not None:
            request.sampling_params.prompt_logprobs = None  # with LoRA on a CPU they end the engine
        self._told[request.request_id] = Load(None, computed, computed + 1)
        return 1

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note what is to be loaded for a request that has its blocks."""
        told = self._told.pop(request.request_id, None)
        if num_external_tokens and told is not None:
            told.first = told.end - num_external_tokens
            self._due[request.request_id] = told

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """What this step has to load; also for requests that come back after they had lost their blocks."""
        blocks = {request.req_id: request.block_ids[0] for request in scheduler_output.scheduled_new_reqs}
        again = scheduler_output.scheduled_cached_reqs
        for name, ids in zip(again.req_ids, again.new_block_ids, strict=True):
            if name in again.resumed_req_ids and ids is not None:
                blocks[name] = ids[0]
        found = Loads()
        for name in [name for name in self._due if name in blocks]:
            load = self._due.pop(name)
            load.blocks = list(blocks[name])
            found.loads.append(load)
        return found

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """Nothing is kept of a request."""
        self._told.pop(request.request_id, None)
        self._due.pop(request.request_id, None)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        """Nothing is kept of a request."""
        return self.request_finished(request, [])

    # ------------------------------------------------------------------------------------------ in a worker

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write the slots that this step needs, before the model runs."""
        for load in self._get_connector_metadata().loads:
            try:
                if load.held is None:
                    raise KoffError("it was refused before")
                self._write(load, forward_context.no_compile_layers)
            except Exception as error:  # whatever is wrong with one memory, the other requests go on
                if load.held is not None:
                    _log.error("memory %s was not loaded: %s", load.held.name, error)
                places = range(load.first // self._block, -(-load.end // self._block))
                self._failed |= {load.blocks[place] for place in places}

    def _write(self, load: Load, layers: dict[str, Any]) -> None:
        """Put slots into the cache of each layer by its own way of writing, which knows how the cache is laid out."""
        places = torch.arange(load.first, load.end)
        slots = torch.tensor(load.blocks)[places // self._block] * self._block + places % self._block
        layers = {name: layer for name, layer in layers.items() if hasattr(layer, "kv_cache_torch_dtype")}
        pairs = self._tensors(load.held)
        for name, layer in layers.items():
            cache = layer.kv_cache
            key, value = (part[load.first : load.end].to(cache.device) for part in pairs[extract_layer_index(name)])
            if key.shape[1] != layer.num_kv_heads or key.shape[2] != layer.head_size:
                raise KoffError(f"{name} has {layer.num_kv_heads} key-value heads here, the memory {key.shape[1]}")
            if not hasattr(layer.impl, "do_kv_cache_update"):
                raise KoffError(f"{type(layer.impl).__name__} cannot write slots: give --attention-backend FLASH_ATTN")
            layer.impl.do_kv_cache_update(layer, key, value, cache, slots.to(cache.device))

    def _tensors(self, held: Held) -> list[list[Tensor]]:
        """The keys and values of a memory's layers that this rank holds, as they were when the request came."""
        if held.salt not in self._kept:
            if find(self._folder, held.name) != held:
                raise KoffError("it was replaced since the request came")
            _, _, memory = read_memory(self._folder / held.name, self._config.num_hidden_layers)
            check_layers(memory, self._config)
            rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            self._kept[held.salt] = placed(memory, self._freq, self._dtype, rank, size)
            if len(self._kept) > _MOST:
                self._kept.popitem(last=False)
        self._kept.move_to_end(held.salt)
        return self._kept[held.salt]

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks that were not written; vLLM fails the requests that need them."""
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All is loaded when the model starts."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""
