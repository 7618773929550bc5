"""How the mask is moved to its target, on counts that are any function of the logits: what is done, and no more.

All numbers are sums of powers of 2, so that edges can be looked at exactly.
"""

import math

import pytest
import torch

from koff_lightning.tracking import APART, ROUNDS, WORST, shift_to_target

TARGET, BAND = 0.25, 0.125


class Slide:
    """A gate whose counts a test chooses: the first logit says how far all was shifted, the second also the round."""

    bound = 8.0

    def __init__(self):
        self.tried, self.rounds = [], 0

    def keep(self, logits):
        return logits

    def shift(self, logits, delta):
        self.tried.append(delta)
        return logits + delta

    def sharpen(self, logits):
        self.rounds += 1
        return logits + torch.tensor([0.0, 1.0])


def track(gaps):
    """Run with both counts less the target as `gaps` of place and round; the gate, and the last place and round."""
    gate, logits = Slide(), torch.zeros(2, dtype=torch.float64)

    def counts(keep):
        place, number = keep[0].item(), round((keep[1] - keep[0]).item())
        return tuple(torch.tensor(TARGET + gap, dtype=torch.float64) for gap in gaps(place, number))

    shift_to_target(gate, logits, TARGET, BAND, counts)
    return gate, logits[0].item(), round((logits[1] - logits[0]).item())


def test_a_gate_that_narrows_itself_is_as_wide_as_when_it_was_best():
    class Narrowing(Slide):
        width = 1.0

        def sharpen(self, logits):
            self.width /= 2
            return super().sharpen(logits)

    gate, logits = Narrowing(), torch.zeros(2, dtype=torch.float64)
    apart = lambda keep: tuple(torch.tensor(TARGET + 8 * side * BAND, dtype=torch.float64) for side in (1, -1))  # noqa: E731
    shift_to_target(gate, logits, TARGET, BAND, apart)
    assert (gate.rounds, gate.width) == (ROUNDS, 1.0)


def test_the_limits_are_those_that_the_log_gives_reasons_for():
    assert (APART, WORST, ROUNDS) == (6, 4, 20)


@pytest.mark.parametrize(
    "gaps", [(0.0, 0.0), (BAND, BAND), (-BAND, -BAND), (4 * BAND, -2 * BAND), (3 * BAND, -3 * BAND)]
)
def test_counts_that_are_near_enough_are_left_alone(gaps):
    """Mean in the band, six bands apart and four off at most: the edges are still in."""
    gate, place, number = track(lambda *_: gaps)
    assert (gate.tried, gate.rounds, place, number) == ([], 0, 0.0, 0)


@pytest.mark.parametrize("gaps", [(3.25 * BAND, -3.25 * BAND), (4.5 * BAND, -0.5 * BAND), (-2 * BAND, 6 * BAND)])
def test_where_no_shift_helps_the_gates_are_sharpened_twenty_times_and_no_more(gaps):
    gate, place, number = track(lambda *_: gaps)
    assert gate.rounds == 20
    assert number == 0, "no round was better than the first, so the logits are those of the first"
    assert math.isfinite(place)


@pytest.mark.parametrize("end", [1, -1])
def test_the_least_shift_ends_at_the_near_edge_of_the_band(end):
    gate, place, number = track(lambda place, _: (end * 1.0 - place / 4,) * 2)
    assert number == gate.rounds == 0
    assert end * 1.0 - place / 4 == pytest.approx(end * BAND, abs=1e-5)
    assert (end * 1.0 - place / 4 - end * BAND) * end <= 0, "inside, not just outside"


