"""The labelling page and its API, over a store: people in a browser, models and simulated labelers over HTTP.

    POST /api/enter      {"token"}                  an invitation becomes a cookie that no script can read
    POST /api/leave      {}                         and ends
    GET  /api/project    title, guidelines, criteria, flags, the annotator's name
    POST /api/next       {"count": 1}           ->  {"tasks": [...], "progress": {...}, "waiting": false}
    POST /api/judgments  an answer              ->  {"judgment": 7}
    POST /api/skip       {"assignment", "reason"}
    POST /api/renew      {"assignment"}             the annotator is still at work on it
    POST /api/back       {"before": null}       ->  {"task": what was judged last, or before an assignment, or null}
    POST /api/invite     {"name", "kind"}       ->  {"token"}, with the server's own token (RLHF_SERVER_TOKEN) only
    GET  /health         {"status": "ok"}

Tasks and answers are `rlhf.collection.records`. Who is not a person sends its invitation's token as
`Authorization: Bearer ...`. Every refusal is `{"error": "one line"}`. What is done with strangers (Host, Origin,
deadlines, limits) is in `rlhf.run.http`; requests that change anything are POSTs of JSON, which another site's page can
send to nobody here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf.collection.project import Project, check_ratings
from rlhf.collection.records import KINDS, Annotator, Answer, HandedOn, Task
from rlhf.collection.standing import Standings
from rlhf.collection.store import Store
from rlhf.errors import InputError, RunStopped, reason, short
from rlhf.run.http import Guard, HttpConfig, Refused, holds_token, read_body
from rlhf.run.page import STYLE

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

log = logging.getLogger("rlhf")
Result = TypeVar("Result")

PAGE = Path(__file__).parent / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The page's content security policy: scripts and styles from files of ours, and no way to make markup of a text."""
PARTS = ("label", "ranking", "server", "view")
"""The page's files, without their endings."""
KINDS_OF_FILES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
COOKIE_SECONDS = 30 * 24 * 3600
MOST_TASKS = 256


@dataclass(frozen=True, kw_only=True)
class LabelConfig(HttpConfig):
    """Where the labelling page is served."""

    max_body_bytes: int = 1024 * 1024
    """Bytes in one request: an answer with its rewrite."""


