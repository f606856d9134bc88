"""`grpc_server_started_total`, `grpc_server_handled_total`: calls by service, method and code, as other servers count.

Labels are bounded: only methods that exist are counted by name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, Counter

_LABELS = ["grpc_type", "grpc_service", "grpc_method"]


class GrpcMetrics(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Counts calls as they begin and end."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Make the counters in a registry."""
        self._started = Counter("grpc_server_started", "Calls begun.", _LABELS, registry=registry)
        self._handled = Counter("grpc_server_handled", "Calls ended.", [*_LABELS, "grpc_code"], registry=registry)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Count the call around its handler; a method that does not exist has none."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = ("client_" if handler.request_streaming else "") + ("server_" if handler.response_streaming else "")
        kind = {"": "unary", "client_server_": "bidi_stream"}.get(kind, kind + "stream")
        service, _, method = str(handler_call_details.method).strip("/").partition("/")
        labels = (kind, service, method)
        # Handlers are async generators or coroutines; which one decides how they are called.
        names = {
            (False, False): "unary_unary",
            (False, True): "unary_stream",
            (True, False): "stream_unary",
            (True, True): "stream_stream",
        }
        name = names[bool(handler.request_streaming), bool(handler.response_streaming)]
        return handler._replace(**{name: self._counted(getattr(handler, name), labels)})

    def _counted(self, behaviour: Any, labels: tuple[str, str, str]) -> Any:
        def ended(context: Any, failed: bool, cancelled: bool) -> None:
            code = context.code()
            if cancelled:
                code = grpc.StatusCode.CANCELLED
            elif not isinstance(code, grpc.StatusCode):
                codes = {c.value[0]: c for c in grpc.StatusCode}
                code = codes.get(code or 0, grpc.StatusCode.UNKNOWN)
            if failed and code is grpc.StatusCode.OK:
                code = grpc.StatusCode.UNKNOWN
            self._handled.labels(*labels, code.name).inc()

        if _yields(behaviour):

            async def stream(request: Any, context: Any) -> Any:
                with _Counting(self._started.labels(*labels), ended, context):
                    async for response in behaviour(request, context):
                        yield response

            return stream

        async def call(request: Any, context: Any) -> Any:
            with _Counting(self._started.labels(*labels), ended, context):
                return await behaviour(request, context)

        return call


class _Counting:
    """Around one call."""

    def __init__(self, started: Counter, ended: Callable[[Any, bool, bool], None], context: Any) -> None:
        self._ended, self._context = ended, context
        started.inc()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        cancelled = kind is not None and not issubclass(kind, Exception)
        self._ended(self._context, kind is not None, cancelled)


def _yields(behaviour: Any) -> bool:
    import inspect

    return inspect.isasyncgenfunction(behaviour)
