"""The verifier over HTTP: JSON in OpenAPI, content in multipart forms, a token, one page.

A client sends contents, never paths, and may be answered ``{"error": {"code", "message"}}``:

====  ======================================================================
400   a request that is no form, or names another host
401   no token, or another one
404   nobody is enrolled under a name
408   a request whose content did not come in time
409   no threshold, or templates of another encoder
413   a request larger than allowed
422   a recording or image that is not fit or cannot be decoded; a form that lacks something
500   a fault of the service; its log has the traceback
503   too many requests at once (``busy``, with ``Retry-After``); the disk or the file of enrolments
      failed (``unavailable``)
====  ======================================================================
"""

# no `from __future__ import annotations`: FastAPI reads those of functions that are made in one
import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from speechbrain_qmargin import __version__
from speechbrain_qmargin.extras import require
from speechbrain_qmargin.files import json_values
from speechbrain_qmargin.verify.people import NotEnrolled, OtherEncoder, StorageFault
from speechbrain_qmargin.verify.readers import Unfit
from speechbrain_qmargin.verify.system import NoThreshold
from speechbrain_qmargin.verify.verifier import Verifier

__all__ = ["make_app", "serve"]

MAX_BYTES = 20_000_000
MAX_FILES = 20
MAX_SECONDS = 60.0
AT_ONCE = 8
_PAGE = {
    "index.html": "text/html",
    "page.js": "text/javascript",
    "recorder.js": "text/javascript",
    "page.css": "text/css",
}
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; media-src blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


@dataclass
class Fault:
    """Why a request was refused."""

    code: str
    message: str


@dataclass
class Refused:
    """Every answer that is not a success."""

    error: Fault


@dataclass
class Enrolled:
    """Who was enrolled, from how many recordings altogether."""

    name: str
    recordings: int
    added: list[dict[str, Any]]


@dataclass
class PersonOut:
    """Somebody who is enrolled."""

    name: str
    recordings: int
    encoder: str
    added: str


@dataclass
class DecisionOut:
    """Accept or reject, with what it rests on."""

    score: float
    llr: float | None
    accept: bool
    threshold: float
    quality: dict[str, Any]
    kind: str
    notes: list[str]


@dataclass
class CandidateOut:
    """Somebody who was found."""

    name: str
    score: float
    llr: float | None
    accept: bool


@dataclass
class FoundOut:
    """Who a recording may be of."""

    candidates: list[CandidateOut]
    name: str | None
    searched: int
    left_out: int
    false_alarm: float
    threshold: float
    quality: dict[str, Any]
    kind: str


@dataclass
class SystemOut:
    """The encoder, its threshold, what that promises, and the scores it was measured on."""

    modality: str
    encoder: str
    kind: str
    threshold: float
    promise: str
    far: float
    far_interval: tuple[float, float] | None
    tar: float
    tar_interval: tuple[float, float] | None
    mark: str
    enrolled_from: int
    histogram: dict[str, Any] | None


class _Guard:
    """Refuse what has no token before its body is read, and let no cache keep an answer."""

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.token = app, token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, credentials = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(credentials.strip(), self.token):
            message = "the token is wanted as `Authorization: Bearer <token>`"
            answer = _refused(401, "unauthorised", message, **{"WWW-Authenticate": "Bearer"})
            await answer(scope, receive, send)
            return

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"cache-control", b"no-store")]
            await send(message)

        await self.app(scope, receive, sent)


