"""Six topics in one language without a model hub: what libraries of six subjects write about themselves.

    python recipes/data/topics.py corpora/topics     # then: koff fit --config ... --config domains/topics_offline.yaml

A document is the docstring of a module, class or function, as it stands, with its doctests; tests are left out, as are
copies of other packages, docstrings under 300 bytes and exact copies. The wheels are fetched by pip from the configured
index, nothing of them is installed or run, and nothing of their text is part of this project. It is reference prose
about a subject and about a library at once, and far less than an encyclopedia's: topics of the paper's kind, not the
paper's.
"""

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

# Topic -> the distribution, its version and the licence that its metadata tells; the text stays under that licence.
PACKAGES = {
    "mathematics": ("sympy", "1.14.0", "BSD-3-Clause"),
    "statistics": ("statsmodels", "0.15.0", "BSD-3-Clause"),
    "networks": ("networkx", "3.6.1", "BSD-3-Clause"),
    "astronomy": ("astropy", "7.1.0", "BSD-3-Clause"),
    "biology": ("biopython", "1.85", "Biopython License Agreement, some files BSD-3-Clause too"),
    "music": ("music21", "9.7.1", "BSD-3-Clause"),
}
OTHERS = {"tests", "test", "testing", "extern", "ext", "_vendor"}  # the last three: copies of other packages
SHORTEST = 300  # bytes of a document


def fetch(name: str, version: str, folder: Path) -> Path:
    """The wheel of a distribution, without what it needs."""
    words = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), f"{name}=={version}"]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    return next(folder.glob(f"{name}-*.whl"))


def documents(wheel: Path, version: str) -> Iterator[dict[str, str]]:
    """The docstrings of a wheel, as lines of jsonl."""
    seen: set[str] = set()
    with zipfile.ZipFile(wheel) as files:
        for path in sorted(name for name in files.namelist() if name.endswith(".py")):
            if OTHERS & set(path.split("/")) or path.rpartition("/")[2].startswith("test"):
                continue
            try:
                tree = ast.parse(files.read(path))
            except (SyntaxError, ValueError):  # a file for another Python
                continue
            for name, text in docstrings(tree):
                if len(text.encode()) >= SHORTEST and text not in seen:
                    seen.add(text)
                    yield {"id": f"{path}:{name}", "text": text, "source": f"{wheel.name.partition('-')[0]} {version}"}


def docstrings(node: ast.AST, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names of what a syntax tree defines, and their docstrings."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, kinds) and (text := ast.get_docstring(node)):
        yield name, text
    for child in ast.iter_child_nodes(node):
        own = f"{name}.{child.name}".lstrip(".") if isinstance(child, kinds[1:]) else name
        yield from docstrings(child, own)


def main() -> None:
    """Write a file for each topic."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write, a jsonl for each topic")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for topic, (name, version, licence) in PACKAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            lines = [json.dumps(each) for each in documents(fetch(name, version, Path(folder)), version)]
        content = "".join(line + "\n" for line in lines)
        (out / f"{topic}.jsonl").write_text(content, encoding="utf-8")
        size = sum(len(json.loads(line)["text"].encode()) for line in lines)
        print(f"{topic}: {len(lines):,} documents, {size:,} bytes, from {name} {version} ({licence})", flush=True)


if __name__ == "__main__":
    main()
