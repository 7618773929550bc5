"""Layers may be compiled, recomputed, or see a step's rows in parts: the run is the same."""

import csv
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from tiny_artifact import tiny_decomposition
from tiny_run import Batches, RandomText, tiny_module, tiny_trainer

from koff_lightning import KoffError
from koff_lightning.artifact.checkpoint import read_checkpoint
from koff_lightning.backbone import allow_recomputation, compile_layers, recomputed
from koff_lightning.cli import main
from koff_lightning.gates import BackboneGates
from koff_lightning.training.checkpoints import newest_checkpoint

ROWS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`koff fit` of six steps with further options -> losses by step, and what was trained."""
    folder = tmp_path_factory.mktemp("layers")
    tiny_decomposition(folder)
    small = {"data.seq_len": 64, "data.max_train_bytes": 20_000, "data.max_heldout_bytes": 1500, "model.lora.rank": 2}
    small |= {"data.domains.de": "bundled:de", "data.domains.en": "bundled:en", "data.domains.fr": "bundled:fr"}
    small |= {"model.backbone": folder / "dense", "model.sparsity.min_channels": 4, "model.kv.slots": 4}
    small |= {"trainer.max_steps": 6, "trainer.accelerator": "cpu", "trainer.log_every_n_steps": 1}
    small |= {"trainer.limit_val_batches": 0, "trainer.enable_progress_bar": "false", "export.enabled": "false"}
    small |= {"anneal.warmup": 0.3, "anneal.ramp": 0.2, "anneal.hold": 0.2, "data.batch_size": ROWS}

    def fit(**options):
        root = folder / str(len(list(folder.iterdir())))
        given = small | {"trainer.default_root_dir": root} | {k.replace("__", "."): v for k, v in options.items()}
        assert main(["fit", *(f"--{name}={value}" for name, value in given.items())]) == 0
        with next(Path(root).rglob("metrics.csv")).open(newline="") as lines:
            losses = [float(row["train/loss"]) for row in csv.DictReader(lines) if row["train/loss"]]
        return losses, read_checkpoint(newest_checkpoint([root]))["state_dict"]

    return fit


@pytest.fixture(scope="module")
def plain(run):
    return run()


def assert_same(one, other, steps=6):
    assert len(one[0]) == len(other[0]) == steps
    torch.testing.assert_close(torch.tensor(one[0]), torch.tensor(other[0]), rtol=1e-5, atol=1e-5)
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], rtol=1e-4, atol=1e-5, msg=f"{name}: ".__add__)


def test_recomputed_activations_change_nothing(run, plain):
    assert_same(run(model__activation_checkpointing="true"), plain)


# Dynamo looks at the gradient of whatever a layer reads, here of the gates' values.
looks_at_gradients = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.mark.slow
@looks_at_gradients
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_compiled_layers_change_nothing(run, plain, checkpointing):
    assert_same(run(model__compile="aot_eager", model__activation_checkpointing=checkpointing), plain)


@pytest.mark.slow
@looks_at_gradients
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor translates to C++")
def test_nor_do_layers_that_inductor_has_translated(run, plain):
    assert_same(run(model__compile="inductor"), plain)


def test_layers_are_compiled_with_the_backend_that_was_named(tmp_path):
    model = tiny_decomposition(tmp_path).backbone
    ids = torch.arange(12)[None]
    before = model(input_ids=ids).logits
    seen = []
    torch._dynamo.reset()  # of what other tests have compiled
    torch._dynamo.register_backend(lambda graph, _: seen.append(graph) or graph.forward, name="koff_test")
    compile_layers(model, "koff_test")
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert seen
    with pytest.raises(KoffError, match=r"model.compile must be a backend of torch.compile \(.*inductor.*got 'fast'"):
        compile_layers(model, "fast")


def test_micro_batches_that_are_accumulated_are_one_batch(tmp_path):
    """Where each holds as many tokens of every domain, each row with the noise that it has there."""
    draw = BackboneGates.draw

    def draw_as_two(gates, rows, place):
        step, batch, rank = place
        if gates.hardened:
            return draw(gates, rows, place)
        return torch.cat([draw(gates, rows // 2, (step, 2 * batch + half, rank)) for half in range(2)])

    def joined(one, other):
        return torch.cat([one, other]) if isinstance(one, torch.Tensor) else one + other

    class Joined(RandomText):
        def train_dataloader(self):
            pairs = zip(*(super(Joined, self).train_dataloader()[half::2] for half in range(2)), strict=True)
            return Batches([{k: joined(one[k], other[k]) for k in one} for one, other in pairs])

    def fit(data, parts):
        torch.manual_seed(0)
        module = tiny_module(tmp_path)
        tiny_trainer(tmp_path, [], steps=8, accumulate_grad_batches=parts).fit(module, data)
        return {name: value for name, value in module.state_dict().items() if name in module.owned()}

    parts = fit(RandomText(16), 2)
    with patch.object(BackboneGates, "draw", draw_as_two):
        whole = fit(Joined(16), 1)
    for name, value in parts.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-5, msg=f"{name}: ".__add__)


def test_layers_keep_their_inputs_alone_inside_the_block_only(tmp_path):
    model = tiny_decomposition(tmp_path).backbone
    ids = torch.arange(12)[None]
    embeddings = model.get_input_embeddings()(ids).requires_grad_()

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(inputs_embeds=embeddings, use_cache=False)
        return sum(sizes)

    before = kept()
    allow_recomputation(model)
    with recomputed(model):
        assert kept() < before / 2
    assert kept() == before
