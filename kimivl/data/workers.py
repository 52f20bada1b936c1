"""Work over items in processes that leave nothing behind: they end with Ctrl-C and with a killed parent."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[int, Result]]:
    """Pairs of an item's place and its result, in the order in which they are ready.

    With one worker or one item all is done in this process. The first exception is raised here, after the items in
    hand are done; the others are not begun. BrokenProcessPool says that a worker was killed.
    """
    count = min(workers, len(items))
    if count < 2:
        yield from ((place, function(item)) for place, item in enumerate(items))
        return
    context = get_context("spawn")  # a fork would copy the locks of pyarrow's and the progress bar's threads
    pool = ProcessPoolExecutor(count, context, initializer=end_with_parent, initargs=(os.getpid(),))
    try:
        places = {pool.submit(function, item): place for place, item in enumerate(items)}
        for future in as_completed(places):
            yield places[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # not by `with`, which would take the cancellation back


def end_with_parent(parent: int) -> None:
    """Called first in a worker: it ends at once with Ctrl-C, and when the process `parent` is gone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
