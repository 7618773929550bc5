"""Refuses what vLLM's own server would answer without a memory, or with an error of the engine: status 400 at once.

    python -m vllm.entrypoints.openai.api_server ... --logits-processors koff_lightning.serving.vllm.refusal:Refusal

It changes no logits; vLLM shows the parameters of a request to such a class before the engine sees them.
"""

from typing import Any

from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import LogitsProcessor

from koff_lightning.serving.vllm.slots import asked
from koff_lightning.support.errors import KoffError


class Refusal(LogitsProcessor):
    """Looks at requests, not at logits."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a misspelt key, and log-probabilities of a prompt that begins with slots.

        Raises:
            ValueError: One line, for the client.
        """
        try:
            memory = asked((sampling_params.extra_args or {}).get("kv_transfer_params"))
        except KoffError as error:
            raise ValueError(str(error)) from error
        if sampling_params.prompt_logprobs is None:
            return
        if memory is not None:
            raise ValueError("prompt_logprobs are not told with a memory: leave them out")
        if current_platform.is_cpu():
            raise ValueError("prompt_logprobs are not told on a CPU, where with LoRA they end the engine")

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: Tensor) -> Tensor:
        """As they are."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Nothing is changed."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """There is none."""
