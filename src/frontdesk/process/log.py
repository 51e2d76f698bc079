"""The log: one JSON object a line on standard error.

The log never delays, fails or ends anything else. `frontdesk serve` puts a pipe in place of standard error, for itself
and its workers. Writing into it never waits; a thread of the supervisor reads it and writes the lines to the true
standard error, and waits there alone. A line that finds no room or cannot be written is dropped and counted.
"""

import atexit
import fcntl
import logging
import os
import re
import select
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

import structlog

LAST_SECONDS = 0.5
"""How long the supervisor waits at its end for the last lines to be written."""

_ROOM_BYTES = 1024 * 1024
"""Of the pipe: some 4,000 lines, if the system allows so much."""
_GATHER_SECONDS = 0.01
"""The thread pauses so long, so that it is not woken for each line."""
_PIECE_BYTES = select.PIPE_BUF
"""The most that a pipe takes in one piece, so that the lines of several processes do not mix."""

_TRUSTED = {"psycopg.pool", "py.warnings"}
"""The loggers whose texts quote nothing of a patient."""
_OBJECT = re.compile(r"[<({\[\"'\n]")
"""Where a text begins to show an object."""
_GRPC_LINE = re.compile(r"([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (.*)")
_GRPC_LEVELS = {"I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}

_library_log = structlog.get_logger("frontdesk.library")


class _Output:
    """A file that takes lines, or does not."""

    def __init__(self, file: int) -> None:
        self.file = file
        self.dropped = 0
        """The lines that it did not take."""
        self._torn = False
        """Whether it took only a part of its last line."""

    def write(self, lines: list[bytes]) -> None:
        """Write these lines, each with its end, at once."""
        # After a part of a line the next one begins on a line of its own.
        data = left = (b"\n" if self._torn else b"") + b"".join(lines)
        try:
            while left:
                left = left[os.write(self.file, left) :]
        except OSError:
            # There is no room now, the disk is full, the reader has gone, or the file is closed.
            self.dropped += min(left.count(b"\n"), len(lines))
        if written := data[: len(data) - len(left)]:
            self._torn = not written.endswith(b"\n")


class _Logger:
    """The last step of structlog."""

    def __init__(self) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = self._write

    def _write(self, line: str) -> None:
        _stderr.write([line.encode(errors="replace") + b"\n"])


class _Render:
    """Makes a line that a pipe takes in one piece."""

    def __init__(self) -> None:
        self._json = structlog.processors.JSONRenderer()

    def __call__(self, logger: Any, name: str, event: Any) -> str:
        line = str(self._json(logger, name, event))
        if len(line) >= _PIECE_BYTES:
            # The last frames of a place say most.
            short = {key: _cut(value[-8:] if isinstance(value, list) else [value]) for key, value in event.items()}
            line = str(self._json(logger, name, short))
        return line


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


class _Forwarder:
    """A pipe in place of standard error, and the thread that writes its lines to the true one."""

    def __init__(self) -> None:
        """Raises OSError or RuntimeError, and then has changed nothing."""
        self.true = _Output(os.dup(2))
        self._source, sink = os.pipe()
        os.set_blocking(sink, False)
        with suppress(OSError):
            fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, _ROOM_BYTES)
        self._rest = b""
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()
        os.dup2(sink, 2)
        os.close(sink)

    def end(self) -> None:
        """Give standard error back, once the lines of this moment are written or LAST_SECONDS are over."""
        self._ends = True
        # To end the thread's wait.
        with suppress(OSError):
            os.write(2, b"\n")
        self._thread.join(LAST_SECONDS)
        os.dup2(self.true.file, 2)

    def _run(self) -> None:
        readable, writable = select.poll(), select.poll()
        readable.register(self._source, select.POLLIN)
        writable.register(self.true.file, select.POLLOUT)
        while not self._ends or readable.poll(0):
            lines = (self._rest + os.read(self._source, _ROOM_BYTES)).split(b"\n")
            # A text without an end is written in parts.
            self._rest = lines.pop() if len(lines[-1]) < _PIECE_BYTES else b""
            piece: list[bytes] = []
            for line in lines:
                if not _is_ours(line):
                    # It comes back through the pipe.
                    _log_text(line.decode(errors="replace"))
                    continue
                if sum(map(len, piece)) + len(line) >= _PIECE_BYTES:
                    # If somebody has made the file non-blocking, this thread can wait all the same.
                    writable.poll()
                    self.true.write(piece)
                    piece = []
                piece.append(line + b"\n")
            if piece:
                writable.poll()
                self.true.write(piece)
            time.sleep(_GATHER_SECONDS)


_stderr = _Output(2)
_forwarder: _Forwarder | None = None


def configure_log(level: str) -> None:
    """Log at or above `level`: our own lines, warnings of libraries and of Python, failures of threads.

    No line tells anything of a patient: of an exception it has the type and the place, and never the text.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    logger = _Logger()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _Render(),
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


def forward_stderr() -> None:
    """Let nothing wait for standard error any more, and make all of it JSON; gRPC's core writes plain text there.

    It holds for this process and for those that it starts afterwards. Lines of a command that fails, `frontdesk: …`,
    stay as they are.
    """
    global _forwarder
    # Without a further thread or file the service would not come far, and says why on standard error as it is.
    with suppress(OSError, RuntimeError):
        _forwarder = _Forwarder()
        atexit.register(_forwarder.end)


def dropped() -> int:
    """How many lines of the log this process has dropped."""
    return _stderr.dropped + (_forwarder.true.dropped if _forwarder is not None else 0)


def failure(error: BaseException) -> dict[str, Any]:
    """The fields of a line about an exception: its type and place. Its text may quote a row."""
    frames = traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__), lookup_lines=False)
    return {
        "error": type(error).__name__,
        "where": [f"{frame.name} {frame.filename}:{frame.lineno}" for frame in frames],
    }


def _cut(values: list[Any]) -> Any:
    """The values as texts of a length that leaves room for the others of a line."""
    texts = [str(value)[:200] for value in values]
    return texts if len(texts) > 1 else texts[0]


def _is_ours(line: bytes) -> bool:
    return line.startswith((b"{", b"frontdesk: "))


def _log_text(line: str) -> None:
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
