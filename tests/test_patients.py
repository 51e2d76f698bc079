"""The rules that recognise the same person, and the ways to find patients."""

import asyncio

import grpc
from google.type.date_pb2 import Date

from clinic.frontdesk.v1 import patient_pb2 as pb
from tests.clinic import Front, details, outcome, reason_of, refusal

PHONE = "+5511987654321"


async def register(front: Front, country: str = "", **fields: object) -> pb.RegisterPatientResponse:
    fields.setdefault("phone", PHONE)
    request = pb.RegisterPatientRequest(default_country=country)
    for name, value in fields.items():
        field = getattr(request.patient, name)
        if isinstance(value, str | int):
            setattr(request.patient, name, value)
        elif isinstance(value, list):
            field.extend(value)
        else:
            field.CopyFrom(value)
    return await front.patients.RegisterPatient(request)


async def test_the_same_person_is_found_again(front: Front) -> None:
    """The same phone and name, in any spelling, is one person; another name on that phone is another person."""
    first = await register(front, given_name="Ana María", family_name="de Souza")
    again = await register(
        front, given_name="  ANA   maría ", family_name="De Souza", phone="(11) 98765-4321", country="BR"
    )
    assert (first.already_registered, again.already_registered) == (False, True)
    assert again.patient == first.patient
    child = await register(front, given_name="Leo", family_name="de Souza")
    assert not child.already_registered
    assert child.patient.phone == first.patient.phone == PHONE


async def test_a_contradicting_birth_date_is_another_person(front: Front) -> None:
    """Father and son with one name share a phone: their birth dates distinguish them; an unknown date matches any."""
    father = await register(front, given_name="João", birth_date=Date(year=1950, month=1, day=2))
    son = await register(front, given_name="João", birth_date=Date(year=1980, month=3, day=4))
    assert father.patient.id != son.patient.id
    assert (await register(front, given_name="João", birth_date=Date(year=1980, month=3, day=4))).patient == son.patient
    assert (await register(front, given_name="João")).already_registered


async def test_registered_once_by_many_at_once(front: Front) -> None:
    """Forty simultaneous registrations of one person make one record."""
    answers = await asyncio.gather(*(register(front, given_name="Eva") for _ in range(40)))
    assert len({answer.patient.id for answer in answers}) == 1
    assert sum(not answer.already_registered for answer in answers) == 1


async def test_everything_is_kept(front: Front) -> None:
    """A patient is read as registered: dates, contacts, allergies, insured numbers."""
    registered = await register(
        front,
        given_name="Rosa",
        family_name="Quispe",
        birth_date=Date(year=1999, month=12, day=31),
        gender=pb.GENDER_FEMALE,
        email="rosa@example.org",
        blood_group="AB-",
        allergies=["penicillin", "nuts"],
        emergency_contact=pb.EmergencyContact(name="Luis", phone="+51987654321"),
        insurances=[pb.Insurance(country="PE", number="00123"), pb.Insurance(country="BR", number="AB 12-3")],
    )
    got = (await front.patients.GetPatient(pb.GetPatientRequest(patient_id=registered.patient.id))).patient
    assert got == registered.patient
    assert got.birth_date == Date(year=1999, month=12, day=31)
    assert list(got.allergies) == ["penicillin", "nuts"]
    assert [(i.country, i.number) for i in got.insurances] == [("PE", "00123"), ("BR", "AB 12-3")]
    assert got.active
    assert got.HasField("create_time")


async def test_update_by_mask(front: Front) -> None:
    """An update changes only the fields of the mask; `*` clears unset fields; required fields cannot be cleared."""
    patient = (await register(front, given_name="Ida", email="ida@example.org", allergies=["dust"])).patient

    async def update(*paths: str, etag: str = "", **fields: object) -> pb.Patient:
        request = pb.UpdatePatientRequest(patient=pb.Patient(id=patient.id, **fields), etag=etag)  # type: ignore[arg-type]
        request.update_mask.paths.extend(paths)
        return (await front.patients.UpdatePatient(request)).patient

    changed = await update("family_name", family_name="Moe", email="ignored@example.org")
    assert (changed.family_name, changed.email) == ("Moe", "ida@example.org")
    assert changed.etag != patient.etag
    assert await outcome(update("email", etag=patient.etag)) == "ETAG_MISMATCH"
    assert (await update("email", etag=changed.etag)).email == ""
    contact = await update("emergency_contact.name", emergency_contact=pb.EmergencyContact(name="Ola"))
    assert contact.emergency_contact.name == "Ola"
    replaced = await update("*", given_name="Ida", phone=PHONE)
    assert (replaced.family_name, list(replaced.allergies), replaced.active) == ("", [], True)
    for path in ("given_name", "phone", "*"):
        assert await outcome(update(path)) == "INVALID_FIELD"


async def test_two_records_of_one_person_are_refused(front: Front) -> None:
    """An update that would make a second record of one person is refused, and names the first record."""
    one = (await register(front, given_name="Ana")).patient
    two = (await register(front, given_name="Anna")).patient
    renamed = pb.UpdatePatientRequest(patient=pb.Patient(id=two.id, given_name="ANA"))
    error = await refusal(front.patients.UpdatePatient(renamed))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.ALREADY_EXISTS, "PATIENT_EXISTS")
    assert details(error)["ResourceInfo"].resource_name == one.id


async def test_find(front: Front) -> None:
    """Patients are found by phone, start of a name, or insured number; at least one is required."""
    ana = (await register(front, given_name="Ana", family_name="Muñoz")).patient
    bob = (await register(front, given_name="Bob", family_name="Anand", phone="+442079460958")).patient
    insured = await register(front, given_name="Cid", insurances=[pb.Insurance(country="CL", number="12345")])

    async def found(**fields: object) -> set[str]:
        answer = await front.patients.ListPatients(pb.ListPatientsRequest(**fields))  # type: ignore[arg-type]
        return {patient.id for patient in answer.patients}

    assert await found(phone="020 7946 0958", default_country="GB") == {bob.id}
    assert await found(name_prefix="AN") == {ana.id, bob.id}
    assert await found(name_prefix="ana muñ") == {ana.id}
    assert await found(name_prefix="%") == set()
    assert await found(name_prefix="an\U0010ffff") == set()
    assert await found(insurance=pb.Insurance(country="CL", number="12345")) == {insured.patient.id}
    assert await found(phone=PHONE, name_prefix="mu") == {ana.id}
    assert await outcome(front.patients.ListPatients(pb.ListPatientsRequest())) == "INVALID_FIELD"


async def test_pages_neither_repeat_nor_skip(front: Front) -> None:
    """Pages show every row once, even while rows come and go; a token is bound to its filter."""
    ids = [(await register(front, given_name=f"Kim {n}")).patient.id for n in range(7)]
    request = pb.ListPatientsRequest(phone=PHONE, page_size=3)
    seen = []
    while True:
        page = await front.patients.ListPatients(request)
        seen += [patient.id for patient in page.patients]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
        # One that was shown leaves the filter, and one joins it.
        front.sql("delete from patient where id = %s", seen[0])
        ids.append((await register(front, given_name=f"Kim {len(ids)}")).patient.id)
        if len(ids) > 9:
            break
    assert len(seen) == len(set(seen))
    assert seen == sorted(seen)
    assert set(ids[:7]) <= set(seen)
    token = (await front.patients.ListPatients(pb.ListPatientsRequest(phone=PHONE, page_size=1))).next_page_token
    other = pb.ListPatientsRequest(phone="+442079460958", page_token=token)
    assert await outcome(front.patients.ListPatients(other)) == "INVALID_FIELD"
