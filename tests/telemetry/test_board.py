"""The board: who publishes does not know who reads."""

from __future__ import annotations

from lightning_fp.telemetry import Board, Measurement
from lightning_fp.telemetry.board import MOST_KEPT


def test_who_follows_hears_of_his_names_from_then_on() -> None:
    board = Board()
    board.publish("loss", 1, 4.0)
    one, other = board.follow(["loss", "norm"]), board.follow(["norm"])
    assert board.followed == {"loss", "norm"}
    for step in (2, 3):
        board.publish("loss", step, 4.0 / step)
        board.publish("else", step, 0.0)
    board.publish("norm", 3, 9.0, since=1)
    norm = Measurement(step=3, value=9.0, since=1)
    assert one.take() == {
        "loss": [
            Measurement(step=2, value=2.0, since=2),
            Measurement(step=3, value=4.0 / 3, since=3),
        ],
        "norm": [norm],
    }
    assert one.take() == {}
    assert other.take() == {"norm": [norm]}


def test_the_latest_is_kept_for_those_who_come_late() -> None:
    board = Board()
    assert board.latest("loss") is None
    for step in range(3):
        board.publish("loss", step, float(step))
    assert board.latest("loss") == Measurement(step=2, value=2.0, since=2)


def test_who_never_takes_costs_bounded_memory() -> None:
    board = Board()
    follower = board.follow(["loss"])
    for step in range(MOST_KEPT + 5):
        board.publish("loss", step, 0.0)
    steps = [measured.step for measured in follower.take()["loss"]]
    assert steps == list(range(5, MOST_KEPT + 5))
