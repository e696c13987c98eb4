"""Who sees that a worker is gone, and when."""

from __future__ import annotations

from pathlib import Path

from lightning_fp.study.sweep.storage.worker_lock import WorkerLock


def left_behind(directory: Path, worker: str) -> Path:
    path = directory / f"{worker}.lock"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path


def test_a_worker_lives_as_long_as_it_holds_its_lock(tmp_path: Path) -> None:
    other = WorkerLock(tmp_path)
    with WorkerLock(tmp_path) as mine:
        with other:
            assert not mine.is_gone(other.name)
        path = left_behind(tmp_path, other.name)
        assert mine.is_gone(other.name)
        assert not path.exists()


def test_what_cannot_be_known(tmp_path: Path) -> None:
    with WorkerLock(tmp_path) as mine:
        assert not mine.is_gone(mine.name)
        assert not mine.is_gone(f"{mine.host}-1-abcdef12"), "it may have ended in order"
        elsewhere = left_behind(tmp_path, f"{mine.host}2-1-abcdef12")
        assert not mine.is_gone(elsewhere.stem), "locks may be seen on one machine alone"
        assert elsewhere.exists()
