"""vLLM computes what our runtime does: bare, LoRA, slots and both, in one batch. Run by `make engines`.

Our runtime answers in this environment, vLLM in its own (.venv-vllm, or what KOFF_VLLM_PYTHON names).
"""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "engines" / "in_vllm.py"
VLLM = Path(os.environ.get("KOFF_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The cases, with our answers."""
    assert VLLM.exists(), f"{VLLM} is not there: make engines"
    folder = tmp_path_factory.mktemp("vllm")
    subprocess.run([sys.executable, RECIPE, "make", folder], check=True)
    return folder


def test_all_families_layouts_and_ropes_are_equal_and_wrong_requests_fail_alone(work):
    """24 texts of eight arms each (two of a merged one), twice; the log-probabilities within 1e-4."""
    subprocess.run([VLLM, RECIPE, "check", work, "--record", ROOT / "docs" / "results" / "engines.json"], check=True)


def test_koff_serve_answers_as_our_runtime(work):
    """By HTTP, all texts at a time; places of slots in no count of tokens."""
    rows = json.loads((work / "llama-ragged" / "answers.json").read_text(encoding="utf-8"))
    koff = [VLLM.parent / "koff", "serve", work / "llama-ragged" / "artifact", "--engine", "vllm", "--port", "0"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    settings |= {"TORCHDYNAMO_DISABLE": "1"}
    server = subprocess.Popen([*koff, "--name", "tiny"], stdout=subprocess.PIPE, text=True, env=os.environ | settings)
    try:
        address = next(match for line in server.stdout if (match := re.search(r"http://\S+", line)))[0]
        for row in rows:
            body = {"model": f"tiny:{row['memory']}" if row["memory"] else "tiny", "prompt": row["ids"]}
            body |= {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True, "logprobs": 1}
            found = asked(f"{address}/v1/completions", body)
            assert found["choices"][0]["token_ids"] == row["tokens"], row["memory"]
            assert found["usage"]["prompt_tokens"] == len(row["ids"])
            values = found["choices"][0]["logprobs"]["token_logprobs"]
            assert max(abs(a - step[0][1]) for a, step in zip(values, row["top"], strict=True)) < 1e-4
    finally:
        server.send_signal(signal.SIGTERM)
        ended = server.wait(60)
        server.stdout.close()
        assert ended in (0, 128 + signal.SIGTERM)


def asked(address, body):
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)
