"""`moeserving up --open` and `moeserving ui` on one machine: a browser is led to the page by a private file."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_browser import Browser, make_browser
from local_place import TIMEOUT_S, Place
from moe_contract.page_keys import derive_page_key

NO_PAGE = {404: "gateway.ui.enabled is false", 503: "`make ui`"}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path, replicas=1)
    yield made
    made.kill()


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Browser:
    return make_browser(tmp_path, monkeypatch)


def address(place: Place) -> str:
    token = (place.state / "a" / "token").read_text().strip()
    return f"{place.process('gateway')['url']}/ui/#key={derive_page_key(token.encode())}"


def assert_led_to(address: str, browser: Browser) -> None:
    given, text = browser.wait_opened()
    assert (given.startswith("file:///"), "#" in given) == (True, False)
    assert f'content="0;url={address}"' in text
    assert "\n-rw------- " in text


def test_the_key_stands_in_a_private_file_and_on_no_command_line(place: Place, browser: Browser) -> None:
    said = place.up("--open")
    assert_led_to(address(place), browser)
    assert f"live page: {address(place)}" in said
    browser.seen.unlink()
    assert place.run("ui").splitlines() == [address(place)]
    assert_led_to(address(place), browser)
    place.run("down")
    assert not (place.state / "a" / "live-page.html").exists()


def test_a_browser_that_stays_open_holds_nothing_up(place: Place, browser: Browser) -> None:
    browser.window.touch()
    try:
        with place.foreground("--open") as command:
            browser.wait_opened()
            command.send_signal(signal.SIGINT)
            assert command.wait(TIMEOUT_S) == 0
    finally:
        browser.window.unlink()


@pytest.mark.parametrize("status", NO_PAGE)
def test_a_gateway_without_a_page_opens_no_browser(place: Place, browser: Browser, status: int) -> None:
    folder = place.state / "a"
    folder.mkdir(parents=True)
    (folder / "gateway.json.no-page").write_text(str(status))
    said = place.up("--open")
    assert "no live page: the gateway " in said
    assert NO_PAGE[status] in said
    assert NO_PAGE[status] in place.run("ui", code=1)
    assert not browser.has_opened()
