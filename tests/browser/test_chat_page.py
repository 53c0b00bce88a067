"""The chat page in a real Chromium: streaming, siblings, blind comparison, feedback, hostile texts, a token."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from reference.policy_server import ScriptedEngine, Speaker, echoing, serving, wait_for

from rlhf.collection.store import Store
from rlhf.serving.app import Service
from rlhf.serving.config import ServingConfig
from rlhf.serving.keeping import Keeper

pytestmark = pytest.mark.browser

HOSTILE = (
    "<script>window.owned = 1</script>", "<img src=x onerror='window.owned = 1'>", "<svg onload='window.owned = 1'>",
    "<iframe srcdoc='<script>parent.owned = 1</script>'></iframe>", "<a href='javascript:window.owned = 1'>click</a>",
    "</p></article><script>window.owned = 1</script>", "<style>body{display:none}</style>", "&lt;b&gt; &amp; &nbsp;",
    "```\n<script>window.owned = 1</script>\n```", "```html\n<b>never closed", "[link](javascript:window.owned=1)",
    "![x](http://evil.example/x.png)", "\u202eright to left\u202c", "\x1b[31mred\x1b[0m \x07", "${window.owned = 1}",
    "<base href='//evil.example/'>", "<meta http-equiv=refresh content='0;url=//evil.example'>", "word" * 400,
)  # fmt: skip


class Page:
    """The page as a person sees it."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        browser.get(url)
        wait_for(lambda: self.one("#model option, #entry:not([hidden])") is not None)

    def one(self, selector: str) -> Any:
        return next(iter(self.all(selector)), None)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def click(self, selector: str) -> None:
        self.one(selector).click()

    def busy(self) -> bool:
        return self.one("#turns").get_attribute("aria-busy") == "true"

    def ask(self, text: str, wait: bool = True) -> None:
        from selenium.webdriver.common.keys import Keys

        self.one("#question").send_keys(text, Keys.ENTER)
        if wait:
            wait_for(lambda: not self.busy() and text in self.texts())

    def texts(self) -> list[str]:
        """Return what the turns say, all at one moment: they are drawn anew while they are written."""
        script = "return [...document.querySelectorAll('.turn .text')].map(one => one.innerText.trim())"
        return self.browser.execute_script(script)

    def message(self) -> str:
        return self.one("#message").text

    def wide(self) -> int:
        script = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        return self.browser.execute_script(script)


@contextlib.contextmanager
def chat_server(speak: Speaker = echoing, pause: float = 0.0, store: Any = None, token: str | None = None, **settings):
    engine = ScriptedEngine(speak=speak, pause=pause)
    config = ServingConfig(store=None if store is None else str(store), **settings)
    keeper = None if store is None else Keeper(config, engine.models)
    with serving(Service(engine, config, keeper), token) as url:
        yield url, engine


@pytest.fixture
def stored(tmp_path) -> Path:
    """Return the store's path."""
    return tmp_path / "store.db"


def test_a_conversation_with_siblings(driver, complaints, screenshot):
    with chat_server() as (url, engine):
        page = Page(driver, url)
        page.ask("Hello")
        assert page.texts() == ["Hello", "sft heard: Hello"]
        engine.speak = lambda policy, question, seed: "another"
        page.click(".again")
        wait_for(lambda: page.texts() == ["Hello", "another"])
        assert page.one(".place").text == "2 / 2"
        page.click(".previous")
        assert page.texts() == ["Hello", "sft heard: Hello"]
        page.ask("And then?")
        assert [m["content"] for m in engine.asked[-1].messages] == ["Hello", "sft heard: Hello", "And then?"]
        page.click(".next")  # of the first answer: the branch below it goes
        wait_for(lambda: page.texts() == ["Hello", "another"])
        page.click(".previous")
        assert page.texts() == ["Hello", "sft heard: Hello", "And then?", "another"]
        page.click(".turn:last-child .edit")
        page.one(".panel textarea").clear()
        page.one(".panel textarea").send_keys("As it should be")
        page.click(".use-edit")
        wait_for(lambda: page.texts()[-1] == "As it should be")
        driver.refresh()
        wait_for(lambda: page.texts() == ["Hello", "sft heard: Hello", "And then?", "As it should be"])
        screenshot(driver, "chat_siblings")
        page.click("#fresh")
        assert page.texts() == []
        assert complaints(driver) == []


