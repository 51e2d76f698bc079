"""Who calls, and what the caller may see. Every method of the core takes the `Caller` first, reads too."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from frontdesk.errors import ClinicNotYours, RoleRequired

ALL, OWN = "ALL", "OWN"


@dataclass(frozen=True, slots=True)
class Identity:
    """A known caller and the rights that credentials give, whatever the method."""

    name: str
    """As the audit and the scope of idempotency keys name it: users/ID, keys/ID, services/NAME,
    issuers/NAME/SUBJECT, anonymous."""
    roles: frozenset[str] = frozenset()
    clinic_ids: tuple[str, ...] = ()
    """Where the roles of the desk hold; empty means every clinic."""
    patient_id: str | None = None
    doctor_id: str | None = None
    unrestricted: bool = False
    """Without credentials in the mode `open`: no rule of access applies."""
    requests_per_minute: int | None = None
    """The limit of an API key or a user; None for a service with a certificate, which has none."""
    one_time_password: bool = False
    """Whether the user must change a one-time password first."""
    unverified_email: bool = False
    """Whether the user is a patient whose e-mail is not verified."""
    digest: bytes = b""
    """Of the credentials that have proved the identity; empty if there were none, or a certificate."""
    until: float | None = None
    """When those credentials expire, by `time.monotonic`; None if they do not."""
    life: float | None = None
    """Seconds from their issue to then."""
    callers: dict[str, "Caller | None"] = field(default_factory=dict, compare=False, repr=False)
    """What the identity may by the name of a policy; filled in as it calls."""

    def calling(self, policy: str, scopes: Mapping[str, str]) -> "Caller | None":
        """The caller of what has this policy (its name, and role to scope); None if no role of the identity may."""
        if policy not in self.callers:
            self.callers[policy] = self._caller(scopes)
        return self.callers[policy]

    def _caller(self, policy: Mapping[str, str]) -> "Caller | None":
        if self.unrestricted:
            return Caller(self.name)
        scopes = {role: policy[role] for role in self.roles if role in policy}
        if not scopes:
            return None
        whole = ALL in scopes.values()
        may_override = not scopes.keys().isdisjoint(("STAFF", "ADMIN"))
        # A patient is nobody's in particular, so what every patient may see is seen at every clinic.
        if scopes.get("PATIENT") == ALL or (whole and not self.clinic_ids):
            return Caller(self.name, may_override=may_override)
        return Caller(
            self.name,
            Sight(
                clinic_ids=self.clinic_ids if whole else None,
                patient_id=self.patient_id if "PATIENT" in scopes else None,
                doctor_id=self.doctor_id if "DOCTOR" in scopes else None,
            ),
            may_override,
        )


@dataclass(frozen=True, slots=True)
class Sight:
    """What a restricted caller may reach: any of these."""

    clinic_ids: tuple[str, ...] | None
    """Everything in these clinics; None means that no role gives a whole clinic."""
    patient_id: str | None
    """What is this patient's own."""
    doctor_id: str | None
    """What is this doctor's own."""

    @property
    def parts(self) -> dict[str, Any]:
        """What is set, as the bind parameters of `within` are named."""
        clinics = None if self.clinic_ids is None else list(self.clinic_ids)
        parts = {"sight_clinics": clinics, "sight_patient": self.patient_id, "sight_doctor": self.doctor_id}
        return {name: value for name, value in parts.items() if value is not None}

    def as_json(self) -> dict[str, Any]:
        """SQL's type of the same name."""
        return {name.removeprefix("sight_"): value for name, value in self.parts.items()}


def current_patient(name: str) -> "sa.ScalarSelect[Any]":
    """The record that the id in this bind parameter stands for: after a merge, the kept one."""
    return sa.select(sa.func.current_patient(sa.bindparam(name, type_=sa.Uuid))).scalar_subquery()


def within(parts: Collection[str], table: Any) -> "sa.ColumnElement[bool]":
    """The condition that a row is in sight, by its columns clinic_id, patient_id and doctor_id."""
    conditions = {
        "sight_clinics": table.clinic_id == sa.any_(sa.bindparam("sight_clinics", type_=sa.ARRAY(sa.Uuid))),
        "sight_patient": table.patient_id == current_patient("sight_patient"),
        "sight_doctor": table.doctor_id == sa.bindparam("sight_doctor"),
    }
    return sa.or_(sa.false(), *(condition for name, condition in conditions.items() if name in parts))


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls one method."""

    identity: str
    sight: Sight | None = None
    """None means that the caller may reach everything."""
    may_override: bool = True
    """Whether the caller's reason makes a place on a full doctor-day: the desk's does."""

    def may_reach_clinic(self, clinic_id: str) -> bool:
        """Whether a role of the desk holds there."""
        return self.sight is None or (self.sight.clinic_ids is not None and clinic_id in self.sight.clinic_ids)

    def require_clinic(self, clinic_id: str) -> None:
        """Raise ClinicNotYours unless a role of the desk holds there."""
        if not self.may_reach_clinic(clinic_id):
            raise ClinicNotYours(clinic_id)

    def may_reach_doctor(self, clinic_id: str, doctor_id: str) -> bool:
        """Whether a role of the desk holds at this clinic, or the doctor's things are the caller's own."""
        return self.may_reach_clinic(clinic_id) or (self.sight is not None and self.sight.doctor_id == doctor_id)

    def require_doctor(self, clinic_id: str, doctor_id: str, method: str) -> None:
        """Raise ClinicNotYours or, for somebody without a role of the desk, RoleRequired, unless he may reach both."""
        if not self.may_reach_doctor(clinic_id, doctor_id):
            raise ClinicNotYours(clinic_id) if self.everywhere else RoleRequired(details={"method": method})

    @property
    def everywhere(self) -> bool:
        """Whether a role of the desk holds somewhere: then also for what belongs to no clinic, such as patients."""
        return self.sight is None or self.sight.clinic_ids is not None


ANONYMOUS = Identity("anonymous", unrestricted=True)

OPERATOR = Caller("operator")
"""Somebody at the command line with access to the database."""
