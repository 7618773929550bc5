"""vLLM as an engine (serving/engine.py): for GPUs and many users, batches and caches are vLLM's own.

Each memory is copied when it is taken up, and looked at: what was checked is what is read, and an answer under way ends
with what it began with, whatever becomes of the artifact. LoRA goes vLLM's own way, slots through the connector; the
tokens in the places of slots are put before a prompt here, and nobody else sees them.
"""

import asyncio
import itertools
import logging
import os
import shutil
import weakref
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from koff_lightning.artifact.folder import MEMORIES, Manifest, verify
from koff_lightning.artifact.memory_files import check_memories, read_memory
from koff_lightning.backbone import end_tokens
from koff_lightning.kv_memory import check_one_rope
from koff_lightning.listed_files import BACKBONE, CARD
from koff_lightning.loading import load_tokenizer
from koff_lightning.serving.engine import Ending, Engine, Failed, Held, Options, Piece, Token, Who
from koff_lightning.serving.vllm.slots import FOLDER, KEY, check_layers, salt_of, with_places
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import hash_file

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
MOST_LORAS = 16  # in one batch; rows of more wait
_CONNECTOR = {"kv_connector": "KoffMemories", "kv_role": "kv_consumer"}
_log = logging.getLogger(__name__)


class VllmEngine(Engine):
    """An engine over vLLM's `AsyncLLM`.

    Args:
        folder: The artifact.
        rows: Most texts that are continued together.
        dtype: Dtype of the backbone; by default as exported.
        options: More of vLLM's own, by the names of its `AsyncEngineArgs`.

    Raises:
        KoffError: vLLM is not installed, or the artifact is not sound.
    """

    scores = False  # with a memory vLLM tells no log-probabilities of a prompt

    def __init__(self, folder: Path, rows: int = 128, dtype: str | None = None, **options: Any) -> None:
        check_installed()
        super().__init__(folder, verify(folder, backbone=False))
        check_memories(folder, self._manifest)
        self.tokenizer = load_tokenizer(str(folder / BACKBONE))
        self._config = self._manifest.form.read_config(folder / BACKBONE, self._manifest.base["family"])
        check_one_rope(self._config)
        self.vocabulary = self._config.vocab_size
        self._ends = _ends(folder / BACKBONE, self._config)
        self._work = Path(mkdtemp(prefix="koff-vllm-"))
        self._clean = weakref.finalize(self, shutil.rmtree, self._work, ignore_errors=True)
        self._copies, self._numbers = itertools.count(), itertools.count(1)
        self._loras: dict[str, Any] = {}  # name of a copy -> vLLM's request of its adapter
        self._rank = _rank_for([about["rank"] for about in self._manifest.domains.values()])
        self._under_way = 0
        self._closed = False
        for name, about in self._manifest.domains.items():
            self._held[name] = self._copied(name, about["card_sha256"], self._manifest)
        self._llm = _started(self._settings(rows, dtype, options))
        self._context = self._llm.model_config.max_model_len

    def _settings(self, rows: int, dtype: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """What vLLM is started with."""
        adapted = len(self._loras)
        lora = {"enable_lora": True, "max_loras": min(adapted, MOST_LORAS), "max_lora_rank": self._rank}
        return {
            "model": str(self.folder / BACKBONE),
            "dtype": dtype or self._manifest.dtype,
            "max_num_seqs": rows,
            "disable_sliding_window": True,  # the context ends where it would begin: slots must stay in sight
            "generation_config": "vllm",  # how to sample and where to end is said with every request
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "kv_transfer_config": _CONNECTOR | {"kv_connector_extra_config": {FOLDER: str(self._work)}},
            **(lora if adapted else {}),
            **options,
        }

    @property
    def load(self) -> tuple[int, int]:
        """Texts under way; which of them wait is vLLM's affair."""
        return self._under_way, 0

    @property
    def alive(self) -> bool:
        """Whether vLLM's processes are."""
        return not self._llm.errored

    # ------------------------------------------------------------------------------------------------ answers

    async def stream(
        self, ids: list[int], memory: str | None, options: Options, who: Who | None = None
    ) -> AsyncIterator[Piece]:
        """Let vLLM continue a text, and give what comes without the end token. Turns are vLLM's own affair."""
        async with self._reading(memory) as held:
            if self._closed:
                raise Ending("the server is ending")
            prompt = tuple(Token(token) for token in ids) if options.echo else None
            if options.max_tokens == 0:
                yield Piece((), "length", prompt)
                return
            self._under_way += 1
            try:
                async for output in self._come(ids, held, options):
                    piece = _piece(output.outputs[0], options, self._ends, prompt)
                    prompt = None
                    yield piece
            finally:
                self._under_way -= 1

    def _come(self, ids: list[int], held: Held | None, options: Options) -> AsyncIterator[Any]:
        """What vLLM makes of a request."""
        prompt: dict[str, Any] = {"prompt_token_ids": with_places(ids, held.slots if held else 0)}
        extra = None
        if held is not None:
            prompt["cache_salt"] = salt_of(held.name, held.sha256)
            extra = {"kv_transfer_params": {KEY: held.name}}
        name = f"koff-{next(self._copies)}"
        parameters, lora = _sampling(options, self._ends, extra), self._loras.get(held.name) if held else None
        return _failing(self._llm.generate(prompt, parameters, name, lora_request=lora))

    # ----------------------------------------------------------------------------------------------- memories

    async def _take_up(self, domain: str, sha256: str, manifest: Manifest) -> Held:
        held = await asyncio.to_thread(self._copied, domain, sha256, manifest)
        if (lora := self._loras.get(held.name)) is not None:
            try:
                await self._llm.add_lora(lora)  # what does not fit is found out here, not in an answer
            except Exception:
                await self._drop(held)
                raise
        return held

    def _copied(self, domain: str, sha256: str, manifest: Manifest) -> Held:
        """Copy a memory and look at the copy.

        Raises:
            KoffError: It cannot be used here.
        """
        copy = self._work / f"{domain[:40]}-{next(self._copies)}"
        try:
            shutil.copytree(self.folder / MEMORIES / domain, copy)
            if hash_file(copy / CARD) != sha256:
                raise KoffError(f"{self.folder / MEMORIES / domain / CARD} is not the one in the artifact's manifest")
            card, weights, slots = read_memory(copy, self._config.num_hidden_layers, manifest)
            if slots is not None:
                check_layers(slots, self._config)
            rank = card.lora["rank"] if weights else 0
            if rank > self._rank:
                raise KoffError(f"its LoRA has rank {rank}, this server made room for {self._rank}: start it again")
        except (OSError, KoffError) as error:
            shutil.rmtree(copy, ignore_errors=True)
            raise KoffError(str(error)) from error
        if weights:
            self._loras[copy.name] = _lora(copy, next(self._numbers))
        return Held(copy.name, sha256, slots.slots if slots else 0)

    async def _drop(self, held: Held) -> None:
        """Let vLLM free a memory."""
        if self._closed:
            return
        lora = self._loras.pop(held.name, None)
        if lora is not None:
            try:
                await self._llm.remove_lora(lora.lora_int_id)
            except Exception as error:  # of an engine that has died: who waits for an answer is told `Failed`
                _log.warning("vLLM did not let go of the LoRA %s (%r)", lora.lora_name, error)
        shutil.rmtree(self._work / held.name, ignore_errors=True)

    async def close(self) -> None:
        """End vLLM's processes."""
        self._closed = True
        await asyncio.to_thread(self._llm.shutdown)
        self._clean()


def check_installed() -> None:
    """Raise KoffError where vLLM is not."""
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise KoffError(
            "vLLM is not installed, and wants an environment of its own: in it, pip install --no-deps . in a clone of "
            "koff-lightning (docs/vllm.md)"
        )


def _started(settings: dict[str, Any]) -> Any:
    """Start vLLM.

    Raises:
        KoffError: It does not start.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing is told to anybody
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise KoffError(f"vLLM does not start ({reason[:300]}); its own log has the rest") from error


def _rank_for(ranks: list[int | None]) -> int:
    """The least rank that vLLM makes room for and that holds all of these."""
    most = max((rank or 0 for rank in ranks), default=0)
    fitting = [rank for rank in RANKS if rank >= most]
    if not fitting:
        raise KoffError(f"vLLM takes LoRA up to rank {RANKS[-1]}, a memory has {most}: serve it with --engine own")
    return fitting[0] if most else 0


def _lora(folder: Path, number: int) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(folder.name, number, str(folder))


def _ends(backbone: Path, config: Any) -> list[int]:
    """The tokens that end a text, as `generate` has them."""
    from transformers import GenerationConfig

    try:
        given = GenerationConfig.from_pretrained(backbone).eos_token_id
    except OSError:  # it has none of its own
        given = config.eos_token_id
    return end_tokens(given)


def _sampling(options: Options, ends: list[int], extra: dict[str, Any] | None) -> Any:
    """The same in vLLM's words."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        max_tokens=options.max_tokens,
        logprobs=options.logprobs,
        ignore_eos=True,  # the ends are said below
        stop_token_ids=[] if options.ignore_end else ends,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra,
    )


async def _failing(come: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """What comes, where vLLM's own faults are `Failed`."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        async for output in come:
            if output.outputs[0].finish_reason in ("error", "abort"):
                raise Failed("the engine could not answer; its log says why")
            yield output
    except (EngineDeadError, EngineGenerateError) as error:
        raise Failed(f"the engine failed ({type(error).__name__})") from error


def _piece(came: Any, options: Options, ends: list[int], prompt: tuple[Token, ...] | None) -> Piece:
    """A part of an answer, without an end token."""
    ids, finish = list(came.token_ids), came.finish_reason
    if finish == "stop" and ids and ids[-1] in ends:
        ids.pop()
    tokens = [Token(token) for token in ids]
    if options.logprobs is not None:
        tokens = [_described(token, came.logprobs[at], options.logprobs) for at, token in enumerate(ids)]
    return Piece(tuple(tokens), finish, prompt)


def _described(token: int, found: Mapping[int, Any], count: int) -> Token:
    """A token with its log-probability and the likeliest ones at its place."""
    best = sorted(found.items(), key=lambda entry: entry[1].rank)[:count]
    return Token(token, found[token].logprob, tuple((other, about.logprob) for other, about in best))
