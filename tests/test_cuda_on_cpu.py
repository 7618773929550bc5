"""What is written for a GPU, run on a device that refuses what a GPU refuses and is computed on the CPU."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from koff_lightning.cli import main

ROOT = Path(__file__).parents[1]
THERE = ROOT / "recipes/gpu/cuda_on_cpu.py"
SMALL = [
    '--data.domains={"de": "bundled:de", "python": "bundled:python"}',
    "--data.batch_size=2",
    "--data.max_train_bytes=60000",
    "--data.max_heldout_bytes=1500",
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="wants g++ (Debian: apt install g++)")
pytestmark = needs_compiler


def there(*words, devices=1):
    """Run a verb or a script on the device; what it said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DEVICES": str(devices)}
    command = [sys.executable, str(THERE), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def fit(folder, *words, run=there):
    """Train a little; the results."""
    run("fit", "--config", "demo.yaml", f"--trainer.default_root_dir={folder}", *SMALL, *words)
    return json.loads((Path(folder) / "results.json").read_text())


def test_the_library_is_of_the_torch_that_loads_it(tmp_path, monkeypatch):
    """Environments share the cache, and one of the same release may since have been deleted."""
    monkeypatch.syspath_prepend(THERE.parent)
    there = importlib.import_module("cuda_on_cpu")
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path))
    monkeypatch.setattr(there.subprocess, "run", lambda words, check: Path(words[words.index("-o") + 1]).touch())
    made = []
    for place in ("one", "one", "another"):
        monkeypatch.setattr(there.torch, "__file__", str(tmp_path / place / "torch/__init__.py"))
        made.append(there.built())
    assert made[0] == made[1] != made[2]
    assert {made[0], made[2]} == set(tmp_path.rglob("*.so"))


def test_the_library_may_lie_in_a_folder_with_spaces(tmp_path, monkeypatch):
    """Which part the names of libraries that are to be loaded first."""

    def stop(program, words, environment):
        raise SystemExit(environment["LD_PRELOAD"])

    monkeypatch.syspath_prepend(THERE.parent)
    there = importlib.import_module("cuda_on_cpu")
    library = tmp_path / "cuda_on_cpu of mine.so"
    library.touch()
    monkeypatch.setattr(there, "built", lambda: library)
    monkeypatch.setattr(there.os, "execve", stop)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    with pytest.raises(SystemExit) as preloaded:
        there.main()
    assert " " not in preloaded.value.code and library.samefile(preloaded.value.code)
    os.close(int(Path(preloaded.value.code).name))


def test_a_run_computes_there_what_it_computes_here(tmp_path):
    """Training with the dense model's answers, the cut, the scores, the figures, the export and its proof."""

    def here(*words):
        assert main(list(words)) == 0

    words = ["--data.seq_len=64", "--trainer.max_steps=4", "--model.loss.kl=1", "--trainer.precision=32-true"]
    one = fit(tmp_path / "there", *words, "--trainer.accelerator=gpu")
    other = fit(tmp_path / "here", *words, "--trainer.accelerator=cpu", "--export.enabled=false", run=here)
    losses = [pd.read_csv(tmp_path / place / "version_0/metrics.csv")["train/loss"] for place in ("there", "here")]
    assert losses[0].iloc[0] == pytest.approx(losses[1].iloc[0], rel=1e-5)
    assert one["mean"]["dense_bpb"] == pytest.approx(other["mean"]["dense_bpb"], rel=1e-5)
    # AdamW's first steps are as long for a gradient of rounding errors as for any other, so runs go apart
    for name in ("koff_bpb", "memory_off_bpb", "swapped_bpb"):
        assert one["mean"][name] == pytest.approx(other["mean"][name], rel=0.1), name
    assert json.loads((tmp_path / "there/artifact/export_report.json").read_text())["passed"]


RUNS = """
import sys
from cuda_on_cpu import COUNTS
from koff_lightning.cli import main
for dtype in ("bfloat16", "float32"):
    COUNTS.update(dict.fromkeys(COUNTS, 0))
    assert main(["fit", "--config", "demo.yaml", f"--model.dtype={dtype}", *sys.argv[1:]]) == 0
    print("kernels", dtype, *COUNTS.values())
"""


