"""Mails, with a real mail server: what they say, their entry for the calendar, and what becomes of refused ones."""

import re
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from clinic.frontdesk.v1 import appointment_pb2, notification_pb2
from clinic.frontdesk.v1.notification_pb2 import Notification
from frontdesk.channels.texts import LANGUAGES, Wording
from frontdesk.core.notification import Outgoing
from frontdesk.settings import Settings, SettingsError
from tests.clinic import Front, day, soon, tomorrow
from tests.hostile.wire import serving
from tests.receivers import MailBox, body, calendar
from tests.test_notifications import service, told
from tests.waiting import until

SENDER = "front@clinic.test"


@pytest.fixture
async def box() -> AsyncIterator[MailBox]:
    async with MailBox() as made:
        yield made


def mailing(settings: Settings, box: MailBox, scheme: str = "smtp", login: str = "") -> Settings:
    """The settings with the channel EMAIL."""
    url = f"{scheme}://{login}localhost:{box.port}"
    return settings.model_copy(update={"smtp_url": url, "mail_from": SENDER})


@pytest.fixture
async def desk(settings: Settings, conninfo: str, box: MailBox) -> AsyncIterator[Front]:
    """A server with its background work, which tells by mail."""
    async with serving(mailing(settings, box), conninfo, background="on") as (_, front):
        yield front


async def visit_of(front: Front, doctor_id: str, **fields: Any) -> str:
    """A booking of tomorrow of a new patient."""
    person = await front.patient(**{"email": "rosa@patients.test", **fields})
    return (await front.book(person.id, doctor_id, tomorrow(), reason="zzprivate", notes="zzprivate")).appointment.id


async def test_a_slot_in_the_calendar(desk: Front, box: MailBox) -> None:
    """Confirmed, moved to a day without times, cancelled: one UID, and a SEQUENCE that grows by one a change."""
    clinic = await desk.clinic(country="PE", address="Av. Larco 1\nMiraflores", city="Lima", phone="+5116101234")
    doctor = await desk.doctor(clinic_id=clinic.id, display_name="Dra. Ñusta")
    slot = await desk.slot(doctor.id, soon())
    person = await desk.patient(given_name="Rosa", family_name="Alves", email="rosa@patients.test")
    visit = (await desk.book_slot(person.id, slot.id, reason="zzprivate", notes="zzprivate")).appointment.id
    (one,) = await told(desk, "CONFIRMATION SENT", appointment_id=visit)
    (mail,) = box.mails
    assert box.to == [["rosa@patients.test"]]
    assert mail["Message-ID"] == f"<{one.id}@clinic.test>"
    assert (str(mail["To"]), str(mail["From"])) == ("Rosa Alves <rosa@patients.test>", f"Clinic <{SENDER}>")
    assert mail["Auto-Submitted"] == "auto-generated"
    when = f"{soon():%H:%M}"
    for text in (body(mail, "plain"), body(mail, "html")):
        for part in ("Rosa Alves", "Dra. Ñusta", when, "Av. Larco 1", "Miraflores", "Lima", "+51 1 6101234"):
            assert part in text
    method, event = calendar(mail)
    assert (method, str(event["UID"]), event["SEQUENCE"], str(event["STATUS"])) == (
        "REQUEST", f"{visit}@frontdesk", 0, "CONFIRMED",
    )  # fmt: skip
    assert event["DTSTART"].dt == soon().astimezone(UTC)
    assert event["DTEND"].dt == soon().astimezone(UTC) + timedelta(minutes=30)
    assert str(event["ATTENDEE"]) == "mailto:rosa@patients.test"

    target = appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(tomorrow() + timedelta(days=1)))
    await desk.appointments.RescheduleAppointment(
        appointment_pb2.RescheduleAppointmentRequest(appointment_id=visit, doctor_day=target)
    )
    await told(desk, "CONFIRMATION SENT", "RESCHEDULED SENT", appointment_id=visit)
    method, event = calendar(box.mails[1])
    assert (method, str(event["UID"]), event["SEQUENCE"]) == ("REQUEST", f"{visit}@frontdesk", 1)
    assert event["DTSTART"].params["VALUE"] == "DATE"
    assert event["DTSTART"].dt == tomorrow() + timedelta(days=1)
    assert event["DTEND"].dt == tomorrow() + timedelta(days=2)

    await desk.cancel(visit, "zzprivate")
    await told(desk, "CONFIRMATION SENT", "RESCHEDULED SENT", "CANCELLATION SENT", appointment_id=visit)
    method, event = calendar(box.mails[2])
    assert (method, event["SEQUENCE"], str(event["STATUS"])) == ("CANCEL", 2, "CANCELLED")
    assert box.subjects[0].startswith("Cita confirmada: ")
    assert not any(
        "zzprivate" in part.get_content() for mail in box.mails for part in mail.walk() if not part.is_multipart()
    )


