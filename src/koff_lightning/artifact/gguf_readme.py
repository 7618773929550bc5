"""The README beside GGUF files: the commands of a plain llama-server, and what it cannot do."""

import json

from koff_lightning.artifact.decomposed import DecomposedModel

_HEAD = """# {name} for llama.cpp

Written by `koff convert gguf` from an artifact of layout `{layout}`: `model.gguf` (weights {kind}) is the pruned
backbone{merged}{adapters}.

    llama-server -m model.gguf{options}

Any client of OpenAI's protocol talks to it; by itself it answers without a memory.
"""

_LORA = """
## A domain per request

The numbers are the order of `--lora` above. A request names all of them, the others with scale 0:

    curl http://localhost:8080/completion -d '{body}'

`lora` goes with `/v1/completions` and `/v1/chat/completions` too.

| domain | id |
| --- | --- |
{table}
"""

_KV = """
## KV memories

{names} also have learned keys and values ({slots} slots), which a plain llama-server has no place for: without them
these domains answer less well than they were scored. `koff serve ARTIFACT --engine llamacpp --gguf .`, of
`koff-lightning[serve,llamacpp]`, gives them to the same engine.
"""


def readme(model: DecomposedModel, kind: str, adapters: list[str]) -> str:
    """Write the text of the README beside a GGUF export.

    Args:
        model: The model that was written.
        kind: Type of the weights.
        adapters: Domains that have a LoRA file.
    """
    manifest = model.manifest
    text = _HEAD.format(
        name=manifest.base["id"].rpartition("/")[2],
        layout=manifest.layout,
        kind=kind,
        merged=f" with the LoRA of `{manifest.domain}` in its weights" if manifest.domain else "",
        adapters=", and each `DOMAIN.lora.gguf` the LoRA of a domain" if adapters else "",
        options="".join(f" --lora {name}.lora.gguf" for name in adapters)
        + (" --lora-init-without-apply" if adapters else ""),
    )
    if adapters:
        lora = [{"id": i, "scale": float(i == 0)} for i in range(len(adapters))]
        body = json.dumps({"prompt": "Once upon a time", "n_predict": 32, "lora": lora})
        table = "\n".join(f"| {name} | {number} |" for number, name in enumerate(adapters))
        text += _LORA.format(body=body, table=table)
    slots = {name: about["slots"] for name, about in manifest.domains.items() if about["slots"]}
    if slots:
        text += _KV.format(names=", ".join(f"`{n}`" for n in slots), slots=", ".join(map(str, set(slots.values()))))
    return text
