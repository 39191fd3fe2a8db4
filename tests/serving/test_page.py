"""The playground and the documentation in headless Chromium, against a server whose answers the test writes."""

import contextlib
import re
import shutil
import threading

import httpx
import pytest

from coda_serving.page import FILES
from coda_serving.protocol import ChatRequest

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("the page is tested in chromium, which is not installed (Debian: chromium)", allow_module_level=True)
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the page is tested with playwright, which is not installed"
)
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

ANSWER = "def add(a, b):\n    return a + b\n"
HOSTILE = "<img src=x onerror=alert(1)>"
KEY = "a-key-of-the-test"


class Turnstile:
    """Lets all steps of the model through, or so many."""

    def __init__(self) -> None:
        self.is_open = True
        self.tickets = threading.Semaphore(0)

    def wait(self, timeout: float) -> None:
        if not self.is_open:
            self.tickets.acquire(timeout=timeout)

    @contextlib.contextmanager
    def after(self, steps: int):
        """Closed behind so many steps."""
        self.tickets = threading.Semaphore(steps)
        self.is_open = False
        try:
            yield
        finally:
            self.open()

    def open(self) -> None:
        self.is_open = True
        self.tickets.release(1000)


def script(request) -> list[int]:
    if request.suffix_ids is not None:
        return list(b"a + b" if request.max_tokens == 5 else b"a - b")
    is_hostile = bytes(request.prompt_ids).endswith(HOSTILE.encode())
    return list((HOSTILE if is_hostile else ANSWER).encode())


@pytest.fixture(scope="module")
def model(serving_fakes):
    return serving_fakes.FakeSampler(script=script, gate=Turnstile(), score=lambda request: request.max_tokens)


@pytest.fixture(scope="module")
def url(serving_fakes, model):
    with serving_fakes.served(serving_fakes.make_app(model)) as url:
        yield url + "/"


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        # Chromium has no sandbox of its own for root, nor in most containers.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, url, monkeypatch):
    """Open a page; at the end none may have broken its content policy, thrown an error or asked another host."""
    with contextlib.ExitStack() as contexts:
        faults = []

        def is_fault(said):
            # Chromium itself tells of each request that fails and each status of 400 and above.
            return said.type == "error" and not said.text.startswith("Failed to load resource")

        def open_page(address=url, *, width=1280, height=800, **options):
            context = chromium.new_context(viewport={"width": width, "height": height}, **options)
            context.set_default_timeout(10_000)
            contexts.callback(context.close)
            page = context.new_page()
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("request", lambda request: request.url.startswith(address) or faults.append(request.url))
            page.on("console", lambda said: is_fault(said) and faults.append(said.text))
            page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
            page.goto(address)
            return page

        yield open_page
        assert faults == []


def send(page, text="add two numbers"):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def finished(page, number=0):
    answer = page.get_by_role("tabpanel").locator("article.done").nth(number)
    answer.wait_for()
    return answer


def counts(page):
    """How many cells are in each state, in the text and in the map."""
    return [
        [page.locator(f"{part}.{state}").count() for state in ("masked", "provisional", "committed")]
        for part in (".answer .cell", ".map i")
    ]


# -- what is sent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES)
def test_no_text_can_become_script_and_nothing_comes_from_elsewhere(url, path):
    answer = httpx.get(url + path[1:])
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert answer.status_code == 200
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert {policy[of] for of in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-type"].split(";")[0] == {
        "html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"
    }[FILES[path].split(".")[-1]]  # fmt: skip


# -- chat ------------------------------------------------------------------------------------------------------------


def test_an_answer_is_seen_while_it_is_denoised(visit, model):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    with model.gate.after(12):
        send(page)
        page.locator(".map .committed").nth(11).wait_for()
        assert counts(page) == [[18, 2, 12]] * 2
        assert page.locator("article").get_attribute("aria-busy") == "true"
        assert "Step 12, 12 of 32 tokens" in page.locator(".cost").inner_text()
    answer = finished(page)
    assert counts(page) == [[0, 0, 32]] * 2
    assert answer.locator(".canvas").inner_text() == ANSWER
    assert re.fullmatch(
        r"32 tokens \u00b7 32 forwards \u00b7 1\.00 per forward \u00b7 [\d.]+ s.*", answer.locator(".cost").inner_text()
    )
    answer.get_by_role("button", name="Copy").click()
    answer.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == ANSWER


