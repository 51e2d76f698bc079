"""Compare the time zone rules of PostgreSQL, which compute every day and slot, with those of the package tzdata.

Either may be older: the package follows the law with each release; an installation of PostgreSQL has its own copy of
the rules, or uses that of the system.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from zoneinfo import ZoneInfo

import psycopg
import structlog

from frontdesk.db import session

_AHEAD = 3 * 365 * 86_400
"""Seconds for which the rules are compared, from now on."""
_STEP = 12 * 3_600
"""Shorter than any law changes a clock for."""

_offsets = """
select extract(epoch from (at at time zone %s) - (at at time zone 'UTC'))::int
from unnest(%s::bigint[]) with ordinality asked (second, n), to_timestamp(second) at order by n
"""

_log = structlog.get_logger("frontdesk.zones")


def warn_of_other_rules(conninfo: str) -> None:
    """Log a warning that names the clinics' time zones for which PostgreSQL and tzdata differ in the next three years.

    Raises psycopg errors.
    """
    with psycopg.connect(conninfo, autocommit=True, prepare_threshold=None, **session.options(conninfo)) as connection:
        used = [zone for (zone,) in connection.execute("select distinct time_zone from clinic order by 1")]
        differing = [zone for zone in used if not _agree(connection, zone)]
    if differing:
        _log.warning("time_zone_rules_differ", zones=differing, tzdata=version("tzdata"), see="docs/operations.md")


def _agree(connection: psycopg.Connection[tuple[int, ...]], zone: str) -> bool:
    try:
        # Not ZoneInfo(zone), which prefers the system's rules.
        with files("tzdata").joinpath("zoneinfo", *zone.split("/")).open("rb") as rules:
            info = ZoneInfo.from_file(rules, zone)
    except OSError:
        return False
    seconds = list(_telling_seconds(info, int(datetime.now(UTC).timestamp())))
    try:
        found = connection.execute(_offsets, (zone, seconds)).fetchall()
    except psycopg.errors.InvalidParameterValue:
        # PostgreSQL does not know the zone.
        return False
    return [offset for (offset,) in found] == [_offset(info, second) for second in seconds]


def _telling_seconds(info: ZoneInfo, start: int) -> Iterator[int]:
    """Seconds since 1970 at which to compare: every half day, and both sides of each change of the offset."""
    for second in range(start, start + _AHEAD, _STEP):
        yield second
        before, after = second, second + _STEP
        if _offset(info, before) != _offset(info, after):
            while after - before > 1:
                middle = (before + after) // 2
                before, after = (middle, after) if _offset(info, middle) == _offset(info, before) else (before, middle)
            yield from (before, after)


def _offset(info: ZoneInfo, second: int) -> int:
    offset = datetime.fromtimestamp(second, info).utcoffset()
    assert offset is not None
    return int(offset.total_seconds())
