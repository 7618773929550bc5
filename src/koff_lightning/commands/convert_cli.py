"""`koff convert`: an artifact in other programs' formats."""

from typing import Literal


def gguf(folder: str, *, out: str, type_: Literal["f32", "f16", "q8_0"] = "f16", overwrite: bool = False) -> None:
    """Write an exported model as GGUF files for llama.cpp: the backbone, and a LoRA adapter for each domain.

    Args:
        folder: Folder that `koff export` wrote.
        out: Folder to write; a README in it tells the commands of llama-server.
        type_: How weights are kept. Where their rows are no multiple of 32, `q8_0` keeps them as `f16`.
        overwrite: Replace GGUF files that are there.
    """
    from koff_lightning.artifact.to_gguf import to_gguf

    form = to_gguf(folder, out, type_, overwrite)
    print(f"wrote {out}: llama.cpp's architecture {form.arch}, weights {type_}; README.md there tells the commands")
