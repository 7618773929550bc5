"""Whose turn it is: places are shared out among requests, and a heavy request gives some back when others come.

Next comes a text of the request that has the fewest under way; of equals one of the caller who has the fewest; of these
the one that has waited longest. Where no place is free, a text steps back whose request has two more under way than
that: it waits again, and is later read anew, answer and all. So places are even in the end, and none go to and fro.
"""

from collections import Counter
from collections.abc import Sequence

from koff_lightning.serving.batch import Batch, Row, pass_share


def turns(batch: Batch, waiting: Sequence[Row], places: int) -> tuple[list[Row], list[Row]]:
    """Which texts come, no more than are read at once, and which step back for them.

    Prompts of a request are read after its earlier ones, so that those of others come between.

    Args:
        batch: What is under way.
        waiting: Texts that wait, in the order of their turns where nothing else decides.
        places: Texts that may be under way.
    """
    live = [row for row in batch.rows if row.lives]
    reading, left = {row.who for row in batch.reading}, 1.0
    waiting = [row for row in waiting if row.lives and row.who not in reading]
    counts = Counter(of for row in live for of in (row.who, row.caller))
    come: list[Row] = []
    back: list[Row] = []
    while waiting:
        row = min(waiting, key=lambda row: (counts[row.who], counts[row.caller]))
        left -= pass_share(row)
        if come and left < 0:
            break
        if len(live) + len(come) >= places:
            heavy = [other for other in live if counts[other.who] > counts[row.who] + 1 and batch.rereads(other)]
            if not heavy:
                break
            most = max(counts[other.who] for other in heavy)
            last = min((other for other in heavy if counts[other.who] == most), key=lambda other: len(other.ids))
            live.remove(last)
            back.append(last)
            counts.subtract((last.who, last.caller))
        waiting.remove(row)
        come.append(row)
        counts.update((row.who, row.caller))
    return come, back
