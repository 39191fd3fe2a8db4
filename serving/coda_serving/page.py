"""The playground at `/` and the API's documentation at `/docs`: files of this package, without a build or a CDN."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

FOLDER = Path(__file__).parent / "page"
FILES = {
    "/": "index.html",
    "/docs": "docs.html",
    "/page/page.css": "page.css",
    "/page/page.js": "page.js",
    "/page/docs.js": "docs.js",
    "/page/icon.svg": "icon.svg",
}
"""By their paths. They hold no secrets and need no key."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Nothing comes from elsewhere, and no text of a model can become script or style."""


def routes() -> APIRouter:
    """A route for each file."""
    router = APIRouter(include_in_schema=False)
    for path, name in FILES.items():
        router.add_api_route(path, _sender(FOLDER / name), methods=["GET", "HEAD"])
    return router


def _sender(file: Path):
    async def send() -> FileResponse:
        return FileResponse(file, headers=HEADERS)

    return send
