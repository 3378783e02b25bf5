"""The server's web page in a real browser: by mouse and by keyboard alone, on a phone's width and on a desk's."""

from __future__ import annotations

import base64
import json
import os
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from PIL import Image

import clipadapt
from clipadapt.data import Playground
from clipadapt.embeddings.format import encode_shard
from clipadapt.search import Index, query_vector
from clipadapt.serve.app import create_app
from clipadapt.serve.indexes import Indexes
from clipadapt.serve.limits import Settings, hash_key
from clipadapt.serve.models import Models

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

WIDTHS = [390, 1280]
KINDS = ("cat", "fish", "house", "star", "tree", "umbrella")
PATIENCE = 20_000  # milliseconds
KEY = "a key that is long enough"


# -- what is served ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """photos/ of six kinds with their embeddings, and two models of these kinds: one that learned, one that did not."""
    folder = tmp_path_factory.mktemp("page")
    backbone = clipadapt.load_backbone()
    world = Playground(kinds=KINDS, styles=("flat", "photo"), seed=5)
    clipadapt.create("gda-clip").fit(backbone, world.dataset(4)).save(folder / "adapted")
    clipadapt.create("zero-shot").fit(backbone, world.dataset(1)).save(folder / "plain")
    (folder / "photos").mkdir()
    paths = []
    for index in range(18):
        paths.append(folder / "photos" / f"{KINDS[index % 6]} {index}.png")
        world.scene(100 + index, kind=KINDS[index % 6]).image.save(paths[-1])
    encode_shard(backbone, paths, folder / "index", columns={"year": [2010 + index for index in range(18)]})
    return folder


