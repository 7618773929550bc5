"""The questions about memories, asked of one opened run: what they are worth, where they sit, what has moved there."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from koff_lightning.decomposition import Batch, Decomposition
from koff_lightning.studies.analysis.attention_mass import attention_mass
from koff_lightning.studies.analysis.causal import reinsertion
from koff_lightning.studies.analysis.knockout import knockout
from koff_lightning.studies.analysis.lape import Specialists
from koff_lightning.studies.analysis.memory_use import adapter_norms, promoted_tokens
from koff_lightning.studies.analysis.similarity import similarity
from koff_lightning.studies.analysis.transfer import transfer
from koff_lightning.support.errors import KoffError

if TYPE_CHECKING:
    import pandas as pd

Answer = Callable[[], Mapping[str, "pd.DataFrame"]]


def questions(
    run: str,
    module: Decomposition,
    heldout: Sequence[Batch],
    specialists: Specialists | None,
    tokenizer: PreTrainedTokenizerBase,
    controls: int,
    seed: int,
) -> dict[str, Answer]:
    """Question -> what answers it with tables; each line begins with the name of the run.

    Args:
        run: Its name.
        module: Opened.
        heldout: Held-out text.
        specialists: Specialists of the dense model; None where there are none.
        tokenizer: Tokenizer of the dense model.
        controls: Random sets of neurons beside each one that is put back.
        seed: Seed of these sets.
    """

    def told(**tables: "pd.DataFrame") -> dict[str, "pd.DataFrame"]:
        for table in tables.values():
            table.insert(0, "run", run)
        return tables

    def causal() -> Mapping[str, "pd.DataFrame"]:
        if specialists is None:
            raise KoffError("no neurons are known to be specific")
        found = reinsertion(module, specialists.assigned, specialists.domains, heldout, controls, seed)
        return told(causal=found)

    def with_memory(answer: Answer) -> Answer:
        def asked() -> Mapping[str, "pd.DataFrame"]:
            if not any(module.memories.size(domain) for domain in module.memories.domains):
                raise KoffError("the run has no memories")
            return answer()

        return asked

    def swapped() -> Mapping[str, "pd.DataFrame"]:
        found = transfer(module, heldout)
        return told(transfer=found.bpb.reset_index(), perplexity=found.perplexity.reset_index())

    return {
        "similarity": lambda: told(**similarity(module, heldout)),
        "transfer": with_memory(swapped),
        "knockout": with_memory(lambda: told(knockout=knockout(module, heldout).reset_index())),
        "causal": causal,
        "attention": with_memory(lambda: told(attention=attention_mass(module, heldout))),
        "adapters": with_memory(lambda: told(adapters=adapter_norms(module))),
        "tokens": with_memory(lambda: told(tokens=promoted_tokens(module, heldout, tokenizer))),
    }
