"""CellTable: deals cells out to workers, and keeps what they found.

A cell is open, claimed, done or failed. Whoever claims one has it for the length of a lease, which
is renewed while it trains; a worker that is killed loses it when the lease ends, or at once where
somebody sees that the worker is gone. Each change of state is one UPDATE that names the state it
expects, so that of two workers exactly one gets a cell, and a result is kept once. Workers on
several machines compare leases by their own clocks: these may differ by less than a lease.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_fp.study.sweep.grid import Cell
from lightning_fp.study.sweep.storage.database import Database, Transaction

LEASE_SECONDS = 180.0
"""How long a claim holds without a sign of life."""

MOST_TRIES = 3
"""Workers that may die over a cell before it counts as failed; each command tries it once more."""

_CLASHES = 5
"""How often to begin again where two workers add the same cells at once."""

_TABLES = (
    "CREATE TABLE IF NOT EXISTS sweep (name VARCHAR(64) PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS cells (id VARCHAR(255) PRIMARY KEY, place INTEGER NOT NULL,"
    " cell TEXT NOT NULL, state VARCHAR(16) NOT NULL, worker VARCHAR(255),"
    " lease DOUBLE PRECISION, tries INTEGER NOT NULL, result TEXT)",
)

_FREE = "(state = 'open' OR (state = 'claimed' AND lease < :now)) AND tries < :most"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A cell with what is known of it."""

    cell: Cell

    state: str
    """"open", "claimed", "done" or "failed"."""

    worker: str | None
    result: Mapping[str, Any]
    """What its run came to; of one that failed, "error"."""


