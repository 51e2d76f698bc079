"""clinic.frontdesk.v1.AccessService."""

from collections.abc import Iterable, Sequence

from clinic.frontdesk.v1 import access_pb2 as pb
from clinic.frontdesk.v1 import policy_pb2
from frontdesk.core.access import ApiKey, ApiKeys
from frontdesk.rpc.convert import (
    EVERY_FIELD,
    IDS,
    changes_from,
    converter,
    enum_numbers,
    instant_from,
    key_of,
    page_from,
    page_token,
    writable,
)
from frontdesk.rpc.pipeline import Call

_NUMBERS = enum_numbers(policy_pb2.Role.DESCRIPTOR)


def roles_from(numbers: Iterable[policy_pb2.Role.ValueType]) -> list[str]:
    """The roles by their names in the core."""
    return [policy_pb2.Role.Name(number).removeprefix("ROLE_") for number in numbers]


def roles_to(names: Iterable[str]) -> Sequence[int]:
    """The roles as numbers of the wire's enum, in its order."""
    return sorted(_NUMBERS[name] for name in names)


to_api_key = converter(pb.ApiKey, ApiKey, roles=lambda api_key: roles_to(api_key.roles))

_WRITABLE = writable(
    "name",
    "requests_per_minute",
    roles=lambda api_key: {"roles": roles_from(api_key.roles)},
    clinic_ids=lambda api_key: {"clinic_ids": list(api_key.clinic_ids)},
    expire_time=lambda api_key: {"expire_time": instant_from(api_key, "expire_time", "api_key.")},
)


class AccessServicer:
    """Translates; `ApiKeys` decides."""

    service = pb.DESCRIPTOR.services_by_name["AccessService"]

    def __init__(self, api_keys: ApiKeys) -> None:
        self._api_keys = api_keys

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, call: Call) -> pb.CreateApiKeyResponse:
        values = changes_from(request.api_key, EVERY_FIELD, _WRITABLE)
        change = await self._api_keys.create(call.caller, values, key=key_of(request, call))
        return pb.CreateApiKeyResponse(
            api_key=to_api_key(change.result.api_key), key=change.result.credentials, replayed=change.replayed
        )

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, call: Call) -> pb.ListApiKeysResponse:
        found = await self._api_keys.list(call.caller, page_from(request, *IDS), active_only=request.active_only)
        return pb.ListApiKeysResponse(
            api_keys=map(to_api_key, found.items), next_page_token=page_token(request, found.next)
        )

    async def RevokeApiKey(self, request: pb.RevokeApiKeyRequest, call: Call) -> pb.RevokeApiKeyResponse:
        change = await self._api_keys.revoke(call.caller, request.api_key_id, key=key_of(request, call))
        return pb.RevokeApiKeyResponse(api_key=to_api_key(change.result), replayed=change.replayed)
