"""The events of the clinic in a terminal: one line for each."""

from contextlib import aclosing
from typing import Any

from rich.console import Console
from rich.text import Text

from clinic.frontdesk.v1 import event_pb2
from frontdesk.client import FrontdeskClient

_PREFIX = "clinic.frontdesk.v1."


async def tail(client: FrontdeskClient, console: Console, **wanted: Any) -> None:
    """Print events until cancelled; `wanted` as in `FrontdeskClient.watch_events`, types also without their prefix.

    Raises FrontdeskError.
    """
    wanted["types"] = [one if one.startswith(_PREFIX) else _PREFIX + one for one in wanted["types"]]
    plain = not console.is_terminal or console.is_dumb_terminal
    async with aclosing(client.watch_events(**wanted)) as events:
        async for event in events:
            said = line(event)
            if plain:
                print(said, file=console.file, flush=True)
            else:
                shown = Text(said)
                shown.highlight_words([_short(event)], "bold cyan")
                console.print(shown, soft_wrap=True)


def line(event: event_pb2.Event) -> str:
    """The event as one line of text: when, what, of what, by whom, and more."""
    time = event.time.ToDatetime().isoformat(timespec="milliseconds") + "Z"
    more = " ".join(f"{name}={text}" for name, text in sorted(event.data.items()))
    revision = f" revision={event.revision}" if event.revision else ""
    return f"{time} {_short(event)} {event.resource} by {event.actor}{revision}{' ' * bool(more)}{more}"


def _short(event: event_pb2.Event) -> str:
    return event.type.removeprefix(_PREFIX)
