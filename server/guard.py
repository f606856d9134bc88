"""Guard: stands before every call. Who is it, may it do this, and has it not enough streams open already?

    call ──► token or certificate ──► scope ──► streams of this device, of all ──► service
               UNAUTHENTICATED     PERMISSION_DENIED     RESOURCE_EXHAUSTED

Nothing of a call is read before it has passed. Health checks pass without a token: load balancers have none.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import grpc
import prometheus_client
import structlog
from structlog.contextvars import bound_contextvars

from .auth import Scope, Token, TokenFile
from .metrics import Metrics

log = structlog.get_logger(__name__)

OPEN = ("/grpc.health.v1.Health/",)
"""Methods that need no token."""

UNKNOWN = "the token is unknown or expired; `headrace token add` makes one"

REFRESH_S = 1.0
"""How often a file of tokens is looked at."""

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Behaviour: TypeAlias = Callable[[Any, Context], Any]
if TYPE_CHECKING:
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]  # generic to the stubs only
else:
    _Interceptor = grpc.aio.ServerInterceptor


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes:
        key: what its streams are counted by: its token, its certificate, or its connection.
        name: for logs: of the token or the certificate; "" for strangers.
        token: its line, if it has one.
    """

    key: str
    name: str = ""
    token: Token | None = None


caller: ContextVar[Caller | None] = ContextVar("caller", default=None)
"""Who made the call that is being answered."""


class RefusedCallError(Exception):
    """A call is not let in."""

    def __init__(self, code: grpc.StatusCode, reason: str, text: str) -> None:
        """`code` and `text` go to the caller, `reason` labels the metric."""
        super().__init__(text)
        self.code, self.reason = code, reason


class Streams:
    """Counts open streams, by caller."""

    def __init__(self, most: int) -> None:
        """At most so many of one caller."""
        self.most = most
        self._by_caller: Counter[str] = Counter()

    @contextmanager
    def one_more(self, key: str) -> Iterator[None]:
        """Hold a place while a stream is open.

        Raises:
            RefusedCallError: there is none.
        """
        if self._by_caller[key] >= self.most:
            raise RefusedCallError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "streams_of_device",
                f"this device has {self.most} streams open, which is its limit (max_streams_per_device)",
            )
        self._by_caller[key] += 1
        try:
            yield
        finally:
            self._by_caller[key] -= 1
            if not self._by_caller[key]:
                del self._by_caller[key]  # callers come and go; what is left of them must not pile up


