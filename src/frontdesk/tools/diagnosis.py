"""Find out why no frontdesk answers: gRPC says the same of most causes, so this tries a connection of its own."""

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 2.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client begins HTTP/2: with these words and an empty frame of settings."""
_TLS_ALERT, _HTTP2_SETTINGS = 0x15, 0x04


@dataclass(frozen=True, slots=True)
class Tls:
    """How a client speaks TLS."""

    authority: Path
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None
    """The name that the server's certificate must have; by default the host of the address."""


def why(host: str, port: int, path: str, tls: Tls | None) -> str:
    """Why there is no gRPC for this client at HOST:PORT or at the socket `path`; empty if there is, or if unknown."""
    try:
        connection = _connect(host, port, path)
    except socket.gaierror:
        return "the name cannot be resolved"
    except ConnectionRefusedError:
        return "connection refused"
    except TimeoutError:
        return f"no connection within {_SECONDS:.0f} s"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    with connection:
        try:
            return _without_tls(connection, host, port, path) if tls is None else _with_tls(connection, host, tls)
        except TimeoutError:
            return f"it takes connections, and says nothing within {_SECONDS:.0f} s"
        except OSError:
            return "it closes the connection"


def _connect(host: str, port: int, path: str) -> socket.socket:
    if not path:
        return socket.create_connection((host, port), timeout=_SECONDS)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_SECONDS)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def _without_tls(connection: socket.socket, host: str, port: int, path: str) -> str:
    connection.sendall(_PREFACE)
    try:
        answer = connection.recv(1024)
    except ConnectionError:
        answer = b""
    if answer[3:4] == bytes([_HTTP2_SETTINGS]):
        return ""
    if answer[:1] == bytes([_TLS_ALERT]) or (not answer and _speaks_tls(host, port, path)):
        return "it speaks TLS: set FRONTDESK_CLIENT_CA"
    return "it does not speak gRPC" if answer else "it closes the connection"


def _speaks_tls(host: str, port: int, path: str) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with _connect(host, port, path) as again, context.wrap_socket(again):
            return True
    except ssl.SSLError as error:
        # An alert is TLS, too.
        return _is_alert(error)
    except OSError:
        return False


def _with_tls(connection: socket.socket, host: str, tls: Tls) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tls.authority)
    context.set_alpn_protocols(["h2"])
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    try:
        secure = context.wrap_socket(connection, server_hostname=tls.server_name or host or "localhost")
    except ssl.SSLCertVerificationError as error:
        hint = "; set FRONTDESK_CLIENT_SERVER_NAME" if "mismatch" in error.verify_message else ""
        return f"its certificate is not accepted: {error.verify_message.rstrip('.')}{hint}"
    except ssl.SSLError as error:
        return _refused(tls) if _is_alert(error) else "it does not speak TLS: unset FRONTDESK_CLIENT_CA"
    with secure:
        # In TLS 1.3 a client has done its part before the server looks at the client's certificate.
        try:
            secure.sendall(_PREFACE)
            return "" if secure.recv(1024) else _refused(tls)
        except TimeoutError:
            raise
        except OSError:
            return _refused(tls)


def _is_alert(error: ssl.SSLError) -> bool:
    return "ALERT" in (error.reason or "")


def _refused(tls: Tls) -> str:
    if tls.certificate is None:
        return "it ends the TLS handshake: it may want a client certificate, FRONTDESK_CLIENT_CERT"
    return "it ends the TLS handshake: it may not know the authority of FRONTDESK_CLIENT_CERT"
