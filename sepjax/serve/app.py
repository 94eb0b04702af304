"""The routes, as an ASGI application."""

import asyncio
import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sepjax.config import UserError
from sepjax.serve import page
from sepjax.serve.asked import Asked
from sepjax.serve.conversations import chain
from sepjax.serve.errors import ApiError, refused
from sepjax.serve.guard import Guard
from sepjax.serve.jobs import Inbox, Item, Job, Paused, Share
from sepjax.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    Wanted,
    chat_request,
    completion_request,
    detokenize_request,
    load_json,
    tokenize_request,
)
from sepjax.serve.responses import Answer, error_event
from sepjax.serve.served import Served, seed_of
from sepjax.serve.view import cache_route

log = logging.getLogger("sepjax.serve")
_BODY_SECONDS = 60.0  # that a client may take to send a request


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_body_bytes: int = 16 << 20
    max_new_tokens: int = 4096  # of an answer where the client says nothing


def create_app(worker: Asked, limits: Limits, *, api_key: str = "") -> ASGIApp:
    """The application.

    Args:
      worker: answers.
      limits: of requests.
      api_key: that every request must bear; "": none, and then only those that name this machine are answered.
    """
    api = Api(worker, limits)
    routes: list[BaseRoute] = [
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/health", api.health),
        Route("/metrics", api.metrics),
        cache_route(worker),
        *page.routes(),
    ]
    handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error, Exception: _bug}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), api_key)


