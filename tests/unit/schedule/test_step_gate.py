"""The gate alone: whatever order steps, answers and the agreement come in, all ranks save at one step."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from dcp_async.schedule.step_gate import NOW, AgreedStep, Position, StepGate

PATIENCE = 60.0


def agreed_on(after: Position) -> AgreedStep:
    return AgreedStep(after=after, why="test", stop=True)


class Rank:
    """A trainer and its gate; steps come from a series that all ranks share."""

    def __init__(self, series: list[int]) -> None:
        self.gate = StepGate()
        self.saved_at: int | None = None
        """Which of the steps of the series."""
        self._series, self.next = series, 0
        self._told: Position | None = None
        self._waiting: threading.Thread | None = None

    def answer(self) -> Position:
        if self._told is None:
            self._told = self.gate.hold()
        return self._told

    def step(self) -> None:
        """The trainer's next step; where it is held, it waits in a thread of its own until ``hear``."""
        if self._waiting is None:
            self._waiting = threading.Thread(target=self._arrive, args=(self._series[self.next],))
            self._waiting.start()
            if self._told is None:
                self._end_step()

    def _arrive(self, step: int) -> None:
        self.gate.arrive(step)
        if self.gate.take_agreed():
            self.saved_at = self.next
        self.next += 1

    def _end_step(self) -> None:
        if self._waiting is not None:
            self._waiting.join(PATIENCE)
            assert not self._waiting.is_alive()
            self._waiting = None

    def hear(self, after: Position) -> None:
        self.gate.agree(agreed_on(after))
        self.gate.release()
        self._end_step()
        self._told = None


SERIES = [0, 1, 2, 5, 6, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
"""Steps are passed over, and once the trainer goes back."""


@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.tuples(st.sampled_from(["answer", "step"]), st.integers(0, 2)), max_size=12),
    st.permutations(range(3)),
)
def test_all_ranks_save_at_the_same_step(
    before: list[int], between: list[tuple[str, int]], order: list[int]
) -> None:
    ranks = [Rank(SERIES) for _ in range(3)]
    for number in before:  # at most as many steps as the series has left for the agreement
        if ranks[number].saved_at is None:
            ranks[number].step()
    for event, number in between:
        if event == "answer":
            ranks[number].answer()
        elif len(before) + len(between) < len(SERIES):
            ranks[number].step()
    after = max(rank.answer() for rank in ranks)
    for number in order:
        ranks[number].hear(after)
    for rank in ranks:
        while rank.saved_at is None and rank.next < len(SERIES):
            rank.step()
    assert len({rank.saved_at for rank in ranks}) == 1


def test_a_step_that_was_told_is_not_saved_and_the_next_one_is() -> None:
    gate = StepGate()
    gate.arrive(4)
    told = gate.hold()
    gate.agree(agreed_on(told))
    gate.release()
    assert gate.take_agreed() == []
    gate.arrive(5)
    assert [agreed.after for agreed in gate.take_agreed()] == [told]
    assert gate.take_agreed() == [], "each is given once"


def test_going_back_to_an_earlier_step_is_behind_every_step_before() -> None:
    gate = StepGate()
    gate.arrive(800)
    told = gate.hold()
    gate.agree(agreed_on(told))
    gate.release()
    gate.arrive(501)
    assert len(gate.take_agreed()) == 1
    assert gate.previous(502) == 501
    assert gate.previous(400) is None


def test_what_is_agreed_for_now_is_due_at_the_first_step() -> None:
    gate = StepGate()
    gate.agree(agreed_on(NOW))
    gate.arrive(0)
    assert len(gate.take_agreed()) == 1
