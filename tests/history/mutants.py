"""`python -m tests.history.mutants [NAME …]`: remove one safeguard at a time, and check that a rule notices.

Nothing in src/ changes: a mutant is a database with changed functions, or a service whose workers are changed when they
start (`launcher`). The runs are short and crowded: two doctors with few places.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg

from tests.history.harness import Plan, play
from tests.history.world import Cluster, function

Mutation = Callable[[psycopg.Connection], None]


def _edited(name: str, *edits: tuple[str, str]) -> Mutation:
    """Create a function again with parts of its text replaced. Each part must be there."""
    text = function(name)
    for old, new in edits:
        assert old in text, f"{name} has no {old!r}"
        text = text.replace(old, new)
    return lambda admin: _run(admin, text)


def _run(admin: psycopg.Connection, *statements: str) -> None:
    for statement in statements:
        admin.execute(statement.replace("{database}", admin.info.dbname).encode())


def _all(*mutations: Mutation) -> Mutation:
    def mutate(admin: psycopg.Connection) -> None:
        for mutation in mutations:
            mutation(admin)

    return mutate


def _sql(*statements: str) -> Mutation:
    return lambda admin: _run(admin, *statements)


_NO_LOCK = _edited(
    "lock_all",
    ("perform pg_advisory_xact_lock(v_key)", "null"),
    ("perform pg_advisory_xact_lock(hashtextextended(p_names[1], 0))", "null"),
)
_NO_ASSERTION = _edited("lock_all", ("current_setting('transaction_isolation') <> 'read committed'", "false"))

CROWD = Plan(
    seconds=6, clients=24, channels=6, doctors=2, capacity=(2, 4), patients=24, faults=(), twins=0.3, haste=0.5,
    bustle=False,
)  # fmt: skip
HOLDING = replace(CROWD, seconds=8, holds=0.3, haste=0.2, capacity=(6, 12))
LONG_LINE = replace(CROWD, doctors=1, capacity=(12, 16))
GUARDED = replace(CROWD, access="required", patients=40, probes=0.15)
LOSING = replace(
    GUARDED, seconds=16, faults=("key-revoked", "user-demoted", "session-ended"), pause=(0.3, 0.6), clients=16
)
BROKEN_NET = replace(CROWD, faults=("answers-lost", "network-reset"), pause=(0.2, 0.5))


@dataclass(frozen=True)
class Mutant:
    """A missing safeguard, and the run that should notice."""

    name: str
    plan: Plan
    mutate: Mutation = lambda admin: None
    changed: str = ""
    tries: int = 3


WALKING = replace(CROWD, walk_ins=0.7, haste=0.2, capacity=(4, 8))
HANDING = replace(CROWD, doctors=3, capacity=(8, 12), haste=0.15, patients=60)
UNDOING = replace(HANDING, undos=0.35)
LEAVING = replace(CROWD, doctors=3, capacity=(12, 20), haste=0.15, patients=80, leaves=0.12, seconds=10)
HOURS = replace(CROWD, doctors=1, capacity=(8, 12), leaves=0.2, seconds=8)

_LOCKS = "perform lock_all(v_locks);"
_LOOK_AGAIN = "select * into v_old from appointment where id = r.appointment;"
_SNAPSHOT = "d.appointment := jsonb_populate_record(d.appointment, v_first.snapshot);"

_SETTLED_AGAIN = _edited(
    "settle_leave",
    # Twice.
    ("and not exists (select from leave_outcome o where o.leave_id = l.id and o.appointment_id = a.id)", ""),
)
_NO_SCHEDULE_LOCK = _edited("lock_names", ("        return array[schedule_name(r.doctor)];", "        return '{}';"))

MUTANTS = (
    Mutant("none (the control)", replace(BROKEN_NET, seconds=8), tries=1),
    Mutant("none, many moves", replace(CROWD, doctors=3, moves=0.5, capacity=(4, 6)), tries=2),
    Mutant("no advisory lock", CROWD, _NO_LOCK),
    Mutant(
        "no advisory lock, no unique index behind it",
        CROWD,
        _all(_NO_LOCK, _sql("drop index appointment_number_key", "drop index appointment_patient_day_key")),
    ),
    Mutant(
        # Each request goes alone, so that a row is read before the lock.
        "what was read before the lock is believed",
        CROWD,
        _edited(
            "decide",
            ("v_old appointment;", "v_old appointment;\n    v_stale appointment;"),
            (_LOCKS, f"select * into v_stale from appointment where id = v_requests[1].appointment;\n    {_LOCKS}"),
            (_LOOK_AGAIN, f"{_LOOK_AGAIN}\n            v_old := v_stale;"),
        ),
        changed="no-batches",
    ),
    Mutant(
        # Two requests must meet at one visit between two days. They get some milliseconds more for it, and go alone,
        # because a batch takes its locks before it reads.
        "a move during the wait for the lock goes unnoticed",
        replace(CROWD, doctors=3, moves=0.5, capacity=(4, 6)),
        # The visit is changed where it was read before the lock.
        _edited(
            "decide",
            ("<> (r.from_doctor, r.from_date, r.from_patient) then", "is distinct from null and false then"),
            (_LOCKS, f"{_LOCKS}\n    perform pg_sleep(0.01);"),
            (
                "            d := case r.verb",
                "            v_old.doctor_id := coalesce(r.from_doctor, v_old.doctor_id);\n"
                "            v_old.date := coalesce(r.from_date, v_old.date);\n            d := case r.verb",
            ),
        ),
        changed="no-batches",
    ),
    Mutant(
        # Only requests that go alone: a batch that waits for another gives way before PostgreSQL reports a deadlock.
        "locks in any order",
        replace(CROWD, doctors=3, moves=0.5, capacity=(4, 6)),
        _edited("lock_all", ("name order by 1 loop", "name loop"), ("distinct ", "")),
        changed="no-batches",
    ),
    Mutant(
        "never DAY_FULL, no unique index",
        CROWD,
        _all(
            _edited(
                "find_place", ("over_capacity := v_taken + v.held >= v.capacity and", "over_capacity := false and")
            ),
            _sql("drop index appointment_number_key"),
        ),
    ),
    Mutant(
        "never SLOT_FULL", CROWD, _edited("find_place", ("if v_taken + v_held >= v_slot.capacity and", "if false and"))
    ),
    Mutant("none, many holds", HOLDING, tries=1),
    Mutant(
        "a hold that does not count",
        HOLDING,
        _edited("find_place", ("(select count(*) from live_holds(p_doctor, p_date, p_now)) as held", "0 as held")),
    ),
    Mutant(
        "an expired hold that still sells",
        HOLDING,
        _edited("hold_refusal", ("h.state <> 'HELD' or h.expire_time <= p_now", "h.state <> 'HELD'")),
    ),
    Mutant(
        "a hold used twice",
        HOLDING,
        _edited("hold_refusal", ("h.state <> 'HELD' or h.expire_time <= p_now", "h.expire_time <= p_now")),
    ),
    Mutant("a key is never found again", CROWD, _edited("recall", ("if not found then", "if true then"))),
    Mutant(
        "a key is never remembered",
        BROKEN_NET,
        _edited("remember", ("    insert into idempotency", "    return;\n    insert into idempotency")),
    ),
    Mutant("a replay tells what is, not what was", CROWD, _edited("recall", (_SNAPSHOT, ""))),
    Mutant(
        "repeatable read, no assertion",
        CROWD,
        _all(
            _NO_ASSERTION,
            _sql("alter database {database} set default_transaction_isolation to 'repeatable read'"),
        ),
        changed="database-defaults",
    ),
    Mutant(
        "synchronous_commit off, postmaster killed",
        replace(CROWD, seconds=12, faults=("postmaster-kill",), pause=(0.5, 1.0)),
        _sql("alter database {database} set synchronous_commit to off"),
        changed="database-defaults",
    ),
    Mutant("no poll behind lost hints", CROWD, changed="no-poll"),
    Mutant(
        "an update skips a change",
        replace(CROWD, faults=("hints-dropped",), pause=(0.1, 0.3)),
        changed="changes-skipped",
    ),
    Mutant("a kind of change is not told", CROWD, changed="old-queue"),
    Mutant("the answers of a batch are swapped", CROWD, changed="answers-swapped"),
    Mutant("a batch is refused as one", CROWD, changed="refused-together"),
    Mutant(
        "a batch takes its locks one by one",
        replace(CROWD, doctors=4, moves=0.3, bursts=0.1, capacity=(4, 6)),
        _edited(
            "decide",
            (_LOCKS, ""),
            ("if cardinality(v_requests) > 1 then", "if false then"),
            ("        d := v_refused[n];", "        perform lock_all(lock_names(r));\n        d := v_refused[n];"),
        ),
    ),
    Mutant("no closing message", replace(CROWD, seconds=2), changed="no-closing"),
    Mutant(
        "tickets from a sequence",
        CROWD,
        _all(
            _sql("create sequence tickets"),
            _edited("record_change", ("then d.last_ticket else", "then nextval('tickets') else")),
        ),
    ),
    Mutant(
        "parking counts no revision",
        CROWD,
        _edited(
            "change_visit",
            (
                "v_change := record_change(",
                "if r.verb = 'ParkPatient' then\n        select x.revision, p_old.ticket as ticket into v_change"
                " from doctor_day x where x.doctor_id = p_old.doctor_id and x.date = p_old.date;\n"
                "    else v_change := record_change(",
            ),
            (
                "v_new.queue_state is not null, v_now);",
                "v_new.queue_state is not null, v_now); end if;",
            ),
        ),
    ),
    Mutant(
        "a move leaves no event behind",
        CROWD,
        _edited(
            "record_change",
            (
                "    insert into log (",
                "    if p_type = 'appointment.moved_out' then return; end if;\n    insert into log (",
            ),
        ),
    ),
    Mutant(
        "CallNext takes the last",
        LONG_LINE,
        _edited("call_next", ("order by place_in_queue(a)", "order by place_in_queue(a) desc")),
    ),
    Mutant("none, many walk-ins", WALKING, tries=1),
    Mutant(
        "a walk-in that is not checked in",
        WALKING,
        _edited("add_walk_in", ("    return change_visit(r, d.appointment);", "    return d;")),
    ),
    Mutant(
        # One transaction books, the next one of the worker checks in.
        "a walk-in in two transactions",
        WALKING,
        _edited(
            "add_walk_in",
            (
                "    d := book(r);",
                "    if r.appointment is null then return book(r); end if;\n"
                "    select a into d.appointment from appointment a where a.id = r.appointment;\n"
                "    d.outcome := 'OK';",
            ),
        ),
        changed="walk-in-in-two",
    ),
    Mutant(
        "an override that is not recorded",
        WALKING,
        _edited("book", ("case when v_place.over_capacity then r.override_reason else '' end", "''")),
    ),
    Mutant(
        "an override by anybody",
        replace(WALKING, access="required"),
        _edited("may_override", ("r.override_reason <> '' and r.may_override", "r.override_reason <> ''")),
    ),
    Mutant(
        "an override recorded where there was a place",
        WALKING,
        _edited(
            "book",
            (
                "case when v_place.over_capacity then r.override_reason",
                "case when true then coalesce(r.override_reason, '')",
            ),
        ),
    ),
    Mutant(
        "CallNext knows no priority",
        LONG_LINE,
        _edited(
            "call_next",
            ("order by place_in_queue(a)", "order by a.returned_revision, a.check_in_time, a.ticket"),
        ),
    ),
    Mutant(
        "a priority that moves to the end of its class",
        LONG_LINE,
        _edited("change_visit", ("if p_old.queue_state = 'MISSED' and", "if r.verb = 'SetPriority' or")),
    ),
    Mutant(
        "CallNext calls who is with another doctor",
        replace(CROWD, doctors=3, capacity=(8, 12), patients=12, seconds=8),
        _edited("call_next", ("        exit when not v_first.elsewhere;", "        exit when true;")),
    ),
    Mutant("none, many transfers and undos", UNDOING, tries=1),
    Mutant(
        "a transfer that does not leave",
        HANDING,
        _edited(
            "transfer",
            (
                "d.vacated_revision := (record_change(r, 'queue.transferred_out', v_left, true, v_now)).revision;",
                "d.vacated_revision := 1;",
            ),
        ),
    ),
    Mutant(
        "a transfer that does not arrive",
        HANDING,
        _edited(
            "transfer",
            (
                "v_change := record_change(r, t.type, v_new, true, v_now);",
                "select x.revision, x.last_ticket + 1 as ticket into v_change from doctor_day x"
                " where x.doctor_id = v_new.doctor_id and x.date = v_new.date;\n"
                "    if not found then return refused('DAY_FULL', r.doctor); end if;",
            ),
        ),
    ),
    Mutant("a transfer keeps its room", HANDING, _edited("transfer", ("    v_new.room := '';\n", ""))),
    Mutant(
        "a transfer asks for no place",
        replace(HANDING, capacity=(3, 5)),
        _edited("transfer", ("p_override => may_override(r, p_old.clinic_id)", "p_override => true")),
    ),
    Mutant(
        "an undo that does not restore the room",
        UNDOING,
        _edited("undo", ("    v_new.room := v_step ->> 'room';\n", "")),
    ),
    Mutant(
        "an undo that does not restore the state of the line",
        UNDOING,
        _edited(
            "undo",
            (
                "v_new.queue_state := v_step ->> 'queue_state';",
                "v_new.queue_state := replace(v_step ->> 'queue_state', 'CALLED', 'WAITING');",
            ),
        ),
    ),
    Mutant(
        "an undone check-in whose ticket is given again",
        UNDOING,
        _all(
            _edited(
                "undo",
                (
                    "            v_new.ticket := null;",
                    "            v_new.ticket := null;\n            update doctor_day set last_ticket = last_ticket - 1"
                    " where doctor_id = p_old.doctor_id and date = p_old.date;",
                ),
            ),
            _sql("drop index appointment_ticket_key"),
        ),
    ),
    Mutant(
        "an undo whenever",
        replace(UNDOING, seconds=10),
        _edited("undo", ("interval '3 seconds'", "interval '1 day'")),
    ),
    Mutant("an undo of any version", UNDOING, _edited("decide", ("r.version <> v_old.version", "false"))),
    Mutant(
        "an undo that takes a place that is sold",
        replace(UNDOING, capacity=(3, 5), haste=0.4),
        _all(
            _edited(
                "undo",
                ("if v_place.outcome <> 'OK' then", "if v_place.outcome not in ('OK', 'DAY_FULL') then"),
                ("v_new.number := v_place.number;", "v_new.number := coalesce(v_place.number, p_old.number + 100);"),
            ),
        ),
    ),
    Mutant(
        "a call can be taken back",
        UNDOING,
        _edited(
            "transitions",
            (
                "'CHECKED_IN', 'CALLED', 'queue.called', 'call_time', false, false",
                "'CHECKED_IN', 'CALLED', 'queue.called', 'call_time', false, true",
            ),
        ),
    ),
    Mutant("none, many leaves", LEAVING, tries=2),
    Mutant(
        # A booking gets some milliseconds more between its decision and its commit.
        "a leave that waits for no booking",
        LEAVING,
        _all(
            _edited("settle_leave", ("    perform lock_all(p_wanted || array(", "    perform (p_wanted || array(")),
            _edited("book", ("    d.outcome := 'OK';", "    perform pg_sleep(0.03);\n    d.outcome := 'OK';")),
        ),
        changed="no-batches",
    ),
    Mutant("an appointment settled again", LEAVING, _SETTLED_AGAIN),
    Mutant(
        "an appointment settled again, no primary key",
        LEAVING,
        _all(_SETTLED_AGAIN, _sql("alter table leave_outcome drop constraint leave_outcome_pkey")),
    ),
    Mutant(
        "bookings of a day on leave",
        LEAVING,
        _edited(
            "find_place", ("if not v.is_present or v.on_leave or v.closed then", "if not v.is_present or v.closed then")
        ),
    ),
    Mutant(
        "bookings at hours on leave",
        LEAVING,
        _edited(
            "find_place",
            ("or not v.on_leave then outcome := 'SLOT_BLOCKED'", "or false then outcome := 'SLOT_BLOCKED'"),
        ),
    ),
    Mutant(
        "bookings of a closed date",
        LEAVING,
        _edited(
            "find_place",
            ("if not v.is_present or v.on_leave or v.closed then", "if not v.is_present or v.on_leave then"),
        ),
    ),
    Mutant(
        # Each appointment takes some milliseconds more, so that it is cancelled meanwhile.
        "a leave that is cancelled while it is settled",
        LEAVING,
        _all(
            _edited("settle_leave", ("where id = p_leave for update;", "where id = p_leave;")),
            _edited(
                "settle_appointments",
                ("        v_place := null;", "        perform pg_sleep(0.01);\n        v_place := null;"),
            ),
        ),
    ),
    Mutant(
        "a leave that cancels who is here",
        LEAVING,
        _all(
            _edited(
                "settle_appointments", ("if a.state <> 'BOOKED' or l.policy = 'KEEP' then", "if l.policy = 'KEEP' then")
            ),
            _edited(
                "transitions",
                (
                    "('CreateLeave', 'BOOKED', '{\"\"}',\n        'CANCELLED', ''",
                    "('CreateLeave', 'CHECKED_IN', '{WAITING}',\n        'CANCELLED', 'LEFT',"
                    " 'appointment.cancelled', 'cancel_time', false, false),\n"
                    "    ('CreateLeave', 'BOOKED', '{\"\"}',\n        'CANCELLED', ''",
                ),
            ),
        ),
    ),
    Mutant(
        "a move that a leave does not note",
        LEAVING,
        _edited(
            "settle_appointments", ("if v_outcome = 'MOVED' then", "if v_outcome = 'MOVED' then null; elsif false then")
        ),
    ),
    Mutant(
        "two leaves at once",
        LEAVING,
        _all(
            _edited(
                "create_leave",
                ("    perform lock_all(array['leaves/' || p_doctor]);\n", ""),
                (
                    "    if found then outcome := 'LEAVE_OVERLAP'; return; end if;",
                    "    if found then outcome := 'LEAVE_OVERLAP'; return; end if;\n    perform pg_sleep(0.05);",
                ),
            ),
            _sql("alter table leave drop constraint leave_doctor_overlap"),
        ),
        tries=5,
    ),
    Mutant("no lock of the schedule", HOURS, _NO_SCHEDULE_LOCK),
    Mutant(
        "no lock of the schedule, no constraints behind it",
        HOURS,
        _all(
            _NO_SCHEDULE_LOCK,
            _sql(
                "alter table slot drop constraint slot_doctor_overlap",
                "alter table schedule drop constraint schedule_doctor_overlap",
                "drop index schedule_doctor_key",
            ),
        ),
    ),
    Mutant(
        "a schedule that cuts no other",
        HOURS,
        _all(
            _edited("set_schedule", ("effective_from < r.date and coalesce(effective_until >= r.date, true)", "false")),
            _sql("alter table schedule drop constraint schedule_doctor_overlap"),
        ),
    ),
    Mutant(
        "new hours are not generated again",
        replace(HOURS, doctors=4, leaves=0.04, seconds=12),
        _edited("generate_again", ("where doctor_id = p_doctor", "where false")),
        tries=5,
    ),
    Mutant(
        "a generation that knows no slots",
        HOURS,
        _all(
            _edited(
                "generate_slots",
                ("if (v.start_time, v.end_time) = (v.instant, v.ends) then", "if false then"),
                ("when v.end_time > v.instant or v_ended > v.instant then", "when false then"),
            ),
            _sql("alter table slot drop constraint slot_doctor_overlap"),
        ),
    ),
    Mutant("calls without a limit", LONG_LINE, _edited("change_visit", ("if v_most > 0 and", "if false and"))),
    Mutant("none, access required", LOSING, tries=1),
    Mutant(
        "a patient may change another's visit",
        GUARDED,
        _edited("out_of_sight", ("s sight := r.sight;\nbegin", "s sight := r.sight;\nbegin\n    return null;")),
    ),
    Mutant("a read shows another's visit", GUARDED, changed="read-everything"),
    Mutant("a limit counted by each worker", GUARDED, changed="limit-each", tries=5),
    Mutant("a revocation that is not told", LOSING, changed="revocations-untold"),
    Mutant(
        "a stream that outlives its caller's rights",
        replace(LOSING, seconds=45, pause=(3.0, 5.0)),
        changed="streams-unjudged",
        tries=2,
    ),
    Mutant("a token that never expires", GUARDED, changed="tokens-forever"),
    Mutant("a clock that is a second ahead", GUARDED, changed="clock-ahead"),
    Mutant("a change logged under another's name", CROWD, changed="labels-logged"),
    Mutant(
        "a check-in that is not logged",
        CROWD,
        _edited(
            "record_change",
            (
                "    insert into log (",
                "    if p_type = 'queue.checked_in' then return; end if;\n    insert into log (",
            ),
        ),
    ),
    Mutant("a revocation that is not logged", LOSING, changed="acts-unlogged"),
    Mutant(
        # What a transaction that still ran had written is never looked at again.
        "a sealer that skips a late commit",
        replace(CROWD, doctors=4),
        _edited("seal_log", ("pg_snapshot_xmin(s)", "pg_snapshot_xmax(s)")),
    ),
    Mutant(
        "a sealer that knows no revisions",
        LONG_LINE,
        _edited(
            "seal_log",
            ("w.revision, w.id\n    loop", "w.id desc\n    loop"),
            ("max(w.transaction) over revisions, ", ""),
        ),
    ),
    Mutant(
        "a chain without links", CROWD, _edited("seal_log", ("sha256(v_chain || v_row.digest)", "sha256(v_row.digest)"))
    ),
    Mutant(
        "a row that is changed after it was sealed",
        CROWD,
        _sql(
            "create function tamper() returns trigger language plpgsql as $$"
            " begin update log set trace_id = 'x' where id = new.id; return null; end $$",
            "create trigger tamper after insert on seal for each row when (new.position % 50 = 7)"
            " execute function tamper()",
        ),
    ),
    Mutant(
        "the missed return to their old place",
        LONG_LINE,
        _edited("change_visit", ("if p_old.queue_state = 'MISSED' and", "if false and")),
    ),
)


def main() -> int:
    """Try each mutant. The exit status is the number of mutants that no rule noticed, not counting the controls."""
    parser = argparse.ArgumentParser(prog="python -m tests.history.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names; default: all")
    wanted = parser.parse_args().names
    rows = []
    with tempfile.TemporaryDirectory(prefix="frontdesk-mutants-") as directory:
        cluster = Cluster(Path(directory) / "data")
        try:
            for mutant in MUTANTS:
                if wanted and not any(part in mutant.name for part in wanted):
                    continue
                began = time.monotonic()
                seconds, caught = 0.0, ""
                for seed in range(1, mutant.tries + 1):
                    plan = replace(mutant.plan, seed=seed, mutate=mutant.mutate, changed=mutant.changed)
                    report = play(plan, cluster)
                    seconds = time.monotonic() - began
                    if report.violations:
                        rules = Counter(violation.rule for violation in report.violations)
                        caught = ", ".join(f"{rule} {count}" for rule, count in rules.most_common(4))
                        if os.environ.get("HISTORY_VERBOSE"):
                            print(report)
                        break
                rows.append((mutant.name, caught or "NOT NOTICED", seconds))
                print(f"{mutant.name:52} {rows[-1][1]:75} {seconds:5.1f} s", flush=True)
        finally:
            cluster.close()
    return sum(caught == "NOT NOTICED" for name, caught, _ in rows if not name.startswith("none"))


if __name__ == "__main__":
    sys.exit(main())