def test_a_shade_tells_how_sure_a_token_is(visit):
    page = visit()
    send(page)
    cell = finished(page).locator(".cell.committed").first
    shaded = cell.evaluate("cell => getComputedStyle(cell).backgroundColor")
    cell.hover()
    assert "committed, 90 %" in cell.get_attribute("title")
    page.get_by_role("button", name="Shades", pressed=True).click()
    assert cell.evaluate("cell => getComputedStyle(cell).backgroundColor") != shaded


def test_a_conversation_is_sent_whole_and_begun_anew(visit, model):
    page = visit()
    page.get_by_label("System message").fill("Be brief.")
    send(page, "one")
    finished(page)
    send(page, "two")
    finished(page, 1)
    asked = bytes(model.batches[-1][0].prompt_ids).decode()
    assert asked == f"[system]Be brief.[user]one[assistant]{ANSWER}[user]two"
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article").count() == 0
    send(page, "three")
    finished(page)
    assert bytes(model.batches[-1][0].prompt_ids).decode() == "[system]Be brief.[user]three"


@pytest.mark.parametrize("way", ["button", "key"])
def test_stopping_stops_the_server(visit, model, url, way):
    def running():
        return httpx.get(url + "health").json()["running"]

    page = visit()
    with model.gate.after(6):
        send(page)
        page.locator(".map .committed").nth(5).wait_for()
        assert running() == 1
        page.get_by_role("button", name="Stop").click() if way == "button" else page.keyboard.press("Escape")
        assert "6 of 32 tokens" in (cost := finished(page).locator(".cost").inner_text())
        assert cost.endswith("stopped")
        assert counts(page) == [[24, 2, 6]] * 2, "what was there is still seen"
        page.get_by_role("button", name="Send").wait_for()
        steps = len(model.sizes)
        for _ in range(3):
            model.gate.tickets.release()
            page.wait_for_timeout(50)
        assert running() == 0
        assert len(model.sizes) <= steps + 1, "the step that ran when it was stopped is the last"


def test_text_of_people_and_of_the_model_stays_text(visit):
    page = visit()
    send(page, HOSTILE)
    assert finished(page).locator(".canvas").inner_text().strip() == HOSTILE
    assert page.locator(".said").inner_text() == HOSTILE
    page.get_by_role("tab", name="Infill").click()
    page.get_by_label("Text with gaps").fill(HOSTILE + "{{gap:5}};")
    page.get_by_role("button", name="Fill").click()
    assert finished(page).locator(".canvas").inner_text() == HOSTILE + "a + b;"
    assert page.locator("main img").count() == 0


WATCH = """() => {
  window.tops = new Set();
  const look = () => { tops.add(document.querySelector(".facts").offsetTop); requestAnimationFrame(look); };
  look();
}"""


def test_the_canvas_fills_without_moving_the_page(visit, model):
    page = visit(width=1000)
    page.get_by_label("max_tokens").fill("300")
    with model.gate.after(1):
        send(page)
        page.locator(".map .committed").first.wait_for()
        page.evaluate(WATCH)
        model.gate.tickets.release(290)
        page.locator(".map .committed").nth(290).wait_for()
        page.wait_for_timeout(100)
        tops = page.evaluate("tops.size")
    assert tops == 1, "what stands below the canvas moved"
    assert finished(page).locator(".canvas").inner_text() == ANSWER


# -- infilling -------------------------------------------------------------------------------------------------------


