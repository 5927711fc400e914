"""Protobuf over HTTP (spec/server.md 1.1)."""

import json
from typing import Any, TypeVar

from google.protobuf.json_format import MessageToDict, Parse, ParseError
from google.protobuf.message import DecodeError, Message
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fedcompute.errors import FedComputeError, OperationFailed, Reason, RequestRejected
from fedcompute.server.security.limits import read_body

MEDIA_TYPE = "application/x-protobuf"
JSON = "application/json"
_NAMES = (MEDIA_TYPE, "application/protobuf")
_UNREAD = (Reason.REQUEST_TOO_LARGE, Reason.REQUEST_TOO_SLOW, Reason.SERVER_STOPPING)

M = TypeVar("M", bound=Message)


class ProtoResponse(Response):
    """A message as the body; an empty message is `Content-Length: 0`, which devices accept."""

    media_type = MEDIA_TYPE

    def __init__(self, message: Message, status: int = 200) -> None:
        super().__init__(message.SerializeToString(), status_code=status)


async def read_proto(request: Request, message_type: type[M], *, limit: int) -> M:
    """Returns the body as a message.

    Raises RequestRejected: UNSUPPORTED_MEDIA_TYPE, REQUEST_TOO_LARGE, or MALFORMED_REQUEST for an empty or
    undecodable body.
    """
    content_type = _content_type(request)
    if content_type not in _NAMES:
        raise RequestRejected(Reason.UNSUPPORTED_MEDIA_TYPE, f"content-type {content_type[:80]!r}")
    body = await read_body(request, limit)
    if not body:
        raise RequestRejected(Reason.MALFORMED_REQUEST, "the body is empty")
    message = message_type()
    try:
        message.ParseFromString(body)
    except DecodeError as cause:
        name = message_type.DESCRIPTOR.name
        raise RequestRejected(Reason.MALFORMED_REQUEST, f"{len(body)} bytes are not a {name}") from cause
    return message


async def read_message(request: Request, message_type: type[M], *, limit: int) -> M:
    """As `read_proto`, and with `application/json` as content type the message's JSON form."""
    if _content_type(request) != JSON:
        return await read_proto(request, message_type, limit=limit)
    body = await read_body(request, limit)
    try:
        return Parse(body, message_type())
    except (ParseError, UnicodeDecodeError, RecursionError) as cause:
        name = message_type.DESCRIPTOR.name
        raise RequestRejected(Reason.MALFORMED_REQUEST, f"{len(body)} bytes are not the JSON of a {name}") from cause


async def read_document(request: Request, *, limit: int) -> dict[str, Any]:
    """The body as a JSON object, `{}` for no body; raises RequestRejected: REQUEST_TOO_LARGE, MALFORMED_REQUEST."""
    body = await read_body(request, limit)
    try:
        document = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise RequestRejected(Reason.MALFORMED_REQUEST, "the body is no JSON object", remedy="send a JSON object")
    return document


def asks_for(request: Request, *media_types: str) -> bool:
    """Whether the Accept header names one of the media types."""
    accepted = {one.partition(";")[0].strip().lower() for one in request.headers.get("accept", "").split(",")}
    return not accepted.isdisjoint(media_types)


def message_response(request: Request, message: Message, status: int = 200) -> Response:
    """The message as protobuf, or as its JSON form where the caller accepts JSON and not protobuf."""
    if asks_for(request, JSON) and not asks_for(request, *_NAMES):
        return JSONResponse(MessageToDict(message, preserving_proto_field_name=True), status_code=status)
    return ProtoResponse(message, status)


def asks_for_protobuf(request: Request) -> bool:
    """Whether the caller wants messages where JSON is the rule."""
    return asks_for(request, *_NAMES)


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def for_strangers(error: FedComputeError, request_id: str) -> FedComputeError:
    """What a caller without a name hears of an error: of a failure inside neither hosts, users nor paths."""
    if error.status < 500:
        return error
    return OperationFailed(error.reason, f"the server's log tells what failed; request id {request_id}")


def error_response(error: FedComputeError) -> Response:
    """The JSON answer for a typed error: code, message, remedy."""
    document = {"code": error.reason.value, "message": error.detail, "remedy": error.remedy}
    # The rest of a refused body is never read, so the connection cannot serve another request.
    headers = {"connection": "close"} if error.reason in _UNREAD else None
    return JSONResponse(document, status_code=error.status, headers=headers)
