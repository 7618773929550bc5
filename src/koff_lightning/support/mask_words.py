"""How reports name the kinds of unit, and the lines in which they give the sparsity of a mask."""

from collections.abc import Mapping
from typing import Any

KIND_NAMES = {"channel": "FFN neurons", "kv_group": "kv groups"} | {
    f"{linear}_channel": f"{linear} channels" for linear in ("gate", "up", "down", "q", "k", "v", "o")
}


def sparsity_lines(sparsity: Mapping[str, Any]) -> list[str]:
    """The nominal sparsity, that of each type or kind of unit, and the physical sparsity, which old artifacts lack.

    Args:
        sparsity: As `results.json` and `koff.json` have it.
    """
    ffn, attention = (f"{100 * sparsity[name]:.2f} %" for name in ("ffn", "attention"))
    parts = f"by type: {ffn} of FFN neurons, {attention} of kv groups, in parameters"
    kinds = sparsity.get("by_kind", {})
    if any(kind.endswith("_channel") for kind in kinds):
        parts = "by kind: " + ", ".join(f"{100 * share:.2f} % of {KIND_NAMES[kind]}" for kind, share in kinds.items())
    share = {name: f"{100 * sparsity[name]:.2f} %" for name in ("body", "total", "units")}
    lines = [
        f"sparsity    {share['body']} of body, {share['total']} of total, {share['units']} of prunable units "
        f"(target: {100 * sparsity['target']:g} % of {sparsity['denominator']})",
        f"            {parts}",
    ]
    if (gone := sparsity.get("physical")) is not None:
        lines.append(
            f"            nominal, closed gates at their price; physically gone: {100 * gone['body']:.2f} % of body, "
            f"{100 * gone['total']:.2f} % of total ({gone['parameters']:,} parameters)"
        )
    return lines
