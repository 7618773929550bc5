"""llama.cpp in this process: its library, found, checked and quiet.

The library is the one inside `xllamacpp`, which holds all of it and runs on any Linux of the last ten years; the
declarations are those of `llama-cpp-py-sync`, whose own libraries want a newer system. Neither checks the other, so
both are held to the pair that was tested.
"""

import functools
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from koff_lightning.support.errors import KoffError

# name -> release; setup.cfg's extra `llamacpp` names the same. Structures change between builds without notice.
TESTED = {"xllamacpp": "2026.10.11549", "llama-cpp-py-sync": "0.11548"}
_HOW = "pip install '.[llamacpp]' in a clone of koff-lightning"
_last: list[str] = []  # what the library has said, newest last


@functools.cache
def library() -> tuple[Any, Any]:
    """The interface of cffi, and the library.

    Raises:
        KoffError: It is not installed, in another release than was tested, or does not load here.
    """
    for name, wanted in TESTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            raise KoffError(f"llama.cpp is not installed ({name} is missing): {_HOW}") from None
        if found != wanted:
            raise KoffError(f"{name} {found} has not been tried, {wanted} has: {_HOW}")
    try:
        import xllamacpp
        from llama_cpp_py_sync._cffi_bindings import get_ffi

        ffi = get_ffi()
        lib = ffi.dlopen(xllamacpp.xllamacpp.__file__)
    except (ImportError, OSError) as error:
        raise KoffError(f"llama.cpp cannot be loaded here ({error}): {_HOW}") from error
    known = lib.llama_context_default_params()
    if (known.n_batch, known.n_ubatch, known.type_k) != (2048, 512, lib.GGML_TYPE_F16):
        raise KoffError(f"llama.cpp and its declarations are of different builds: {_HOW}")
    lib.llama_log_set(_listener(ffi), ffi.NULL)
    lib.llama_backend_init()
    return ffi, lib


@functools.cache  # the library holds only a pointer to it
def _listener(ffi: Any) -> Any:
    @ffi.callback("void(enum ggml_log_level, const char *, void *)")
    def listen(level: int, text: Any, data: Any) -> None:
        _last.append(ffi.string(text).decode(errors="replace").strip())
        del _last[:-20]

    return listen


def complaint() -> str:
    """The last line that tells of a fault."""
    faults = [line for line in _last if any(word in line.lower() for word in ("error", "fail", "unknown", "missing"))]
    return (faults or _last or ["it gave no reason"])[-1][:300]