def test_gaps_are_filled_at_a_length_given_or_searched(visit, model):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("tab", name="Infill").click()
    text = page.get_by_label("Text with gaps")
    assert page.get_by_text("2 gaps, 14 tokens to fill").is_visible()
    text.fill("return {{gap:5}}\n")
    with model.gate.after(2):
        page.get_by_role("button", name="Fill").click()
        page.locator(".map .committed").nth(1).wait_for()
        assert counts(page) == [[1, 2, 2]] * 2
    finished(page).get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "return a + b\n"
    request = model.batches[-1][0]
    assert (bytes(request.prompt_ids), request.max_tokens, bytes(request.suffix_ids)) == (b"return ", 5, b"\n")

    text.fill("return ;\n")
    assert page.get_by_role("button", name="Fill").is_disabled()
    text.evaluate("text => text.setSelectionRange(7, 7)")
    page.get_by_role("button", name="Insert gap").click()
    assert text.input_value() == "return {{gap}};\n"
    page.get_by_role("button", name="Fill").click()
    assert finished(page).locator(".canvas").inner_text().startswith("return a - b;")


def test_what_runs_gives_way_to_what_is_asked_for(visit, model):
    page = visit()
    with model.gate.after(3):
        send(page)
        page.locator(".map .committed").nth(2).wait_for()
        page.get_by_role("tab", name="Infill").click()
        page.get_by_label("Text with gaps").fill("{{gap:5}};")
        page.get_by_role("button", name="Fill").click()
        page.get_by_role("button", name="Stop").wait_for()
    assert "tokens" in finished(page).locator(".cost").inner_text()
    with model.gate.after(3):
        page.get_by_role("button", name="Fill").click()
        page.locator("#filled .map .committed").nth(2).wait_for()
        page.get_by_role("tab", name="Chat").click()
        assert "stopped" in finished(page).locator(".cost").inner_text()
        send(page, "two")
        page.get_by_role("button", name="Stop").wait_for()
    assert finished(page, 1).locator(".canvas").inner_text() == ANSWER
    assert page.get_by_role("button", name="Send").is_visible()
    page.get_by_role("tab", name="Infill").click()
    assert "stopped" in finished(page).locator(".cost").inner_text()


# -- settings, faults, key -------------------------------------------------------------------------------------------


def test_the_settings_are_those_of_the_table_and_reach_the_request(visit, model):
    page = visit()
    page.locator("#set-steps").wait_for()
    offered = set(page.locator("#fields [name]").evaluate_all("all => all.map((one) => one.name)"))
    schema = ChatRequest.model_json_schema()["properties"]
    assert offered == {name for name, about in schema.items() if "x-regime" in about} | {"seed"}
    page.get_by_label("max_tokens").fill("12")
    page.get_by_label("alg", exact=True).select_option("topk_margin")
    page.get_by_label("temperature", exact=True).fill("0.7")
    page.get_by_label("seed").fill("5")
    send(page)
    finished(page)
    request = model.batches[-1][0]
    assert (request.max_tokens, request.seed) == (12, 5)
    assert (request.options.alg, request.options.temperature) == ("topk_margin", 0.7)
    page.get_by_role("button", name="Reset").click()
    assert page.get_by_label("max_tokens").input_value() == page.get_by_label("alg", exact=True).input_value() == ""


@pytest.mark.parametrize("value", ["9", "warm", "1e999", "null and void"])
def test_a_refused_setting_is_said_and_marked(visit, model, value):
    page = visit()
    page.get_by_label("temperature", exact=True).fill(value)
    asked = len(model.batches)
    send(page)
    assert "temperature" in page.get_by_role("alert").inner_text()
    assert page.get_by_label("temperature", exact=True).get_attribute("aria-invalid") == "true"
    assert len(model.batches) == asked
    page.get_by_label("temperature", exact=True).fill("1")
    page.get_by_role("button", name="Try again").click()
    assert finished(page).locator(".canvas").inner_text() == ANSWER
    assert page.locator(".said").count() == 1
    assert page.get_by_role("alert").count() == 0


def test_a_fault_of_the_model_and_a_server_that_is_gone_are_said(visit, model, serving_fakes):
    with serving_fakes.served(serving_fakes.make_app(own := serving_fakes.FakeSampler())) as url:
        page = visit(url + "/")
        page.locator("#set-steps").wait_for()
        own.error = RuntimeError("a fault")
        send(page)
        page.get_by_role("alert").filter(has_text=re.compile(r"\w")).wait_for()
        assert "a fault" not in page.content()
    page.context.set_offline(True)
    send(page)
    page.get_by_text("The server cannot be reached. Is it still running?").wait_for()


