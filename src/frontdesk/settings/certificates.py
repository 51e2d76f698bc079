"""Check files of certificates and keys before gRPC reads them: it says of none of them what is wrong."""

import ssl
from pathlib import Path


def read(path: Path) -> bytes:
    """The file's content. Raises ValueError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def check_certificates(path: Path) -> None:
    """Raise ValueError unless the file has certificates in PEM form."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=read(path).decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError):
        raise ValueError(f"{path}: has no certificate in PEM form") from None


def check_pair(certificate: Path, key: Path) -> None:
    """Raise ValueError unless the key is in PEM form, without a password, and that of the certificate."""
    read(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # How strong a key must be is up to the two sides that use it.
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    asked: list[bool] = []

    def password() -> bytes:
        # Without this OpenSSL would ask on the terminal.
        asked.append(True)
        return b""

    try:
        context.load_cert_chain(certificate, key, password)
    except ssl.SSLError as error:
        if asked:
            raise ValueError(f"{key}: has a password") from None
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"{key}: is not the key of {certificate}") from None
        raise ValueError(f"{key}: has no private key in PEM form") from None
