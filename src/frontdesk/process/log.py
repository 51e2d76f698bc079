"""The log: one JSON object a line on standard error."""

import logging
import sys

import structlog


def configure_log(level: str) -> None:
    """Write what is at or above `level`, without a patient's data: nothing here formats an exception's text."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
