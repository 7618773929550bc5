"""Tokens -> text as they come: whole characters only, and nothing that may yet become a stop word."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_PATIENCE = 8  # tokens of a character that are waited for: more are no character
_BEFORE = 8  # tokens of the prompt that the first new one is decoded after: some tokenizers drop a text's first space


class Text:
    """The text of one answer.

    Args:
        tokenizer: The backbone's.
        prompt: Tokens that stand before it.
        stop: It ends before the first of these.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids = list(prompt[-_BEFORE:])
        self._start, self._read = 0, len(self._ids)  # decoded up to `_read`; what comes is decoded from `_start` on
        self._before = self._decode()  # text of the tokens from `_start` to `_read`
        self._held = ""  # not told yet
        self.stopped = False  # at a stop word

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """What can be told now.

        Args:
            ids: New tokens.
            last: Nothing follows: tell what was held back too.
        """
        if self.stopped:
            return ""
        self._ids += ids
        now, new = self._decode(), len(self._ids) - self._read
        if last or not now.endswith("�") or new > _PATIENCE:  # else the end of a character is missing
            ended = not now.startswith(self._before)  # a character that the prompt had begun
            self._held += now[len(self._before.rstrip("�") if ended else self._before) :]
            self._start, self._read = self._read, len(self._ids)
            self._before = self._decode()
        places = [place for word in self._stop if (place := self._held.find(word)) >= 0]
        if places:
            self.stopped = True
            return self._tell(min(places))
        return self._tell(len(self._held) - (0 if last else self._may_become_stop()))

    def _decode(self) -> str:
        return decoded(self._tokenizer, self._ids[self._start :])

    def _tell(self, length: int) -> str:
        told, self._held = self._held[:length], self._held[length:]
        return told

    def _may_become_stop(self) -> int:
        """Characters at the end of what is held that a stop word begins with."""
        most = len(self._held) + 1
        sizes = [n for word in self._stop for n in range(1, min(len(word), most)) if self._held.endswith(word[:n])]
        return max(sizes, default=0)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of tokens, without special ones."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