def test_rows_in_bf16_go_through_the_flash_kernels(tmp_path):
    words = ["--data.seq_len=512", "--trainer.max_steps=1", "--export.enabled=false", "--trainer.accelerator=gpu"]
    words += ["--trainer.limit_val_batches=0", "--trainer.limit_test_batches=1"]
    words += ["--trainer.precision=bf16-mixed", *SMALL, f"--trainer.default_root_dir={tmp_path}"]
    (tmp_path / "runs.py").write_text(RUNS)
    counts = re.findall(r"kernels (\w+) (\d+) (\d+)", there(tmp_path / "runs.py", *words))
    assert [dtype for dtype, *_ in counts] == ["bfloat16", "float32"]
    for dtype, forward, backward in counts:
        assert int(forward) > int(backward) > 7, dtype  # 7 of `kernels_agree`, in the first run


REFUSED = {
    "torch.ones(3, device='cuda') + torch.ones(3)": "Expected all tensors to be on the same device",
    "torch.ones(3)[torch.zeros(1, dtype=torch.long, device='cuda')]": "Expected all tensors to be on the same device",
    "torch.rand(3, device='cuda', generator=torch.Generator())": "Expected a 'cuda' device type for generator",
    "torch.rand(3, generator=torch.Generator('cuda'))": "Expected a 'cpu' device type for generator",
    "torch.ones(3, device='cuda').numpy()": "can't convert cuda:0 device type tensor to numpy",
    "attend_merged(*made(torch.float32))": "only support fp16 and bf16",
    "dist.all_reduce(torch.ones(3))": "No backend type associated with device type cpu",
}
REFUSING = """
import json
import torch
import torch.distributed as dist
from koff_lightning.attention import LayerMemory, attend_merged
def made(dtype):
    a = torch.ones(1, 2, 8, 8, device="cuda", dtype=dtype)
    return a, a, a, LayerMemory(a, a), None, None, True
dist.init_process_group("nccl", init_method="file://{folder}/meet", rank=0, world_size=1)
dist.all_reduce(torch.ones(3, device="cuda"))
dist.all_reduce(torch.ones(3), group=dist.new_group(backend="gloo"))
torch.ones(3, device="cuda")[torch.zeros(1, dtype=torch.long)] + torch.tensor(1.0)
torch.rand(3, device="cuda", generator=torch.Generator("cuda")).cpu().numpy()
attend_merged(*made(torch.bfloat16))
said = {}
for line in {lines}:
    try:
        eval(line)
    except (RuntimeError, TypeError) as error:
        said[line] = str(error)
print("said", json.dumps(said))
"""
MEMORIES = """
import torch
from koff_lightning import KVSpec, LoraSpec, SparsitySpec
from koff_lightning.decomposition import Decomposition
made = []
for place in ("cpu", "cuda"):
    torch.manual_seed(3)
    with torch.device(place):
        model = Decomposition("koff-tiny", ["a"], SparsitySpec(), LoraSpec(rank=2), KVSpec(slots=4, init="normal"))
    parts = [*model.memories.lora_parameters(), *model.memories.kv_parameters()]
    assert {part.device.type for part in parts} == {place}
    torch.manual_seed(3)
    made.append([torch.rand(1, device=place).cpu(), *(part.detach().cpu() for part in parts)])
same = [torch.equal(one, other) for one, other in zip(*made)]
print("same", len(same), same[0], all(same[1:]))
"""


