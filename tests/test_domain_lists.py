"""Every ready list of hub corpora is parsed over an experiment and read to a batch, from a stand-in of the hub."""

from types import SimpleNamespace

import datasets
import pytest
import yaml
from test_configs import ON_CPU, built, stand_in  # noqa: F401  fixtures
from toy_text import toy_documents, toy_tokenizer, write_jsonl

from koff_lightning.commands.parsing.config_files import SHIPPED, shipped_configs
from koff_lightning.data import shards
from koff_lightning.data.shards import FileShard, HubShard

LISTS = [name for name in shipped_configs() if name.startswith("domains/")]
FINEWEB = ("text", "id", "dump", "url", "date", "file_path", "language", "language_score")
COMMON_PILE = ("id", "text", "source", "added", "created", "metadata")
COLUMNS = {  # of the datasets' cards
    "HuggingFaceFW/fineweb-2": FINEWEB,
    "HuggingFaceFW/fineweb-edu": FINEWEB,
    "wikimedia/wikipedia": ("id", "url", "title", "text"),
    "wikimedia/wikisource": ("id", "url", "title", "text"),
    "tarekziade/wikipedia-topics": (
        "id",
        "title",
        "summary",
        "text",
        "categories",
    ),  # by its author's code: see the list
    "allenai/c4": ("text", "timestamp", "url"),
    "openai/gsm8k": ("question", "answer"),
    "allenai/ai2_arc": ("id", "question", "choices", "answerKey"),
    "codeparrot/codeparrot-clean": ("repo_name", "path", "copies", "size", "content", "license", "hash"),
    "common-pile/stackv2_edu_filtered": COMMON_PILE,
    "common-pile/pubmed_filtered": COMMON_PILE,
    "common-pile/caselaw_access_project_filtered": COMMON_PILE,
    "common-pile/regulations_filtered": COMMON_PILE,
}
COMMIT = "c" * 40
NAMED = {"HuggingFaceFW/fineweb-2", "HuggingFaceFW/fineweb-edu", "wikimedia/wikipedia", "wikimedia/wikisource"}
NAMED |= {"allenai/c4", "openai/gsm8k", "allenai/ai2_arc"}  # those in subsets
TEXT = {"codeparrot/codeparrot-clean": "content", "openai/gsm8k": "answer", "allenai/ai2_arc": "question"}
TOPICS = ("Mathematics", "Science", "Technology", "History", "Culture", "Geography")


@pytest.fixture
def asked(monkeypatch):
    """The hub, as far as it is asked: two shards of toy text under the columns of each dataset."""
    questions = []

    def load_dataset(path, name, split, revision, streaming=False):
        assert (name is not None) == (path in NAMED)
        assert revision == COMMIT, "all that read it read the same version"
        questions.append((path, name))
        texts = toy_documents(120, seed=len(questions))
        rows = {column: [f"{column}-{len(questions)}-{i}" for i in range(120)] for column in COLUMNS[path]}
        rows[TEXT.get(path, "text")] = texts
        if "categories" in rows:
            rows["categories"] = [["Stub", TOPICS[i % 6]] for i in range(120)]
        return datasets.Dataset.from_dict(rows).to_iterable_dataset(num_shards=2)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: SimpleNamespace(hash=COMMIT))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # also where the tests run without a network
    shards._open_hub.cache_clear()
    yield questions
    shards._open_hub.cache_clear()


@pytest.mark.parametrize("name", LISTS)
def test_each_list_is_read_to_the_first_batch(name, built, stand_in, asked, tmp_path):  # noqa: F811
    write_jsonl(tmp_path / "corpora" / "medicine" / "own.jsonl", toy_documents(40, seed=99))
    for topic in ("mathematics", "statistics", "networks", "astronomy", "biology", "music"):
        write_jsonl(tmp_path / "corpora" / "topics" / f"{topic}.jsonl", toy_documents(40, seed=len(topic)))
    tokenizer = toy_tokenizer(tmp_path / "tokenizer")
    words = ["--data.tokenizer", tokenizer, "--data.num_workers=0", "--data.seq_len=64"]
    cli = built(
        "--config", "llama_12pct.yaml", "--config", name, "--model.backbone", stand_in("llama"), *ON_CPU, *words
    )
    data, domains = cli.datamodule, yaml.safe_load((SHIPPED / name).read_text())["data"]["domains"]
    assert data.domain_names == list(domains) == cli.model.domains, "the list stands for the experiment's domains"
    whole = yaml.safe_load((SHIPPED / name).read_text())["data"].get("streaming") is None
    assert data.streaming != whole
    data.setup()
    data.trainer = SimpleNamespace(accumulate_grad_batches=1, max_steps=9, world_size=1)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (7, 64)
    if whole:  # a stored teacher wants rows that stay: the paper's lists are prepared, not streamed
        assert {len(rows) > 0 for rows in data._train.values()} == {True}
        return
    for domain, source in data.sources.items():
        kinds = {type(shard) for shard in data._texts[domain].shards}
        assert kinds == ({HubShard, FileShard} if any("*" in entry for entry in source.entries) else {HubShard})
    hub = {(e.removeprefix("hub:"), s.subset) for s in data.sources.values() for e in s.entries if e.startswith("hub:")}
    assert set(asked) == hub
    assert len(asked) == len(hub), "no dataset stands in two domains"


def test_the_papers_general_text_is_read(built, stand_in, asked, tmp_path):  # noqa: F811
    tokenizer = toy_tokenizer(tmp_path / "tokenizer")
    words = ["--data.tokenizer", tokenizer, "--data.seq_len=64", "--model.backbone", stand_in("llama"), *ON_CPU]
    for place in ("one", "two", "general"):
        write_jsonl(tmp_path / "corpora" / place / "own.jsonl", toy_documents(60, seed=len(place)))
    scaled = ["--model.loss.top_k=50", "--model.lora.layers=all", "--model.kv.layers=all"]
    scaled += ["--model.sparsity.min_channels=4"]
    cli = built("--config", "paper/llama32_3b_languages.yaml", "--config", "retention/paper.yaml", *words, *scaled)
    cli.datamodule.setup()
    assert set(cli.datamodule.general._train) == {"c4", "gsm8k", "arc"}
    assert {path for path, _ in asked} == {"allenai/c4", "openai/gsm8k", "allenai/ai2_arc"}


@pytest.mark.parametrize("name", ["domains/wikipedia_topics.yaml", "domains/wikisource.yaml"])
def test_the_papers_lists_take_as_many_documents_as_the_paper(name):
    data = yaml.safe_load((SHIPPED / name).read_text())["data"]
    assert {source["max_documents"] for source in data["domains"].values()} == {30_000}
    assert data["heldout_fraction"] == 0.05


def test_there_are_lists_of_languages_and_subjects():
    assert {"domains/fineweb2.yaml", "domains/wikipedia.yaml", "domains/code.yaml", "domains/law.yaml"} < set(LISTS)


@pytest.mark.parametrize("name", LISTS)
def test_each_list_tells_its_licence_and_what_was_tried(name):
    head = (SHIPPED / name).read_text().split("data:")[0]
    assert "icence" in head
    assert "tried" in head or "stand-in" in head
