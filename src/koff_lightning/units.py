"""What the linears of a layer are called, and the units that can be removed from them: names alone, without torch."""

from koff_lightning.support.errors import KoffError

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = ("channel", "kv_group")

FFN = ("mlp", ("gate_proj", "up_proj"), "down_proj")
ATTENTION = ("self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj")
# A kind of channel -> the block and the linear whose output channels are gated one by one: gate_channel, k_channel ...
LINEAR_OF = {f"{name[:-5]}_channel": (block, name) for block in (FFN, ATTENTION) for name in (*block[1], block[2])}
CHANNELS = tuple(LINEAR_OF)
HALVES = ("gate_channel", "up_channel")  # a neuron is the product of the two, so either closes it
NEURONS = (KINDS[0], *HALVES)  # kinds of which each layer has as many units as neurons, in their order


def check_kinds(kinds: tuple[str, ...] | list[str]) -> None:
    """Raise KoffError for a kind of unit that does not exist, for none, and for two that own the same weights."""
    known = (*KINDS, *CHANNELS)
    unknown = [kind for kind in kinds if kind not in known]
    if unknown or not kinds:
        raise KoffError(f"prunable units must be some of {', '.join(known)}; got {', '.join(unknown) or 'none'}")
    for whole, block in zip(KINDS, (FFN, ATTENTION), strict=True):
        inside = [kind for kind in kinds if kind in CHANNELS and LINEAR_OF[kind][0] is block]
        if whole in kinds and inside:
            raise KoffError(
                f"sparsity.units: {whole} owns the weights of {' and '.join(inside)}, which would be counted twice: "
                f"give {whole} or the channels"
            )
