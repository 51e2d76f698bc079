"""The channel WEBHOOK: one request for each notification, signed as Standard Webhooks says.

Who joins an SMS or WhatsApp gateway receives it, and forwards the text to the phone.
"""

import base64
import hashlib
import hmac
import json
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC

import httpx

from frontdesk.channels.texts import Wording, language_of
from frontdesk.core.notification import WEBHOOK, Outgoing, Unsent

_SECONDS = 10.0
_MOST_ANSWER = 64 * 1024
"""Bytes of an answer that are read, so that its connection can be used again."""

_OF_MESSAGE = (400, 413, 415, 422)
"""Answers that are about this one request: the next one may be taken."""


class Webhook:
    """Posts notifications to the operator's URL."""

    name = WEBHOOK

    def __init__(self, url: str, secrets: Sequence[bytes], wording: Wording) -> None:
        """A request is signed with every secret, so that a receiver can change from one to the next."""
        self._url = url
        self._secrets = secrets
        self._wording = wording
        self._client = httpx.AsyncClient(
            timeout=_SECONDS, follow_redirects=False, trust_env=False, verify=ssl.create_default_context()
        )

    async def send(self, one: Outgoing, code: str) -> None:
        """Raises Unsent unless the receiver has answered 2xx."""
        body = json.dumps(self._body(one), ensure_ascii=False, separators=(",", ":")).encode()
        seconds = int(time.time())
        headers = {
            "content-type": "application/json",
            "user-agent": "frontdesk",
            "webhook-id": one.id,
            "webhook-timestamp": str(seconds),
            "webhook-signature": signature(self._secrets, one.id, seconds, body),
        }
        try:
            async with self._client.stream("POST", self._url, content=body, headers=headers) as answer:
                status = answer.status_code
                # What comes after the status changes nothing.
                with suppress(httpx.HTTPError):
                    await _read(answer)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise Unsent("CONNECTION_FAILED", away=True) from error
        except httpx.TimeoutException as error:
            raise Unsent("TIMEOUT", away=True, perhaps=True) from error
        except httpx.HTTPError as error:
            raise Unsent("CONNECTION_LOST", away=True, perhaps=True) from error
        if not 200 <= status < 300:
            raise Unsent(f"HTTP_{status}", for_good=status == 410, away=status not in (*_OF_MESSAGE, 410))

    def _body(self, one: Outgoing) -> object:
        instant = one.plan_time.astimezone(UTC).isoformat().replace("+00:00", "Z")
        return {
            "type": f"notification.{one.kind.lower()}",
            "timestamp": instant,
            "data": {
                "notification": {
                    "id": one.id,
                    "kind": one.kind,
                    "channel": WEBHOOK,
                    "appointment_id": one.appointment_id,
                    "patient_id": one.patient_id,
                    "plan_time": instant,
                },
                "to": one.to,
                "language": language_of(one),
                "text": self._wording.short(one),
            },
        }

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


async def _read(answer: httpx.Response) -> None:
    read = 0
    async for chunk in answer.aiter_raw():
        read += len(chunk)
        if read > _MOST_ANSWER:
            return


def signature(secrets: Sequence[bytes], webhook_id: str, seconds: int, body: bytes) -> str:
    """The header `webhook-signature` of Standard Webhooks, one signature for each secret."""
    signed = f"{webhook_id}.{seconds}.".encode() + body
    return " ".join(
        f"v1,{base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode()}" for secret in secrets
    )
