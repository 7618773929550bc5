"""What the kinds of unit are called, and how the two counts of a mask are told apart."""

from collections.abc import Mapping
from typing import Any

KIND_NAMES = {"channel": "FFN neurons", "kv_group": "kv groups"} | {
    f"{linear}_channel": f"{linear} channels" for linear in ("gate", "up", "down", "q", "k", "v", "o")
}


def nominal_and_physical(sparsity: Mapping[str, Any]) -> list[str]:
    """The two counts of a mask apart, in lines under the first of them; none for an artifact older than the second.

    Args:
        sparsity: As `results.json` and `koff.json` have it.
    """
    if (gone := sparsity.get("physical")) is None:
        return []
    lines = [
        f"            nominal, closed gates at their price; physically gone: {100 * gone['body']:.2f} % of body, "
        f"{100 * gone['total']:.2f} % of total ({gone['parameters']:,} parameters)"
    ]
    kinds = sparsity.get("by_kind", {})
    if any(kind.endswith("_channel") for kind in kinds):
        shares = ", ".join(f"{kind} {100 * share:.2f} %" for kind, share in kinds.items())
        lines.append(f"            nominal by kind: {shares}")
    return lines
