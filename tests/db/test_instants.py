"""SQL finds the same instants for a time of the clock as zoneinfo does, on days on which the clock is changed."""

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import psycopg
import pytest

DAYS = (
    ("Europe/London", date(2027, 3, 28)),
    ("Europe/London", date(2027, 10, 31)),
    ("Australia/Lord_Howe", date(2027, 4, 4)),
    ("Australia/Lord_Howe", date(2027, 10, 3)),
    ("Africa/Cairo", date(2027, 4, 30)),
    ("Africa/Cairo", date(2027, 10, 28)),
    ("America/Santiago", date(2027, 4, 3)),
    ("America/Santiago", date(2027, 9, 5)),
    ("Asia/Tehran", date(2022, 3, 22)),
    # By two hours.
    ("Antarctica/Troll", date(2027, 3, 28)),
    ("Antarctica/Troll", date(2027, 10, 31)),
    # The rules were changed for good, by half an hour.
    ("America/Caracas", date(2016, 5, 1)),
    # A date that did not exist, and the farthest zones.
    ("Pacific/Apia", date(2011, 12, 30)),
    ("Pacific/Kiritimati", date(2027, 6, 1)),
    ("Etc/GMT+12", date(2027, 6, 1)),
)


def minutes_around(day: date) -> Iterator[datetime]:
    """Every quarter of an hour of the day, and of those before and after it."""
    start = datetime.combine(day, time()) - timedelta(days=1)
    return (start + timedelta(minutes=15 * n) for n in range(3 * 96))


def instants(local: datetime, zone: ZoneInfo) -> list[datetime]:
    """The instants at which the zone's clock shows this time, by zoneinfo."""
    found = {local.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1)}
    return sorted(at for at in found if at.astimezone(zone).replace(tzinfo=None, fold=0) == local)


@pytest.mark.parametrize(("zone", "day"), DAYS)
def test_instants_of(conninfo: str, zone: str, day: date) -> None:
    """A time that is skipped has no instant, one that comes twice has two, and every other one."""
    with psycopg.connect(conninfo) as connection:
        connection.execute("set timezone to 'America/New_York'")
        found = connection.execute(
            "select at, array(select i from instants_of(at, %s) i order by i) from unnest(%s::timestamp[]) at",
            (zone, list(minutes_around(day))),
        ).fetchall()
    expected = [(local, instants(local, ZoneInfo(zone))) for local in minutes_around(day)]
    assert found == expected