class _Limit:
    """Refuse what is too much: requests at once, and a body that is too large or too slow.

    A body is refused while it comes, whatever its header says. Only requests with content count
    among those at once: decoding and embedding it is what takes memory and time.
    """

    def __init__(self, app: Any, max_bytes: int, max_seconds: float, at_once: int) -> None:
        self.app, self.max_bytes = app, max_bytes
        self.max_seconds, self.at_once = max_seconds, at_once
        self.running = 0  # changed by the event loop's thread alone

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or len(said) > 18 or int(said) > self.max_bytes:
            await self._too_large()(scope, receive, send)
        elif scope["method"] != "POST":
            await self._limited(scope, receive, send)
        elif self.running >= self.at_once:
            message = f"{self.running} requests are being answered; ask again in a moment"
            await _refused(503, "busy", message, **{"Retry-After": "1"})(scope, receive, send)
        else:
            self.running += 1
            try:
                await self._limited(scope, receive, send)
            finally:
                self.running -= 1

    async def _limited(self, scope: Any, receive: Any, send: Any) -> None:
        seen, whole = 0, False
        refusal: Any = None
        clock = asyncio.get_running_loop().time
        end = clock() + self.max_seconds

        async def watched() -> Any:
            nonlocal seen, whole, refusal
            if refusal is not None:
                return {"type": "http.disconnect"}
            if whole:  # what comes now is the client's leaving
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - clock()))
            except asyncio.TimeoutError:
                refusal = self._too_slow()
                return {"type": "http.disconnect"}
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > self.max_bytes:
                refusal = self._too_large()
                return {"type": "http.disconnect"}
            return message

        async def sent(message: Any) -> None:
            if refusal is None:  # or it would complain of a body that is cut off
                await send(message)

        try:
            await self.app(scope, watched, sent)
        except Exception:
            if refusal is None:
                raise
        if refusal is not None:
            await refusal(scope, receive, send)

    def _too_large(self) -> Any:
        return _refused(413, "too_large", f"a request has at most {self.max_bytes:,} bytes")

    def _too_slow(self) -> Any:
        message = f"the content has to come within {self.max_seconds:g} s"
        return _refused(408, "too_slow", message, Connection="close")


def _refused(status: int, code: str, message: str, **headers: str) -> Any:
    from starlette.responses import JSONResponse

    content = {"error": {"code": code, "message": message}}
    return JSONResponse(content, status, headers or None)


