"""Chat templates are programs of strangers: they may raise, and they may go on for ever. One door for all of them."""

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from koff_lightning.support.errors import KoffError

SECONDS = 10.0  # for all that is written of one talk; a template takes milliseconds
LARGEST = 16  # times the messages' own size and 2**20 characters: what a template may make of them
Message = dict[str, Any]  # role, content, and what else a template may want


class _TooLong(BaseException):
    """Raised in the thread that writes; nobody on the way takes it for an error of the template."""


@contextmanager
def writing(seconds: float = SECONDS) -> Iterator[None]:
    """Let templates run for so long at most, in any thread; what they hold in memory meanwhile is not bounded.

    Jinja's sandbox keeps templates from files, modules and long ranges, but not from loops in loops. A template is
    Python code by the time it runs, so an exception that is raised in its thread from outside ends it.

    Raises:
        KoffError: A template took longer.
    """
    lock, over, thread = threading.Lock(), threading.Event(), ctypes.c_ulong(threading.get_ident())

    def stop() -> None:
        with lock:
            if not over.is_set():
                over.set()
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_TooLong))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except _TooLong:
        raise KoffError(
            f"its chat template still wrote after {seconds:g} s: correct the tokenizer's template"
        ) from None
    finally:
        timer.cancel()
        with lock:
            if over.is_set():  # it may not have come yet; where it has, there is none to take back
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
            over.set()


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False, **options: Any
) -> str:
    """A talk as the tokenizer's chat template writes it.

    Args:
        tokenizer: With a chat template.
        messages: Messages of the talk.
        add_generation_prompt: Add the words that ask the assistant to speak.
        options: Further ones of the template, or of the tokenizer's `apply_chat_template`.

    Raises:
        KoffError: The template refuses the messages, fails, or makes something far too long of them.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except Exception as error:  # a template may raise anything: TemplateError on purpose, TypeError by mistake
        kind = "" if isinstance(error, TemplateError) else f" ({type(error).__name__})"
        reason = " ".join(str(error).split()).rstrip(".")
        roles = ", ".join(str(message.get("role")) for message in messages[:8])
        raise KoffError(f"the chat template does not take these messages{kind}: {reason} (roles: {roles})") from error
    if len(text) > 2**20 + LARGEST * sum(len(str(message)) for message in messages):
        raise KoffError(f"the chat template makes {len(text):,} characters of a short talk: correct the template")
    return text
