"""When a child process of the supervisor is to stop."""

import asyncio
import signal
from multiprocessing.connection import Connection


def stop_event(handover: Connection | None) -> asyncio.Event:
    """Set once this process is to stop: at a SIGTERM, or as its supervisor says at the other end of `handover`.

    With `handover` a first SIGTERM is told there, and the process goes on: a worker has a successor first.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    if handover is None:
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        return stop
    asked = False

    def sigterm() -> None:
        nonlocal asked
        if asked:
            stop.set()
            return
        asked = True
        try:
            handover.send(None)
        except OSError:
            # The supervisor was killed.
            stop.set()

    def told() -> None:
        loop.remove_reader(handover.fileno())
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, sigterm)
    loop.add_reader(handover.fileno(), told)
    return stop