class Api:
    """The routes' functions."""

    def __init__(self, worker: Asked, limits: Limits):
        self._worker, self._limits = worker, limits

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat_request)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, completion_request)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [_model(self._worker.ready())]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        served = self._worker.ready()
        _check_model(served, request.path_params["name"])
        return JSONResponse(_model(served))

    async def health(self, request: Request) -> Response:
        """GET /health: 200 once it answers requests."""
        self._worker.ready()
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(await self._worker.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        served, body = self._worker.ready(), await self._body(request)

        def find() -> list[int]:
            asked = tokenize_request(load_json(body))
            _check_model(served, asked.model)
            if asked.messages is not None:
                return served.chat_ids(asked.messages, asked.template_variables, tools=asked.tools)
            assert asked.prompt is not None
            return served.tokenizer.encode(asked.prompt, bos=asked.add_special_tokens)

        ids = await _in_thread(find)
        return JSONResponse({"count": len(ids), "max_model_len": None, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        served, body = self._worker.ready(), await self._body(request)

        def find() -> str:
            asked = detokenize_request(load_json(body))
            _check_model(served, asked.model)
            return served.text_of(asked.tokens)

        return JSONResponse({"prompt": await _in_thread(find)})

    # -- answers ----------------------------------------------------------------------------------------------------

    async def _answer(self, request: Request, read: Callable[[Any], ChatRequest | CompletionRequest]) -> Response:
        came, served = time.perf_counter(), self._worker.ready()
        inbox, client = self._worker.inbox(), request.client.host if request.client else ""
        found = [await self._body(request)]  # taken out of it: nobody needs it while the answer is made

        def prepare() -> tuple[Answer, Wanted, list[Job]]:
            with self._worker.clocks("http: read a request (in threads)"):
                asked = read(served.filled(load_json(found.pop())))
                return self._prepare(served, asked, inbox, client, came)

        answer, wanted, jobs = await _in_thread(prepare)
        self._worker.submit(jobs)
        reading = Reading(self._worker, inbox, answer, came)
        return EventStream(reading) if wanted.stream else await reading.whole(request.receive)

    def _prepare(
        self, served: Served, asked: ChatRequest | CompletionRequest, inbox: Inbox, client: str, came: float
    ) -> tuple[Answer, Wanted, list[Job]]:
        """Everything that takes time and no device, outside the event loop. Raises ApiError, UserError."""
        wanted, is_chat, finds_calls = asked.wanted, isinstance(asked, ChatRequest), False
        _check_model(served, wanted.model)
        self._worker.check_room(wanted.n * (1 if isinstance(asked, ChatRequest) else len(asked.prompts)))
        if isinstance(asked, ChatRequest):
            if finds_calls := asked.finds_calls:
                served.check_calls()
            how: dict[str, Any] = {"continues": asked.continues, "tools": asked.tools}
            prompts = {"messages": served.chat_ids(asked.messages, asked.template_variables, **how)}
        else:
            names = ["prompt"] if len(asked.prompts) == 1 else [f"prompt[{i}]" for i in range(len(asked.prompts))]
            pairs = zip(names, asked.prompts, strict=True)
            prompts = {name: served.prompt_ids(prompt, name) for name, prompt in pairs}
        # One array and one chain for all choices of a prompt: both are as long as it is.
        read = [(ids, chain(ids)) for ids in (served.check_prompt(ids, name) for name, ids in prompts.items())]
        if self._worker.conversations is not None:
            for ids, blocks in read:
                self._worker.conversations.warm(ids, blocks)
        id, seed = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}", seed_of(wanted)
        most, jobs = self._limits.max_new_tokens, []
        inbox.choices = wanted.n * len(read)
        each = [(*pair, share) for pair in read for share in [Share(wanted.n)] for _ in range(wanted.n)]
        for choice, (ids, blocks, share) in enumerate(each):
            slot = served.request(wanted, choice=choice, seed=seed, is_chat=is_chat, most=most)
            name = f"{id}:{choice}" if choice else id
            job = Job(inbox, choice, ids, slot, wanted.user or client, came, name, blocks)
            job.share = share if wanted.n > 1 else None
            jobs.append(job)
        tokens = [len(ids) for ids, *_ in each]
        answer = Answer(id, served, wanted, is_chat=is_chat, prompt_tokens=tokens, finds_calls=finds_calls)
        return answer, wanted, jobs

    async def _body(self, request: Request) -> bytes:
        """The whole body, within limits of size and time."""
        most, found = self._limits.max_body_bytes, bytearray()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a form on somebody's web page cannot send
            raise ApiError(415, f"content-type is {kind[:80]!r}, expected application/json")
        if (packed := request.headers.get("content-encoding", "identity")).strip().lower() not in ("", "identity"):
            raise ApiError(415, f"content-encoding is {packed[:80]!r}; bodies that are packed are not read")
        too_large = ApiError(413, f"the body is larger than {most} bytes (--max_body_bytes)", code="body_too_large")
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for piece in request.stream():
                    found += piece
                    if len(found) > most:
                        raise too_large
        except ClientDisconnect:
            raise ApiError(400, "the client went away before the body had come") from None
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {_BODY_SECONDS:g} seconds") from None
        return bytes(found)


class Reading:
    """The reading of one answer, while the client is there."""

    def __init__(self, worker: Asked, inbox: Inbox, answer: Answer, came: float):
        self._worker, self._inbox, self._came = worker, inbox, came
        self.answer, self.clocks = answer, worker.clocks

    async def take(self) -> list[tuple[int, Item]]:
        """What has come; gives rows back that were put aside, now that all before was read."""
        items = await self._inbox.take()
        if any(isinstance(item, Paused) for _, item in items):
            self._worker.caught_up(self._inbox)
        return items

    async def whole(self, receive: Receive) -> Response:
        """The answer in one piece; nobody's, if the client goes away."""

        async def collect() -> None:
            while not self.answer.is_done:
                self.answer.add(await self.take())

        with self.ending():
            if not await while_there(receive, collect()):
                return Response(status_code=499)
            return JSONResponse(self.answer.whole())

    @contextlib.contextmanager
    def ending(self) -> Any:
        """Whatever happens inside, no row works on for nobody; says in the log how it went."""
        status: Any = 200
        try:
            yield
        except ApiError as error:
            status = error.status
            raise
        finally:
            done = self.answer.is_done
            if not done:
                self._worker.cancel(self._inbox)
                status = 499 if status == 200 else status
            usage = self.answer.usage()
            log.info("answered" if done else "not answered", extra={
                "id": self.answer.id, "status": status, "prompt_tokens": usage["prompt_tokens"],
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                "completion_tokens": usage["completion_tokens"],
                "finish": [choice.finish_reason for choice in self.answer.choices],
                "seconds": round(time.perf_counter() - self._came, 3),
            })  # fmt: skip


class EventStream(Response):
    """An answer as server-sent events. `send` waits for a slow client, so no more is taken than it reads."""

    media_type = "text/event-stream"

    def __init__(self, reading: Reading):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._reading = reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Writes it until its end, or until the client goes away."""
        with contextlib.suppress(ApiError), self._reading.ending():  # which has been answered by then
            await while_there(receive, self._write(scope, receive, send))

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            chunks = self._reading.answer.chunks(await self._reading.take())
        except ApiError as error:  # nothing has gone out yet: a status of its own
            await _respond(error)(scope, receive, send)
            raise
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            while True:
                if chunks:
                    await send({"type": "http.response.body", "body": b"".join(chunks), "more_body": True})
                if self._reading.answer.is_done:
                    break
                items = await self._reading.take()
                with self._reading.clocks("http: write chunks"):
                    chunks = self._reading.answer.chunks(items)
        except ApiError as error:
            await send({"type": "http.response.body", "body": error_event(error), "more_body": False})
            raise  # for the log: it was not the client that went away
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_there(receive: Receive, work: Any) -> bool:
    """Runs `work` to its end unless the client goes away before; returns whether it came to its end."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
            return True
        return False
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _in_thread[T](work: Callable[[], T]) -> T:
    """Runs it beside the event loop; what the model's own code refuses is the client's mistake."""
    try:
        return await asyncio.to_thread(work)
    except UserError as error:
        raise refused(error) from error


def _model(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": 0, "owned_by": "sepjax"}


def _check_model(served: Served, name: str | None) -> None:
    if name not in (None, served.name, served.alias):
        raise ApiError(
            404, f"the model {name[:80]!r} does not exist here; there is {served.name!r}", param="model",
            code="model_not_found",
        )  # fmt: skip


def _respond(error: ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


async def _api_error(request: Request, error: ApiError) -> Response:
    about = {
        "status": error.status,
        "code": error.code,
        "path": request.url.path[:80],
    }  # the message may quote contents
    asks_whether_it_is_up = request.url.path == "/health"  # every second, by whoever waits for it
    log.log(logging.DEBUG if asks_whether_it_is_up else logging.INFO, "refused", extra=about)
    return _respond(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    found = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
    response = _respond(found)
    response.headers.update(error.headers or {})  # of a 405, what is allowed
    return response


async def _bug(request: Request, error: Exception) -> Response:
    log.error("a bug", exc_info=error)
    return _respond(ApiError(500, "the server has made a mistake; its log says which"))