def test_a_connection_that_breaks_is_said_and_can_be_tried_again(visit, serving_fakes):
    app = serving_fakes.make_app(serving_fakes.FakeSampler())
    asked = []

    async def breaking(scope, receive, send):
        if scope.get("path") != "/v1/chat/completions" or asked.append(scope) or len(asked) > 1:
            await app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
        raise RuntimeError("broken")

    with serving_fakes.served(breaking) as url:
        page = visit(url + "/")
        page.locator("#set-steps").wait_for()
        send(page)
        page.get_by_role("alert").filter(has_text="The connection ended before the answer did.").wait_for()
        page.get_by_role("button", name="Try again").click()
        assert finished(page).locator(".canvas").inner_text() == "hello"


def test_a_key_is_asked_for_once_and_kept_for_the_tab(visit, serving_fakes):
    with serving_fakes.served(serving_fakes.make_app(serving_fakes.FakeSampler(), api_key=KEY)) as url:
        page = visit(url + "/")
        field = page.get_by_label("This server needs an API key")
        field.fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("The server does not know this key.").wait_for()
        field.fill(KEY)
        page.keyboard.press("Enter")
        page.locator("#set-steps").wait_for()
        assert field.is_hidden()
        page.reload()
        page.locator("#set-steps").wait_for()
        assert field.is_hidden()
        send(page)
        assert finished(page).locator(".canvas").inner_text().strip() == "hello"
        assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")


def test_the_page_works_under_the_prefix_of_a_proxy(visit, serving_fakes):
    app = serving_fakes.make_app(serving_fakes.FakeSampler())

    async def below(scope, receive, send):
        await app(scope | {"path": scope.get("path", "").removeprefix("/coda")}, receive, send)

    with serving_fakes.served(below) as url:
        page = visit(url + "/coda/")
        send(page)
        assert finished(page).locator(".canvas").inner_text().strip() == "hello"
        page.get_by_role("link", name="API").click()
        page.locator("article").first.wait_for()
        assert page.url == url + "/coda/docs"


# -- for everyone ----------------------------------------------------------------------------------------------------


def test_the_keyboard_is_enough(visit, model):
    page = visit()
    page.locator("#set-steps").wait_for()
    sample = "Write a function that checks whether a number is prime."
    page.get_by_role("link", name="Skip").focus()
    for name in ("Skip to the message", "Chat", "API", "Theme: system", "Conversation", sample):
        focused = page.locator(":focus")
        assert (focused.get_attribute("aria-label") or focused.inner_text()) == name
        page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    finished(page)
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", name="Infill", selected=True).is_visible()
    page.get_by_label("Text with gaps").fill("{{gap:5}};")
    page.keyboard.press("Control+Enter")
    assert finished(page).locator(".canvas").inner_text() == "a + b;"


def test_a_screen_reader_hears_the_answer_once(visit, model):
    page = visit()
    status = page.get_by_role("status")
    with model.gate.after(3):
        send(page)
        page.locator(".map .committed").nth(2).wait_for()
        assert status.inner_text() == "The answer is being denoised."
        assert "def" not in page.locator("article").aria_snapshot()
    finished(page)
    assert status.inner_text() == "The answer is there: 32 tokens."
    assert page.locator("article").aria_snapshot().count("def add(a, b)") == 1


@pytest.mark.parametrize(
    ("what", "scheme"),
    [("welcome", "light"), ("answers", "light"), ("answers", "dark"), ("infill", "dark"), ("docs", "light")],
)
def test_axe_finds_nothing(visit, model, what, scheme):
    """Names of controls, contrast, landmarks, order of headings and the rest of its rules."""
    page = visit(color_scheme=scheme)
    page.locator("details").first.wait_for()
    page.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    context = None
    with model.gate.after(12) if what == "answers" else contextlib.nullcontext():
        if what == "answers":
            page.get_by_label("temperature", exact=True).fill("9")
            send(page)
            page.get_by_role("button", name="Try again").wait_for()
            page.get_by_label("temperature", exact=True).fill("1")
            send(page)
            page.locator(".map .committed").nth(11).wait_for()
        elif what == "infill":
            page.get_by_role("tab", name="Infill").click()
            page.get_by_role("button", name="Insert gap").click()
        elif what == "docs":
            page.goto(page.url + "docs")
            page.locator("article").first.wait_for()
            context = {"exclude": [["article:nth-of-type(n+6)"]]}  # like those before, and many
        found = axe.Axe().run(page, context=context, options={"resultTypes": ["violations"]})
    assert found.violations_count == 0, found.generate_report()


