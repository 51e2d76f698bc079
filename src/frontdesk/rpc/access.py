"""Whose call it is, and whether that identity may make it: the credentials, and the policy of the method.

The rows that a caller may reach are decided with the rows, in SQL: `Caller.sight`.
"""

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor

from clinic.frontdesk.v1 import policy_pb2
from clinic.frontdesk.v1.queue_pb2 import QueueView
from frontdesk.core.caller import ANONYMOUS, Caller, Identity
from frontdesk.core.credential import KEY_PREFIX, Credentials
from frontdesk.core.limit import Limits, holder_of
from frontdesk.errors import (
    CredentialsInvalid,
    CredentialsRequired,
    EmailNotVerified,
    PasswordChangeRequired,
    RateLimited,
    RoleRequired,
)
from frontdesk.rpc.origin import Origins

_CREDENTIALS = ("authorization", "x-api-key")
_VIEW = "view_"
_WRONG = ""
"""Credentials that are never good."""
_MOST_LABEL = 64
_MOST_NAME = 200


class Policy:
    """Who may call one method: the annotation in its proto, or the part of it that is about one view."""

    def __init__(self, method: MethodDescriptor, view: str = "") -> None:
        self.method = method.name
        said = method.GetOptions().Extensions[policy_pb2.policy]
        if view:
            said = getattr(said, _VIEW + view.lower())
        self.name = f"{method.name}/{view}"
        """Tells it from every other policy."""
        self.scopes: Mapping[str, str] = {
            field.name.upper(): policy_pb2.Policy.Scope.Name(scope).removeprefix("SCOPE_")
            for field, scope in said.ListFields()
            if field.enum_type is not None
        }
        self.without_credentials: bool = said.without_credentials
        self.always: bool = said.always
        self.one_time_password: bool = said.one_time_password
        self.unverified_email: bool = said.unverified_email
        self.every_clinic: bool = said.every_clinic
        self.views: Mapping[int, Policy] = {}
        """Of a method that has them: the policies of the views that are not the default one, by number."""
        if not view:
            names = (field.name.removeprefix(_VIEW).upper() for field, _ in said.ListFields() if _VIEW in field.name)
            self.views = {QueueView.Value(f"QUEUE_VIEW_{name}"): Policy(method, name) for name in names}


