"""The page at /: what it may load, the lanes that it draws, and the whole of it in a browser."""

import json
import os
import re
import shutil
from collections.abc import Iterator

import httpx2
import pytest

from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.policies.discard import Discard
from jaxcept.scheduler.request import Request
from jaxcept_serve import page
from jaxcept_serve.lanes import Lanes, LaneState
from jaxcept_serve.limits import ApiKey, ServerOptions
from jaxcept_serve.page import content_security_policy, read_page
from tests.fakes import Rig, scripted
from tests.page_server import FakeTraffic, PageServer


def observe(rig: Rig, lanes: Lanes, limit: int = 200) -> None:
    """Steps until nothing can be computed."""
    while rig.engine.has_work:
        before = len(rig.events)
        rig.step()
        lanes.on_step(rig.engine, rig.events[before:], rig.clock.now())
        limit -= 1
        assert limit


def states(lanes: Lanes, lane: int) -> str:
    """The letters of a lane's moves, in order."""
    return "".join(move.state.value for move in lanes.frame().moves if move.lane == lane)


def test_a_lane_tells_what_its_sequence_did():
    rig, lanes = Rig(), Lanes()
    seq_id = rig.add("r", range(6), scripted(2), max_tokens=4)
    observe(rig, lanes)
    assert states(lanes, seq_id) == "qprd"
    (row,) = lanes.frame().rows
    assert (row.state, row.label, row.device, row.host, row.dropped) == (LaneState.ON_DEVICE, "scripted", 2, 0, 0)
    rig.clock.advance(5.0)
    rig.engine.resume(seq_id, [7, 8])
    observe(rig, lanes)
    assert states(lanes, seq_id) == "qprdqpre"
    assert lanes.frame().moves[-1].label == "length"
    times = [move.at for move in lanes.frame().moves]
    assert times == sorted(times)


def test_a_context_that_is_given_up_is_dropped():
    rig, lanes = Rig(Discard()), Lanes()
    rig.add("r", range(9), scripted(2), max_tokens=6)
    observe(rig, lanes)
    (row,) = lanes.frame().rows
    assert row.state is LaneState.DROPPED and row.dropped > 0 == row.device


def test_a_lane_goes_on_with_the_request_that_takes_its_context_over():
    rig, lanes = Rig(), Lanes()
    rig.add("first", range(6), scripted(2), max_tokens=4)
    observe(rig, lanes)
    (seq,) = rig.scheduler.sequences.values()
    rig.engine.follow("first", Request("next", (*seq.token_ids, 3, 4), SamplingParams(max_tokens=2)))
    observe(rig, lanes)
    assert states(lanes, seq.seq_id) == "qprdqpre"


def test_a_frame_tells_what_is_new_and_old_moves_are_forgotten():
    rig, lanes = Rig(), Lanes()
    rig.add("one", range(6), max_tokens=3)
    observe(rig, lanes)
    frame = lanes.frame()
    assert frame.moves and not frame.rows and not lanes.frame(frame.serial).moves
    rig.clock.advance(1000.0)
    second = rig.add("two", range(6), max_tokens=3)
    observe(rig, lanes)
    assert (
        {move.lane for move in lanes.frame().moves}
        == {second}
        == {move.lane for move in lanes.frame(frame.serial).moves}
    )


