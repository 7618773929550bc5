"""A decomposed model in vLLM: its plugin (layers of unequal width, memories chosen per request) and an engine over it.

Nothing here imports Lightning, PEFT or anything else that vLLM's own environment does not have.
"""
