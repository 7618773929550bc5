"""The state of a sequence in llama.cpp, with a memory's keys and values in the place of those that it computed.

The form has no promise across builds. So nothing here builds one: the engine decodes as many placeholders as the memory
has slots, saves what came of it, and only the tensors in that are replaced; whatever does not look as it should is
refused. Read off llama-kv-cache.cpp (`state_write`); all numbers are little-endian:

    u32 mark, u32 number of the sequence that was saved
    u32 streams; for each: u32 cells, and where there are any
        per cell    i32 position, u32 count, i32 sequence [count]
        u32 whether values are transposed, u32 layers, u32 and u32 sizes of rotations that only packed caches have
        per layer   i32 type, u64 bytes of a row, keys [cell, K * dh]
        per layer   the same for values, or i32 type, u32 bytes of a number, u32 K * dh, values [K * dh, cell]
"""

import struct
from collections.abc import Sequence

import numpy as np

from koff_lightning.support.errors import KoffError

_TYPES = {0: np.dtype("<f4"), 1: np.dtype("<f2")}  # ggml's numbers for f32 and f16

Pairs = Sequence[tuple[np.ndarray, np.ndarray]]  # keys and values of each layer, [P, K * dh] each


class _Cursor:
    def __init__(self, state: bytes) -> None:
        self.state, self.at = state, 0

    def take(self, form: str) -> tuple[int, ...]:
        values = struct.unpack_from(f"<{form}", self.state, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values


def with_slots(state: bytes, pairs: Pairs) -> bytes:
    """The state of P placeholders at the positions 0..P-1, with other keys and values.

    Raises:
        KoffError: The state is not of the form described above, or not of these layers.
    """
    try:
        return _replaced(state, pairs)
    except struct.error:
        raise KoffError(_unlike("it ends too early")) from None


def data_of(state: bytes, slots: int) -> bytes:
    """The part of a state of `slots` cells or more that holds tensors; the part before names sequences.

    Raises:
        KoffError: As `with_slots`.
    """
    try:
        return state[_start(_Cursor(state), slots) :]
    except struct.error:
        raise KoffError(_unlike("it ends too early")) from None


def _replaced(state: bytes, pairs: Pairs) -> bytes:
    slots = len(pairs[0][0])
    cursor, out = _Cursor(state), bytearray(state)
    cursor.at = _start(cursor, slots)
    transposed, layers, *rotations = cursor.take("IIII")
    if layers != len(pairs) or any(rotations) or transposed > 1:
        raise KoffError(_unlike(f"{layers} layers, transposed {transposed}, rotations {rotations}"))
    for which in (0, 1):
        for pair in pairs:
            rows = pair[which]
            if which and transposed:
                kind, size, width = cursor.take("iII")
                rows, given = rows.T, (size, width)
                due = (_type(kind).itemsize, rows.shape[0])
            else:
                kind, row = cursor.take("iQ")
                given, due = (row,), (_type(kind).itemsize * rows.shape[1],)
            if given != due:
                raise KoffError(_unlike(f"rows of {given} where {due} are due"))
            data = np.ascontiguousarray(rows, dtype=_type(kind)).tobytes()
            if cursor.at + len(data) > len(state):
                raise KoffError(_unlike("it ends too early"))
            out[cursor.at : cursor.at + len(data)] = data
            cursor.at += len(data)
    if any(state[cursor.at :]):  # further streams, which are empty
        raise KoffError(_unlike("more follows than was expected"))
    return bytes(out)


def _start(cursor: _Cursor, slots: int) -> int:
    """Where the tensors of the only stream that holds cells begin."""
    _, _, streams = cursor.take("III")
    for _ in range(streams):
        (cells,) = cursor.take("I")
        if not cells:
            continue
        if cells < slots:
            raise KoffError(_unlike(f"{cells} cells where {slots} are due"))
        for place in range(cells):
            position, count = cursor.take("iI")
            cursor.take(f"{count}i")
            if position != place or count != 1:
                raise KoffError(_unlike(f"cell {place} at position {position}, of {count} sequences"))
        return cursor.at
    raise KoffError(_unlike("no cells"))


def _type(kind: int) -> np.dtype:
    if kind not in _TYPES:
        raise KoffError(_unlike(f"a cache of type {kind}, f32 and f16 are read"))
    return _TYPES[kind]


def _unlike(what: str) -> str:
    return f"llama.cpp's saved state is not of the form that is known ({what}): a build that was not tested"
