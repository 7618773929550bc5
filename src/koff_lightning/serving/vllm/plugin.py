"""The entry point `vllm.general_plugins`: what every process of vLLM has to know before it loads one of our models."""

import logging

TESTED = "0.32"  # releases that begin so
CONNECTOR = "KoffMemories"
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_log = logging.getLogger("vllm.koff")  # vLLM shows what is logged below its own name


def register() -> None:
    """Make the koff_* model types, the config of layout `deci` and the connector known; called in every process."""
    import vllm
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from koff_lightning.artifact.modeling_koff import KoffDeciConfig  # makes the koff_* configs known, too

    if untried := said_of(vllm.__version__):
        _log.warning(untried)
    here = __name__.rpartition(".")[0]
    AutoConfig.register(KoffDeciConfig.model_type, KoffDeciConfig, exist_ok=True)
    for family in _FAMILIES:
        ModelRegistry.register_model(f"Koff{family}ForCausalLM", f"{here}.models:Koff{family}ForCausalLM")
    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, f"{here}.connector", CONNECTOR)
    spare_bare_rows(PunicaWrapperCPU)


def said_of(release: str) -> str | None:
    """One line about a release of vLLM that was not tried; None for one that was."""
    if f"{release}.".startswith(f"{TESTED}."):
        return None
    return f"koff-lightning was not tried with vLLM {release}, only with {TESTED}: compare its answers"


def spare_bare_rows(wrapper: type) -> None:
    """Let rows without LoRA have none where adapters are computed by plain torch, as on a CPU.

    Such a row has -1 for the number of its adapter. Taken as an index, that is the last place for an adapter, and
    whatever adapter is or was in it would be added to rows that asked for none, without a word.

    Args:
        wrapper: vLLM's class for it; nothing is done to one that is mended already.
    """
    stock = wrapper._apply_shrink
    if getattr(stock, "koff", False):
        return

    def shrink(self, y, x, w_t_all, scale):  # noqa: ANN001, ANN202  (vLLM's signature)
        """Add (x @ w) * scale to y [tokens, rank], and nothing for rows without an adapter."""
        stock(self, y, x, w_t_all, scale)
        bare = self.token_lora_indices < 0  # [tokens]
        y.view(-1, y.shape[-1])[: len(bare)][bare] = 0

    shrink.koff = True
    wrapper._apply_shrink = shrink