class CellTable:
    """The cells of one sweep in a database.

    Args:
        database: where they are.
        lease: seconds that a claim holds without being renewed.
    """

    def __init__(self, database: Database, *, lease: float = LEASE_SECONDS) -> None:
        self.database, self.lease = database, lease

    def enqueue(
        self, cells: Sequence[Cell], settings: Mapping[str, Any], about: Mapping[str, Any]
    ) -> None:
        """Add the cells that are not there, and open again those that failed or were given up.

        Args:
            cells: all that this command asks for.
            settings: what all cells of a sweep must share.
            about: what is kept of whoever came first, besides.

        Raises:
            ValueError: if there is a sweep with other settings.
        """
        for tries_left in reversed(range(_CLASHES)):
            try:
                return self._enqueue(cells, settings, about)
            except self.database.clashes:
                if not tries_left:
                    raise

    def _enqueue(
        self, cells: Sequence[Cell], settings: Mapping[str, Any], about: Mapping[str, Any]
    ) -> None:
        with self.database.transaction() as now:
            for statement in _TABLES:
                now.change(statement)
        with self.database.transaction() as now:
            now.change(
                "INSERT INTO sweep (name, value) SELECT 'settings', :value"
                " WHERE NOT EXISTS (SELECT 1 FROM sweep WHERE name = 'settings')",
                {"value": json.dumps({**settings, **about})},
            )
            ((text,),) = now.rows("SELECT value FROM sweep WHERE name = 'settings'")
            kept = json.loads(text)
            for name, value in settings.items():
                if kept.get(name) != value:
                    raise ValueError(
                        f"{self.database.where} has a sweep with {name} {kept.get(name)!r}, not"
                        f" {value!r}: their cells cannot be compared; take another --dir"
                    )
            known = {row[0] for row in now.rows("SELECT id FROM cells")}
            for place, cell in enumerate(cells):
                if cell.id not in known:
                    _insert(now, cell, place)
            now.change("UPDATE cells SET state = 'open', tries = 0 WHERE state = 'failed'")
            # Whoever is killed and started again, however often, has lost no cell.
            now.change(
                "UPDATE cells SET tries = :last WHERE state <> 'done' AND tries > :last",
                {"last": MOST_TRIES - 1},
            )

    def claim(self, worker: str) -> Cell | None:
        """Take the first free cell; None if there is none now.

        Args:
            worker: who takes it.
        """
        while True:
            now = time.time()
            values = {"now": now, "most": MOST_TRIES}
            with self.database.transaction() as transaction:
                found = transaction.rows(
                    # Cells over which workers died come last, lest they keep the others waiting.
                    f"SELECT id, cell FROM cells WHERE {_FREE} ORDER BY tries, place, id LIMIT 1",
                    values,
                )
                if not found:
                    self._give_up(transaction, now)
                    return None
                ((id, cell),) = found
                taken = transaction.change(
                    "UPDATE cells SET state = 'claimed', worker = :worker, lease = :until,"
                    f" tries = tries + 1 WHERE id = :id AND {_FREE}",
                    {**values, "worker": worker, "until": now + self.lease, "id": id},
                )
            if taken:  # else another worker was faster
                return Cell.from_json(cell)

    def renew(self, cell: Cell, worker: str) -> bool:
        """Give a sign of life; whether the cell is still the worker's."""
        with self.database.transaction() as now:
            return bool(
                now.change(
                    f"UPDATE cells SET lease = :until WHERE {_MINE}",
                    {"until": time.time() + self.lease, **_mine(cell, worker)},
                )
            )

    def finish(self, cell: Cell, worker: str, result: Mapping[str, Any]) -> bool:
        """Keep what a run came to; False if the cell is another worker's by now."""
        return self._end(cell, worker, "done", result)

    def fail(self, cell: Cell, worker: str, error: str) -> bool:
        """Note that a cell could not run; the next command tries it again."""
        return self._end(cell, worker, "failed", {"error": error})

    def leave(self, worker: str) -> None:
        """Open what a worker still holds, as if it had not claimed it."""
        with self.database.transaction() as now:
            now.change(
                "UPDATE cells SET state = 'open', tries = tries - 1"
                " WHERE state = 'claimed' AND worker = :worker",
                {"worker": worker},
            )

    def workers(self) -> set[str]:
        """Those that hold a cell."""
        with self.database.transaction() as now:
            rows = now.rows("SELECT DISTINCT worker FROM cells WHERE state = 'claimed'")
        return {row[0] for row in rows}

    def bury(self, worker: str) -> int:
        """Open the cells of a worker that is gone; how many there were."""
        with self.database.transaction() as now:
            return now.change(
                "UPDATE cells SET state = 'open' WHERE state = 'claimed' AND worker = :worker",
                {"worker": worker},
            )

    def entries(self) -> list[Entry]:
        """All cells, in order."""
        with self.database.transaction() as now:
            rows = now.rows("SELECT cell, state, worker, result FROM cells ORDER BY place, id")
        return [
            Entry(
                cell=Cell.from_json(cell),
                state=state,
                worker=worker,
                result=json.loads(result) if result else {},
            )
            for cell, state, worker, result in rows
        ]

    def _end(self, cell: Cell, worker: str, state: str, result: Mapping[str, Any]) -> bool:
        values = {"state": state, "result": json.dumps(result, allow_nan=False)}
        with self.database.transaction() as now:
            return bool(
                now.change(
                    f"UPDATE cells SET state = :state, result = :result WHERE {_MINE}",
                    {**values, **_mine(cell, worker)},
                )
            )

    def _give_up(self, transaction: Transaction, now: float) -> None:
        """Cells over which so many workers died are not tried for ever."""
        told = json.dumps({"error": f"its worker was killed {MOST_TRIES} times; out of memory?"})
        transaction.change(
            "UPDATE cells SET state = 'failed', result = :result WHERE tries >= :most"
            " AND (state = 'open' OR (state = 'claimed' AND lease < :now))",
            {"result": told, "most": MOST_TRIES, "now": now},
        )


_MINE = "id = :id AND state = 'claimed' AND worker = :worker"


def _mine(cell: Cell, worker: str) -> dict[str, Any]:
    return {"id": cell.id, "worker": worker}


def _insert(transaction: Transaction, cell: Cell, place: int) -> None:
    # In databases that let two transactions run beside each other both may come to this line: the
    # primary key refuses the second, and its worker begins again.
    transaction.change(
        "INSERT INTO cells (id, place, cell, state, tries) VALUES (:id, :place, :cell, 'open', 0)",
        {"id": cell.id, "place": place, "cell": cell.to_json()},
    )
