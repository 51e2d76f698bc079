"""Who calls, and what the caller may see. Every method of the core takes the `Caller` first, reads too."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("PATIENT", "DOCTOR", "STAFF", "ADMIN", "SERVICE", "BOARD")

ALL, OWN = "ALL", "OWN"


@dataclass(frozen=True, slots=True)
class Identity:
    """A known caller and the rights that credentials give, whatever the method."""

    name: str
    """As the audit and the scope of idempotency keys name it: users/ID, keys/ID, services/NAME, anonymous."""
    roles: frozenset[str] = frozenset()
    clinic_ids: tuple[str, ...] = ()
    """Where the roles of the desk hold; empty means every clinic."""
    patient_id: str | None = None
    doctor_id: str | None = None
    unrestricted: bool = False
    """Without credentials in the mode `open`: no rule of access applies."""
    callers: dict[str, "Caller | None"] = field(default_factory=dict, compare=False, repr=False)
    """What the identity may by the name of a policy; filled in as it calls."""

    def calling(self, method: str, policy: Mapping[str, str]) -> "Caller | None":
        """The caller of a method with this policy (role to scope); None if no role of the identity may call it."""
        if method not in self.callers:
            self.callers[method] = self._caller(policy)
        return self.callers[method]

    def _caller(self, policy: Mapping[str, str]) -> "Caller | None":
        if self.unrestricted:
            return Caller(self.name)
        scopes = {role: policy[role] for role in self.roles if role in policy}
        if not scopes:
            return None
        whole = ALL in scopes.values()
        if whole and not self.clinic_ids:
            return Caller(self.name)
        return Caller(
            self.name,
            Sight(
                clinic_ids=self.clinic_ids if whole else None,
                patient_id=self.patient_id if scopes.get("PATIENT") == OWN else None,
                doctor_id=self.doctor_id if scopes.get("DOCTOR") == OWN else None,
            ),
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

    def as_json(self) -> dict[str, Any]:
        """SQL's type of the same name."""
        clinics = None if self.clinic_ids is None else list(self.clinic_ids)
        return {"clinics": clinics, "patient": self.patient_id, "doctor": self.doctor_id}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls one method."""

    identity: str
    sight: Sight | None = None
    """None means that the caller may reach everything."""


ANONYMOUS = Identity("anonymous", unrestricted=True)