class Guard(_Interceptor):
    """Lets calls in, or ends them with their status."""

    def __init__(
        self, tokens: TokenFile | None, scope: Scope, streams: Streams, refused: prometheus_client.Counter
    ) -> None:
        """Nobody is let in yet.

        Args:
            tokens: which are let in; None for everybody who can connect.
            scope: that a token must have.
            streams: how many may be open.
            refused: counts refused calls, by reason.
        """
        self._tokens, self._scope, self._streams, self._refused = tokens, scope, streams, refused
        self._open: dict[asyncio.Task[Any], Token] = {}
        self._revoked: set[asyncio.Task[Any]] = set()

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """The method's handler, behind this guard; None where there is no such method, as gRPC then says."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        anyone = handler_call_details.method.startswith(OPEN)
        return self._behind(handler, anyone)

    async def watch(self) -> None:
        """Read tokens again when they change, and end the streams of those that are gone or expired. Runs until
        cancelled."""
        tokens = self._tokens
        while tokens is not None:
            await asyncio.sleep(REFRESH_S)
            await asyncio.to_thread(tokens.refresh)
            for task in [t for t, token in self._open.items() if not tokens.valid(token)]:
                if task not in self._revoked:
                    self._revoked.add(task)
                    task.cancel()

    def _behind(self, handler: Any, anyone: bool) -> grpc.RpcMethodHandler[Any, Any]:
        kinds = ("unary", "stream")
        name = f"{kinds[handler.request_streaming]}_{kinds[handler.response_streaming]}"
        inner: Behaviour = getattr(handler, name)
        streams = self._streams if handler.response_streaming else None
        guarded = self._generator if inspect.isasyncgenfunction(inner) else self._coroutine
        make: Any = getattr(grpc, f"{name}_rpc_method_handler")
        made: grpc.RpcMethodHandler[Any, Any] = make(
            guarded(inner, anyone, streams), handler.request_deserializer, handler.response_serializer
        )
        return made

    def _coroutine(self, inner: Behaviour, anyone: bool, streams: Streams | None) -> Behaviour:
        async def run(request: Any, context: Context) -> Any:
            try:
                with self._let_in(context, anyone, streams):
                    return await inner(request, context)
            except (RefusedCallError, asyncio.CancelledError) as error:
                await self._end(context, error)

        return run

    def _generator(self, inner: Behaviour, anyone: bool, streams: Streams | None) -> Behaviour:
        async def run(request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                with self._let_in(context, anyone, streams):
                    async for response in inner(request, context):
                        yield response
            except (RefusedCallError, asyncio.CancelledError) as error:
                await self._end(context, error)

        return run

    @contextmanager
    def _let_in(self, context: Context, anyone: bool, streams: Streams | None) -> Iterator[None]:
        who = self._who(context, anyone)
        task = asyncio.current_task()
        setting = caller.set(who)
        if who.token is not None and streams is not None and task is not None:
            self._open[task] = who.token
        try:
            with bound_contextvars(**({"token": who.name} if who.token else {})):
                if streams is None:
                    yield
                else:
                    with streams.one_more(who.key):
                        yield
        finally:
            caller.reset(setting)
            if task is not None:
                self._open.pop(task, None)

    def _who(self, context: Context, anyone: bool) -> Caller:
        peer = Caller(f"connection {context.peer()}")
        certified = context.auth_context()
        names: Any = certified.get("x509_common_name") or certified.get("x509_subject_alternative_name") or []
        if names:
            name = bytes(names[0]).decode(errors="replace")[:64]
            peer = Caller(f"certificate {name}", name)
        if self._tokens is None or anyone:
            return peer
        shown = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        if len(shown) != 1:
            raise RefusedCallError(
                grpc.StatusCode.UNAUTHENTICATED, "no_token", "a token is needed; give the device one with --token-file"
            )
        kind, _, secret = str(shown[0]).partition(" ")
        token = self._tokens.check(secret.strip()) if kind.lower() == "bearer" else None
        if token is None:
            raise RefusedCallError(grpc.StatusCode.UNAUTHENTICATED, "wrong_token", UNKNOWN)
        if token.scope is not self._scope:
            raise RefusedCallError(
                grpc.StatusCode.PERMISSION_DENIED, "scope", f"a token of the scope {token.scope} does not open this"
            )
        return Caller(f"token {token.id}", token.name, token)

    async def _end(self, context: Context, error: BaseException) -> NoReturn:
        if isinstance(error, RefusedCallError):
            self._refused.labels(error.reason).inc()
            log.debug("a call was refused", reason=error.reason, peer=context.peer())
            await context.abort(error.code, str(error))
        task = asyncio.current_task()
        if task not in self._revoked:
            raise error
        self._revoked.discard(task)
        task.uncancel()
        self._refused.labels("revoked").inc()
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token was taken back or has expired")
        raise AssertionError("abort returned")


def refused_calls(metrics: Metrics) -> prometheus_client.Counter:
    """The counter of refused calls, in the server's registry."""
    counter = prometheus_client.Counter(
        "headrace_server_refused_calls", "Calls that were not let in, by reason.", ["reason"], registry=metrics.registry
    )
    for reason in ("no_token", "wrong_token", "scope", "streams_of_device", "revoked"):
        counter.labels(reason)
    return counter
