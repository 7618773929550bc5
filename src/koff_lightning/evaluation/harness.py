"""lm-eval over a decomposition: HFLM that reads with one domain's memory, with none, or with the dense model.

    import koff_lightning.evaluation.harness                                     # registers the name "koff"
    model = {"path": "runs/demo/artifact", "domain": "de"}
    lm_eval.simple_evaluate("koff", model, tasks=["koff_cloze_de"], task_manager=bundled_index())

What HFLM does (requests, windows, padding, stopping) stays lm-eval's own, so scores compare with everybody's; only
prompts are encoded as everywhere in this package (`data.encoding`). The slots of a KV memory stand at positions -P..-1
and take nothing from the model's context.

Shapes: B rows, T tokens, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from koff_lightning.artifact.decomposed import DecomposedModel, dense_of
from koff_lightning.backbone import hidden_states
from koff_lightning.data.encoding import encode, encode_and_count, encode_prompt, opening
from koff_lightning.decomposition import Decomposition
from koff_lightning.evaluation.chats import WritesTalks
from koff_lightning.evaluation.lm_ranks import SharesRequests
from koff_lightning.evaluation.lm_scores import MAIN, Scores, plain
from koff_lightning.evaluation.lm_tasks import Loaded, check_room, check_version, quiet
from koff_lightning.evaluation.scored_models import (
    Model,
    check_router,
    domains_of,
    load_model,
    opens_with_start,
    rows_of,
    tokenizer_of,
)
from koff_lightning.support import ranks
from koff_lightning.support.errors import KoffError
from koff_lightning.support.names import AUTO
from koff_lightning.support.wording import nearest

check_version()  # before what may be elsewhere in another release

from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from koff_lightning.evaluation.rolling import TextLikelihood, known_bytes, log_likelihoods, windows_of  # noqa: E402

SEED = 1234  # lm-eval's own, of the few-shot examples


class Reader:
    """One way to read text with a model, as HFLM asks a model: call it for logits, or `generate`.

    Args:
        model: The model whose backbone reads.
        domain: Whose memory every row reads; None for none, "auto" for what the router picks.
        dense: Read with gates and memories off.
    """

    def __init__(self, model: Decomposition | DecomposedModel, domain: str | None, dense: bool = False) -> None:
        self.whole, self.domain, self.dense = model, domain, dense
        self.model: PreTrainedModel = model.backbone

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    @property
    def config(self) -> PreTrainedConfig:
        """Of the backbone; HFLM takes the longest context from it."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the backbone; for lm-eval's files."""
        return self.model.dtype

    def num_parameters(self) -> int:
        """Of the backbone as it lies in memory, without adapters; for lm-eval's files."""
        base = (p for name, p in self.model.named_parameters() if "lora_" not in name)
        return sum(p.numel() for p in base)

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        """`.logits` [B, T, V] for ids [B, T] without padding on the left."""
        if isinstance(self.whole, DecomposedModel):
            return SimpleNamespace(logits=self.whole(input_ids, domains=self.domain).logits)
        return SimpleNamespace(logits=self.model.get_output_embeddings()(self.hidden(input_ids)))

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Last hidden states [B, T, d], of the same."""
        with self._in_force(len(input_ids)):
            return hidden_states(self.model, input_ids=input_ids)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Long [B, T + new], by transformers' `generate`."""
        if isinstance(self.whole, DecomposedModel):
            return self.whole.generate(input_ids, domains=self.domain, **options)
        copies = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
        with self._in_force(len(input_ids) * copies):
            return self.model.generate(input_ids=input_ids, **options)

    @contextmanager
    def _in_force(self, rows: int) -> Iterator[None]:
        """Gates and memories of this way of reading, for so many rows."""
        if isinstance(self.whole, DecomposedModel):
            with self.whole.memories.scope(self.whole.memories.routes_of([self.domain] * rows)):
                yield
            return
        how = ((), None) if self.dense else ([self.domain] * rows, self.whole.hard_gates())
        with self.whole.under(*how):
            yield


