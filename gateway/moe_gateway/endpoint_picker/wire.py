"""The messages of Envoy's external processing, as far as the endpoint picker reads and writes them.

Names and numbers of fields are those of `envoy.service.ext_proc.v3`, `envoy.config.core.v3` and `envoy.type.v3` in
Envoy's API; fields that stand here no more are skipped. Enumerations are plain numbers, which look the same on the
wire. Why no package of Envoy's API is used: ADR 0027.
"""

from typing import Any

from google.protobuf import descriptor_pool, message_factory, struct_pb2
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

SERVICE, METHOD = "envoy.service.ext_proc.v3.ExternalProcessor", "Process"
# `ProcessingMode.BodySendMode`: how a body is sent to the endpoint picker.
NONE, STREAMED, BUFFERED, BUFFERED_PARTIAL, FULL_DUPLEX = range(5)
# `HeaderValueOption.HeaderAppendAction`.
OVERWRITE_IF_EXISTS_OR_ADD = 2

# A message is a mapping of its fields to number and type: `[]` before the type repeats it, `{}` maps texts to it, and
# what stands before a bar is the group of fields of which a message has one.
_PACKAGE = "moeserving.ext_proc"
_STRUCT = "google.protobuf.Struct"
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "HeaderValue": {"key": (1, "string"), "value": (2, "string"), "raw_value": (3, "bytes")},
    "HeaderMap": {"headers": (1, "[]HeaderValue")},
    "HeaderValueOption": {"header": (1, "HeaderValue"), "append_action": (3, "int32")},
    "HeaderMutation": {"set_headers": (1, "[]HeaderValueOption"), "remove_headers": (2, "[]string")},
    "Metadata": {"filter_metadata": (1, "{}" + _STRUCT)},
    "HttpStatus": {"code": (1, "int32")},
    "HttpHeaders": {"headers": (1, "HeaderMap"), "end_of_stream": (3, "bool")},
    "HttpBody": {"body": (1, "bytes"), "end_of_stream": (2, "bool")},
    "HttpTrailers": {"trailers": (1, "HeaderMap")},
    "ProtocolConfiguration": {"request_body_mode": (1, "int32"), "response_body_mode": (2, "int32")},
    "ProcessingRequest": {
        "request_headers": (2, "request|HttpHeaders"),
        "response_headers": (3, "request|HttpHeaders"),
        "request_body": (4, "request|HttpBody"),
        "response_body": (5, "request|HttpBody"),
        "request_trailers": (6, "request|HttpTrailers"),
        "response_trailers": (7, "request|HttpTrailers"),
        "metadata_context": (8, "Metadata"),
        "attributes": (9, "{}" + _STRUCT),
        "protocol_config": (11, "ProtocolConfiguration"),
    },
    "StreamedBodyResponse": {"body": (1, "bytes"), "end_of_stream": (2, "bool")},
    "BodyMutation": {"body": (1, "mutation|bytes"), "streamed_response": (3, "mutation|StreamedBodyResponse")},
    "CommonResponse": {"header_mutation": (2, "HeaderMutation"), "body_mutation": (3, "BodyMutation")},
    "HeadersResponse": {"response": (1, "CommonResponse")},
    "BodyResponse": {"response": (1, "CommonResponse")},
    "TrailersResponse": {"header_mutation": (1, "HeaderMutation")},
    "ImmediateResponse": {
        "status": (1, "HttpStatus"),
        "headers": (2, "HeaderMutation"),
        "body": (3, "bytes"),
        "details": (5, "string"),
    },
    "ProcessingResponse": {
        "request_headers": (1, "response|HeadersResponse"),
        "response_headers": (2, "response|HeadersResponse"),
        "request_body": (3, "response|BodyResponse"),
        "response_body": (4, "response|BodyResponse"),
        "request_trailers": (5, "response|TrailersResponse"),
        "response_trailers": (6, "response|TrailersResponse"),
        "immediate_response": (7, "response|ImmediateResponse"),
        "dynamic_metadata": (8, _STRUCT),
    },
}
_SCALARS = {
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "bytes": FieldDescriptorProto.TYPE_BYTES,
    "int32": FieldDescriptorProto.TYPE_INT32,
    "string": FieldDescriptorProto.TYPE_STRING,
}


def _describe(name: str, fields: dict[str, tuple[int, str]]) -> DescriptorProto:
    message = DescriptorProto(name=name)
    for field, (number, form) in fields.items():
        group, _, kind = form.rpartition("|")
        if kind.startswith("{}"):
            entry = "".join(part.title() for part in field.split("_")) + "Entry"
            pair = _describe(entry, {"key": (1, "string"), "value": (2, kind.removeprefix("{}"))})
            pair.options.map_entry = True
            message.nested_type.append(pair)
            kind = f"[]{name}.{entry}"
        row = message.field.add(name=field, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL)
        if kind.startswith("[]"):
            row.label, kind = FieldDescriptorProto.LABEL_REPEATED, kind.removeprefix("[]")
        if group:
            if not message.oneof_decl:
                message.oneof_decl.add(name=group)
            row.oneof_index = 0
        if kind in _SCALARS:
            row.type = _SCALARS[kind]
        else:
            row.type = FieldDescriptorProto.TYPE_MESSAGE
            row.type_name = f".{kind}" if "google" in kind else f".{_PACKAGE}.{kind}"
    return message


def _make_classes() -> dict[str, Any]:
    file = FileDescriptorProto(name="moeserving/ext_proc.proto", package=_PACKAGE, syntax="proto3")
    file.dependency.append(struct_pb2.DESCRIPTOR.name)
    file.message_type.extend(_describe(name, fields) for name, fields in _MESSAGES.items())
    pool = descriptor_pool.Default()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


# Classes that are made at run time have no static type.
Message = Any
_CLASSES = _make_classes()
BodyMutation: Any = _CLASSES["BodyMutation"]
BodyResponse: Any = _CLASSES["BodyResponse"]
CommonResponse: Any = _CLASSES["CommonResponse"]
HeaderMap: Any = _CLASSES["HeaderMap"]
HeaderMutation: Any = _CLASSES["HeaderMutation"]
HeaderValue: Any = _CLASSES["HeaderValue"]
HeaderValueOption: Any = _CLASSES["HeaderValueOption"]
HeadersResponse: Any = _CLASSES["HeadersResponse"]
HttpBody: Any = _CLASSES["HttpBody"]
HttpHeaders: Any = _CLASSES["HttpHeaders"]
HttpStatus: Any = _CLASSES["HttpStatus"]
HttpTrailers: Any = _CLASSES["HttpTrailers"]
ImmediateResponse: Any = _CLASSES["ImmediateResponse"]
Metadata: Any = _CLASSES["Metadata"]
ProcessingRequest: Any = _CLASSES["ProcessingRequest"]
ProcessingResponse: Any = _CLASSES["ProcessingResponse"]
ProtocolConfiguration: Any = _CLASSES["ProtocolConfiguration"]
StreamedBodyResponse: Any = _CLASSES["StreamedBodyResponse"]
TrailersResponse: Any = _CLASSES["TrailersResponse"]
