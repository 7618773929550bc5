"""Refusals, in the form that OpenAI's clients know."""

from typing import Any


class Refused(Exception):
    """A request that is not answered.

    Args:
        message: One line: what was wanted, what came, what to do.
        status: HTTP status of the answer.
        param: The parameter at fault.
        code: A word for machines.
        headers: HTTP headers of the answer.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def no_model(name: str) -> Refused:
    """The answer to the name of a model that does not exist, or that the key may not know of: so it names no others."""
    said = f"the model {name[:200]!r} does not exist: GET /v1/models lists them"
    return Refused(said, 404, "model", "model_not_found")
