"""One client's connection to a SuperLink: Flower's Fleet API over one kept-alive HTTPS connection.

This file and superlink.py hold all contact with Flower's internal API. Flower's own wrapper around these calls
(`http_request_response`) ends the process when it cannot connect and sends itself SIGINT when it is refused, so the
client below it is used directly.
"""

import secrets
from collections.abc import Callable
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from kilotune.engine.flower.certificates import load_private
from kilotune.engine.flower.keys import JoinFile, is_loopback, key_id
from kilotune.engine.flower.limits import Limits
from kilotune.engine.flower.tls import client_context

TIMEOUT = httpx.Timeout(60.0, connect=30.0)  # a poll is held for 15 s; a handshake over 5 kbit/s may take 10 s
SPARE_HEADERS = ("user-agent", "accept", "accept-encoding", "connection")
T = TypeVar("T")


class AwayError(Exception):
    """The server cannot be reached, or broke off; it may come back."""


class RefusedError(Exception):
    """This client or this server is not the right one; trying again does not help."""


class ForgottenError(Exception):
    """The server does not know this session any more: it was restarted. Join again."""


class FleetLink:
    """Joins, polls and answers. Raises AwayError, RefusedError and ForgottenError only."""

    def __init__(self, join: JoinFile, limits: Limits) -> None:
        key = load_private(join.key)
        self._join = join
        self._public = public_key_to_bytes(key.public_key())
        self._node = Node()
        scheme = "http" if join.ca is None else "https"
        signer = NodeAuthHttpInterceptor(key, key.public_key())
        lean = _Lean(key_id(self._public))
        self._client = FleetHttpClient(f"{scheme}://{join.server}", interceptors=[signer, lean])
        self._client._client.close()
        self._client._client = httpx.Client(
            verify=client_context(join),
            timeout=TIMEOUT,
            trust_env=not is_loopback(join.server.rsplit(":", 1)[0]),
            limits=httpx.Limits(keepalive_expiry=None),  # a client may train for long between two requests
            event_hooks={"response": [lambda response: _bounded(response, limits.pull())]},
        )

    def activate(self) -> None:
        """Join, or join again."""
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        try:
            self._node = Node(node_id=self._call(lambda: self._client.ActivateNode(request)).node_id)
        except ForgottenError:
            raise RefusedError(
                f"server {self._join.server} did not accept the signature of {self._join.client!r}. "
                "Check that the clocks of both machines agree within 5 minutes."
            ) from None

    def heartbeat(self) -> None:
        """Say that this client still works on its answer."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        self._call(lambda: self._client.SendNodeHeartbeat(request))

    def pull(self) -> Message | None:
        """The next message, or None after the server has held the poll in vain."""
        response = self._call(lambda: self._client.PullMessages(PullMessagesRequest(node=self._node)))
        try:
            return message_from_proto(response.messages_list[0]) if response.messages_list else None
        except Exception as error:  # Flower's own reading of foreign bytes raises what it meets
            raise AwayError(f"it sent what is no message ({type(error).__name__})") from None

    def push(self, reply: Message) -> None:
        """Send a reply; pushing one twice is harmless."""
        if not reply.metadata.message_id:
            reply.metadata.__dict__["_message_id"] = secrets.token_hex(8)
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(reply)],
            message_object_trees=[ObjectTree(object_id=reply.metadata.reply_to_message_id)],  # nothing to fetch
        )
        self._call(lambda: self._client.PushMessages(request))

    def leave(self) -> None:
        """Tell the server, if it can be told, and close."""
        try:
            self._client._client.timeout = httpx.Timeout(2.0)
            if self._node.node_id:
                self._call(lambda: self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id)))
        except (AwayError, RefusedError, ForgottenError):
            return  # it finds out by the closed connection
        finally:
            self._client.close()

    def _call(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status == httpx.codes.FORBIDDEN:
                raise RefusedError(
                    f"server {self._join.server} does not know the key of {self._join.client!r}. "
                    "Ask its owner for a new join file."
                ) from None
            if status == httpx.codes.UNAUTHORIZED:
                raise ForgottenError from None
            if status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
                raise RefusedError(
                    f"server {self._join.server} refuses the answer of {self._join.client!r} as larger than its recipe "
                    "needs. Use the same recipe on both ends."
                ) from None
            raise AwayError(f"it answered with HTTP status {status}") from None
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise RefusedError(
                    f"server {self._join.server} has a certificate that the join file of {self._join.client!r} does "
                    "not trust. Check the address, or ask the server's owner for a new join file."
                ) from None
            raise AwayError(str(error)) from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise AwayError(str(error) or type(error).__name__) from None


class _Lean:
    """Leaves out headers Flower's server does not read and shortens the public key, which our server knows."""

    def __init__(self, short: str) -> None:
        self._short = short

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        for name in SPARE_HEADERS:
            context.request.headers.pop(name, None)
        context.request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = self._short
        return call_next(context)


def _bounded(response: httpx.Response, limit: int) -> None:
    """Before the body is read: its size has to be said, in range, and of the body as it is."""
    size = response.headers.get("content-length", "")
    plain = not {"content-encoding", "transfer-encoding"} & set(response.headers)
    if not plain or not (size.isascii() and size.isdigit() and len(size) < 12 and int(size) <= limit):
        response.close()
        raise RefusedError(
            f"the server sent a message of {size[:12] or 'unknown'} bytes, the recipe needs {limit:,} at most. "
            "Use the same recipe on both ends."
        )