async def test_hostile_names(desk: Front, box: MailBox) -> None:
    """A name is text wherever it stands: no markup, no second header, no other recipient."""
    clinic = await desk.clinic(country="US", address="<b>here</b>\nBcc: eve@evil.test")
    doctor = await desk.doctor(clinic_id=clinic.id, display_name="Dr. <script>alert(1)</script>")
    name = '"Rosa" <eve@evil.test>, Bob; {{ 7*7 }} & \\'
    visit = await visit_of(desk, doctor.id, given_name=name)
    await told(desk, "CONFIRMATION SENT", appointment_id=visit)
    (mail,) = box.mails
    assert box.to == [["rosa@patients.test"]]
    (to,) = mail["To"].addresses
    assert (to.addr_spec, to.display_name) == ("rosa@patients.test", name)
    assert mail["Bcc"] is None
    html = body(mail, "html")
    assert "<script>" not in html
    assert "<b>here" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "{{ 7*7 }}" in html
    assert name in body(mail, "plain")
    _, event = calendar(mail)
    assert str(event["ATTENDEE"]) == "mailto:rosa@patients.test"
    assert str(event["SUMMARY"]) == "Appointment with Dr. <script>alert(1)</script>"


async def test_languages(desk: Front, box: MailBox) -> None:
    """The patient's language, else that of the clinic's country, else English."""
    for country, language, subject in (
        ("BR", "", "Consulta confirmada"), ("CL", "", "Cita confirmada"), ("DE", "", "Appointment confirmed"),
        ("BR", "es-PE", "Cita confirmada"), ("PE", "en", "Appointment confirmed"),
    ):  # fmt: skip
        doctor = await desk.doctor(clinic_id=(await desk.clinic(country=country)).id)
        person = await desk.patient(email="rosa@patients.test")
        if language:
            wanted = notification_pb2.SetContactPreferencesRequest(
                patient_id=person.id, channels=[Notification.CHANNEL_EMAIL], language=language
            )
            await service(desk).SetContactPreferences(wanted)
        visit = (await desk.book(person.id, doctor.id, tomorrow())).appointment.id
        await told(desk, "CONFIRMATION SENT", appointment_id=visit)
        assert box.subjects[-1].startswith(subject), (country, language)


async def test_a_refused_recipient(desk: Front, box: MailBox) -> None:
    """5xx gives up at once, 4xx is tried again; neither keeps the others waiting."""
    doctor = await desk.doctor()
    box.refuse = lambda address: {"gone@patients.test": "550 no such user", "later@patients.test": "451 later"}.get(
        address
    )
    gone = await visit_of(desk, doctor.id, email="gone@patients.test")
    later = await visit_of(desk, doctor.id, email="later@patients.test")
    (one,) = await told(desk, "CONFIRMATION DEAD", appointment_id=gone)
    assert (one.attempts, one.failure) == (1, "SMTP_550")
    await until(lambda: desk.sql("select 1 from notification where failure = 'SMTP_451'") != [])
    good = await visit_of(desk, doctor.id)
    await told(desk, "CONFIRMATION SENT", appointment_id=good)
    box.refuse = lambda address: None
    (one,) = await told(desk, "CONFIRMATION SENT", appointment_id=later)
    assert one.attempts == 2
    box.answer = "554 spam"
    spam = await visit_of(desk, doctor.id)
    (one,) = await told(desk, "CONFIRMATION DEAD", appointment_id=spam)
    assert one.failure == "SMTP_554"
    nobody = await visit_of(desk, doctor.id, email="")
    await told(desk, "CONFIRMATION SKIPPED NO_ADDRESS", appointment_id=nobody)