KERNELS = """
import json, warnings
import torch
from koff_lightning import attention
from koff_lightning.backbone import _documents
def attend(dtype):
    torch.manual_seed(0)
    query, key, value, *slots = (
        torch.randn(2, heads, length, 16).to("cuda", dtype)
        for heads, length in ((4, 600), (2, 600), (2, 600), (2, 8), (2, 8))
    )
    layer = torch.nn.Module()
    layer.koff_memory = lambda: attention.LayerMemory(*slots)
    places = torch.arange(600, device="cuda").expand(2, -1) % 250
    bounds = _documents(places, places)
    number = torch.bucketize(torch.arange(1200, device="cuda"), bounds["koff_documents"], right=True).view(2, 1, 600)
    mask = (number[..., :, None] == number[..., None, :]).tril()
    return attention.koff_attention(layer, query, key, value, mask, **bounds)[0].float()
reference = attend(torch.float32)
with torch.no_grad():  # without a memory, as a teacher's pass
    layer, tokens = torch.nn.Module(), [torch.randn(2, heads, 600, 16, device="cuda") for heads in (6, 2, 2)]
    layer.num_key_value_groups = 3
    places = torch.arange(600, device="cuda").expand(2, -1) % 250
    bounds = _documents(places, places)
    number = torch.bucketize(torch.arange(1200, device="cuda"), bounds["koff_documents"], right=True).view(2, 1, 600)
    mask = (number[..., :, None] == number[..., None, :]).tril()
    plain = attention.sdpa_attention_forward(layer, *tokens, mask)[0]
    calls, kernel = [], attention.flash
    attention.flash = lambda *a: calls.append(a) or kernel(*a)
    taught = attention.koff_attention(layer, *(each.bfloat16() for each in tokens), mask, **bounds)[0].float()
    found = {"taught": (float((taught - plain).abs().max() / plain.abs().max()), len(calls), [])}
    # one new token of rows with a mask: heads that share keys are rows of one product
    memory = attention.LayerMemory(*(torch.randn(2, 2, 8, 16, device="cuda") for _ in range(2)))
    layer.koff_memory = lambda: memory
    seen = torch.rand(2, 1, 1, 600, device="cuda") > 0.3
    there = attention.koff_attention(layer, tokens[0][:, :, :1], *tokens[1:], seen)[0].cpu()
    memory = attention.LayerMemory(memory.key.cpu(), memory.value.cpu())
    tokens = [each.cpu() for each in tokens]
    here = attention.koff_attention(layer, tokens[0][:, :, :1], *tokens[1:], seen.cpu())[0]
    found["one token"] = float((there - here).abs().max() / here.abs().max()), 0, []
merged, gradients = attention.attend_merged, attention._with_gradients
def absent(*_):
    raise RuntimeError("no such kernel")
for name, attend_merged, with_gradients in (
    ("right", merged, gradients),
    ("wrong", lambda *a: merged(*a) * 1.1, gradients),
    ("absent", absent, gradients),
    ("nan", merged, lambda *a: [*gradients(*a)[:-1], torch.tensor(torch.nan)]),
):
    calls = []
    attention.attend_merged = lambda *a: calls.append(a) or attend_merged(*a)
    attention._with_gradients = with_gradients
    attention._agree.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = [attend(torch.bfloat16) for _ in range(2)][1]
    gap = float((out - reference).abs().max() / reference.abs().max())
    found[name] = gap, len(calls), [str(each.message) for each in said if "flash" in str(each.message)]
print("found", json.dumps(found))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What these scripts say, run one by one in one process: to begin it takes longer than they do."""
    folder = tmp_path_factory.mktemp("scripts")
    refusing = REFUSING.replace("{folder}", str(folder)).replace("{lines}", str(list(REFUSED)))
    for number, text in enumerate((MEMORIES, refusing, KERNELS)):  # the last replaces functions
        (folder / f"{number}.py").write_text(text)
    (folder / "all.py").write_text("import runpy, sys\nfor path in sys.argv[1:]: runpy.run_path(path)")
    return there(folder / "all.py", *sorted(folder.glob("?.py")))


def test_what_a_gpu_refuses_is_refused(said):
    """Else the tests here could not fail."""
    found = json.loads(said.partition("said ")[2].splitlines()[0])
    for line, message in REFUSED.items():
        assert message in found.get(line, "nothing"), line


def test_the_same_seed_gives_the_same_memories_there(said):
    """DDP makes them on the GPU, FSDP on the CPU, and both are to be the same run."""
    number, noise, memories = said.partition("same ")[2].split()[:3]
    assert int(number) > 20
    assert (noise, memories) == ("False", "True")


