"""`koff serve`: an exported model behind OpenAI's protocol, a domain per request."""

import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from koff_lightning.support.errors import KoffError
from koff_lightning.support.names import AUTO
from koff_lightning.support.quick_imports import quick_imports

if TYPE_CHECKING:
    from koff_lightning.artifact.folder import Manifest
    from koff_lightning.serving.engine import Engine

_TOLD = 4  # names of models that the first line tells
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    artifact: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: str | None = None,
    name: str | None = None,
    engine: Literal["own", "llamacpp", "vllm"] = "own",
    gguf: str | None = None,
    batch_size: int | None = None,
    queue: int = 256,
    time_limit: float = 600.0,
    max_tokens: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Serve an exported model by OpenAI's protocol: NAME is its backbone, NAME:DOMAIN one with a memory.

    Args:
        artifact: Folder that `koff export` wrote, or org/name of one on the hub. Memories that are added to a folder or
            removed show up in a second.
        host: Address to listen at. Another than this machine's own needs --keys.
        port: Port to listen at.
        keys: YAML file of who may use which domains, NAME: {key: ..., domains: [...] or all, admin: true}.
        name: What the model is called; by default as its dense model.
        engine: What computes: the project's own runtime; llama.cpp (extra `llamacpp`), faster on a CPU; or vLLM, from
            an environment of its own (docs/vllm.md), for GPUs and many users.
        gguf: Folder of `koff convert gguf`, for llamacpp; by default the artifact is converted at start, as f16.
        batch_size: Most texts that are continued together; by default 32, 128 of vllm, or 4 of llamacpp, which holds
            the token cache of each from the start.
        queue: Most texts that wait for their turn; who comes then is told to come again (status 429).
        time_limit: Seconds that a request may take.
        max_tokens: Most tokens of an answer; by default what the context leaves.
        device: Torch device; by default a GPU if there is one.
        dtype: Dtype of the backbone; by default as exported.
    """
    batch_size = {"own": 32, "llamacpp": 4, "vllm": 128}[engine] if batch_size is None else batch_size
    _refuse_unread(engine, {"--gguf": gguf, "--device": device, "--dtype": dtype})
    _check(batch_size, queue, time_limit, max_tokens)
    _check_installed()
    if keys is None and not is_local(host):
        raise KoffError(f"anybody who reaches {host} could use this server: give --keys FILE, or leave --host out")
    from koff_lightning.artifact.folder import read_manifest
    from koff_lightning.artifact.hub import local_folder
    from koff_lightning.serving.keys import read_keys

    folder = local_folder(artifact).resolve()
    manifest = read_manifest(folder)
    allowed = read_keys(keys) if keys is not None else None
    called = _name(manifest) if name is None else name
    if not called or ":" in called or any(c.isspace() for c in called):
        raise KoffError(f"the model's name cannot be {called!r}: give --name without ':' and spaces")
    with listening(host, port) as at:
        from koff_lightning.serving.app import create_app
        from koff_lightning.serving.front import Settings

        make = {"own": _own, "llamacpp": _llamacpp, "vllm": _vllm}[engine]
        made = make(folder, batch_size, gguf=gguf, device=device, dtype=dtype)
        settings = Settings(called, allowed, batch_size + queue, time_limit, max_tokens, folder=folder)
        _run(create_app(made, settings), at, time_limit, names_told(called, manifest))


def _refuse_unread(engine: str, given: dict[str, str | None]) -> None:
    """Refuse an option that this engine does not read."""
    unread = {"own": ["--gguf"], "llamacpp": ["--device", "--dtype"], "vllm": ["--gguf", "--device"]}[engine]
    if odd := [option for option in unread if given[option] is not None]:
        raise KoffError(f"{odd[0]} is not for --engine {engine}: leave it out")


def _own(folder: Path, batch_size: int, *, gguf: None, device: str | None, dtype: str | None) -> "Engine":
    with quick_imports():
        from koff_lightning.artifact.decomposed import default_device
        from koff_lightning.serving.own import OwnEngine

    return OwnEngine(folder, batch_size, default_device(device), dtype)


def _llamacpp(folder: Path, batch_size: int, *, gguf: str | None, device: None, dtype: None) -> "Engine":
    from koff_lightning.serving.llamacpp import LlamaCppEngine

    return LlamaCppEngine(folder, batch_size, gguf)


def _vllm(folder: Path, batch_size: int, *, gguf: None, device: None, dtype: str | None) -> "Engine":
    from koff_lightning.serving.vllm.engine import VllmEngine

    return VllmEngine(folder, batch_size, dtype)


def _check(batch_size: int, queue: int, time_limit: float, max_tokens: int | None) -> None:
    if batch_size < 1 or queue < 0:
        raise KoffError(f"--batch-size must be at least 1 and --queue at least 0; got {batch_size} and {queue}")
    if not 0 < time_limit < 10**6:
        raise KoffError(f"--time-limit must be more than 0 seconds and less than 1000000; got {time_limit}")
    if max_tokens is not None and max_tokens < 1:
        raise KoffError(f"--max-tokens must be at least 1; got {max_tokens}")


def _check_installed() -> None:
    from importlib.util import find_spec

    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise KoffError(f"koff serve needs {', '.join(missing)}: pip install '.[serve]' in a clone of koff-lightning")


def _name(manifest: "Manifest") -> str:
    """The last part of the dense model's id."""
    return Path(manifest.base["id"].replace(":", "-")).name.replace(" ", "-")


def names_told(called: str, manifest: "Manifest") -> str:
    """What requests may give as `model`: the first few names."""
    names = [called, *(f"{called}:{domain}" for domain in manifest.domains)]
    if manifest.router is not None and AUTO not in manifest.domains:
        names.append(f"{called}:{AUTO}")
    more = ["..."] * (len(names) > _TOLD)
    return f"{', '.join([*names[:_TOLD], *more])} (GET /v1/models lists them)"


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address, by a name that `guard.LOCAL` knows."""
    return host in ("localhost", "127.0.0.1", "::1", "[::1]")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; before a model is loaded, which takes a while.

    Raises:
        KoffError: The port is taken, or the address is none of this machine's.
    """
    if not 0 <= port < 2**16:
        raise KoffError(f"--port must be between 0 and 65535; got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise KoffError(f"cannot listen at {host}: {error.strerror or error}") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(1024)
    except OSError as error:
        made.close()
        raise KoffError(f"cannot listen at {host} port {port}: {error.strerror}; give another --port") from error
    return made


def _run(app: Any, at: socket.socket, patience: float, names: str) -> None:
    """Say where and which models; serve until a signal comes; requests under way are then answered first."""
    from koff_lightning.serving.connection import Server, config

    logging.basicConfig(format="koff: %(message)s", level=logging.WARNING)
    host, port = at.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving on http://{shown}:{port}, model names: {names}", flush=True)
    Server(config(app, patience)).run(sockets=[at])
