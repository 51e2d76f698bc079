"""The log: one JSON object a line on standard error.

The log never delays, fails or ends anything else. A thread of its own writes the lines. A line that cannot be written
is dropped and counted, and so is one that finds no room because nobody reads the lines before it.
"""

import atexit
import logging
import os
import re
import select
import sys
import threading
import time
import traceback
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import structlog

MOST_WAITING = 10_000
"""Lines that may wait to be written: those of some seconds of a busy worker."""

LAST_SECONDS = 0.5
"""How long a process that ends waits for its last lines to be written."""

_GATHER_SECONDS = 0.01
"""The thread waits so long for further lines, so that a busy worker wakes it less often."""
_PIECE_BYTES = select.PIPE_BUF
"""The most that a pipe takes in one piece, so that the lines of several processes do not mix."""

_TRUSTED = {"psycopg.pool", "py.warnings"}
"""The loggers whose texts quote nothing of a patient."""
_OBJECT = re.compile(r"[<({\[\"'\n]")
"""Where a text begins to show an object."""
_GRPC_LINE = re.compile(r"([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (.*)")
_GRPC_LEVELS = {"I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
_LONGEST_LINE = 8192

_library_log = structlog.get_logger("frontdesk.library")


class _Writer:
    """Writes lines to standard error, from a thread of its own."""

    def __init__(self) -> None:
        try:
            # A copy, because `capture_stderr` puts something else in its place.
            self._file = os.dup(2)
        except OSError:
            self._file = -1
        self._lines: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._torn = False
        """Whether the last line that was written was cut off."""
        self._counting = threading.Lock()
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        # Without a thread the room is soon used up, and every further line is dropped.
        with suppress(RuntimeError):
            self._thread.start()

    def write(self, line: str) -> None:
        """Write the line soon, or drop it."""
        if self._lines.qsize() >= MOST_WAITING:
            self._drop(1)
        else:
            self._lines.put(line)

    def flush(self, seconds: float) -> None:
        """Wait until the lines of this moment are written, at most so many seconds."""
        if self._thread.is_alive():
            written = threading.Event()
            self._lines.put(written)
            written.wait(seconds)

    def _drop(self, lines: int) -> None:
        with self._counting:
            self.dropped += lines

    def _run(self) -> None:
        while True:
            taken = [self._lines.get()]
            if isinstance(taken[0], str):
                time.sleep(_GATHER_SECONDS)
            taken += [self._lines.get_nowait() for _ in range(self._lines.qsize())]
            piece: list[bytes] = []
            for one in taken:
                line = one.encode(errors="replace") + b"\n" if isinstance(one, str) else b""
                if piece and (not line or sum(map(len, piece)) + len(line) > _PIECE_BYTES):
                    self._write_piece(piece)
                    piece = []
                if isinstance(one, str):
                    piece.append(line)
                else:
                    one.set()
            if piece:
                self._write_piece(piece)

    def _write_piece(self, lines: list[bytes]) -> None:
        # After a line that was cut off the next one begins on a line of its own.
        data = left = (b"\n" if self._torn else b"") + b"".join(lines)
        try:
            while left:
                try:
                    left = left[os.write(self._file, left) :]
                except BlockingIOError:
                    # Somebody who shares the file has made it non-blocking; this thread can wait.
                    ready = select.poll()
                    ready.register(self._file, select.POLLOUT)
                    ready.poll()
        except OSError:
            # The disk is full, the reader has gone, or there is no such file.
            self._drop(min(left.count(b"\n"), len(lines)))
        if written := data[: len(data) - len(left)]:
            self._torn = not written.endswith(b"\n")


class _Logger:
    """The last step of structlog."""

    def __init__(self, writer: _Writer) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = writer.write


class _FromLogging(logging.Handler):
    """Turns the records of libraries into lines of the log."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Exception):
            if record.name in _TRUSTED:
                text = record.getMessage()
            else:
                # An object in a text may be of a patient: it is left out, or the text ends before it.
                text = str(record.msg) if record.args else _OBJECT.split(str(record.msg), 1)[0]
            error = record.exc_info[1] if record.exc_info else None
            more = {} if error is None else failure(error)
            # structlog has names for these levels only.
            level = min(max(record.levelno // 10 * 10, logging.DEBUG), logging.CRITICAL)
            _library_log.log(level, record.name, said=text.strip(), **more)


_writer: _Writer | None = None
_capture: threading.Thread | None = None


def configure_log(level: str) -> None:
    """Log at or above `level`: our own lines, warnings of libraries and of Python, failures of threads.

    No line tells anything of a patient: of an exception it has the type and the place, and never the text.
    """
    global _writer
    if _writer is None:
        _writer = _Writer()
        atexit.register(_end)
    logger = _Logger(_writer)
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: logger,
        cache_logger_on_first_use=True,
    )
    logging.getLogger().handlers = [_FromLogging()]
    logging.getLogger().setLevel(max(number, logging.WARNING))
    logging.captureWarnings(True)
    threading.excepthook = _thread_failed
    sys.unraisablehook = _exception_ignored


def capture_stderr() -> None:
    """Turn any other text that this process writes to standard error into lines of the log; gRPC's core writes some.

    Call it after `configure_log`, in a process that starts no others: their standard error would be captured too.
    """
    global _capture
    try:
        source, sink = os.pipe()
    except OSError:
        return
    # A text that finds no room is lost; nothing waits for the log.
    os.set_blocking(sink, False)
    os.dup2(sink, 2)
    os.close(sink)
    _capture = threading.Thread(target=_forward, args=(source,), name="stderr", daemon=True)
    with suppress(RuntimeError):
        _capture.start()


def dropped() -> int:
    """How many lines of this process's log were not written."""
    return 0 if _writer is None else _writer.dropped


def failure(error: BaseException) -> dict[str, Any]:
    """The fields of a line about an exception: its type and place. Its text may quote a row."""
    frames = traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__), lookup_lines=False)
    return {
        "error": type(error).__name__,
        "where": [f"{frame.name} {frame.filename}:{frame.lineno}" for frame in frames],
    }


def _forward(source: int) -> None:
    rest = b""
    while data := os.read(source, 65536):
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            lines, rest = [*lines, rest], b""
        for line in lines:
            _forward_line(line.decode(errors="replace"))
    _forward_line(rest.decode(errors="replace"))


def _forward_line(line: str) -> None:
    if found := _GRPC_LINE.fullmatch(line):
        _library_log.log(_GRPC_LEVELS[found[1]], "grpc", said=found[2])
    elif line.strip():
        _library_log.warning("stderr", said=line)


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        _library_log.error("thread_failed", thread=args.thread and args.thread.name, **failure(args.exc_value))


def _exception_ignored(args: Any) -> None:
    if args.exc_value is not None:
        _library_log.error("exception_ignored", **failure(args.exc_value))


def _end() -> None:
    if _capture is not None and _capture.is_alive():
        # The pipe has no other writer, so this ends the thread.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _capture.join(LAST_SECONDS)
    if _writer is not None:
        _writer.flush(LAST_SECONDS)
