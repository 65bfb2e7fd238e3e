"""The site: which address shows what. No GET changes anything; POSTs file a request, and take one back."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse

from fedunlearn.apps.serve import ask, class_map
from fedunlearn.apps.serve.ask import Asked
from fedunlearn.apps.serve.guard import SEALED, is_from_here
from fedunlearn.apps.serve.jobs import Jobs
from fedunlearn.apps.serve.look import PACKAGE, Look, Parts, can_be_accepted, gate_of, stamp
from fedunlearn.errors import UserError
from fedunlearn.naming import as_command
from fedunlearn.runs import receipts
from fedunlearn.runs.figures import COLOURS
from fedunlearn.runs.hints import of_run
from fedunlearn.runs.ledger import TAKEN_UP
from fedunlearn.runs.overview import Glance
from fedunlearn.runs.page import IN_THE_DARK, Picture, encoded, rendered
from fedunlearn.runs.run import Run

SECONDS = 1.0  # between two looks
REST = 10  # times as long as a look took: a long run must not keep a CPU busy
QUIET = 15  # looks without news until a word is sent that shows who is still there
MOST_LISTENERS = 24
RECEIPT = re.compile(r"r\d{1,9}(-\d{1,9})?\.(json|html)")

Typed = Annotated[str, Form()]


def typed_into(
    clients: Typed = "",
    class_: Annotated[str, Form(alias="class")] = "",
    patient: Typed = "",
    by: Typed = "",
    right: Typed = "",
) -> Asked:
    """Take what was typed into a form."""
    return Asked(*(text.strip() for text in (clients, class_, patient, by, right)))


class Site:
    """Answers requests about the runs of a state folder.

    Args:
        home: state folder.
        jobs: starts what serves runs that no process holds.
    """

    def __init__(self, home: Path, jobs: Jobs) -> None:
        self._home, self._jobs, self._look = home, jobs, Look(home, jobs)
        self._listeners = 0
        self._drawing = Lock()
        self._maps: dict[tuple[object, ...], Picture] = {}

    def app(self) -> FastAPI:
        """Make the application."""
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        for path, answer in {
            "/": self.all_runs,
            "/events": self.all_events,
            "/live.js": self.script,
            "/runs/{name}": self.one_run,
            "/runs/{name}/events": self.events,
            "/runs/{name}/ask": self.form,
            "/runs/{name}/map": self.map,
            "/runs/{name}/report": self.report,
            "/runs/{name}/receipts/{file}": self.receipt,
            "/runs/{name}/requests/{request_id}/cancel": self.reconsider,
            "/runs/{name}/requests/{request_id}/accept": self.answer_for,
        }.items():
            looks = ["GET"] if path.endswith("/events") else ["GET", "HEAD"]
            app.add_api_route(path, answer, methods=looks, response_model=None)
        for path, answer in {
            "/runs/{name}/ask": self.confirm,
            "/runs/{name}/requests": self.file,
            "/runs/{name}/requests/{request_id}/cancel": self.cancel,
            "/runs/{name}/requests/{request_id}/accept": self.accept,
        }.items():
            app.add_api_route(path, answer, methods=["POST"], response_model=None)
        for error, answer in {
            HTTPException: _refused,
            400: _refused,
            404: _refused,
            405: _refused,
            UserError: _put_right,
        }.items():
            app.add_exception_handler(error, answer)
        app.add_exception_handler(RequestValidationError, _put_right)
        app.add_exception_handler(Exception, _failed)
        return app

    # Looking ------------------------------------------------------------------------------------------------------

    def all_runs(self, request: Request) -> Response:
        """Show all runs."""
        return _page(request, "list.html.jinja", parts=self._look.listed(), events="/events", home=self._home)

    def one_run(self, request: Request, name: str) -> Response:
        """Show one run."""
        self._folder(name)
        return _page(request, "run.html.jinja", name=name, parts=self._look.run(name), events=f"/runs/{name}/events")

    async def all_events(self) -> Response:
        """Send the list again whenever it changes."""
        return self._stream(self._look.listed)

    async def events(self, name: str) -> Response:
        """Send the parts of a run's page that have changed."""
        await run_in_threadpool(self._folder, name)
        return self._stream(lambda: self._look.run(name))

    def script(self) -> Response:
        """Give the script that takes in what is sent."""
        return Response(files(PACKAGE).joinpath("live.js").read_bytes(), media_type="text/javascript")

    def map(self, request: Request, name: str) -> Response:
        """Show who has what: images by client and class."""
        with self._opened(name) as run:
            key = (run.ledger.key, len(run.ledger.purged()), *run.ledger.portions(TAKEN_UP))
        if key not in self._maps:
            if not self._drawing.acquire(blocking=False):
                raise HTTPException(503, "A map is being drawn: load this page again in a moment.")
            try:
                self._maps[key] = class_map.drawn(name, str(self._home))
            finally:
                self._drawing.release()
        return _page(request, "map.html.jinja", name=name, map=self._maps[key])

    def report(self, name: str) -> Response:
        """Show the report that the run has written."""
        return self._file_of(name, "report", "index.html")

    def receipt(self, name: str, file: str) -> Response:
        """Give a receipt: the page for people, or what is signed, to keep."""
        if not RECEIPT.fullmatch(file):
            raise HTTPException(404, f"{file!r} is no receipt.")
        return self._file_of(name, receipts.FOLDER, file)

    # Asking -------------------------------------------------------------------------------------------------------

    def form(self, request: Request, name: str) -> Response:
        """Show the form that asks for clients to be forgotten."""
        with self._opened(name) as run:
            return _form(request, run, Asked())

    def confirm(
        self,
        request: Request,
        name: str,
        typed: Annotated[Asked, Depends(typed_into)],
        token: Typed = "",
        signed: Annotated[UploadFile | None, File()] = None,
    ) -> Response:
        """Say what a request would do, and ask whether it is to be filed."""
        _check_form(request, token)
        asked = replace(typed, signed=signed.file.read().decode(errors="replace") if signed else "")
        with self._opened(name) as run:
            try:
                words = ask.outlook(run, asked)
            except UserError as error:
                return _form(request, run, asked, str(error))
            command = as_command(*self._jobs.words(name, asked.options(run.class_names())))
            return _page(request, "confirm.html.jinja", run=run, asked=asked, command=command, **words)

    def file(
        self,
        request: Request,
        name: str,
        typed: Annotated[Asked, Depends(typed_into)],
        token: Typed = "",
        signed: Typed = "",
    ) -> Response:
        """File a request."""
        _check_form(request, token)
        asked = replace(typed, signed=signed)
        with self._opened(name) as run:
            try:
                ask.file(run, asked, self._jobs)
            except UserError as error:
                return _form(request, run, asked, str(error))
        return _back_to(name)

    def reconsider(self, request: Request, name: str, request_id: str) -> Response:
        """Ask whether a request is to be taken back."""
        with self._opened(name) as run:
            found = run.ledger.request(request_id)
            words = {"run": run, "asked": found, "whom": ask.whom(run, found.owners, found.selection)}
            command = as_command("forget", f"--cancel={found.id}", "--key=FILE", *of_run(run.folder))
            return _page(request, "cancel.html.jinja", command=command, **words)

    def cancel(self, request: Request, name: str, request_id: str, token: Typed = "") -> Response:
        """Take a request back."""
        _check_form(request, token)
        with self._opened(name) as run:
            receipts.cancel(run, request_id)
        return _back_to(name)

    def answer_for(self, request: Request, name: str, request_id: str) -> Response:
        """Ask who answers for a model that the gate has refused."""
        with self._opened(name) as run:
            return self._accepting(request, run, request_id)

    def accept(self, request: Request, name: str, request_id: str, by: Typed = "", token: Typed = "") -> Response:
        """Have such a model taken."""
        _check_form(request, token)
        with self._opened(name) as run:
            try:
                ask.accept(run, request_id, by.strip(), self._jobs)
            except UserError as error:
                return self._accepting(request, run, request_id, by=by, error=str(error))
        return _back_to(name)

    def _accepting(self, request: Request, run: Run, request_id: str, **typed: str) -> Response:
        asked = run.ledger.request(request_id)
        words = {"run": run, "asked": asked, "whom": ask.whom(run, asked.owners, asked.selection)}
        words |= {"can_be_accepted": can_be_accepted(run, asked), "gate": gate_of(asked.detail.get("gate", {}))}
        words |= {"is_taken": ask.is_taken(run), "most": ask.MOST_TYPED}
        return _page(request, "accept.html.jinja", status=422 if typed else 200, **words, **typed)

    # ----------------------------------------------------------------------------------------------------------------

    def _folder(self, name: str) -> Path:
        """The folder of a run; only a name that is in the list of all runs is one."""
        try:
            return self._look.folder(name)
        except UserError as error:
            raise HTTPException(404, str(error)) from error

    @contextmanager
    def _opened(self, name: str) -> Iterator[Run]:
        run = Run.opened(self._folder(name))
        with closing(run.ledger):
            yield run

    def _file_of(self, name: str, *place: str) -> Response:
        """A file of a run's folder, and of no other folder; a page may do nothing but be looked at."""
        folder = self._folder(name).resolve()
        file = folder.joinpath(*place).resolve()
        if not file.is_relative_to(folder) or not file.is_file():
            raise HTTPException(404, f"Run {name} has no {'/'.join(place)}.")
        saved_as = f"{name}-{file.name}" if file.suffix == ".json" else None
        return FileResponse(file, headers={"content-security-policy": SEALED}, filename=saved_as)

    def _stream(self, look: Callable[[], Parts]) -> Response:
        if self._listeners >= MOST_LISTENERS:
            raise HTTPException(503, "Too many pages are open.")
        return StreamingResponse(self._news(look), media_type="text/event-stream")

    async def _news(self, look: Callable[[], Parts]) -> AsyncIterator[str]:
        """Send every part that has changed, until nobody listens any more."""
        sent: dict[str, str] = {}
        quiet = 0
        self._listeners += 1
        try:
            while True:
                started = time.monotonic()
                parts = await run_in_threadpool(look)
                took = time.monotonic() - started
                for name, html in parts.items():
                    if sent.get(name) != (now := stamp(html)):
                        sent[name], quiet = now, 0
                        yield _news_of(name, html)
                quiet += 1
                if quiet % QUIET == 0:
                    yield ": nothing new\n\n"
                await asyncio.sleep(max(SECONDS, REST * took))
        except UserError as error:  # the run's folder is gone
            gone = Glance("", state="removed", error=f"{error}: what else is shown here is as it was last")
            yield _news_of("now", rendered(PACKAGE, "now.html.jinja", glance=gone))
        finally:
            self._listeners -= 1