async def test_a_server_that_comes_back(desk: Front, box: MailBox) -> None:
    """While the mail server is away mails wait, and each comes once when it is back; also one that was cut off."""
    doctor = await desk.doctor()
    await told(desk, "CONFIRMATION SENT", appointment_id=await visit_of(desk, doctor.id))
    await box.stop()
    visits = [await visit_of(desk, doctor.id) for _ in range(3)]
    await until(lambda: desk.sql("select 1 from notification where failure = 'CONNECTION_FAILED'") != [])
    await box.start()
    for visit in visits:
        await told(desk, "CONFIRMATION SENT", appointment_id=visit)
    assert len({mail["Message-ID"] for mail in box.mails}) == len(box.mails) == 4
    # Cut off before the answer: it may have been taken, so a cancellation is told.
    box.gate.clear()
    cut = await visit_of(desk, doctor.id)
    await until(lambda: len(box.tried) == 5)
    await box.stop()
    await until(lambda: desk.sql("select 1 from notification where told and state <> 'SENT'") != [])
    await desk.cancel(cut)
    box.gate.set()
    await box.start()
    await told(desk, "CONFIRMATION SKIPPED SUPERSEDED", "CANCELLATION SENT", appointment_id=cut)


@pytest.mark.parametrize("scheme", ["smtp+starttls", "smtps"])
async def test_encrypted_with_a_login(
    settings: Settings, conninfo: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scheme: str
) -> None:
    """STARTTLS and TLS with user and password; a wrong password or an unknown authority hands in nothing."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    arguments: Any = {"starttls" if scheme == "smtp+starttls" else "tls": context}
    async with MailBox(**arguments) as box:
        untrusting = mailing(settings, box, scheme, "clinic:s3cret%20%2F@")
        async with serving(untrusting, conninfo, background="on") as (_, front):
            visit = await visit_of(front, (await front.doctor()).id)
            await until(lambda: front.sql("select 1 from notification where failure <> ''") != [])
            assert front.sql("select failure from notification where failure <> ''") == [("TLS_FAILED",)]
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        async with serving(mailing(settings, box, scheme, "clinic:wrong@"), conninfo, background="on") as (_, front):
            await until(lambda: front.sql("select 1 from notification where failure = 'SMTP_535_LOGIN'") != [])
        assert box.tried == []
        async with serving(untrusting, conninfo, background="on") as (_, front):
            await told(front, "CONFIRMATION SENT", appointment_id=visit)
        assert box.secure == 1


async def test_templates_of_ones_own(settings: Settings, conninfo: str, box: MailBox, tmp_path: Path) -> None:
    """A file of the same name takes the place of ours; all else stays."""
    (tmp_path / "en").mkdir()
    own = '{% extends "en/base.jinja" %}{% block subject %}Hello {{ name }}{% endblock %}'
    (tmp_path / "en" / "confirmation.jinja").write_text(own)
    changed = mailing(settings, box).model_copy(update={"template_dir": tmp_path})
    async with serving(changed, conninfo, background="on") as (_, front):
        doctor = await front.doctor(display_name="Dr. No")
        visit = await visit_of(front, doctor.id, given_name="Rosa")
        await told(front, "CONFIRMATION SENT", appointment_id=visit)
        assert box.subjects == ["Hello Rosa"]
        assert "Dr. No" in body(box.mails[0], "plain")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"smtp_url": "http://h"}, "smtp://"),
        ({"smtp_url": "smtp://h:x"}, "URL"),
        ({"smtp_url": "smtp://u:geheim@mail.example"}, "plain text"),
        ({"smtp_url": "smtps://u@mail.example"}, "go together"),
        ({"smtp_url": "smtp://localhost"}, "FRONTDESK_MAIL_FROM go together"),
        ({"mail_from": "a@b.example"}, "FRONTDESK_MAIL_FROM go together"),
        ({"smtp_url": "smtp://localhost", "mail_from": "nobody"}, "e-mail address"),
        ({"smtp_url": "smtp://localhost", "mail_from": "a@b.example\nBcc: c@d.example"}, "e-mail address"),
        ({"webhook_url": "ftp://h"}, "http"),
        ({"webhook_url": "http://h"}, "FRONTDESK_WEBHOOK_SECRET go together"),
        ({"webhook_url": "http://h", "webhook_secret": "geheim"}, "whsec_"),
        ({"webhook_url": "http://h", "webhook_secret": "whsec_geheim"}, "whsec_"),
        ({"template_dir": Path("/nowhere")}, "not a directory"),
        ({"retry_hours": 0}, "0.001"),
    ],
)
def test_settings(given: dict[str, Any], message: str) -> None:
    """A bad setting is one line that names it, without a secret."""
    with pytest.raises(SettingsError) as refused:
        Settings.load(**given)
    assert message in str(refused.value)
    assert "geheim" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    """Neither the settings nor a template at fault shows a secret."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    shown = repr(
        Settings(
            smtp_url="smtps://u:geheim@mail.example",
            mail_from="Front Desk <a@b.example>",
            webhook_url="http://h/geheim",
            webhook_secret=f"{secret} {secret}",
        )
    )
    assert "geheim" not in shown
    assert secret not in shown
    (tmp_path / "bad.jinja").write_text("{% block %}")
    with pytest.raises(SettingsError, match=r"bad\.jinja: line 1"):
        Settings.load(template_dir=tmp_path)