def test_the_page_loads_nothing_and_says_so():
    html = read_page()
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)|@import|url\(|\son[a-z]+=|\sstyle=|innerHTML""", html)
    policy = content_security_policy(html)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert len(re.findall(r"<script>", html)) == len(re.findall(r"<style>", html)) == 1


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    with FakeTraffic(24) as traffic, PageServer(traffic) as started:
        yield started


def test_the_feed_sends_frames_until_the_server_drains():
    with FakeTraffic(8) as traffic, PageServer(traffic) as server:
        page = httpx2.get(server.url + "/")
        assert page.headers["content-security-policy"] == content_security_policy(page.text)
        frames = []
        with httpx2.stream("GET", server.url + "/live", timeout=10) as response:
            for line in response.iter_lines():
                if line.startswith("data:"):
                    frames.append(json.loads(line[5:]))
                server.api.gate.is_draining = len(frames) >= 5
        assert len(frames) <= 7, "the stream ends soon after the server drains"
        hello, first = frames[:2]
        assert hello == {"model": "fake", "policy": "thirds"}
        assert {"now", "moves", "rows", "figures", "memory"} <= set(first)
        assert sum(len(frame["moves"]) for frame in frames[1:]) > 10
        assert frames[-1]["figures"]["generated_tokens"] > 0


def test_the_feed_asks_for_the_key():
    options = ServerOptions(api_keys=(ApiKey("me", "secret"),))
    with FakeTraffic(4) as traffic, PageServer(traffic, options) as server:
        assert httpx2.get(server.url + "/live").status_code == 401
        assert httpx2.get(server.url + "/").status_code == 200, "the page itself tells nothing"
        headers = {"authorization": "Bearer secret"}
        with httpx2.stream("GET", server.url + "/live", headers=headers, timeout=10) as response:
            assert next(response.iter_lines()).startswith("data:")


def test_the_feed_has_room_for_so_many_pages(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "MAX_WATCHERS", 1)
    with FakeTraffic(4) as traffic, PageServer(traffic) as server:
        with httpx2.stream("GET", server.url + "/live", timeout=10) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data:")
            refused = httpx2.get(server.url + "/live")
            assert refused.status_code == 503 and refused.headers["retry-after"]
        for _ in range(100):
            with httpx2.stream("GET", server.url + "/live", timeout=10) as response:
                if response.status_code == 200:
                    return
        pytest.fail("a page that is closed makes room")


def chromium() -> str | None:
    """A browser on this machine: by $JAXCEPT_CHROMIUM, on the path, or one that playwright has installed."""
    named = os.environ.get("JAXCEPT_CHROMIUM")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = named or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
        with sync_api.sync_playwright() as playwright:
            path = playwright.chromium.executable_path
        found = path if os.path.exists(path) else None
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_page_in_a_browser(server: PageServer):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = chromium()
    if browser_path is None:
        pytest.skip("there is no Chromium on this machine; $JAXCEPT_CHROMIUM may name one")
    expect = sync_api.expect
    said: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="dark")
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.url)
        expect(page.locator("#status")).to_have_text("live", timeout=15_000)
        expect(page.locator("#f-rate")).to_have_text(re.compile("[1-9]"))
        expect(page.locator("#summary")).to_have_text(re.compile("on a tool"))
        painted = page.evaluate(
            "() => { const c = document.getElementById('lanes'), pen = c.getContext('2d');"
            " const data = pen.getImageData(0, 0, c.width, c.height).data, seen = new Set();"
            " for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 250) seen.add(data.slice(i, i + 3).join());"
            " return seen.size; }"
        )
        assert painted >= 4, "lanes of several colours are drawn"
        page.get_by_label("Message").fill("What is 37 * 91?")
        page.keyboard.press("Enter")
        expect(page.locator(".facts")).to_have_count(1)
        assert page.text_content(".call") == 'calculator({"expression": "37 * 91"})→ 3367  (0.05 s)'
        assert page.text_content(".msg.assistant") == "37 * 91 is 3367. <b>turn 1</b>", "text is text, not markup"
        assert "32 of them kept" in (page.text_content(".facts") or "")
        page.get_by_role("button", name="What is the capital of Japan?").click()
        expect(page.locator(".facts")).to_have_count(2)
        assert "turn 3" in page.locator(".msg.assistant").nth(1).inner_text(), "the conversation is sent whole"
        page.get_by_text("Show them as a table").click()
        expect(page.locator("#rows tr").nth(3)).to_be_visible()
        theme = "document.documentElement.dataset.theme"
        assert page.evaluate(theme) == "dark"
        page.get_by_role("button", name="Dark or light").click()
        assert page.evaluate(theme) == "light"
        browser.close()
    assert said == []