def test_an_answer_is_stopped_and_stays(driver):
    with chat_server(speak=lambda *_: " ".join(map(str, range(100))), pause=0.05) as (url, engine):
        page = Page(driver, url)
        page.ask("Count", wait=False)
        wait_for(lambda: len(page.texts()) == 2 and "3" in page.texts()[1])
        page.click("#stop")
        wait_for(lambda: not page.busy())
        text = page.texts()[1]
        assert "stopped" in page.one(".who").text
        assert 3 < len(text.split()) < 60
        wait_for(lambda: engine.left == 1)  # given up before its end
        page.ask("Go on", wait=False)
        wait_for(lambda: len(engine.asked) == 2)
        assert engine.asked[1].messages[1] == {"role": "assistant", "content": text}
        page.click("#stop")
        wait_for(lambda: not page.busy())


def test_a_blind_comparison_and_its_vote(driver, stored, complaints, screenshot):
    with chat_server(store=stored, speak=lambda policy, question, seed: f"the answer of {len(policy) * 'x'}") as (
        url,
        _,
    ):
        page = Page(driver, url)
        page.click("#compare")
        page.ask("Which?")
        assert len(page.all(".sides .answer")) == 2
        shown = page.one(".sides").text
        assert "sft" not in shown
        assert "ppo" not in shown
        assert page.one("#send").get_property("disabled")
        screenshot(driver, "chat_compare")
        page.click(".agree")
        page.all(".better")[1].click()
        wait_for(lambda: page.one(".sides") is None)
        winner = page.one(".answer .who").text
        assert "sft" in winner or "ppo" in winner
        assert page.one(".place").text == "2 / 2"
        page.click("#compare")
        page.ask("Go on")
        assert complaints(driver) == []
    with Store(stored) as store:
        (vote,) = store.feedback(usable=True)
        (talk,) = store.conversations(usable=True)
    assert vote.policies == ("ppo", "sft")
    best = vote.policies[vote.order[1]]
    assert best in winner
    assert vote.ranks == ((1, 2) if best == "ppo" else (2, 1))
    assert talk.messages == [{"role": "user", "content": "Which?"}]


def test_every_turn_may_ask_for_a_comparison_and_no_difference_is_an_answer(driver, stored):
    with chat_server(store=stored, compare_share=1.0) as (url, _):
        page = Page(driver, url)
        page.ask("Which?")
        assert len(page.all(".sides .answer")) == 2
        page.click(".same")
        wait_for(lambda: page.one(".sides") is None)
    with Store(stored) as store:
        (vote,) = store.feedback(usable=False)
        assert store.conversations(usable=False) == []
    assert vote.ranks == (1, 1)
    assert vote.responses == ("", "")  # nobody agreed


def test_thumbs_with_reasons_and_consent(driver, stored, screenshot):
    with chat_server(store=stored) as (url, _):
        page = Page(driver, url)
        page.ask("I am jo@mail.example")
        page.click(".bad")
        assert not page.one(".agree").is_selected()
        page.click(".tags button:nth-child(4)")
        page.click(".send-thumb")
        wait_for(lambda: page.one(".panel") is None)
        assert page.one(".bad").get_attribute("aria-pressed") == "true"
        with Store(stored) as store:
            (down,) = store.feedback(usable=False)
        page.click(".good")
        page.click(".agree")
        screenshot(driver, "chat_thumb")
        page.click(".send-thumb")
        wait_for(lambda: page.one(".panel") is None)
        page.click(".edit")
        page.one(".panel textarea").send_keys(" And more.")
        page.click(".agree")
        page.click(".use-edit")
        wait_for(lambda: page.texts()[-1] == "sft heard: I am jo@mail.example And more.")
    with Store(stored) as store:
        up, edit = store.feedback(usable=False)  # the thumb down is taken back
        (talk,) = store.conversations(usable=True)
    assert (down.thumb, down.tags, down.consent, down.responses) == (-1, ("wrong",), False, ("",))
    assert (up.thumb, up.consent, up.responses) == (1, True, ("sft heard: I am [mail]",))
    assert edit.edit == "sft heard: I am [mail] And more."
    assert talk.messages[0]["content"] == "I am [mail]"
    assert len({down.person, up.person, edit.person}) == 1


LOSING = """window.posts = 0; const send = window.fetch;
window.fetch = async (path, settings) => {
  if (!path.endsWith("v1/feedback")) return send(path, settings);
  window.posts += 1;
  const answer = await send(path, settings);
  if (window.posts === 1) throw new TypeError("lost");
  return answer;
};"""
TWICE = "document.querySelector(arguments[0]).click(); document.querySelector(arguments[0]).click()"


