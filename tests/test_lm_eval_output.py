"""What `koff lm-eval` shows: a table that fits, one bar, and nothing asked of git and pip."""

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from koff_lightning.commands.lm_eval_cli import _few_questions, lm_eval
from koff_lightning.evaluation import harness, lm_scores, rolling
from koff_lightning.support.errors import KoffError

SEVEN = {name: {"koff_bpb_en": {"bits_per_byte": 1.25, "bits_per_byte_stderr": 0.01}} for name in "abcdefg"}


@pytest.mark.parametrize("width", [80, 100])
def test_a_table_fits_whatever_the_number_of_domains(width, monkeypatch, capsys):
    monkeypatch.setattr(lm_scores, "Console", lambda **options: Console(**(options | {"width": width})))
    lm_scores.show(SEVEN)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= width
    assert said.count("1.2500 ± 0.0100") == 7
    assert all(f" {name} " in said for name in SEVEN)


def test_few_columns_stand_side_by_side(capsys):
    lm_scores.show({name: SEVEN[name] for name in "ab"})
    assert "1.2500 ± 0.0100   1.2500 ± 0.0100" in capsys.readouterr().out


def rolled(lm, texts):
    from lm_eval.api.instance import Instance

    return lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts])


def test_long_and_short_texts_are_scored_in_batches_of_like_length(monkeypatch, capsys):
    texts = ["a b c d e f g h " * 9, "a", "b c", "c d e f g h a b " * 7, "d"]
    lm = harness.KoffLM("koff-tiny", device="cpu", batch_size=2, max_length=16)
    asked, call = [], harness.hidden_states
    monkeypatch.setattr(
        harness,
        "hidden_states",
        lambda model, input_ids: asked.append(input_ids.shape) or call(model, input_ids=input_ids),
    )
    together = rolled(lm, texts)
    assert capsys.readouterr().err.count("   0%|") == 1, "one bar; its end may be drawn twice"
    assert all(rows <= 2 for rows, _ in asked)
    lengths = [length for _, length in asked]
    assert lengths == sorted(lengths, reverse=True), "batches hold windows of like length"
    assert len(asked) == -(-sum(rows for rows, _ in asked) // 2), "only the last may be short"
    assert lm.batch_size == 2
    alone = [rolled(lm, [text])[0] for text in texts]
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-5, atol=1e-4)


def test_a_batch_on_a_cpu_is_of_no_more_tokens_than_help(monkeypatch):
    """Long windows go alone, so that none is padded to another's length for nothing; short ones share a forward."""
    asked, call = [], harness.hidden_states
    monkeypatch.setattr(
        harness,
        "hidden_states",
        lambda model, input_ids: asked.append(tuple(input_ids.shape)) or call(model, input_ids=input_ids),
    )
    texts = ["a b c d e f g h " * 400, "a b c d e f g h " * 40, *["a b c d e f g h " * 8] * 20]
    lm = harness.KoffLM("koff-tiny", device="cpu", batch_size=8)
    rolled(lm, texts)
    shapes, asked[:] = asked[:], []
    assert max(rows * length for rows, length in shapes) <= rolling.ON_CPU == 1024
    assert {rows for rows, length in shapes if length > 512} == {1}
    assert max(rows for rows, _ in shapes) == 8
    monkeypatch.setattr(rolling, "ON_CPU", 64)
    rolled(lm, texts[1:2])
    assert [rows for rows, _ in asked] == [1], "a longer window than that is read all the same"


def test_text_that_the_tokenizer_cannot_read_is_said(tmp_path):
    """Of tasks, which count its bytes; its unknown tokens are cheap."""
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "a", "b"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="a", eos_token="b")
    lm = harness.KoffLM("koff-tiny", device="cpu", batch_size=2, tokenizer=tokenizer)
    with pytest.warns(UserWarning, match=r"does not know 46\.2% of the scored text .* too low"):
        rolled(lm, ["a b a b", "狐狸"])  # 6 of 13 bytes


def test_of_a_text_the_logits_of_predicted_tokens_alone_are_made_and_of_few_at_a_time():
    """A last window is as long as the others, mostly context; logits of whole windows cost more than they say."""
    lm = harness.KoffLM("koff-tiny", device="cpu", batch_size=2, max_length=300)
    texts, made = ["a b c d e f g h " * 40, "a", "b c"], []
    lm.model.get_output_embeddings().register_forward_hook(lambda *parts: made.append(parts[2].shape[:-1].numel()))
    rolled(lm, texts)
    lm.add_bos_token = False
    assert sum(made) == sum(len(lm.tok_encode(text)) for text in texts) > 300
    assert max(made) <= rolling.TOKENS


def test_git_and_pip_are_asked_nothing_without_a_file_to_say_it_in():
    from lm_eval import evaluator

    before = evaluator.get_git_commit_hash, evaluator.add_env_info
    for written in (False, True):
        with _few_questions(written):
            assert evaluator.get_git_commit_hash() is None
            assert (evaluator.add_env_info is before[1]) == written
        assert (evaluator.get_git_commit_hash, evaluator.add_env_info) == before


def test_abbreviations_are_refused():
    with pytest.raises(KoffError, match="lm-eval: no option 'dom'. Did you mean 'domain"):
        lm_eval(["--model", "koff-tiny", "--tasks", "koff_cloze_en", "--dom", "en"])