def test_every_shade_of_a_token_can_be_read(visit):
    page = visit()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        ratios = page.evaluate(RATIOS)
        assert len(ratios) == 22
        assert min(ratios) >= 4.5


RATIOS = """() => {
  const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = () => {
    const parts = [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255);
    const [r, g, b] = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const answer = document.body.appendChild(Object.assign(document.createElement("div"), { className: "answer" }));
  const ratios = ["provisional", "committed"].flatMap((state) => Array.from({ length: 11 }, (_, p) => {
    const cell = answer.appendChild(Object.assign(document.createElement("span"), { className: `cell ${state}` }));
    cell.style.setProperty("--p", p);
    const paints = [getComputedStyle(answer).backgroundColor, getComputedStyle(cell).backgroundColor];
    const levels = [paints, [getComputedStyle(cell).color]].map((layers) => {
      for (brush.fillStyle of layers) brush.fillRect(0, 0, 1, 1);
      return light();
    });
    return Math.max(...levels) / Math.min(...levels);
  }));
  answer.remove();
  return ratios;
}"""
"""Contrast of both kinds of token at every confidence, on the ground of an answer."""


def test_the_theme_follows_the_system_until_it_is_chosen(visit):
    def ground():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page = visit(color_scheme="dark")
    dark = ground()
    page.get_by_role("button", name="Theme: system").click()
    assert ground() != dark
    page.reload()
    assert ground() != dark
    page.get_by_role("button", name="Theme: light").click()
    page.emulate_media(color_scheme="light")
    assert ground() == dark


def test_nothing_is_cut_off_on_a_phone(visit, model):
    def overflow():
        return page.evaluate(
            "Math.max(...[document.documentElement, ...document.querySelectorAll('.scroll, .docs, .settings')]"
            ".map((one) => one.scrollWidth - one.clientWidth))"
        )

    page = visit(width=390, height=844)
    assert page.get_by_label("max_tokens").is_hidden()
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("max_tokens").fill("30")
    assert overflow() == 0
    page.keyboard.press("Escape")
    with model.gate.after(12):
        send(page, "x" * 300)
        page.locator(".map .committed").nth(11).wait_for()
        assert overflow() == 0
    finished(page)
    assert model.batches[-1][0].max_tokens == 30
    page.get_by_role("tab", name="Infill").click()
    page.get_by_label("Text with gaps").fill("y" * 300 + "{{gap:5}}")
    page.get_by_role("button", name="Fill").click()
    finished(page)
    assert overflow() == 0
    page.goto(page.url + "docs")
    page.locator("article").first.wait_for()
    assert overflow() == 0


def test_settings_that_were_open_do_not_lock_a_wider_page(visit):
    page = visit(width=700)
    page.get_by_role("button", name="Settings", exact=True).click()
    page.set_viewport_size({"width": 1280, "height": 800})
    send(page)
    finished(page)


def test_the_documentation_has_every_route(visit, url):
    page = visit()
    page.goto(url + "docs")
    page.locator("article").first.wait_for()
    paths = httpx.get(url + "openapi.json").json()["paths"]
    routes = [f"{method.upper()}{path}" for path, methods in paths.items() for method in methods]
    assert page.get_by_role("navigation", name="Endpoints").get_by_role("link").all_text_contents() == routes
    headings = page.get_by_role("heading", level=2)
    assert headings.all_text_contents()[: len(routes)] == routes
    boxes = [headings.nth(i).bounding_box() for i in range(3)]
    assert len({box["x"] for box in boxes}) == 1, "one below the other"
