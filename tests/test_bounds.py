"""The options of the method: their defaults are those of the page, and their bounds are taken, but nothing beyond."""

import json
import math
import re
from pathlib import Path

import pytest

from koff_lightning import KoffError, KVSpec, LoraSpec, LossSpec, OptimSpec, SparsitySpec
from koff_lightning.kv_memory import KVMemory

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
SPECS = {"sparsity": SparsitySpec, "loss": LossSpec, "optim": OptimSpec, "lora": LoraSpec, "kv": KVSpec}


def slots(count):
    return KVMemory([(1, 2)], count)


@pytest.mark.parametrize("name", SPECS)
def test_defaults_are_those_of_the_page(name):
    rows = re.findall(rf"^\| `--model\.{name}\.(\w+)` \| .+? \| (.*?) \| ", PAGE.read_text(encoding="utf-8"), re.M)
    made = vars(SPECS[name]())
    assert {option for option, _ in rows} == set(made)
    for option, told in rows:
        value = made[option]
        assert told == ("" if value is None else value if isinstance(value, str) else json.dumps(value)), option


def test_a_gate_gets_the_options_that_it_has():
    assert SparsitySpec(beta=2.0, beta_end=0.5, initial=1.5).gate_options() == {
        "initial": 1.5,
        "beta": 2.0,
        "beta_end": 0.5,
    }
    assert SparsitySpec(gate="ddp", initial=1.5).gate_options() == {"initial": 1.5}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (SparsitySpec, {"target": 0.0}),
        (SparsitySpec, {"target": math.nextafter(1.0, 0.0)}),
        (SparsitySpec, {"min_channels": 1, "min_kv_groups": 1, "multiple_of": 1}),
        (SparsitySpec, {"band": 0.5}),
        (SparsitySpec, {"band": 5e-324}),
        (SparsitySpec, {"spread": 0.0, "weight": 0.0}),
        (SparsitySpec, {"beta": 5e-324, "beta_end": 5e-324}),
        (SparsitySpec, {"gate": "ddp", "initial": 0.0}),
        (SparsitySpec, {"penalty": "hinge", "autoscale": True, "target": 5e-324}),
        (SparsitySpec, {"scope": "local", "denominator": "units"}),
        (SparsitySpec, {"harden": "threshold", "multiple_of": 1}),
        (SparsitySpec, {"units": ["gate_channel", "kv_group"], "multiple_of": 1}),
        (LossSpec, {"ce": 0.0, "kl": 5e-324}),
        (LossSpec, {"ce": 5e-324, "kl": 0.0}),
        (LossSpec, {"chunk": 1, "top_k": 2, "teacher": "stored"}),
        (OptimSpec, {"warmup": 0.0, "final": 0.0}),
        (OptimSpec, {"warmup": math.nextafter(1.0, 0.0), "final": 1.0, "on_nonfinite": "skip"}),
        (OptimSpec, dict.fromkeys(("mask_lr", "multiplier_lr", "lora_lr", "kv_lr", "clip"), 5e-324)),
        (LoraSpec, {"rank": 1, "alpha": 5e-324}),
        (LoraSpec, {"rank": 1024}),
        (KVSpec, {"slots": 2, "std": 5e-324}),
        (KVSpec, {"slots": 1, "frozen_first": False, "init": "normal"}),
        (KVSpec, {"slots": 8192}),
        (slots, {"count": 1}),
        (slots, {"count": 8192}),
    ],
)
def test_bounds_are_taken(make, options):
    made = make(**options)
    assert options.items() <= (vars(made) | {"count": options.get("count")}).items()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (SparsitySpec, {"target": 1.0}, r"sparsity.target must lie in \[0, 1\).*got 1.0"),
        (SparsitySpec, {"target": -5e-324}, "sparsity.target"),
        (SparsitySpec, {"min_channels": 0}, "min_channels and sparsity.min_kv_groups must be at least 1"),
        (SparsitySpec, {"min_kv_groups": 0}, "min_channels and sparsity.min_kv_groups must be at least 1"),
        (SparsitySpec, {"multiple_of": 0}, "sparsity.multiple_of must be at least 1; got 0"),
        (SparsitySpec, {"band": 0.0}, r"sparsity.band must lie in \(0, 0.5\]; got 0.0"),
        (SparsitySpec, {"band": math.nextafter(0.5, 1.0)}, "sparsity.band must lie"),
        (SparsitySpec, {"spread": -5e-324}, "sparsity.spread must be >= 0 and finite"),
        (SparsitySpec, {"weight": math.inf}, "sparsity.weight must be >= 0 and finite; got inf"),
        (SparsitySpec, {"beta": 0.0}, "sparsity.beta must be > 0 and finite; got 0.0"),
        (SparsitySpec, {"beta_end": 0.0}, "sparsity.beta_end must be > 0 and finite; got 0.0"),
        (SparsitySpec, {"beta": math.inf}, "sparsity.beta must be > 0 and finite; got inf"),
        (SparsitySpec, {"gate": "ddp", "beta": 2.0}, "sparsity.beta and sparsity.beta_end are of gate hc"),
        (SparsitySpec, {"gate": "ddp", "beta_end": 2 / 3}, "sparsity.beta and sparsity.beta_end are of gate hc"),
        (SparsitySpec, {"initial": math.nan}, "sparsity.initial must be finite; got nan"),
        (SparsitySpec, {"penalty": "hinge", "target": 0.0}, "would press on nothing"),
        (
            SparsitySpec,
            {"autoscale": True},
            "sparsity.autoscale scales penalty hinge or absolute; got penalty lagrangian",
        ),
        (SparsitySpec, {"scope": "local"}, "set sparsity.denominator to units; got body"),
        (SparsitySpec, {"harden": "threshold", "multiple_of": 2}, "threshold leaves any widths"),
        (SparsitySpec, {"harden": "threshold", "layout": "uniform"}, "threshold leaves any widths"),
        (SparsitySpec, {"units": ["gate_channel"], "multiple_of": 2}, "sparsity.multiple_of 2 is of whole units"),
        (SparsitySpec, {"units": ["gate_channel"], "layout": "uniform"}, "sparsity.layout uniform is of whole units"),
        (LossSpec, {"ce": 0.0, "kl": 0.0}, "not both 0; got 0.0 and 0.0"),
        (LossSpec, {"ce": -5e-324}, "loss.ce and loss.kl must be >= 0"),
        (LossSpec, {"kl": -5e-324}, "loss.ce and loss.kl must be >= 0"),
        (LossSpec, {"ce": math.inf}, "loss.ce and loss.kl must be >= 0, finite"),
        (LossSpec, {"chunk": 0}, "loss.chunk must be at least 1 token; got 0"),
        (LossSpec, {"top_k": 1}, "loss.top_k must be at least 2.*got 1"),
        (LossSpec, {"teacher": "kept"}, "loss.teacher must be live or stored; got 'kept'"),
        (LossSpec, {"teacher": "stored"}, "set loss.top_k .100 in the paper. and a loss.kl above 0; got None and 2.0"),
        (LossSpec, {"teacher": "stored", "top_k": 2, "kl": 0.0}, "a loss.kl above 0; got 2 and 0.0"),
        (OptimSpec, {"warmup": 1.0}, "optim.warmup and optim.final are shares of 1"),
        (OptimSpec, {"final": -5e-324}, "optim.warmup and optim.final are shares of 1"),
        (OptimSpec, {"final": math.nextafter(1.0, 2.0)}, "optim.warmup and optim.final are shares of 1"),
        (OptimSpec, {"clip": 0.0}, "rates and clip must be positive and finite; got clip=0.0"),
        (OptimSpec, {"kv_lr": math.inf, "clip": math.nan}, "got kv_lr=inf, clip=nan"),
        (OptimSpec, {"on_nonfinite": "go"}, "optim.on_nonfinite must be stop or skip; got 'go'"),
        (LoraSpec, {"rank": 0}, "lora.rank must be between 1 and 1024; got 0"),
        (LoraSpec, {"rank": 1025}, "lora.rank must be between 1 and 1024; got 1025"),
        (LoraSpec, {"alpha": 0.0}, "lora.alpha must be positive and finite; got 0.0"),
        (LoraSpec, {"alpha": math.inf}, "lora.alpha must be positive and finite; got inf"),
        (LoraSpec, {"targets": []}, "lora.targets must be some of .*; got none"),
        (LoraSpec, {"targets": ["q_proj", "x"]}, "lora.targets must be some of .*; got x$"),
        (LoraSpec, {"layers": "some"}, "lora.layers must be all"),
        (KVSpec, {"slots": 1}, r"kv.slots must be between 2 and 8192 \(slot 0 is frozen\); got 1"),
        (KVSpec, {"slots": 0, "frozen_first": False}, "kv.slots must be between 1 and 8192; got 0"),
        (KVSpec, {"slots": 8193}, "kv.slots must be between 2 and 8192"),
        (KVSpec, {"init": "zeros"}, "kv.init must be text or normal; got 'zeros'"),
        (KVSpec, {"std": 0.0}, "kv.std must be positive and finite; got 0.0"),
        (KVSpec, {"std": math.inf}, "kv.std must be positive and finite; got inf"),
        (KVSpec, {"layers": []}, "kv.layers must be all"),
        (slots, {"count": 0}, "a memory needs 1 to 8192 slots, got 0"),
        (slots, {"count": 8193}, "a memory needs 1 to 8192 slots, got 8193"),
    ],
)
def test_what_lies_beyond_is_refused(make, options, message):
    with pytest.raises(KoffError, match=message):
        make(**options)
