"""Names of a layer's linears and of the units that can be removed from them; without torch."""

from koff_lightning.support.errors import KoffError

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = ("channel", "kv_group")  # whole units: an FFN neuron, a kv head with its query heads

FFN = ("mlp", ("gate_proj", "up_proj"), "down_proj")
ATTENTION = ("self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj")
# Kind of channel (gate_channel, k_channel ...) -> the block and the linear whose output channels have a gate each.
LINEAR_OF = {
    f"{name.removesuffix('_proj')}_channel": (block, name)
    for block in (FFN, ATTENTION)
    for name in (*block[1], block[2])
}
CHANNELS = tuple(LINEAR_OF)
HALVES = ("gate_channel", "up_channel")  # a neuron is the product of the two, so closing either closes it
NEURONS = (KINDS[0], *HALVES)  # kinds that have one unit for each neuron, in the order of neurons


def check_kinds(kinds: tuple[str, ...] | list[str]) -> None:
    """Raise KoffError for an unknown kind of unit, for none at all, and for two that own the same weights."""
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
