"""Small lm-eval tasks for the tests: one in which the model writes, one of choices, with examples if asked."""

import json
from pathlib import Path

PROMPTS = ["the quick", "während größere Füchse schlafen и кошки", "fox", "狐狸 跳过 the brown fox jumps the quick"]
UNTIL, NEW = ["ch", "ö"], 10  # strings that end a text, and tokens at most

CODE = f"""
from datasets import Dataset

PROMPTS = {PROMPTS!r}

def documents(**_):
    choices = ["fox", "кошки jumps", "狐狸"]
    rows = [dict(prompt=prompt, choices=choices, answer=i % 3) for i, prompt in enumerate(PROMPTS)]
    return dict(test=Dataset.from_list(rows), train=Dataset.from_list(rows[::-1]))
"""
SHARED = 'custom_dataset: !function toy.documents\ntest_split: test\nfewshot_split: train\ndoc_to_text: "{{prompt}}"\n'
WRITE = f"""task: toy_write
{SHARED}output_type: generate_until
doc_to_target: "{{{{prompt}}}}"
generation_kwargs: {{until: {json.dumps(UNTIL, ensure_ascii=False)}, max_gen_toks: {NEW}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = f"""task: toy_choose
{SHARED}output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
PARTS = "group: toy_parts\ntask: [toy_choose]\n"  # a group without a score of its own


def toy_tasks(folder: Path) -> str:
    """Write tasks `toy_write` and `toy_choose` and group `toy_parts`; returns the folder, for `--include_path`."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {"toy_write": WRITE, "toy_choose": CHOOSE, "toy_parts": PARTS}
    for name, text in [("toy.py", CODE), *((f"{name}.yaml", text) for name, text in tasks.items())]:
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder)