def make_app(
    verifier: Verifier,
    token: str,
    *,
    max_bytes: int = MAX_BYTES,
    max_seconds: float = MAX_SECONDS,
    at_once: int = AT_ONCE,
    hosts: tuple[str, ...] = LOOPBACK,
) -> Any:
    """The service as an ASGI application.

    Parameters
    ----------
    verifier : Verifier
    token : str
        What clients send as ``Authorization: Bearer <token>``; 16 characters at least.
    max_bytes : int
        Of a request's body.
    max_seconds : float
        In which the body has to come.
    at_once : int
        Requests with content that are answered at once; more are refused with 503.
    hosts : tuple of str
        What a request may name as host; with ``*`` anything. It keeps web pages that a user visits
        from speaking to a service on the user's own machine.

    Raises
    ------
    ImportError
        The extra ``serve`` is not installed.
    ValueError
        A token that is too short, or not of printable ASCII; a limit that is not positive.
    """
    require("fastapi", "python_multipart", why="the service", extra="serve")
    from fastapi import APIRouter, Depends, FastAPI, File, UploadFile
    from fastapi.security import HTTPBearer
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    content = File(description="a file's content; its name is not used")
    contents = File(description="contents; their names are not used")
    if len(token) < 16 or not token.isascii() or not token.isprintable():
        raise ValueError("the token wants 16 characters or more, of printable ASCII")
    if min(max_bytes, max_seconds, at_once) <= 0:
        raise ValueError(
            f"limits must be positive, got {max_bytes} bytes, {max_seconds:g} s, {at_once} at once"
        )

    app = FastAPI(
        title="speechbrain_qmargin",
        description="Enrol people, verify claims, find who somebody is.",
        version=__version__,
        docs_url=None,  # its pages are on a CDN
        redoc_url=None,
    )
    app.add_middleware(_Limit, max_bytes=max_bytes, max_seconds=max_seconds, at_once=at_once)
    app.add_middleware(_Guard, token=token)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    _answer_faults(app)
    _serve_page(app)
    refused: dict[int | str, dict[str, Any]] = {
        status: {"model": Refused} for status in (400, 401, 404, 408, 409, 413, 422, 500, 503)
    }
    described = [Depends(HTTPBearer(auto_error=False))]  # for OpenAPI; the guard has seen to it
    api = APIRouter(prefix="/v1", dependencies=described, responses=refused)

    # ---------------------------------------------------------------- people

    @api.get("/people")
    def list_people() -> list[PersonOut]:
        """Everybody who is enrolled."""
        return [PersonOut(**asdict(one)) for one in verifier.people.list()]

    @api.post("/people/{name}", status_code=201)
    def enrol(
        name: str, files: Annotated[list[UploadFile], contents], replace: bool = False
    ) -> Enrolled:
        """Enrol somebody, or add recordings: all of them or none."""
        if len(files) > MAX_FILES:
            raise ValueError(f"at most {MAX_FILES} files at once")
        count, added = verifier.enrol(name, [_content(one) for one in files], replace)
        return Enrolled(name=name, recordings=count, added=[json_values(one) for one in added])

    @api.get("/people/{name}")
    def export_person(name: str) -> dict[str, Any]:
        """All that is held of a person."""
        return verifier.people.export(name)

    @api.delete("/people/{name}")
    def erase_person(name: str) -> dict[str, Any]:
        """Erase a person from the file."""
        return {"name": name, "recordings": verifier.erase(name)}

    # ---------------------------------------------------------------- decisions

    @api.post("/people/{name}/verify", response_model=DecisionOut)
    def verify(name: str, file: Annotated[UploadFile, content]) -> Any:
        """Whether a recording is of the person."""
        return json_values(verifier.verify(name, _content(file)))

    @api.post("/compare", response_model=DecisionOut)
    def compare(one: Annotated[UploadFile, content], other: Annotated[UploadFile, content]) -> Any:
        """Whether two recordings are of one person; nothing is kept."""
        return json_values(verifier.compare(_content(one), _content(other)))

    @api.post("/identify", response_model=FoundOut)
    def identify(file: Annotated[UploadFile, content], max_candidates: int = 5) -> Any:
        """Who of those enrolled a recording may be of."""
        return json_values(verifier.identify(_content(file), min(max_candidates, 100)))

    @api.get("/system")
    def system() -> SystemOut:
        """The threshold, what it promises, and the histogram of the scores it was measured on."""
        found = verifier.system
        point, histogram = found.point, found.histogram
        return SystemOut(
            modality=verifier.reader.modality,
            encoder=verifier.reader.digest,
            kind=found.kind,
            threshold=point.threshold,
            promise=point.promise(),
            far=point.far,
            far_interval=point.far_interval,
            tar=point.tar,
            tar_interval=point.tar_interval,
            mark=point.mark,
            enrolled_from=point.enrolled_from,
            histogram=None if histogram is None else asdict(histogram),
        )

    app.include_router(api)
    return app


