"""Reads and decodes the next frames while the engine thinks about this one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

DEPTH = 3


def ahead(items: Iterable[Item], depth: int = DEPTH) -> Iterator[Item]:
    """The same items in the same order, up to `depth` made beforehand in a thread; its errors are raised here."""
    made: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple) -> bool:
        while not stopped.is_set():
            try:
                made.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the thread that waits
            put((None, error))
        else:
            put((None, StopIteration()))

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        # Left early too, the files must not be closed under the reader.
        stopped.set()
        thread.join()