class Access:
    """Judges calls by their credentials."""

    def __init__(
        self,
        credentials: Credentials,
        limits: Limits,
        origins: Origins,
        *,
        required: bool,
        client_certificates: bool,
        address_requests_per_minute: int,
    ) -> None:
        """`required`: calls without credentials are refused, unless their method needs none. `client_certificates`: a
        certificate is a credential, for calls that bring no other. `address_requests_per_minute` limits the calls to
        such methods, if `required`, and in any case those with credentials that are refused.
        """
        self._origins = origins
        self._address_requests_per_minute = address_requests_per_minute
        self._credentials = credentials
        self._limits = limits
        self._required = required
        self._client_certificates = client_certificates
        self._services: dict[str, Identity] = {}

    async def identify(self, context: grpc.aio.ServicerContext[Any, Any], policy: Policy) -> Identity:
        """Whose call it is; counts it.

        Raises CredentialsRequired, CredentialsInvalid, CredentialsExpired, RateLimited.
        """
        given: str | None = None
        label = ""
        # Keys that end in -bin have bytes; these have text.
        metadata: Any = context.invocation_metadata() or ()
        for key, value in metadata:
            if key in _CREDENTIALS:
                # Two are as good as wrong ones, because proxies and we might choose differently.
                given = _WRONG if given is not None else _given(key, value)
            elif key == "frontdesk-caller" and not label:
                label = value[:_MOST_LABEL]
        if policy.without_credentials:
            # Where calls without credentials may do everything, these are not limited either.
            if self._required:
                await self._limits.admit(f"calls/{self._holder(context)}", self._address_requests_per_minute)
            return _unproven(label)
        if given is not None:
            identity = await self._judged(given, context)
            if identity.requests_per_minute is not None:
                await self._limits.admit(identity.name, identity.requests_per_minute)
            return identity
        if self._client_certificates and (name := _certified_name(context)):
            if name not in self._services:
                self._services[name] = Identity(f"services/{name}", frozenset({"SERVICE"}))
            return self._services[name]
        if self._required or policy.always:
            raise CredentialsRequired
        return _unproven(label)

    async def _judged(self, given: str, context: grpc.aio.ServicerContext[Any, Any]) -> Identity:
        def refusals() -> str:
            return f"refusals/{self._holder(context)}"

        try:
            try:
                return await self._credentials.identity(given, lambda: self._limits.require_left(refusals()))
            except CredentialsInvalid as refused:
                # Expired ones do not count: a client that notices it late has several calls under way.
                if refused.counts:
                    await self._limits.admit(refusals(), self._address_requests_per_minute)
                raise
        except RateLimited as limited:
            limited.of_refusals = True
            raise

    def _holder(self, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        return holder_of(self._origins.of(context))

    async def again(
        self, context: grpc.aio.ServicerContext[Any, Any], identity: Identity, *, policy: Policy, request: Any
    ) -> tuple[Identity, Caller] | None:
        """Judge the caller of a stream again; None if nothing about its credentials can have changed. Counts nothing.

        Raises as a new call would.
        """
        if self._credentials.knows(identity):
            return None
        metadata: Any = context.invocation_metadata()
        # It was found to be the only one.
        given = next(_given(key, value) for key, value in metadata if key in _CREDENTIALS)
        identity = await self._credentials.identity(given, lambda: None)
        self.admit(identity, policy)
        return identity, self.caller(identity, policy, request)

    def admit(self, identity: Identity, policy: Policy) -> None:
        """Refuse an identity that may not call the method, whatever it asks for.

        Raises RoleRequired, PasswordChangeRequired, EmailNotVerified.
        """
        if identity.one_time_password and not policy.one_time_password:
            raise PasswordChangeRequired
        if identity.unverified_email and not policy.unverified_email:
            raise EmailNotVerified
        if all(_caller(identity, one) is None for one in (policy, *policy.views.values())):
            raise RoleRequired(details={"method": policy.method})

    def caller(self, identity: Identity, policy: Policy, request: Any) -> Caller:
        """An admitted identity as the caller with this request. Raises RoleRequired, CredentialsRequired."""
        wanted = policy.views.get(request.view, policy) if policy.views else policy
        if wanted.always and identity.unrestricted:
            raise CredentialsRequired
        caller = _caller(identity, wanted)
        if caller is None:
            raise RoleRequired(details={"method": policy.method, "field": "view"})
        return caller


def _unproven(label: str) -> Identity:
    return Identity("name:" + label, unrestricted=True) if label else ANONYMOUS


def _caller(identity: Identity, policy: Policy) -> Caller | None:
    # A method that says nothing is for nobody.
    if not (policy.scopes or policy.without_credentials):
        return None
    caller = identity.calling(policy.name, policy.scopes)
    return None if policy.every_clinic and caller is not None and caller.sight is not None else caller


def _given(key: str, value: str) -> str:
    if key == "x-api-key":
        return value if value.startswith(KEY_PREFIX) else _WRONG
    return _bearer(value)


def _bearer(value: str) -> str:
    scheme, _, token = value.partition(" ")
    # Not of another scheme, nor empty: no credentials of ours look so.
    return token if scheme.lower() == "bearer" else _WRONG


def _certified_name(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The name in the client's certificate: a URI, else a DNS name, else the common name (RFC 9525 puts them so)."""
    properties = context.auth_context()
    for name in ("peer_uri", "peer_dns", "x509_common_name"):
        for value in properties.get(name, ()):
            return value.decode(errors="replace")[:_MOST_NAME]
    return ""
