"""clinic.frontdesk.v1.AccessService."""

from typing import Any

from clinic.frontdesk.v1 import access_pb2 as pb
from frontdesk.core.access import ApiKey, ApiKeys, Users
from frontdesk.rpc.convert import (
    EVERY_FIELD,
    active_from,
    changes_from,
    converter,
    id_or_none,
    instant_from,
    key_of,
    page_from,
    page_token,
    version_from,
    writable,
)
from frontdesk.rpc.pipeline import Call
from frontdesk.rpc.services.auth import roles_from, roles_to, to_user

to_api_key = converter(pb.ApiKey, ApiKey, roles=lambda api_key: roles_to(api_key.roles))


def _roles_of(holder: Any) -> dict[str, Any]:
    return {"roles": roles_from(holder.roles)}


def _clinics_of(holder: Any) -> dict[str, Any]:
    return {"clinic_ids": sorted(holder.clinic_ids)}


def _doctor_of(holder: Any) -> dict[str, Any]:
    return {"doctor_id": id_or_none(holder.doctor_id)}


_USER = writable("name", "phone", "address", active=active_from)
_NEW_USER = writable("email", "name", "phone", "address", roles=_roles_of, doctor_id=_doctor_of, clinic_ids=_clinics_of)
_WRITABLE = writable(
    "name",
    "requests_per_minute",
    roles=_roles_of,
    clinic_ids=_clinics_of,
    expire_time=lambda api_key: {"expire_time": instant_from(api_key, "expire_time", "api_key.")},
)


class AccessServicer:
    """Translates; `Users` and `ApiKeys` decide."""

    service = pb.DESCRIPTOR.services_by_name["AccessService"]

    def __init__(self, users: Users, api_keys: ApiKeys) -> None:
        self._users = users
        self._api_keys = api_keys

    async def CreateUser(self, request: pb.CreateUserRequest, call: Call) -> pb.CreateUserResponse:
        values = changes_from(request.user, EVERY_FIELD, _NEW_USER)
        change = await self._users.create(call.caller, values, key=key_of(request, call))
        return pb.CreateUserResponse(
            user=to_user(change.result.user),
            one_time_password=change.result.one_time_password,
            replayed=change.replayed,
        )

    async def GetUser(self, request: pb.GetUserRequest, call: Call) -> pb.GetUserResponse:
        return pb.GetUserResponse(user=to_user(await self._users.get(call.caller, request.user_id)))

    async def ListUsers(self, request: pb.ListUsersRequest, call: Call) -> pb.ListUsersResponse:
        role = roles_from([request.role])[0] if request.HasField("role") else None
        found = await self._users.list(call.caller, await page_from(request, call), email=request.email, role=role)
        return pb.ListUsersResponse(
            users=map(to_user, found.items), next_page_token=await page_token(request, call, found.next)
        )

    async def UpdateUser(self, request: pb.UpdateUserRequest, call: Call) -> pb.UpdateUserResponse:
        changes = changes_from(request.user, request.update_mask, _USER)
        change = await self._users.update(
            call.caller, request.user.id, changes, version_from(request.etag), key=key_of(request, call)
        )
        return pb.UpdateUserResponse(user=to_user(change.result), replayed=change.replayed)

    async def SetUserRoles(self, request: pb.SetUserRolesRequest, call: Call) -> pb.SetUserRolesResponse:
        roles = {**_roles_of(request), **_doctor_of(request), **_clinics_of(request)}
        change = await self._users.set_roles(
            call.caller, request.user_id, roles, version_from(request.etag), key=key_of(request, call)
        )
        return pb.SetUserRolesResponse(user=to_user(change.result), replayed=change.replayed)

    async def LinkPatient(self, request: pb.LinkPatientRequest, call: Call) -> pb.LinkPatientResponse:
        change = await self._users.link_patient(
            call.caller, request.user_id, request.patient_id, version_from(request.etag), key=key_of(request, call)
        )
        return pb.LinkPatientResponse(user=to_user(change.result), replayed=change.replayed)

    async def ResetSecondFactor(self, request: pb.ResetSecondFactorRequest, call: Call) -> pb.ResetSecondFactorResponse:
        change = await self._users.reset_second_factor(
            call.caller, request.user_id, version_from(request.etag), key=key_of(request, call)
        )
        return pb.ResetSecondFactorResponse(user=to_user(change.result), replayed=change.replayed)

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, call: Call) -> pb.CreateApiKeyResponse:
        values = changes_from(request.api_key, EVERY_FIELD, _WRITABLE)
        change = await self._api_keys.create(call.caller, values, key=key_of(request, call))
        return pb.CreateApiKeyResponse(
            api_key=to_api_key(change.result.api_key), key=change.result.credentials, replayed=change.replayed
        )

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, call: Call) -> pb.ListApiKeysResponse:
        found = await self._api_keys.list(call.caller, await page_from(request, call), active_only=request.active_only)
        return pb.ListApiKeysResponse(
            api_keys=map(to_api_key, found.items), next_page_token=await page_token(request, call, found.next)
        )

    async def RevokeApiKey(self, request: pb.RevokeApiKeyRequest, call: Call) -> pb.RevokeApiKeyResponse:
        change = await self._api_keys.revoke(call.caller, request.api_key_id, key=key_of(request, call))
        return pb.RevokeApiKeyResponse(api_key=to_api_key(change.result), replayed=change.replayed)