@register_model("koff")
class KoffLM(WritesTalks, SharesRequests, HFLM):
    """A decomposition, an artifact, a checkpoint or a dense model, for lm-eval.

    Args:
        path: Folder of an artifact, checkpoint, dense model (hub id, folder, `.gguf`, `koff-tiny`), or a loaded one.
        domain: Whose memory to read; None for none, "auto" for what an artifact's router picks for each request, from
            its context; where a text is scored as a whole, from the text.
        dense: The dense model that the decomposition was made from.
        tokenizer: By default the model's own.
        backbone: Where the backbone of a checkpoint is, if it has moved.
        device: Torch device; by default a GPU if there is one.
        dtype: Dtype of the backbone; by default as it is stored.
        rows: Tokens read at once where a text is scored as a whole (a rolling likelihood); by default as `rows_of`
            says, else `max_length`.
        open_with_start: Begin all windows of a text with the start token, where the tokenizer itself puts it; by
            default as `opens_with_start` says. Not done for a dense model alone.
        options: Further arguments of HFLM: `batch_size`, `max_batch_size`, `max_length`, `softmax_dtype` ...

    Raises:
        KoffError: No such model, no memory of that domain in it, or "auto" in one of several processes.
    """

    def __init__(
        self,
        path: str | Model,
        domain: str | None = None,
        dense: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        backbone: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        rows: int | None = None,
        open_with_start: bool | None = None,
        **options: Any,
    ) -> None:
        known = {*signature(HFLM.__init__).parameters, *signature(KoffLM.__init__).parameters}
        if unknown := sorted(options.keys() - known):  # HFLM would take them for what a loaded model has no use of
            raise KoffError(f"the lm-eval model 'koff' has no argument {unknown[0]!r}.{nearest(unknown[0], known)}")
        model = load_model(str(path), backbone, device, dtype) if isinstance(path, str | Path) else path
        if rows is None and not options.get("max_length"):
            rows = rows_of(path)
        tokenizer = copy.deepcopy(tokenizer or tokenizer_of(model))  # HFLM changes its padding
        options.setdefault("softmax_dtype", "float32")  # a sum of log-likelihoods in bf16 has two or three digits
        with quiet():
            super().__init__(reading(model, domain, dense), tokenizer=tokenizer, **options)
        self._rank, self._world_size = dist.get_rank() if ranks.count() > 1 else 0, ranks.count()
        if self._routes and self._world_size > 1:  # they score in step, and each would ask for other memories
            raise KoffError(f"domain 'auto' is scored in one process, and here are {self._world_size}: name a domain")
        self.rows = min(rows or self.max_length, self.max_length)
        opened = opens_with_start(path) if open_with_start is None else open_with_start
        # With what windows inside of a text begin: as a run's rows; for dense models alone nothing, as in stock HFLM.
        self.opening = opening(tokenizer) if opened and not isinstance(model, PreTrainedModel) else None
        self.broken = 0  # requests whose log-likelihood is no number

    def __repr__(self) -> str:
        return f"KoffLM({getattr(self.model, 'domain', None) or 'no memory'})"

    @property
    def prefix_token_id(self) -> int:
        """What stands before text without a context: the start token, else the end token.

        Raises:
            KoffError: The tokenizer has neither.
        """
        if (found := super().prefix_token_id) is None:
            raise KoffError(
                "this tokenizer has neither a start nor an end token to predict a first token from: name one in "
                'Python, lm_eval.simple_evaluate("koff", {"path": ..., "prefix_token_id": ID}, tasks=[...])'
            )
        return found

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """Ids of a prompt, by `encode_prompt`; where special tokens are declined the text's alone."""
        asked = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if asked is False:
            ids = encode(self.tokenizer, string, add_special_tokens=False)["input_ids"]
        else:
            ids = encode_prompt(self.tokenizer, string)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, T] of prompts, each encoded by `tok_encode`."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        if truncation:
            rows = [row[: self.tokenizer.model_max_length] for row in rows]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """HFLM's own, which puts the start token before the text itself: the text is encoded without one.

        Of an artifact or a checkpoint all windows begin with it, where its run's rows do: see data/packing.py. In one
        process, with batches of a given size, the same windows are scored at less cost: `evaluation.rolling`. Each
        answer knows how many of its text's bytes the tokenizer knows, for tasks that count no others.

        Raises:
            KoffError: The tokenizer does not know most of a task's text.
        """
        texts = [request.args[0] for request in requests]
        if self._routes:
            return self._by_domain(requests, texts, lambda part: self.loglikelihood_rolling(part, disable_tqdm))
        encoded = [encode_and_count(self.tokenizer, text) for text in texts]
        known = known_bytes(texts, [unknown for _, unknown in encoded], [request.task_name for request in requests])
        before, self.add_bos_token = self.add_bos_token, False
        longest, self._max_length = self._max_length, self.rows
        try:
            windows = [windows_of(ids, self.prefix_token_id, self.rows, self.opening) for ids, _ in encoded]
            fixed = isinstance(self.batch_size_per_gpu, int)
            if self.world_size > 1 or self.mixed_precision_dtype is not None or not fixed:
                if self.opening is None:
                    found = super().loglikelihood_rolling(requests, disable_tqdm)
                else:
                    found = self._by_window(windows, disable_tqdm)
                return list(map(TextLikelihood.of, found, known))
        finally:
            self.add_bos_token, self._max_length = before, longest
        reader = self.model if isinstance(self.model, Reader) else None
        hidden = reader.hidden if reader else lambda ids: hidden_states(self.model, input_ids=ids)
        head = (reader.model if reader else self.model).get_output_embeddings()
        found = log_likelihoods(windows, hidden, head, self.batch_size_per_gpu, self.softmax_dtype, disable_tqdm)
        answers = list(map(TextLikelihood.of, found, known))
        for text, value in zip(texts, answers, strict=True):
            self.broken += not math.isfinite(value)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return answers

    def _by_window(self, texts: list[list[Any]], disable_tqdm: bool) -> list[float]:
        """Log-likelihoods of texts by their windows, as HFLM scores those; every rank scores as many."""
        windows = [(None, *window) for text in texts for window in text]
        missing = max(ranks.gather(len(windows))) - len(windows)
        kept, self.logits_cache = self.logits_cache, False  # it takes windows that read the same to predict the same
        try:
            found = iter(self._loglikelihood_tokens(windows + windows[:1] * missing, disable_tqdm))
        finally:
            self.logits_cache = kept
        return [sum(next(found)[0] for _ in text) for text in texts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts, as HFLM does."""
        if self._routes:
            texts = [request.args[0] for request in requests]
            return self._by_domain(requests, texts, lambda part: self.generate_until(part, disable_tqdm))
        check_room(requests, self.max_gen_toks, self.max_length)
        return super().generate_until(requests, disable_tqdm)

    @property
    def _routes(self) -> bool:
        """Whether requests are still to be routed."""
        return getattr(self.model, "domain", None) == AUTO and AUTO not in self.model.whole.domains

    def _by_domain(self, requests: list[Any], texts: list[str], run: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Answers of `run` in the order of the requests, those of one memory asked together."""
        picked = self.model.whole.route(texts)
        answers: dict[int, Any] = {}
        try:
            for self.model.domain in dict.fromkeys(picked):
                places = [place for place, domain in enumerate(picked) if domain == self.model.domain]
                answers |= dict(zip(places, run([requests[place] for place in places]), strict=True))
        finally:
            self.model.domain = AUTO
        return [answers[place] for place in range(len(requests))]

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        if self._routes:
            texts = [context for (context, _), _, _ in requests]
            return self._by_domain(requests, texts, lambda part: self._loglikelihood_tokens(part, *args, **kwargs))
        if (longest := max((len(answer) for _, _, answer in requests), default=0)) > self.max_length:
            raise KoffError(
                f"an answer of {longest} tokens is longer than the {self.max_length} that are read at once: "
                "raise max_length, or leave this task out"
            )
        scores = super()._loglikelihood_tokens(requests, *args, **kwargs)
        self.broken += sum(not math.isfinite(value) for value, _ in scores)  # told later, by all ranks at once
        return scores

    def check_finite(self) -> None:
        """Raise KoffError, on every rank alike, if a log-likelihood since the last call was no finite number."""
        broken, self.broken = int(ranks.total(torch.tensor(self.broken, device=self.device))), 0
        if broken:
            raise KoffError(
                f"{broken} log-likelihoods are not finite, so the scores mean nothing: the weights hold nan or inf, or "
                "their dtype overflows (try dtype float32)"
            )


def reading(model: Model, domain: str | None, dense: bool) -> Reader | PreTrainedModel:
    """What HFLM is given as its model.

    Raises:
        KoffError: There is no such memory, or no dense model at hand.
    """
    known = domains_of(model)
    if domain == AUTO and AUTO not in known:
        check_router(model, getattr(model, "source", "this model"))
    elif domain is not None and domain not in known:
        raise KoffError(f"there is no memory for domain {domain!r}; there is {', '.join(known) or 'none at all'}")
    if isinstance(model, PreTrainedModel):
        return model
    if not dense:
        return Reader(model, domain)
    if isinstance(model, DecomposedModel):
        return dense_of(model)
    return Reader(model, None, dense=True)


def score(lm: KoffLM, tasks: Loaded, num_fewshot: int | None = None, limit: float | None = None) -> Scores:
    """Score tasks, shared out over the ranks; every rank gets the scores. For lm-eval's files use `simple_evaluate`.

    Args:
        lm: The model.
        tasks: As `load_tasks` gives them.
        num_fewshot: Examples before each question; None for what the task says.
        limit: Samples per task, or a share of them below 1.

    Raises:
        KoffError: A log-likelihood that is no finite number.
    """
    _set_examples(tasks, num_fewshot)
    found = evaluate(lm, tasks, limit=limit, log_samples=False)  # on rank 0, elsewhere None
    lm.check_finite()
    table = [found and plain(found["results"])]
    if lm.world_size > 1:
        dist.broadcast_object_list(table, 0, device=lm.device)
    return table[0]


def _set_examples(tasks: Loaded, number: int | None) -> None:
    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (number is not None and own != 0):  # lm-eval's rule: a task that says 0 means it
            task.set_config("num_fewshot", number or 0)
        task.set_fewshot_seed(SEED)


def answers(lm: KoffLM, tasks: Loaded) -> list[float]:
    """Whether each sample of the tasks is answered right, 0 or 1, by the metric that stands in tables; in one process.

    Raises:
        KoffError: A log-likelihood that is no finite number.
    """
    _set_examples(tasks, None)
    with quiet():
        samples = evaluate(lm, tasks)["samples"]
    lm.check_finite()
    rows = [row for name in tasks["tasks"] for row in sorted(samples[name], key=lambda row: row["doc_id"])]
    return [float(row[next(metric for metric in MAIN if metric in row)]) for row in rows]