@contextmanager
def running(folder: Path, **settings):
    """The address of a server of everything in `folder`."""
    models = Models([folder / "adapted", folder / "plain"])
    app = create_app(models, Indexes([folder / "index"], models), Settings(**settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    host, port = server.servers[0].sockets[0].getsockname()
    try:
        yield f"http://{host}:{port}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(folder):
    with running(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    playwright.expect.set_options(timeout=PATIENCE)
    with playwright.sync_playwright() as driver:
        found = found or driver.chromium.executable_path
        if not os.path.exists(found):
            pytest.skip("no Chromium is installed")
        browser = driver.chromium.launch(
            executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [], timeout=60_000
        )
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS)
def page(request, browser):
    """An empty page; in the end nothing may have gone wrong in it, and nothing may stick out of it."""
    context = browser.new_context(viewport={"width": request.param, "height": 844}, reduced_motion="reduce")
    page, problems, hosts = context.new_page(), [], set()
    page.set_default_timeout(PATIENCE)
    page.on("filechooser", lambda chooser: None)  # from now on, so that no key comes before the listening
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if _is_problem(message) else None)
    page.on("request", lambda sent: hosts.add(sent.url.split("/")[2]) if sent.url.startswith("http") else None)
    page.on("response", lambda response: problems.append(response.url) if response.status == 404 else None)
    yield page
    assert problems == []
    assert len(hosts) == 1
    assert page.evaluate("document.documentElement.scrollWidth") == request.param
    context.close()


def _is_problem(message) -> bool:
    # Chromium logs every refused request of a script; that the page deals with it, the tests see.
    return message.type == "error" and not message.text.startswith("Failed to load resource")


def choose(page, *paths) -> None:
    """Choose images by the mouse."""
    with page.expect_file_chooser() as chooser:
        page.click(".drop")
    chooser.value.set_files(list(paths))


def tab_to(page, selector: str, key: str = "Tab") -> None:
    """Walk by the keyboard to an element, whose focus must then be seen."""
    element = page.locator(selector).first
    for _ in range(60):
        if element.evaluate("element => element === document.activeElement"):
            shown = "element => getComputedStyle(element.closest('.drop, .button') ?? element).outlineStyle"
            assert element.evaluate(shown) != "none"
            return
        page.keyboard.press(key)
    raise AssertionError(f"{selector} cannot be reached by the keyboard")


def said(page, selector: str, text: str) -> None:
    playwright.expect(page.locator(selector)).to_have_text(text)


def some(folder: Path, *kinds: str) -> list[Path]:
    return [
        next(path for path in sorted((folder / "photos").iterdir()) if path.name.startswith(kind)) for kind in kinds
    ]


# -- classify ---------------------------------------------------------------------------------------------------------


def test_images_are_classified_as_the_model_does(page, address, folder):
    page.goto(address)
    images = some(folder, "cat", "star")
    choose(page, *images)
    said(page, "#classify-status", "2 images.")
    model = clipadapt.load(folder / "adapted")
    probabilities = model.predict_proba(images)
    for card, path, expected in zip(page.locator(".card").all(), images, probabilities, strict=True):
        assert card.locator(".name").inner_text() == path.name
        ranked = sorted(range(len(KINDS)), key=lambda c: -expected[c])[:5]
        assert card.locator(".class").all_inner_texts() == [model.class_names_[c] for c in ranked]
        assert card.locator(".value").all_inner_texts() == [f"{100 * expected[c]:.1f} %" for c in ranked]
        widths = card.locator(".bar span").evaluate_all("bars => bars.map(bar => parseFloat(bar.style.width))")
        assert widths == pytest.approx([100 * float(expected[c]) for c in ranked], abs=0.01)


def test_two_models_are_compared(page, address, folder):
    page.goto(address)
    images = sorted((folder / "photos").iterdir())[:8]
    choose(page, *images)
    page.select_option("#other", "plain")
    models = [clipadapt.load(folder / name) for name in ("adapted", "plain")]
    tops = [[model.class_names_[label] for label in model.predict(images)] for model in models]
    differ = [one != other for one, other in zip(*tops, strict=True)]
    assert 0 < sum(differ) < 8, "these images say nothing about comparing"
    said(page, "#classify-status", f"8 images, different answers for {sum(differ)}.")
    for card, first, second in zip(page.locator(".card").all(), *tops, strict=True):
        assert card.locator(".model").all_inner_texts() == ["adapted", "plain"]
        assert card.locator(".bars li:first-child .class").all_inner_texts() == [first, second]
        verdict = f"= They agree: {first}" if first == second else f"≠ They differ: {first} or {second}"
        assert card.locator(".verdict").inner_text() == verdict


def test_a_file_that_is_no_image_is_told_in_its_place(page, address, folder, tmp_path):
    page.goto(address)
    name = "<img src=x onerror=alert(1)>.png"
    (tmp_path / name).write_bytes(b"no image")
    choose(page, tmp_path / name, *some(folder, "fish"))
    said(page, "#classify-status", "2 images, 1 without an answer.")
    wrong, right = page.locator(".card").all()
    assert wrong.locator(".name").inner_text() == name
    assert "not an image" in wrong.locator(".error").inner_text()
    assert right.locator(".bars li").count() == 5
    page.click("#clear")
    said(page, "#classify-status", "No images yet.")
    assert page.locator(".card").count() == 0


def test_a_image_may_show_none_of_the_classes(page, address, folder):
    """As multi-label models say of some images."""
    none = {"model": "adapted", "revision": "", "results": [{"predictions": []}]}
    page.goto(address)
    page.route("**/v1/classify", lambda route: route.fulfill(json=none))
    choose(page, *some(folder, "cat"))
    said(page, ".column .none", "None of its classes.")
    page.click("text=Why?")
    said(page, "#why-status", "Choose a class, or write any text.")


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_images_are_pasted_and_dropped(page, address, folder, event):
    page.goto(address)
    page.locator("#model option").first.wait_for(state="attached")
    (image,) = some(folder, "tree")
    page.evaluate(
        """([event, data]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], "given.png", { type: "image/png" }));
            const options = { bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer };
            document.body.dispatchEvent(new (event === "drop" ? DragEvent : ClipboardEvent)(event, options));
        }""",
        [event, base64.b64encode(image.read_bytes()).decode()],
    )
    said(page, "#classify-status", "1 image.")
    said(page, ".card .name", "given.png")


def test_waiting_can_be_cancelled_and_moves_nothing(page, address, folder):
    page.goto(address)
    page.route("**/v1/classify", lambda route: None)  # which waits
    choose(page, *some(folder, "cat", "fish"))
    said(page, "#classify-status", "0 of 2 images …")
    before = page.locator(".card").first.bounding_box()
    page.click("#cancel")
    said(page, "#classify-status", "2 images, 2 without an answer.")
    assert page.locator(".error").all_inner_texts() == ["Cancelled.", "Cancelled."]
    page.unroute("**/v1/classify")
    page.click("#clear")
    choose(page, *some(folder, "cat"))
    said(page, "#classify-status", "1 image.")
    assert page.locator(".card").first.bounding_box() == before


def test_a_busy_server_is_asked_again(page, address, folder):
    refusals = iter([1])

    def answer(route):
        if next(refusals, None):
            route.fulfill(status=503, headers={"Retry-After": "1"}, json={"error": {"message": "full", "type": "x"}})
        else:
            route.continue_()

    page.goto(address)
    page.route("**/v1/classify", answer)
    choose(page, *some(folder, "cat"))
    said(page, "#notice", "The server is busy. Trying again in 1 second.")
    said(page, "#classify-status", "1 image.")
    assert page.locator("#notice").inner_text() == ""


# -- search -----------------------------------------------------------------------------------------------------------


def test_an_index_is_searched_by_words(page, address, folder):
    page.goto(address + "#search")
    page.fill("#text", "a drawing of a star")
    page.fill("#minus", "cat, a fish")
    page.fill("#where", "year >= 2015")
    with page.expect_request("**/v1/search") as sent:
        page.click("text=Search >> nth=-1")
    assert sent.value.post_data_json["minus"] == ["cat", "a fish"]
    said(page, "#search-status", "13 images, the best first.")
    index = Index.open(folder / "index")
    query = query_vector(index.model, ["a drawing of a star"], minus=["cat", "a fish"])
    (hits,) = index.search(query[None], 24, "year >= 2015")
    for card, hit in zip(page.locator(".hit").all(), hits, strict=True):
        assert card.locator(".name").inner_text() == Path(hit.name).name
        assert card.locator(".score").inner_text() == f"score {hit.score:.3f}"
        assert card.locator(".facts").inner_text() == f"width: 64, height: 64, year: {hit.facts['year']}"
        card.locator("img[src^=blob]").wait_for()
    page.fill("#where", "year > 3000")
    page.keyboard.press("Enter")
    said(page, "#search-status", "No image fits.")
    page.fill("#where", "no such thing")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#search-status")).to_have_class("failed")


def test_a_image_finds_itself_and_its_like(page, address, folder):
    page.goto(address)
    (image,) = some(folder, "house")
    choose(page, image)
    page.click("text=Find similar")
    said(page, ".hit .name >> nth=0", image.name)
    said(page, "#like-name", image.name)
    second = page.locator(".hit .name").nth(1).inner_text()
    page.click("text=More like this >> nth=1")
    said(page, "#like-name", second)
    said(page, ".hit .name >> nth=0", second)
    page.click("#like-remove")
    page.keyboard.press("Enter")
    said(page, "#search-status", "Describe in words what you are looking for, or choose an image.")


# -- why --------------------------------------------------------------------------------------------------------------


def test_why_shows_the_numbers_of_the_server(page, address, folder):
    page.goto(address)
    choose(page, *some(folder, "umbrella"))
    with page.expect_response("**/v1/explain") as explained:
        page.click("text=Why?")
    answer = explained.value.json()
    scores = answer["scores"]
    flat = [value for row in scores for value in row]
    top = next((y, x) for y, row in enumerate(scores) for x, value in enumerate(row) if value == max(flat))
    said(page, "#why-low", f"{min(flat):.2f}")
    said(page, "#why-high", f"{max(flat):.2f}")
    best = page.locator(".card .class").first.inner_text()
    words = f"Similarity to “{best}”: {answer['score']:.2f} for the whole image; highest at row {top[0] + 1}, column"
    assert words in page.locator("#why-status").inner_text()
    page.click("summary")
    cells = page.locator("#why-table td").all_inner_texts()
    assert cells == [f"{value:.2f}" for value in flat]

    colour = """(canvas, [x, y]) => [...canvas.getContext("2d").getImageData(
        Math.floor(x * canvas.width), Math.floor(y * canvas.height), 1, 1).data].slice(0, 3)"""
    place = [(top[1] + 0.5) / len(scores[0]), (top[0] + 0.5) / len(scores)]
    page.fill("#why-opacity", "100")
    assert page.locator("#why-image").evaluate(colour, place) == pytest.approx([253, 231, 37], abs=12)
    page.fill("#why-opacity", "0")
    plain = page.locator("#why-image").evaluate(colour, place)

    page.fill("#why-text", "a red umbrella in the rain")
    with page.expect_response("**/v1/explain") as explained:
        page.click("text=Show")
    assert explained.value.json()["scores"] != scores
    playwright.expect(page.locator("#why-status")).to_contain_text("a red umbrella in the rain")
    assert page.locator("#why-image").evaluate(colour, place) == plain
    page.click("#why-close")
    assert not page.locator("#why").is_visible()


def test_heat_lies_on_the_part_that_the_backbone_saw(page, address, tmp_path):
    Image.new("RGB", (200, 100), "white").save(tmp_path / "wide.png")
    page.goto(address)
    choose(page, tmp_path / "wide.png")
    page.click("text=Why?")
    playwright.expect(page.locator("#why-status")).to_contain_text("Similarity to")
    page.fill("#why-opacity", "100")
    white = "(canvas, x) => canvas.getContext('2d').getImageData(x * canvas.width, 160, 1, 1).data[0] === 255"
    whites = [page.locator("#why-image").evaluate(white, x) for x in (0.05, 0.22, 0.28, 0.72, 0.78, 0.95)]
    assert whites == [True, True, False, False, True, True]


# -- the whole of it by keyboard --------------------------------------------------------------------------------------


def test_everything_works_by_the_keyboard_alone(page, address, folder):
    page.goto(address)
    page.locator("#other option").first.wait_for(state="attached")
    tab_to(page, "#files")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(some(folder, "cat"))
    said(page, "#classify-status", "1 image.")
    tab_to(page, "#other", "Shift+Tab")
    page.keyboard.press("ArrowDown")
    playwright.expect(page.locator(".column .value")).to_have_count(10)
    tab_to(page, ".column .why")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#why-status")).to_contain_text("Similarity to")
    tab_to(page, "#why-opacity")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#why-opacity").input_value() == "54"
    page.keyboard.press("Escape")
    tab_to(page, ".column .why")  # where it was before

    tab_to(page, "nav a >> nth=1", "Shift+Tab")
    page.keyboard.press("Enter")
    tab_to(page, "#text")
    page.keyboard.type("a cat")
    page.keyboard.press("Enter")
    said(page, "#search-status", "18 images, the best first.")
    tab_to(page, ".hit .similar")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#like")).to_be_visible()


# -- the server ------------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_and_kept(page, folder, secured):
    page.goto(secured)
    said(page, "#key-status", "This server asks for a key.")
    page.keyboard.press("Escape")
    said(page, "#unreachable-why", "This server asks for an API key.")
    page.click("#unreachable-retry")
    page.fill("#key-input", "a key that is wrong")
    page.keyboard.press("Enter")
    said(page, "#key-status", "The server does not accept that key.")
    page.fill("#key-input", KEY)
    page.click("text=Use this key")
    choose(page, *some(folder, "cat"))
    said(page, "#classify-status", "1 image.")
    page.click("text=Find similar")
    playwright.expect(page.locator(".hit img[src^=blob]")).to_have_count(18)
    page.reload()
    playwright.expect(page.locator("#server li")).to_have_count(3)
    assert not page.locator("#key").is_visible()
    page.click("#key-forget")
    said(page, "#key-status", "This server asks for a key.")


@pytest.fixture(scope="module")
def secured(folder):
    with running(folder, keys=(hash_key(KEY),)) as address:
        yield address


def test_the_page_says_what_the_server_is(page, address, folder):
    page.goto(address)
    revision = json.loads(page.request.get(address + "v1/models").text())["data"][0]["revision"]
    said(page, "#server li >> nth=0", f"adapted: gda-clip, 6 classes, revision {revision[:8]}")
    said(page, "#server li >> nth=2", "index: an index of 18 images")


def test_an_empty_server_and_none_at_all(page, address):
    page.route("**/v1/models", lambda route: route.abort())
    page.goto(address)
    said(page, "#unreachable-why", "The server cannot be reached.")
    page.unroute("**/v1/models")
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [], "indexes": []}))
    page.click("#unreachable-retry")
    playwright.expect(page.locator("#classify-empty")).to_be_visible()
    assert not page.locator("#unreachable").is_visible()
    page.click("nav a >> nth=1")
    playwright.expect(page.locator("#search-empty")).to_be_visible()
    assert not page.locator("#search-form").is_visible()
