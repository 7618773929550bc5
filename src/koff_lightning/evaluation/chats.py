"""Talks of lm-eval's tasks, as the model's chat template writes them: a program of whoever made the model."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from koff_lightning.data.rendering import Message, render, writing
from koff_lightning.support.errors import KoffError


class WritesTalks:
    """What a model for lm-eval has in the place of HFLM's own way, which bounds nothing and drops without a word."""

    tokenizer: PreTrainedTokenizerBase
    chat_template_args: dict[str, Any]

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """A talk as text; where the template takes no system message, without it, which is said.

        Raises:
            KoffError: The template does not take the messages, or does not come to an end.
        """
        options = {"continue_final_message": not add_generation_prompt} | self.chat_template_args
        with writing():
            try:
                return render(self.tokenizer, chat_history, add_generation_prompt, **options)
            except KoffError as error:
                rest = [message for message in chat_history if message["role"] != "system"]
                if len(rest) == len(chat_history):
                    raise
                rank_zero_warn(f"tasks are asked without their description or system instruction: {error}")
                return render(self.tokenizer, rest, add_generation_prompt, **options)