def test_every_kind_has_words() -> None:
    """Each kind that is sent has its words in every language: no block is empty, and no two languages say the same."""
    wording = Wording()
    kinds = [name.removeprefix("KIND_") for name, number in Notification.Kind.items() if number]
    for kind in kinds:
        said = []
        for language in LANGUAGES:
            code = "7KQ4M-2XWPA" if kind in ("EMAIL_VERIFICATION", "PASSWORD_RESET") else ""
            one = outgoing(kind, language, visit=not code)
            mail = wording.mail(one, code)
            said += [mail.subject, wording.short(one) or kind + language]
            for text in (mail.text, mail.html):
                assert "Rosa" in text
                assert ("23:45" in text) == (kind == "WAITLIST_OFFER")
                assert not re.search(r"\n{3}", mail.text)
                assert code in text
            if code:
                assert code in mail.text.splitlines()
        assert len(set(said)) == len(said), kind


def outgoing(kind: str, language: str, *, visit: bool = True) -> Outgoing:
    """A notification of a visit, or to a user."""
    start = datetime(2026, 12, 3, 9, 30)
    return Outgoing(
        id="0190a0b0-1111-7222-8333-444455556666", kind=kind, attempts=1, sequence=0, plan_time=datetime.now(UTC),
        appointment_id="a" if visit else None, patient_id=None, user_id=None if visit else "u", to="rosa@patients.test",
        language=language, country="", name="Rosa", doctor="Dr. No" if visit else "", clinic="Clinic" if visit else "",
        address="", city="", phone="", email="", time_zone="UTC", date=date(2026, 12, 3) if visit else None,
        start_time=start.replace(tzinfo=UTC) if visit else None, end_time=start.replace(tzinfo=UTC) if visit else None,
        local_start=start if visit else None, reminder=kind == "REMINDER",
        until=datetime(2026, 12, 1, 23, 45) if kind == "WAITLIST_OFFER" else None,
    )  # fmt: skip
