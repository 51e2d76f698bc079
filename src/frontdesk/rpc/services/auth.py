"""clinic.frontdesk.v1.AuthService."""

from collections.abc import Iterable, Sequence

from google.protobuf.duration_pb2 import Duration

from clinic.frontdesk.v1 import auth_pb2 as pb
from clinic.frontdesk.v1 import policy_pb2
from frontdesk.core.auth import Auth
from frontdesk.core.second_factor import Challenge
from frontdesk.core.user import User
from frontdesk.core.user_session import Session, Sessions
from frontdesk.db.change import Key
from frontdesk.rpc.convert import (
    EVERY_FIELD,
    changes_from,
    converter,
    enum_numbers,
    key_of,
    version_from,
    writable,
)
from frontdesk.rpc.pipeline import Call
from frontdesk.rpc.services.patient import WRITABLE as PATIENT

_NUMBERS = enum_numbers(policy_pb2.Role.DESCRIPTOR)


def roles_from(numbers: Iterable[policy_pb2.Role.ValueType]) -> list[str]:
    """The roles by their names in the core, in the order of the enum."""
    return [policy_pb2.Role.Name(number).removeprefix("ROLE_") for number in sorted(numbers)]


def roles_to(names: Iterable[str]) -> Sequence[int]:
    """The roles as numbers of the wire's enum, in its order."""
    return sorted(_NUMBERS[name] for name in names)


to_user = converter(pb.User, User, roles=lambda user: roles_to(user.roles))

_to_second_factor = converter(pb.SecondFactor, Challenge)

_PROFILE = writable("name", "phone", "address")


def _to_session(session: Session | None) -> pb.Session | None:
    if session is None:
        return None
    return pb.Session(
        access_token=session.access_token,
        expires_in=Duration(seconds=session.seconds),
        refresh_token=session.refresh_token,
        user=to_user(session.user),
    )


def _no_key(call: Call) -> Key:
    return Key(call.caller.identity, call.method, address=call.address, trace_id=call.trace_id)


class AuthServicer:
    """Translates; `Auth` and `Sessions` decide."""

    service = pb.DESCRIPTOR.services_by_name["AuthService"]

    def __init__(self, auth: Auth, sessions: Sessions) -> None:
        self._auth = auth
        self._sessions = sessions

    async def RegisterUser(self, request: pb.RegisterUserRequest, call: Call) -> pb.RegisterUserResponse:
        patient = changes_from(request.patient, EVERY_FIELD, PATIENT)
        change = await self._auth.register(
            call.caller,
            request.email,
            request.password,
            patient,
            request.default_country,
            key=key_of(request, call),
        )
        return pb.RegisterUserResponse(
            user=to_user(change.result.user), session=_to_session(change.result.session), replayed=change.replayed
        )

    async def Login(self, request: pb.LoginRequest, call: Call) -> pb.LoginResponse:
        step = await self._auth.login(request.email, request.password, key=_no_key(call))
        if isinstance(step, Challenge):
            return pb.LoginResponse(second_factor=_to_second_factor(step))
        return pb.LoginResponse(session=_to_session(step))

    async def VerifySecondFactor(
        self, request: pb.VerifySecondFactorRequest, call: Call
    ) -> pb.VerifySecondFactorResponse:
        session = await self._auth.verify_second_factor(request.challenge, request.code, key=_no_key(call))
        return pb.VerifySecondFactorResponse(session=_to_session(session))

    async def RefreshToken(self, request: pb.RefreshTokenRequest, call: Call) -> pb.RefreshTokenResponse:
        session = await self._sessions.refresh(request.refresh_token, key=_no_key(call))
        return pb.RefreshTokenResponse(session=_to_session(session))

    async def Logout(self, request: pb.LogoutRequest, call: Call) -> pb.LogoutResponse:
        replayed = await self._sessions.logout(
            request.refresh_token, everywhere=request.everywhere, key=key_of(request, call)
        )
        return pb.LogoutResponse(replayed=replayed)

    async def GetProfile(self, request: pb.GetProfileRequest, call: Call) -> pb.GetProfileResponse:
        return pb.GetProfileResponse(user=to_user(await self._auth.profile(call.caller, call.method)))

    async def UpdateProfile(self, request: pb.UpdateProfileRequest, call: Call) -> pb.UpdateProfileResponse:
        changes = changes_from(request.user, request.update_mask, _PROFILE)
        change = await self._auth.update_profile(
            call.caller, changes, version_from(request.etag), key=key_of(request, call)
        )
        return pb.UpdateProfileResponse(user=to_user(change.result), replayed=change.replayed)

    async def ChangePassword(self, request: pb.ChangePasswordRequest, call: Call) -> pb.ChangePasswordResponse:
        change = await self._auth.change_password(
            call.caller, request.old_password, request.new_password, key=key_of(request, call)
        )
        return pb.ChangePasswordResponse(session=_to_session(change.result), replayed=change.replayed)

    async def VerifyEmail(self, request: pb.VerifyEmailRequest, call: Call) -> pb.VerifyEmailResponse:
        replayed = await self._auth.verify_email(request.code, key=key_of(request, call))
        return pb.VerifyEmailResponse(replayed=replayed)

    async def RequestPasswordReset(
        self, request: pb.RequestPasswordResetRequest, call: Call
    ) -> pb.RequestPasswordResetResponse:
        replayed = await self._auth.request_password_reset(request.email, key=key_of(request, call))
        return pb.RequestPasswordResetResponse(replayed=replayed)

    async def ResetPassword(self, request: pb.ResetPasswordRequest, call: Call) -> pb.ResetPasswordResponse:
        replayed = await self._auth.reset_password(request.code, request.password, key=key_of(request, call))
        return pb.ResetPasswordResponse(replayed=replayed)

    async def EnrollSecondFactor(
        self, request: pb.EnrollSecondFactorRequest, call: Call
    ) -> pb.EnrollSecondFactorResponse:
        change = await self._auth.enroll_second_factor(call.caller, key=key_of(request, call))
        return pb.EnrollSecondFactorResponse(otpauth_uri=change.result, replayed=change.replayed)

    async def ConfirmSecondFactor(
        self, request: pb.ConfirmSecondFactorRequest, call: Call
    ) -> pb.ConfirmSecondFactorResponse:
        change = await self._auth.confirm_second_factor(call.caller, request.code, key=key_of(request, call))
        return pb.ConfirmSecondFactorResponse(recovery_codes=change.result, replayed=change.replayed)

    async def RemoveSecondFactor(
        self, request: pb.RemoveSecondFactorRequest, call: Call
    ) -> pb.RemoveSecondFactorResponse:
        change = await self._auth.remove_second_factor(
            call.caller, request.password, request.code, key=key_of(request, call)
        )
        return pb.RemoveSecondFactorResponse(replayed=change.replayed)
