"""The account of what could not be used: one JSON line per item, and sums by source and reason.

Several processes append to one file (a line is one write), each item once; whoever reads it counts an item once,
however often epochs, workers or resumed runs met it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from walt.data.index import Broken
from walt.errors import WaltError

EARLY = 16
"""Items of a source that are tried before its broken share is judged while training goes on."""


class Account:
    """Skipped items by source, and the rule that a source that is mostly broken stops the run.

    Args:
        path: JSON-lines file, appended to; None: nothing is written.
        limit: largest share of a source's items that may be broken.
        anew: whether what the file says is forgotten, in place of going on from it.
    """

    def __init__(self, path: Path | None, limit: float, anew: bool = False) -> None:
        self.path, self.limit = path, limit
        self.totals: dict[str, int] = {}
        self.skipped: dict[tuple[str, str], Broken] = {}
        self.tried: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if anew:
                path.unlink(missing_ok=True)
            self._merge()

    def listed(self, source: str, total: int, broken: Iterable[Broken], write: bool = True) -> None:
        """Takes over what the index knows of a source; `write` on one rank only.

        Raises:
            WaltError: the broken share is above the limit.
        """
        broken = list(broken)
        self.totals[source] = total
        if write:
            for item in broken:
                self._add(source, item)
        self._judge(source, len(broken), total, Counter(item.reason for item in broken))

    def used(self, source: str) -> None:
        """Counts an item that was read."""
        self.tried[source] += 1

    def skip(self, source: str, item: Broken) -> None:
        """Writes down an item that could not be read after all.

        Raises:
            WaltError: the share among those tried in this process is above the limit, by more than chance.
        """
        self.tried[source] += 1
        self.failed[source] += 1
        self._add(source, item)
        tried, failed = self.tried[source], self.failed[source]
        # Every rank and worker judges anew at every item, so a stroke of bad luck is sure to come somewhere: it takes
        # three standard deviations beyond the limit.
        least = self.limit * tried + 3 * math.sqrt(self.limit * (1 - self.limit) * tried)
        if tried >= EARLY and failed > least:
            reasons = Counter(found.reason for (name, _), found in self.skipped.items() if name == source)
            self._judge(source, failed, tried, reasons)

    def summary(self) -> dict[str, dict[str, Any]]:
        """By source: items in all, skipped, and skipped by reason; other processes' lines included."""
        self._merge()
        table: dict[str, dict[str, Any]] = {}
        for source, total in self.totals.items():
            reasons = Counter(item.reason for (name, _), item in self.skipped.items() if name == source)
            table[source] = {"items": total, "skipped": sum(reasons.values()), "reasons": dict(sorted(reasons.items()))}
        return table

    def lines(self) -> list[str]:
        """The summary for the terminal."""
        told = []
        for source, row in self.summary().items():
            reasons = ", ".join(f"{count} {reason}" for reason, count in row["reasons"].items())
            told.append(
                f"{source}: {row['items']} items, {row['skipped']} skipped" + (f" ({reasons})" if reasons else "")
            )
        if self.path is not None and any(row["skipped"] for row in self.summary().values()):
            told.append(f"every skipped item by name: {self.path}")
        return told

    def _judge(self, source: str, broken: int, total: int, reasons: Counter[str]) -> None:
        if total and broken / total > self.limit:
            told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
            raise WaltError(
                f'sources: {broken} of {total} items of "{source}" cannot be used ({told}); data.max_broken is '
                f"{self.limit:g}" + (f", see {self.path}" if self.path else "")
            )

    def _add(self, source: str, item: Broken) -> None:
        if (source, item.key) in self.skipped:
            return
        self.skipped[source, item.key] = item
        if self.path is None:
            return
        row = {"source": source, "item": item.key, "reason": item.reason, "detail": item.detail}
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(handle, line)
            finally:
                os.close(handle)
        except OSError as error:
            # A full disk must not end a run that goes on without the item.
            print(f"{self.path}: {error.strerror}; left out {item.key}: {item.reason}", file=sys.stderr, flush=True)

    def _merge(self) -> None:
        """Reads what other processes (and earlier runs) have written."""
        if self.path is None or not self.path.exists():
            return
        # Only at line feeds: a name may hold other separators. A line that was cut off may end inside a character.
        try:
            text = self.path.read_bytes().decode("utf-8", "replace")
        except OSError as error:
            raise WaltError(f"{self.path} cannot be read: {error.strerror or error}") from None
        for line in text.split("\n"):
            try:
                row = json.loads(line)
                key = (row["source"], row["item"])
                self.skipped.setdefault(key, Broken(row["item"], row["reason"], row["detail"]))
            except (ValueError, KeyError, TypeError):  # a line that a kill cut off
                continue
