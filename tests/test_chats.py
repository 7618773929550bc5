"""Talks of lm-eval's tasks: as HFLM writes them, in bounded time, and what a template does not take is said."""

import pytest

from koff_lightning import KoffError, load_tokenizer
from koff_lightning.data import rendering
from koff_lightning.evaluation.chats import WritesTalks
from koff_lightning.evaluation.harness import KoffLM

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}"
TALK = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "1 + 1?"}]


class Writer(WritesTalks):
    def __init__(self, template):
        self.tokenizer, self.chat_template_args = load_tokenizer("koff-tiny"), {}
        self.tokenizer.chat_template = template


def test_it_is_what_lm_eval_asks():
    assert KoffLM.apply_chat_template is WritesTalks.apply_chat_template


def test_a_talk_is_written_as_by_hflm():
    writer = Writer(PLAIN)
    assert writer.apply_chat_template(TALK) == "<system>Answer.</><user>1 + 1?</><assistant>"
    begun = [*TALK, {"role": "assistant", "content": "It is"}]
    assert writer.apply_chat_template(begun, add_generation_prompt=False).endswith("<assistant>It is")


def test_a_template_without_a_system_role():
    with pytest.warns(UserWarning, match="without their description or system instruction: .*no system role"):
        assert Writer(NO_SYSTEM).apply_chat_template(TALK) == "<user>1 + 1?</><assistant>"


@pytest.mark.parametrize(("template", "message"), [(ENDLESS, "still wrote after 0.5 s"), (HUGE, "of a short talk")])
def test_a_template_that_does_not_come_to_an_end(monkeypatch, template, message):
    monkeypatch.setattr(rendering.writing.__wrapped__, "__defaults__", (0.5,))
    with pytest.raises(KoffError, match=message):
        Writer(template).apply_chat_template(TALK[1:])