def test_the_mean_of_both_counts_is_brought_to_the_target():
    """Three bands apart and moving together: the mean is at the edge, neither count by itself."""
    _, place, number = track(lambda place, _: (1.0 - place / 4, 1.0 + 3 * BAND - place / 4))
    assert number == 0
    assert 1.0 + 1.5 * BAND - place / 4 == pytest.approx(BAND, abs=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_shift_is_a_64th_of_the_gates_range_and_doubles_until_the_goal_lies_between(sign):
    gate, place, _ = track(lambda place, _: (sign * (BAND + 0.75) - place,) * 2)
    assert gate.tried[:4] == [sign * 2.0**k for k in range(-3, 1)], "to 1, as 0.5 is too little"
    assert gate.tried[4:] == [sign * 0.75] * 2, "then halves: the goal itself is found at once, and the logits go there"
    assert place == sign * 0.75


@pytest.mark.parametrize("sign", [1, -1])
def test_a_goal_nearer_than_the_first_shift_is_found(sign):
    gate, place, _ = track(lambda place, _: (sign * (BAND + 1 / 16) - place,) * 2)
    assert place == sign / 16
    assert max(map(abs, gate.tried)) == 1 / 8


def test_a_goal_that_a_doubled_shift_meets_is_between():
    """What stands still at the goal from there on is not passed by; the first place where it holds is near."""
    gate, place, _ = track(lambda place, _: (max(BAND + 0.5 - place, BAND),) * 2)
    assert max(gate.tried) == 0.5
    assert 0.5 - 1e-5 <= place <= 0.5


@pytest.mark.parametrize(("before", "after"), [(0.5, -0.375), (0.375, -0.5)])
def test_a_jump_is_halved_thirty_times_and_left_on_the_side_that_is_nearer(before, after):
    gate, place, number = track(lambda place, _: (before if place < math.pi / 4 else after,) * 2)
    assert number == 0
    assert place == pytest.approx(math.pi / 4, abs=1e-8)
    assert (place >= math.pi / 4) is (abs(after) < abs(before))
    assert len(gate.tried) == 4 + 30 + 1, "doublings from an eighth to 1, halvings, and to go there"


def test_counts_far_apart_are_brought_together_where_the_hard_one_is_on_target():
    """The soft one falls slowly; nothing is sharpened, and the counts that were found are those of the logits."""
    gate, place, number = track(lambda place, _: (0.25 - place / 64, 1.5 - place / 2))
    soft, hard = 0.25 - place / 64, 1.5 - place / 2
    assert number == gate.rounds == 0
    assert max(abs(soft), abs(hard)) <= WORST * BAND
    assert abs(soft + hard) / 2 <= BAND + 1e-5
    assert gate.tried[:6] == [2.0**k for k in range(-3, 3)], "the hard count alone is near enough at 4, not at 2"


def test_where_the_hard_count_is_on_target_and_so_is_the_mean_the_logits_go_there():
    gate, place, _ = track(lambda place, _: (-place / 64, 1.5 - place / 2))
    assert gate.rounds == 0
    assert 1.5 - place / 2 == pytest.approx(BAND, abs=1e-5)


ROUNDS_OF = {  # soft and hard gap of each round, in bands; further apart than any shift could mend
    "the largest of both counts": [(20, 1), (18, 2), (16, 4), (24, 0.5)],
    "the first of equals": [(20, 1), (16, 4), (16, 5), (20, 2)],
    "of either sign": [(-20, 1), (-18, 2), (-12, 4), (13, 4)],
}


@pytest.mark.parametrize(
    ("case", "best"), [("the largest of both counts", 2), ("the first of equals", 1), ("of either sign", 2)]
)
def test_what_was_best_is_kept_where_sharpening_has_not_helped(case, best):
    rounds = ROUNDS_OF[case]
    gate, _, number = track(lambda _, number: [BAND * gap for gap in rounds[min(number, 3)]])
    assert (gate.rounds, number) == (20, best)


@pytest.mark.parametrize("start", [1.0, -1.0])
def test_at_last_the_mean_is_on_target_though_the_counts_stay_apart(start):
    gate, place, number = track(lambda place, _: (start + 4 * BAND - place, start - 4 * BAND - place))
    assert (gate.rounds, number) == (20, 0)
    assert start - place == pytest.approx(math.copysign(BAND, start), abs=1e-5)


def test_a_target_that_no_shift_reaches_is_given_up():
    """Doubled to the first that is a hundred thousand times the first, for the hard count and at last for the mean."""
    gate, *_ = track(lambda *_: (1.0, 2.0))
    step = gate.bound / 64
    assert max(gate.tried) == step * 2**17
    assert 2**16 < 1e5 < 2**17
