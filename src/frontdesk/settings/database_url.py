"""Check how a database is named before libpq uses it: no message about it may show a part of the password."""

import re

from psycopg import ProgrammingError, pq
from psycopg.conninfo import conninfo_to_dict

_SCHEME = re.compile(r"postgres(?:ql)?://")
_HOST = re.compile(r"[\w.:%-]*|[/@].*")
"""A name, an address, or the directory of a Unix socket."""
_KEYWORDS = {option.keyword.decode() for option in pq.Conninfo.get_defaults()} | {"ssl"}


def check_database_url(text: str) -> None:
    """Raise ValueError unless libpq reads the text as its author meant it.

    An @ or / that is not percent-encoded moves the end of a password into the host, the port or the database, which
    error messages quote.
    """
    try:
        parts = conninfo_to_dict(text)
    except ProgrammingError:
        # The message of libpq may quote the password.
        raise ValueError("is not a PostgreSQL URL or key=value string") from None
    scheme = _SCHEME.match(text)
    if scheme is not None:
        user_and_password, at, _ = _without_query(text[scheme.end() :]).rpartition("@")
        if at and re.search("[@/]", user_and_password):
            raise ValueError("has a user name or password that is not percent-encoded: @ is %40, / is %2F")
    if not all(_HOST.fullmatch(host) for host in str(parts.get("host") or "").split(",")):
        raise ValueError("has a host that is not a name, an address or the directory of a socket")
    if not all(re.fullmatch("[0-9]{0,5}", port) for port in str(parts.get("port") or "").split(",")):
        raise ValueError("has a port that is not a number")


def _without_query(rest: str) -> str:
    """What follows the scheme, up to the ? of the options; a ? in a password is not one."""
    for mark in re.finditer(r"\?", rest):
        options = rest[mark.end() :].split("&")
        if all(option.partition("=")[0] in _KEYWORDS for option in options):
            return rest[: mark.start()]
    return rest