def test_kernels_that_do_not_agree_are_not_used(said):
    """They are called below torch's public functions, so another release or GPU may have others; said once."""
    found = json.loads(said.partition("found ")[2].splitlines()[0])
    assert found.pop("one token")[0] < 1e-5
    gap, calls, _ = found.pop("taught")
    assert 0 < gap < 0.02
    assert calls == 1
    assert {name: calls for name, (_, calls, _) in found.items()} == {"right": 4, "wrong": 2, "absent": 1, "nan": 2}
    for name, message in {"right": None, "wrong": "differ by", "absent": "fail: no such", "nan": "nan%"}.items():
        gap, _, said = found[name]
        assert 0 < gap < 0.02, name
        assert len(said) == (message is not None), name
        assert (message or "") in "".join(said), name


@pytest.mark.parametrize("part", ["attention", pytest.param("all", marks=pytest.mark.slow)])
def test_the_recipe_for_a_gpu_runs_there(tmp_path, part):
    rows = tmp_path / "rows.jsonl"
    said = there(ROOT / "recipes/gpu/parts.py", part, "--tiny", "--out", rows)
    assert "WRONG" not in said
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    parts = {"correct", "speed", "attention", "decode", "compile"} if part == "all" else {part}
    assert {row["part"] for row in found} == parts
    assert {row["what"] for row in found if "error" in row} <= {"attention, flex"}  # torch.compile on a played device
    merged = [row for row in found if row["what"] == "attention, merged"]
    assert len(merged) == 2  # whole rows and packed ones
    assert all(row["dtype"] == "bf16" and row["gap"] < 2e-2 for row in merged)


@pytest.mark.slow
def test_a_run_on_two_of_them(tmp_path):
    words = ["--config", "hardware/ddp.yaml", "--data.seq_len=64", "--trainer.max_steps=2"]
    found = fit(tmp_path, *words, run=lambda *all_words: there(*all_words, devices=2))
    assert found["mean"]["koff_bpb"] > found["mean"]["dense_bpb"] > 1
    assert json.loads((tmp_path / "artifact/export_report.json").read_text())["passed"]


@pytest.mark.slow
def test_what_follows_a_run_works_there(tmp_path):
    """Every verb that a GPU is taken for."""
    run, gpu = tmp_path / "run", "--trainer.accelerator=gpu"
    words = ["--config", "demo.yaml", *SMALL, "--data.seq_len=64", gpu]
    fit(run, "--data.seq_len=64", "--trainer.max_steps=4", gpu)
    artifact, teacher = run / "artifact", ["--model.loss.kl=1", "--model.loss.top_k=20", "--model.loss.teacher=stored"]
    there("fit", *words, f"--trainer.default_root_dir={run}", "--trainer.max_steps=6", "--ckpt_path=last")
    there("prepare", *words, *teacher, "--teacher=true")
    there("fit", *words, *teacher, f"--trainer.default_root_dir={tmp_path / 'stored'}", "--trainer.max_steps=2")
    for method in ("fisher", "flap"):
        there("baseline", *words, f"--method={method}", "--sparsity=0.12", f"--out={tmp_path / method}", "--seed=0")
    there("generate", "--model", artifact, "--domain", "de", "--compare", "dense", "--prompt", "Es war")
    there("router", "fit", "--model", artifact)
    there("generate", "--model", artifact, "--domain", "auto", "--prompt", "Es war einmal", "--temperature", "0.8")
    there("lm-eval", "--model", artifact, "--domain", "de", "--memory_off", "--tasks", "koff_bpb_de", "--limit", "2")
    there("analyze", "--model", run, "--out", tmp_path / "analysis", "--device", "cuda")
    recipe = [f"--trainer.default_root_dir={tmp_path / 'paper'}", "--trainer.max_steps=21", "--export.enabled=false"]
    there("fit", "--config", "paper/tiny_languages.yaml", *SMALL, "--data.seq_len=64", gpu, *recipe)