@pytest.mark.parametrize(
    ("setting", "opened", "button"), [("#model", ".good", ".send-thumb"), ("#compare", "", ".better")]
)
def test_two_clicks_and_an_answer_that_is_lost_are_one_submission(driver, stored, setting, opened, button):
    with chat_server(store=stored) as (url, _):
        page = Page(driver, url)
        page.click(setting)
        page.ask("Which?")
        if opened:
            page.click(opened)
        driver.execute_script(LOSING)
        driver.execute_script(TWICE, button)  # stored, and its answer is lost
        wait_for(lambda: page.message() != "" and page.one(button).is_enabled())
        assert driver.execute_script("return window.posts") == 1
        driver.execute_script(TWICE, button)
        wait_for(lambda: page.one(button) is None)
        assert driver.execute_script("return window.posts") == 2
    with Store(stored) as store:
        assert len(store.feedback(usable=False)) == 1


def test_what_is_typed_into_an_edit_outlives_what_else_is_done(driver, stored):
    with chat_server(store=stored) as (url, _):
        page = Page(driver, url)
        page.ask("Hello")
        page.click(".edit")
        page.one(".panel textarea").send_keys(" And more.")
        page.click(".panel .agree")
        typed = "sft heard: Hello And more."

        def kept() -> bool:
            box = page.one("#turns .answer:nth-of-type(2) .agree")
            return page.one(".panel textarea").get_attribute("value") == typed and box.is_selected()

        page.ask("And then?")
        assert kept()
        page.click(".turn:nth-of-type(2) .good")
        assert kept()
        page.click(".send-thumb")
        wait_for(lambda: not page.all(".send-thumb"))
        assert kept()
        page.click(".turn:nth-of-type(2) .edit")
        assert kept()
        page.click(".use-edit")
        wait_for(lambda: page.texts() == ["Hello", typed])
        assert not page.all(".panel")
        with Store(stored) as store:
            assert [given.edit for given in store.feedback(usable=False) if given.kind == "edit"] == [typed]


def test_hostile_texts_stay_texts(driver, complaints):
    answers = iter(HOSTILE)
    with chat_server(speak=lambda *_: next(answers)) as (url, _):
        page = Page(driver, url)
        for place, text in enumerate(HOSTILE):
            page.one("#question").send_keys("<b>Q</b>")
            page.click("#send")
            wait_for(lambda place=place: not page.busy() and len(page.texts()) == 2 * place + 2)
            seen = driver.execute_script("return [...document.querySelectorAll('.text')].pop().textContent")
            words = "".join(text.replace("```html", "").replace("```", "").split())
            assert "".join(seen.split()) == words
        assert driver.execute_script("return window.owned") is None
        made = driver.execute_script("return [...document.querySelectorAll('.text *')].map(e => e.localName)")
        assert set(made) <= {"p", "pre", "code"}
        assert page.wide() <= 0
        assert complaints(driver) == []


def test_a_token_is_asked_for(driver):
    with chat_server(token="s3cret") as (url, _):
        page = Page(driver, url)
        assert page.one("#entry").is_displayed()
        for token, enters in (("wrong", False), ("s3cret", True)):
            page.one("#token").send_keys(token)
            page.click("#entry button")
            if enters:
                wait_for(lambda: page.one("#asking").is_displayed())
            else:
                wait_for(lambda: "send the token" in page.message())
        page.ask("Hello")
        assert page.texts() == ["Hello", "sft heard: Hello"]
        assert "s3cret" not in driver.current_url


def test_a_refusal_is_told(driver):
    with chat_server(speak=lambda *_: [][0]) as (url, _):
        page = Page(driver, url)
        page.ask("Hello", wait=False)
        wait_for(lambda: "the server failed: IndexError" in page.message())
        wait_for(lambda: not page.busy())
        assert page.texts() == []
        assert page.one("#question").get_property("value") == "Hello"  # to be asked again
    page.ask("?", wait=False)
    wait_for(lambda: "can't be reached" in page.message())


@pytest.mark.parametrize("width", [375, 1280])
def test_narrow_and_wide(new_browser, stored, screenshot, width):
    browser = new_browser(width, 812, touch=width < 500)
    long = "A fairly long answer, with a line of code:\n\n```\n" + "x = 1; " * 40 + "\n```\n" + "words " * 60
    with chat_server(store=stored, speak=lambda *_: long, log=True) as (url, _):
        page = Page(browser, url)
        assert "kept for 30 days" in page.one("#logged").text
        page.click("#compare")
        page.ask("How?")
        assert page.wide() <= 0
        screenshot(browser, f"chat_compare_{width}")
        page.click(".better")
        wait_for(lambda: page.one(".sides") is None)
        page.click(".bad")
        page.click("#settings summary")
        screenshot(browser, f"chat_{width}")
        assert page.wide() <= 0