def _answer_faults(app: Any) -> None:
    """What goes wrong as :class:`Refused`."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    @app.exception_handler(HTTPException)
    def _(request: Any, error: HTTPException) -> Any:
        codes = {400: "malformed", 404: "not_found", 405: "not_allowed"}
        code = codes.get(error.status_code, "refused")
        return _refused(error.status_code, code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    def _(request: Any, error: RequestValidationError) -> Any:
        first = error.errors()[0]
        where = ".".join(str(one) for one in first.get("loc", ()))
        return _refused(422, "malformed", f"{where}: {first.get('msg', 'not as described')}")

    @app.exception_handler(ValueError)
    def _(request: Any, error: ValueError) -> Any:
        for kind, status, code in (
            (NotEnrolled, 404, "not_enrolled"),
            (OtherEncoder, 409, "other_encoder"),
            (NoThreshold, 409, "no_threshold"),
            (Unfit, 422, "unfit"),
        ):
            if isinstance(error, kind):
                return _refused(status, code, str(error))
        return _refused(422, "invalid", str(error))

    @app.exception_handler(OSError)
    def _(request: Any, error: OSError) -> Any:
        if isinstance(error, StorageFault):
            logging.getLogger(__name__).error("%s", error)  # its message has the file
            return _refused(503, "unavailable", "the enrolments cannot be read or written")
        if error.errno is not None:  # of the disk
            return _refused(503, "unavailable", error.strerror or "the storage failed")
        return _refused(422, "undecodable", str(error))

    @app.exception_handler(Exception)
    def _(request: Any, error: Exception) -> Any:
        return _refused(500, "internal", "the service failed; its log says how")


def _serve_page(app: Any) -> None:
    """The demonstration page, and whether the service is there; neither wants the token."""
    from fastapi.responses import HTMLResponse

    folder = files("speechbrain_qmargin.verify") / "page"
    page = {name: (folder / name).read_text(encoding="utf-8") for name in _PAGE}

    @app.get("/health", include_in_schema=False)
    def health() -> dict[str, str]:
        return {"status": "ok"}

    def served(name: str, kind: str) -> None:
        headers = {
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }

        def send() -> HTMLResponse:
            return HTMLResponse(page[name], headers=headers, media_type=kind)

        path = "/" if name == "index.html" else f"/{name}"
        app.get(path, include_in_schema=False, response_class=HTMLResponse)(send)

    for name, kind in _PAGE.items():
        served(name, kind)


def _content(upload: Any) -> bytes:
    """What was sent; its name is nobody's business."""
    return upload.file.read()


def read_token(path: str | Path) -> str:
    """The first line of a file that others cannot read.

    Raises
    ------
    ValueError
        An empty file, or one that others may read.

    Examples
    --------
    >>> path = getfixture("tmp_path") / "token"
    >>> path.touch(mode=0o600)
    >>> _ = path.write_text("correct horse battery staple")
    >>> read_token(path)
    'correct horse battery staple'
    """
    path = Path(path)
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise ValueError(f"{path}: others may read it; chmod 600 {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].strip():
        raise ValueError(f"{path}: no token in its first line")
    return lines[0].strip()


def serve(
    verifier: Verifier,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: str | Path | None = None,
    max_bytes: int = MAX_BYTES,
    max_seconds: float = MAX_SECONDS,
    at_once: int = AT_ONCE,
) -> None:
    """Listen until interrupted.

    Parameters
    ----------
    verifier : Verifier
    host, port
        By default this machine alone can reach it. There is no TLS: for others put it behind a
        proxy that has.
    token_file : path, optional
        Without it a token is made and printed with the page's address.
    max_bytes, max_seconds, at_once
        As of :func:`make_app`.

    Raises
    ------
    OSError, ValueError
        The port is taken, or none; before an address is printed.
    """
    require("uvicorn", why="the service", extra="serve")
    import uvicorn

    token = read_token(token_file) if token_file else secrets.token_urlsafe(24)
    hosts = LOOPBACK if host in LOOPBACK else ("*",)
    with _listening(host, port) as listening:
        app = make_app(
            verifier,
            token,
            max_bytes=max_bytes,
            max_seconds=max_seconds,
            at_once=at_once,
            hosts=hosts,
        )
        port = listening.getsockname()[1]  # 0 asks for any that is free
        place = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        print(f"{place}#token={token}" if not token_file else place, flush=True)
        print(f"people: {verifier.people.path}", flush=True)
        config = uvicorn.Config(app, log_level="warning", server_header=False)
        with contextlib.suppress(KeyboardInterrupt):  # which ends it
            uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OverflowError:
        raise ValueError(f"port {port}: ports are from 0 to 65535") from None
    except OSError as error:
        raise OSError(
            f"{host}:{port}: {error.strerror or error}; give another --port or --host"
        ) from None
