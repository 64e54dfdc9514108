"""An API server whose answers to chosen calls are errors, in front of the real one."""

from collections.abc import Callable
from typing import Any

from moe_contract.api_server import ApiError, Kind

Fault = Callable[[str, Kind, dict[str, Any]], ApiError | None]


class FaultyServer:
    """Passes every call on but those for which the fault has an error.

    Args:
        server: the real connection.
        fault: from verb, kind and document (or a name alone) to the error; None lets the call through.
    """

    def __init__(self, server: Any, fault: Fault) -> None:
        self._server, self.fault = server, fault

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._server, name)
        if name not in ("apply", "merge", "create", "replace", "delete", "get"):
            return method

        async def call(kind: Kind, *arguments: Any, **options: Any) -> Any:
            document = arguments[0] if isinstance(arguments[0], dict) else {"metadata": {"name": arguments[-1]}}
            verb = "status" if options.get("subresource") == "status" else name
            error = self.fault(verb, kind, document)
            if error is not None:
                raise error
            return await method(kind, *arguments, **options)

        return call


def fail(verb: str, kind: str, error: ApiError, name: str = "") -> Fault:
    """A fault of one verb and kind, and of objects of one name where it is given."""

    def fault(called: str, of: Kind, document: dict[str, Any]) -> ApiError | None:
        wanted = not name or document["metadata"]["name"] == name
        return error if called == verb and of.name == kind and wanted else None

    return fault


def no_fault(_verb: str, _kind: Kind, _document: dict[str, Any]) -> ApiError | None:
    """Lets every call through."""
    return None
