"""Whose call it is, and whether that identity may make it: the credentials, and the policy of the method.

The rows that a caller may reach are decided with the rows, in SQL: `Caller.sight`.
"""

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor

from clinic.frontdesk.v1 import policy_pb2
from frontdesk.core.caller import ANONYMOUS, Caller, Identity
from frontdesk.errors import CredentialsRequired, RoleRequired

_MOST_LABEL = 64
_MOST_NAME = 200


class Policy:
    """Who may call one method: the annotation in its proto."""

    def __init__(self, method: MethodDescriptor) -> None:
        self.method = method.name
        said = method.GetOptions().Extensions[policy_pb2.policy]
        self.scopes: Mapping[str, str] = {
            field.name.upper(): policy_pb2.Policy.Scope.Name(scope).removeprefix("SCOPE_")
            for field, scope in said.ListFields()
            if field.enum_type is not None
        }
        self.without_credentials: bool = said.without_credentials


class Access:
    """Judges calls by their credentials."""

    def __init__(self, *, required: bool, client_certificates: bool) -> None:
        """`required`: calls without credentials are refused, unless their method needs none. `client_certificates`: a
        certificate is a credential.
        """
        self._required = required
        self._client_certificates = client_certificates
        self._services: dict[str, Identity] = {}

    async def identify(self, context: grpc.aio.ServicerContext[Any, Any], policy: Policy) -> Identity:
        """Whose call it is. Raises CredentialsRequired."""
        if self._client_certificates and (name := _certified_name(context)):
            if name not in self._services:
                self._services[name] = Identity(f"services/{name}", frozenset({"SERVICE"}))
            return self._services[name]
        if self._required and not policy.without_credentials:
            raise CredentialsRequired
        for key, value in context.invocation_metadata() or ():
            if key == "frontdesk-caller" and isinstance(value, str):
                return Identity("name:" + value[:_MOST_LABEL], unrestricted=True)
        return ANONYMOUS

    def admit(self, identity: Identity, policy: Policy) -> Caller:
        """The identity as the caller of the method. Raises RoleRequired."""
        caller = identity.calling(policy.method, policy.scopes)
        # A method that says nothing is for nobody.
        if caller is None or not (policy.scopes or policy.without_credentials):
            raise RoleRequired(details={"method": policy.method})
        return caller


def _certified_name(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The name in the client's certificate: a URI, else a DNS name, else the common name (RFC 9525 puts them so)."""
    properties = context.auth_context()
    for name in ("peer_uri", "peer_dns", "x509_common_name"):
        for value in properties.get(name, ()):
            return value.decode(errors="replace")[:_MOST_NAME]
    return ""
