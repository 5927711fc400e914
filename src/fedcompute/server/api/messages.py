"""Protobuf over HTTP (spec/server.md 1.1)."""

from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fedcompute.errors import FedComputeError, Reason, RequestRejected
from fedcompute.server.security.limits import read_body

MEDIA_TYPE = "application/x-protobuf"
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
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in (MEDIA_TYPE, "application/protobuf"):
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


def error_response(error: FedComputeError) -> Response:
    """The JSON answer for a typed error: code, message, remedy."""
    document = {"code": error.reason.value, "message": error.detail, "remedy": error.remedy}
    # The rest of a refused body is never read, so the connection cannot serve another request.
    headers = {"connection": "close"} if error.reason in _UNREAD else None
    return JSONResponse(document, status_code=error.status, headers=headers)
