"""Events as CloudEvents 1.0 in structured mode, for message brokers: in the JSON or the protobuf form."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from clinic.frontdesk.v1 import event_pb2
from frontdesk.core.event import Event
from frontdesk.rpc.services.event import to_event

SOURCE = "/frontdesk"
CONTENT_TYPES: Mapping[str, str] = {
    "json": "application/cloudevents+json; charset=utf-8",
    "protobuf": "application/cloudevents+protobuf",
}
"""By form: what a message with the header `content-type` of this value has."""


def as_json(event: Event) -> tuple[str, bytes]:
    """The type, and the CloudEvent in JSON; its data is the message Event in protobuf's JSON form."""
    message = to_event(event)
    data = MessageToDict(message)
    envelope = {
        "specversion": "1.0",
        "id": message.id,
        "source": SOURCE,
        "type": message.type,
        "subject": message.resource,
        "time": data["time"],
        "datacontenttype": "application/json",
        "data": data,
    }
    return message.type, json.dumps(envelope, ensure_ascii=False, separators=(",", ":")).encode()


def as_protobuf(event: Event) -> tuple[str, bytes]:
    """The type, and the CloudEvent as `io.cloudevents.v1.CloudEvent`; its data is the message Event."""
    message = to_event(event)
    envelope = CloudEvent(id=message.id, source=SOURCE, spec_version="1.0", type=message.type)
    envelope.attributes["subject"].ce_string = message.resource
    envelope.attributes["time"].ce_timestamp.MergeFromString(message.time.SerializeToString())
    envelope.attributes["datacontenttype"].ce_string = "application/protobuf"
    envelope.proto_data.type_url = f"type.googleapis.com/{event_pb2.Event.DESCRIPTOR.full_name}"
    envelope.proto_data.value = message.SerializeToString()
    return message.type, envelope.SerializeToString()


ENCODERS: Mapping[str, Callable[[Event], tuple[str, bytes]]] = {"json": as_json, "protobuf": as_protobuf}
"""By form."""


def _cloud_event() -> type[Message | Any]:
    """The message of the specification's protobuf form, as far as we write it.

    Generated code would lie in a package `io`, which is Python's.
    """
    file = descriptor_pb2.FileDescriptorProto(
        name="cloudevents.proto",
        package="io.cloudevents.v1",
        syntax="proto3",
        dependency=["google/protobuf/any.proto", "google/protobuf/timestamp.proto"],
    )
    kinds = descriptor_pb2.FieldDescriptorProto
    event = file.message_type.add(name="CloudEvent")
    for number, name in enumerate(("id", "source", "spec_version", "type"), 1):
        event.field.add(name=name, number=number, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    event.field.add(
        name="attributes",
        number=5,
        type=kinds.TYPE_MESSAGE,
        label=kinds.LABEL_REPEATED,
        type_name=".io.cloudevents.v1.CloudEvent.AttributesEntry",
    )
    event.field.add(
        name="proto_data",
        number=8,
        type=kinds.TYPE_MESSAGE,
        label=kinds.LABEL_OPTIONAL,
        type_name=".google.protobuf.Any",
        oneof_index=0,
    )
    event.oneof_decl.add(name="data")
    entry = event.nested_type.add(name="AttributesEntry")
    entry.options.map_entry = True
    value = event.nested_type.add(name="CloudEventAttributeValue")
    value.oneof_decl.add(name="attr")
    value.field.add(name="ce_string", number=3, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL, oneof_index=0)
    value.field.add(
        name="ce_timestamp",
        number=7,
        type=kinds.TYPE_MESSAGE,
        label=kinds.LABEL_OPTIONAL,
        type_name=".google.protobuf.Timestamp",
        oneof_index=0,
    )
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    entry.field.add(
        name="value",
        number=2,
        type=kinds.TYPE_MESSAGE,
        label=kinds.LABEL_OPTIONAL,
        type_name=".io.cloudevents.v1.CloudEvent.CloudEventAttributeValue",
    )
    # A pool of our own: another package of the process may have the whole file.
    pool = descriptor_pool.DescriptorPool()
    for known in (any_pb2, timestamp_pb2):
        pool.AddSerializedFile(known.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("io.cloudevents.v1.CloudEvent"))


CloudEvent: Any = _cloud_event()