class Api:
    """The endpoints. `invitations`: the server's own token, whose holder may invite annotators; None: nobody may."""

    def __init__(self, store: Store, project: Project, config: LabelConfig, invitations: str | None) -> None:
        self.store, self.project, self.config, self.invitations = store, project, config, invitations
        self.guideline = store.set_guideline(project.guideline) if project.guideline else None
        # one browser may know several servers of this machine, whose cookies it doesn't tell apart by port
        self.cookie = f"rlhf_label_{hashlib.sha256(str(store.path.resolve()).encode()).hexdigest()[:12]}"
        self.standings = Standings(store)
        self.threads = ThreadPoolExecutor(4, thread_name_prefix="store")

    # --- who asks, and what ---

    async def in_store(self, action: Callable[[], Result]) -> Result:
        """Do something with the store in a thread. Raises Refused: 409 for an item that went to others, 400 for a
        mistake, 503 where the store itself fails."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, action)
        except HandedOn as error:
            raise Refused(409, str(error)) from None
        except (InputError, RunStopped) as error:
            if not isinstance(error, RunStopped) and not str(error).startswith(str(self.store.path)):
                raise Refused(400, str(error)) from None
            log.error("%s", error)  # which names the file
            raise Refused(503, "the store can't be used right now; nothing was stored, try again") from None

    async def annotator(self, request: Request) -> Annotator:
        """Return who asks. Raises Refused (401) for nobody known."""
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        token = sent.strip() if scheme.lower() == "bearer" else request.cookies.get(self.cookie, "")
        if scheme.lower() != "bearer" and request.headers.get("sec-fetch-site", "same-origin") not in SAME:
            raise Refused(403, "pages of other addresses may not ask this server")
        return await self.known(token)

    async def known(self, token: object) -> Annotator:
        """Return whom a token lets in. Raises Refused (401)."""
        text = token if isinstance(token, str) else ""
        if 0 < len(text) <= 200 and text.isascii():
            found = await self.in_store(lambda: self.store.annotator_of(text))
            if found is not None:
                return found
            log.warning("an invitation that is not known was refused")
        raise Refused(401, "no invitation, or one that has ended; ask for a new link")

    async def content(self, request: Request, *names: str) -> dict[str, Any]:
        """Return a request's JSON object. Raises Refused for anything else, and for fields beside `names`."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "send JSON: Content-Type: application/json")
        body = await read_body(request, self.config)
        try:
            content = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is no JSON: {reason(error)}") from None
        if not isinstance(content, dict):
            raise Refused(400, f"the body is a {type(content).__name__}; send an object")
        for name in content.keys() - set(names) if names else ():
            raise Refused(400, f"unknown field {short(name)!r}; known: {', '.join(names)}")
        return content

    def task(self, task: Task, annotator: Annotator) -> dict[str, Any]:
        """Write a task as JSON; a person gets no columns, which may hold the right answer, but the name under which the
        browser keeps the draft, and after how many seconds the page is to renew the lease."""
        made = task.to_json()
        if annotator.kind == "person":
            told = [self.cookie, annotator.name, made.pop("item"), made.pop("columns"), made["candidates"]]
            made["draft"] = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]
            made["renew_seconds"] = min(300.0, max(1.0, (task.lease_until - self.store.clock()) / 3))
        return made

    # --- endpoints ---

    async def enter(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        content = await self.content(request, "token")
        token = content.get("token")
        annotator = await self.known(token)
        answer = JSONResponse({"annotator": annotator.name})
        secure = request.headers.get("origin", "").startswith("https:")  # behind a proxy that speaks TLS
        answer.set_cookie(
            self.cookie, str(token), max_age=COOKIE_SECONDS, path="/", secure=secure, httponly=True, samesite="strict"
        )
        return answer

    async def leave(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        await self.content(request)
        answer = JSONResponse({})
        answer.delete_cookie(self.cookie, path="/", httponly=True, samesite="strict")
        return answer

    async def about(self, request: Request) -> dict[str, Any]:
        annotator = await self.annotator(request)
        guideline = self.guideline.hash if self.guideline else None
        return {**self.project.to_json(), "guideline": guideline, "annotator": annotator.name}

    async def next(self, request: Request) -> dict[str, Any]:
        annotator = await self.annotator(request)
        count = _whole(await self.content(request, "count"), "count", 1, MOST_TASKS)
        name = annotator.name
        tasks = await self.in_store(lambda: self.store.lease(name, count))
        far = await self.in_store(lambda: self.standings.of(name, idle=not tasks))
        return {
            "tasks": [self.task(task, annotator) for task in tasks],
            "progress": {"done": far.done, "skipped": far.skipped, "left": far.left},
            "waiting": far.waiting,
        }

    async def judge(self, request: Request) -> dict[str, Any]:
        annotator = await self.annotator(request)
        content = await self.content(request)

        def submit() -> int:
            answer = Answer.from_json(content)
            check_ratings(answer.ratings, self.project)
            return self.store.submit(annotator.name, answer).id

        return {"judgment": await self.in_store(submit)}

    async def skip(self, request: Request) -> dict[str, Any]:
        annotator = await self.annotator(request)
        content = await self.content(request, "assignment", "reason")
        assignment, why = _whole(content, "assignment"), content.get("reason", "")
        await self.in_store(lambda: self.store.skip(annotator.name, assignment, why))
        return {}

    async def renew(self, request: Request) -> dict[str, Any]:
        annotator = await self.annotator(request)
        assignment = _whole(await self.content(request, "assignment"), "assignment")
        return {"held": await self.in_store(lambda: self.store.renew(annotator.name, assignment))}

    async def back(self, request: Request) -> dict[str, Any]:
        annotator = await self.annotator(request)
        content = await self.content(request, "before")
        before = None if content.get("before") is None else _whole(content, "before")
        judged = await self.in_store(lambda: self.store.history(annotator.name, before))
        return {"task": self.task(judged[0], annotator) if judged else None}

    async def invite(self, request: Request) -> dict[str, Any]:
        if self.invitations is None or not holds_token(request.headers.get("authorization", ""), self.invitations):
            raise Refused(401, "only who holds this server's own token (RLHF_SERVER_TOKEN) invites")
        content = await self.content(request, "name", "kind")
        name, kind = content.get("name"), content.get("kind", "simulated")
        if not isinstance(name, str) or kind not in KINDS:
            raise Refused(400, f'send {{"name": "grader", "kind": one of {", ".join(KINDS)}}}')
        return {"token": await self.in_store(lambda: self.store.invite(name, kind))}


SAME = ("same-origin", "none")
"""What browsers say of requests that the page itself sends, or that a person typed."""


def _whole(content: dict[str, Any], name: str, default: int | None = None, most: int = 2**62) -> int:
    value = content.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise Refused(400, f"{name}: got {short(repr(value))}; send a whole number from 1 to {most}")
    return value


def create_app(store: Store, project: Project, config: LabelConfig, invitations: str | None = None) -> Starlette:
    """Make the ASGI application. Raises InputError where starlette is not installed.

    invitations: the server's own token, whose holder may invite annotators; None: nobody may.
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError as missing:
        raise InputError(f"the labelling page needs {missing.name}: pip install 'rlhf-recipes[server]'") from None

    api = Api(store, project, config, invitations)

    def answered(endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            said = await endpoint(request)
            if isinstance(said, Response):
                return said
            return Response(json.dumps(said, allow_nan=False), media_type="application/json")  # ASCII: any text passes

        return answer

    def file(path: Path) -> Callable[[Request], Any]:
        content = path.read_text(encoding="utf-8")
        content = STYLE + content if path.suffix == ".css" else content
        media, headers = KINDS_OF_FILES[path.suffix], {"Content-Security-Policy": POLICY}

        async def answer(request: Request) -> Response:
            return Response(content, media_type=media, headers=headers)

        return answer

    async def health(request: Request) -> dict[str, Any]:
        return {"status": "ok"}

    async def no_such_thing(request: Request, problem: HTTPException) -> JSONResponse:
        return JSONResponse({"error": f"{request.method} {request.url.path}: {problem.detail}"}, problem.status_code)

    posts = {"enter": api.enter, "leave": api.leave, "next": api.next, "judgments": api.judge, "skip": api.skip,
             "renew": api.renew, "back": api.back, "invite": api.invite}  # fmt: skip
    routes = [Route(f"/api/{name}", answered(endpoint), methods=["POST"]) for name, endpoint in posts.items()]
    routes += [Route("/api/project", answered(api.about)), Route("/health", answered(health))]
    files = sorted(path for path in PAGE.iterdir() if path.stem in PARTS)
    routes += [Route(f"/{path.name}" if path.suffix != ".html" else "/", file(path)) for path in files]
    handlers: dict[Any, Any] = {HTTPException: no_such_thing}
    app = Starlette(routes=routes, middleware=[Middleware(Guard, config=config)], exception_handlers=handlers)
    app.router.redirect_slashes = False  # a redirect would lead to whatever the Host header names
    return app
