"""A whole clinic day from a file, played on a real server with a watcher on every queue."""

from collections import Counter
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

from benchmarks.clinic_day import (
    PATIENTS_PER_DOCTOR,
    SLOTS_PER_DOCTOR,
    ZONE,
    Row,
    assign,
    assign_slots,
    play,
    read,
    slot_times,
)
from tests.clinic import Front

SAMPLE = Path(__file__).parent.parent / "benchmarks" / "sample-day.csv"


async def test_sample_day(front: Front) -> None:
    """Every row is booked, each patient who came completes the visit, and every watcher ends with the true queue."""
    outcome = await play(read(SAMPLE), f"127.0.0.1:{front.port}")
    assert outcome.problems == []
    assert (outcome.rows, outcome.booked, outcome.refused.total()) == (63, 63, 0)
    assert (outcome.clinics, outcome.doctors, outcome.patients) == (4, 8, 56)
    assert (outcome.came, outcome.no_shows + outcome.left_booked) == (50, 13)
    assert (outcome.watchers_equal, outcome.watchers) == (8, 8)
    # Five changes for each patient who came; a booking and a no-show for each of the others.
    assert outcome.changes == 50 * 5 + 13 + outcome.no_shows
    # Late in the clinic's evening there is too little time left for slots.
    now = datetime.now(ZoneInfo(ZONE))
    if (now + timedelta(hours=2)).date() == now.date():
        assert outcome.by_slot > 0
    states = dict(front.sql("select state, count(*) from appointment group by state"))
    assert states.pop("BOOKED", 0) == outcome.left_booked
    assert states == {"COMPLETED": 50, "NO_SHOW": outcome.no_shows}


async def test_a_day_can_be_played_twice(front: Front) -> None:
    """A second run on the same server has its own patients and keys, and is not affected by the first."""
    rows = read(SAMPLE)[:20]
    for _ in range(2):
        outcome = await play(rows, f"127.0.0.1:{front.port}")
        assert outcome.problems == []
        assert outcome.booked == 20


def test_assign_deals_patients_to_different_doctors() -> None:
    """Ten patients per doctor; a patient sees one doctor again only if the clinic has no other."""
    rows = [Row(f"p{n % 21}", f"a{n}", "Large", came=True) for n in range(35)]
    rows += [Row("q", f"b{n}", "Small", came=True) for n in range(2)]
    desks = assign(rows)
    assert Counter(desk.clinic for desk in desks) == {"Large": 4, "Small": 1}
    assert sum(len(desk.visits) for desk in desks) == 37
    assert max(len(desk.visits) for desk in desks) <= PATIENTS_PER_DOCTOR
    assert [visit.turn for visit in desks[-1].visits] == [0, 1]
    for desk in desks:
        meetings = Counter((visit.row.patient, visit.turn) for visit in desk.visits)
        assert set(meetings.values()) == {1}


def test_slots_end_by_midnight_or_are_not_opened() -> None:
    """Slots have their usual length in the morning, a shorter one in the evening, and do not exist at night."""
    morning = datetime(2030, 1, 15, 9, tzinfo=ZoneInfo(ZONE))
    times = slot_times(morning, morning.date(), 100)
    assert len(times) == SLOTS_PER_DOCTOR
    assert {end - start for start, end in times} == {timedelta(minutes=20)}
    assert all(end == start for (_, end), (start, _) in pairwise(times))
    evening = slot_times(morning.replace(hour=22), morning.date(), 100)
    assert evening[0][0] > morning.replace(hour=22)
    assert evening[-1][1] <= morning.replace(hour=0) + timedelta(days=1)
    assert slot_times(morning.replace(hour=23, minute=30), morning.date(), 100) == []


def test_assigned_slots_never_overlap_for_a_patient() -> None:
    """A patient with slots of several doctors has them at different times."""
    rows = [Row(f"p{n % 10}", f"a{n}", f"Clinic {n // 10}", came=True) for n in range(80)]
    desks = assign(rows)
    assign_slots(desks)
    taken = [(visit.row.patient, visit.slot) for desk in desks for visit in desk.visits if visit.slot is not None]
    assert len(taken) == 20
    assert len(set(taken)) == len(taken)
    for desk in desks:
        slots = [visit.slot for visit in desk.visits if visit.slot is not None]
        assert len(set(slots)) == len(slots)
        assert all(slot < SLOTS_PER_DOCTOR for slot in slots)