def _news_of(part: str, html: str) -> str:
    return f"data: {json.dumps({'part': part, 'stamp': stamp(html), 'html': html})}\n\n"


def _page(request: Request, template: str, *, status: int = 200, **words: Any) -> Response:
    scope = request.scope
    about = {"nonce": scope["nonce"], "form_token": scope["form_token"], "stamp": stamp}
    about |= {"colours": COLOURS, "dark": IN_THE_DARK}
    return HTMLResponse(encoded(rendered(PACKAGE, template, **about, **words)), status)


def _back_to(run: str) -> Response:
    return RedirectResponse(f"/runs/{quote(run, safe='')}", 303)


def _form(request: Request, run: Run, asked: Asked, error: str = "") -> Response:
    key = run.ledger.key if run.config.forget.signed else ""
    names = ", ".join(run.config.partition.names[: ask.MOST_NAMED])
    words = {"run": run, "asked": asked, "error": error, "key": key, "names": names, "most": ask.MOST_TYPED}
    return _page(request, "ask.html.jinja", status=422 if error else 200, **words)


def _check_form(request: Request, token: str) -> None:
    if not is_from_here(request, token):
        raise HTTPException(403, "This form is out of date: go back, load the page again and fill it in there.")


async def _refused(request: Request, error: Any) -> Response:
    text = {"Not Found": "There is no such page.", "Method Not Allowed": "This page takes no such request."}
    words = {"status": error.status_code, "error": text.get(error.detail, error.detail)}
    answer = _page(request, "error.html.jinja", **words)
    answer.headers.update(error.headers or {})
    return answer


async def _failed(request: Request, error: Exception) -> Response:
    """Answer where the page itself is at fault; its process writes the traceback."""
    text = f"The page has failed ({type(error).__name__}). What `fedunlearn serve` writes in its terminal says where."
    return _page(request, "error.html.jinja", status=500, error=text)


async def _put_right(request: Request, error: Any) -> Response:
    text = str(error) if isinstance(error, UserError) else "The form was not filled in as a browser does it."
    return _page(request, "error.html.jinja", status=422, error=text)
