"""What `koff lm-eval` shows: a table that fits, one bar, and nothing asked of git and pip."""

import re

import pytest
import torch
from lm_eval.api import model
from lm_eval.models import huggingface
from rich.console import Console
from tiny_artifact import tiny_artifact
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from koff_lightning.commands.lm_eval_cli import lm_eval
from koff_lightning.commands.lm_eval_columns import few_questions
from koff_lightning.data import encoding
from koff_lightning.data.encoding import encode_and_count, tokenize
from koff_lightning.evaluation import harness, lm_scores, rolling
from koff_lightning.evaluation.lm_tasks import load_tasks
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
    head, *_, row = capsys.readouterr().out.split("\n\n")[0].strip().splitlines()
    assert head.split() == ["task", "metric", "a", "b"]
    assert row.split() == ["koff_bpb_en", "bits_per_byte", *["1.2500", "±", "0.0100"] * 2]


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


def test_tasks_draw_no_bars_of_their_own(capsys):
    tasks = load_tasks(["koff_cloze_de", "koff_cloze_fr"])
    for task in tasks["tasks"].values():
        task.dataset = {split: rows.select(range(4)) for split, rows in task.dataset.items()}
    harness.answers(harness.KoffLM("koff-tiny", device="cpu"), tasks)
    begun = [part for part in re.split("[\r\n]", capsys.readouterr().err) if "| 0/" in part]
    assert [part.partition(":")[0] for part in begun] == ["Tokenizing inputs", "Running loglikelihood requests"]


def test_the_command_draws_one_bar_over_all_columns_and_kinds_of_requests(tmp_path, capsys):
    made = tiny_artifact(tmp_path)
    capsys.readouterr()  # of what saving drew
    names = [f"{name} ({number} of 4)" for number, name in enumerate((*made.module.domains, "none"), 1)]
    tasks = ["--tasks", "koff_cloze_de,koff_bpb_de", "--limit", "3"]
    lm_eval(["--model", str(made.folder), "--domains", "all", "--memory_off", *tasks])
    drawn = [part for part in re.split("[\r\n]", capsys.readouterr().err) if re.search("(it/s|s/it)]", part)]
    assert [*dict.fromkeys(part.partition(":")[0] for part in drawn)] == names
    counts = [tuple(map(int, re.search(r"(\d+)/(\d+) ", part).groups())) for part in drawn]
    assert [done for done, _ in counts] == sorted(done for done, _ in counts), "it never goes back"
    assert counts[-1][0] <= counts[-1][1] == max(total for _, total in counts)
    assert counts[-1][1] % 4 == 0, "the columns are asked the same"
    assert (model.tqdm, huggingface.tqdm, rolling.tqdm) == (tqdm,) * 3, "lm-eval draws its own again"


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


@pytest.fixture(scope="module")
def reads_two_letters():
    """Scores koff-tiny by a tokenizer that knows "a" and "b" only, and puts its unknown token for all else."""
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "a", "b"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="a", eos_token="b")
    return harness.KoffLM("koff-tiny", device="cpu", batch_size=2, tokenizer=tokenizer)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])  # of mixed precision: by our own windows, and by HFLM's
def test_bits_per_byte_count_as_in_a_run_what_the_tokenizer_cannot_read(reads_two_letters, dtype, monkeypatch):
    """Not the bytes, but what the unknown token costs: by the rule of `tokenize`, whose start token is no byte."""
    lm, texts = reads_two_letters, ["a b a b", "狐狸 b"]
    monkeypatch.setattr(lm, "mixed_precision_dtype", dtype)
    with pytest.warns(UserWarning, match=r"does not know 40\.0% of the text .* koff_bpb does not count these bytes"):
        found = rolled(lm, texts)  # 6 of 15 bytes
    task = next(iter(load_tasks(["koff_bpb_de"])["tasks"].values()))
    pairs = [task.process_results({"text": text}, [value]) for text, value in zip(texts, found, strict=True)]
    counted = [pair["bits_per_byte"] for pair in pairs]
    assert [num_bytes for _, num_bytes in counted] == tokenize(texts, lm.tokenizer).num_bytes.tolist() == [7, 2]
    ids = [encode_and_count(lm.tokenizer, text)[0] for text in texts]
    cost = lm._loglikelihood_tokens([(("", ""), [lm.prefix_token_id], row) for row in ids])
    assert [value for value, _ in counted] == pytest.approx([value for value, _ in cost], rel=1e-2 if dtype else 1e-5)
    foreign = task.process_results({"text": "狐狸 b"}, [-1.0])  # of a model that is not ours
    assert foreign == {"bits_per_byte": (-1.0, 8)}


def test_a_task_whose_text_is_mostly_unknown_is_refused(reads_two_letters):
    with pytest.raises(KoffError, match=r"text: the tokenizer does not know 75% of the text .*leave this task out"):
        rolled(reads_two_letters, ["a b", "狐狸狐"])


def test_a_text_is_tokenised_once(reads_two_letters, monkeypatch):
    calls, encode = [], encoding.encode

    def counted(tokenizer, text, **options):
        calls.append(text)
        return encode(tokenizer, text, **options)

    for module in (encoding, harness):
        monkeypatch.setattr(module, "encode", counted)
    rolled(reads_two_letters, ["a b a", "b"])
    assert calls == ["a b a", "b"]


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
        with few_questions(written):
            assert evaluator.get_git_commit_hash() is None
            assert (evaluator.add_env_info is before[1]) == written
        assert (evaluator.get_git_commit_hash, evaluator.add_env_info) == before


def test_abbreviations_are_refused():
    with pytest.raises(KoffError, match="lm-eval: no option 'dom'. Did you mean 'domain"):
        lm_eval(["--model", "koff-tiny", "--tasks", "koff_cloze_en", "--dom", "en"])
