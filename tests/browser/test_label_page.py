"""The labelling page in a real Chromium: keys, mouse, touch, two people, reloads, hostile texts, a narrow screen."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from reference.served import served, wait_for

from rlhf.collection.app import LabelConfig, create_app
from rlhf.collection.project import Criterion, Project
from rlhf.collection.store import Candidate, Item, Plan, Store

pytestmark = pytest.mark.browser

GUIDELINES = """# How to rank

Prefer what is **true**, then what is *useful*.

- Read every response
- Ties are fine: `2 = 3`

## Not like this
<script>document.title = "owned"</script> [a link](javascript:alert(1))
"""
PROJECT = Project(
    "Helpful answers",
    GUIDELINES,
    (Criterion("helpfulness", ("1", "2", "3", "4", "5"), "Does it do what was asked?"),
     Criterion("tone", ("rude", "plain", "kind"))),
    ("unsafe", "personal data", "broken prompt"),
)  # fmt: skip
LONG = "Rome was founded, so the story goes, by two brothers whom a she-wolf had fed. " * 6

HOSTILE = (
    "<script>window.owned = 1</script>", "<img src=x onerror='window.owned = 1'>", "<svg onload='window.owned = 1'>",
    "<iframe srcdoc='<script>parent.owned = 1</script>'></iframe>", "<a href='javascript:window.owned = 1'>click</a>",
    "</pre></article><script>window.owned = 1</script>", "<!-- --><b>bold</b>", "<style>body{display:none}</style>",
    "<link rel=stylesheet href='//evil.example/x.css'>", "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<base href='//evil.example/'>", "<form action='//evil.example'><input name=x></form>",
    "<object data='data:text/html,x'></object>", "<embed src='data:text/html,x'>", "<body onload='window.owned = 1'>",
    "<details open ontoggle='window.owned = 1'>x</details>", "<input autofocus onfocus='window.owned = 1'>",
    "<video><source onerror='window.owned = 1'></video>", "<math><mtext><script>window.owned=1</script></mtext></math>",
    "<template><script>window.owned = 1</script></template>", "<noscript><p title='</noscript><img src=x>'>",
    "&lt;b&gt;escaped&lt;/b&gt; &amp; &nbsp;", "${window.owned = 1}", "{{constructor.constructor('window.owned=1')()}}",
    "'\"`><script>window.owned = 1</script>", "javascript:window.owned = 1", "\u202eright to left\u202c and back",
    "\u0000\u0007\u001b[31mcontrol\u001b[0m", "word" * 400, "\u2028\u2029<\u200bscript>\ufeff", "a\n\n\n\tb   c \r\n d",
)  # fmt: skip

MARKUP = (
    "script", "img", "svg", "iframe", "a", "style", "link", "form", "object", "embed", "video", "math", "meta", "base",
    "template", "noscript", "b", "i",
)  # fmt: skip
"""What only a text could have brought into the page."""


def items(count: int, k: int = 4) -> list[Item]:
    return [
        Item(
            [{"role": "user", "content": f"Question {n}: who founded Rome?"}],
            tuple(Candidate(f"Answer {n}.{i}. {LONG if i % 3 == 1 else ''}") for i in range(k)),
        )
        for n in range(count)
    ]


class Page:
    """The page as a person sees it."""

    def __init__(self, browser: Any, url: str, token: str) -> None:
        self.browser, self.url = browser, url
        browser.get(f"{url}/#invite={token}")
        self.settled()

    def settled(self) -> None:
        wait_for(lambda: self.browser.find_element("tag name", "body").get_attribute("aria-busy") == "false")

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.browser).send_keys(key).perform()
            self.settled()

    def click(self, name: str) -> None:
        self.browser.find_element("id", name).click()
        self.settled()

    def text(self, name: str) -> str:
        return self.browser.find_element("id", name).text

    def cards(self) -> list[Any]:
        return self.browser.find_elements("css selector", ".card")

    def shown(self) -> list[str]:
        """Return the responses' texts, character by character, as they stand in the page."""
        script = "return [...document.querySelectorAll('.card .text')].map(one => one.textContent)"
        return self.browser.execute_script(script)

    def wide(self) -> int:
        """Return by how many pixels the page is wider than the screen."""
        return self.browser.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    with Store(tmp_path / "labels.db") as store:
        store.set_plan(Plan(seed=1, gold_share=0.0))
        yield store


@contextlib.contextmanager
def page_server(store: Store, project: Project = PROJECT) -> Iterator[str]:
    config = LabelConfig()
    with served(create_app(store, project, config), config) as url:
        yield url


@pytest.fixture
def url(store) -> Iterator[str]:
    with page_server(store) as url:
        yield url


def plain(store: Store) -> Any:
    """Return a server of a project that asks for the ranking alone."""
    return page_server(store, Project("Ranking", "", (), ("unsafe", "odd")))


def ranks_shown(store: Store) -> tuple[float, ...]:
    """Return the last judgment's ranks in the order in which its annotator saw the candidates."""
    last = max(store.judgments(), key=lambda judgment: judgment.id)
    assert last.ranks is not None
    return tuple(last.ranks[place] for place in last.order)


def test_nine_responses_with_ties_by_keys_alone(store, driver, complaints, screenshot):
    from selenium.webdriver.common.keys import Keys

    store.add_items(items(2, k=9))
    with plain(store) as url:
        page = Page(driver, url, store.invite("anna"))
        assert len(page.cards()) == 9
        page.press(*"3=193")  # 3 is ranked already
        assert page.text("message") == "3 is ranked already; Backspace undoes."
        assert page.text("ranking") == "3 = 1 > 9"
        page.press(Keys.BACKSPACE, *"8=6=", Keys.ENTER)
        assert "After = comes the number" in page.text("message")
        page.press(*"425", Keys.ENTER)
        assert page.text("message") == "Not ranked yet: 7, 9."
        page.press(*"97", "=")
        assert page.text("ranking") == "3 = 1 > 8 = 6 = 4 > 2 > 5 > 9 > 7"
        screenshot(driver, "label-nine-1280")
        assert not store.judgments()
        page.press(Keys.ENTER)
        assert ranks_shown(store) == (1, 3, 1, 2, 4, 2, 6, 2, 5)
        assert len(store.judgments()) == 1
        assert page.text("ranking").startswith("Best first")
        assert page.text("count") == "1 done, 1 left"
        page.press(*"123456789", Keys.ENTER)
        assert page.text("news") == "All done, thank you!"
        screenshot(driver, "label-done-1280")
        page.press("b")
        assert page.text("ranking") == "1 > 2 > 3 > 4 > 5 > 6 > 7 > 8 > 9"
    assert complaints(driver) == []


def test_every_key_and_what_is_stored(store, url, driver, complaints, screenshot):
    from selenium.webdriver.common.keys import Keys

    store.add_items(items(3, k=3))
    page = Page(driver, url, store.invite("anna"))
    assert driver.current_url == f"{url}/"  # the token has left the address
    assert driver.execute_script("return document.cookie") == ""
    assert driver.title == page.text("title") == "Helpful answers"
    screenshot(driver, "label-begin-1280")
    page.press("?")
    assert driver.find_element("id", "keys").is_displayed()
    screenshot(driver, "label-keys-1280")
    page.press("1", "?")
    assert not driver.find_element("id", "keys").is_displayed()
    assert page.text("ranking").startswith("Best first")
    page.press(*"2=31", Keys.ENTER)
    assert page.text("message") == "No helpfulness yet for: 1, 2, 3."
    for place, (help_, tone) in enumerate([(5, 3), (2, 1), (4, 2)]):
        for row, value in enumerate((help_, tone)):
            driver.find_element("css selector", f"input[name=rating-{place}-{row}][value='{value}']").click()
    best = page.shown()[1]
    page.press("e")
    field = driver.find_element("id", "rewrite")
    assert field.get_property("value") == best  # no letter e in it
    field.send_keys(" And 12 more words")
    page.press(Keys.ESCAPE, "c")
    driver.find_element("id", "comment").send_keys("Response 3 is odd\n= 1?")
    page.press(Keys.ESCAPE, "f")
    assert driver.find_element("id", "flagging").is_displayed()
    page.press("2")
    assert page.text("ranking") == "2 = 3 > 1"
    screenshot(driver, "label-full-1280")
    page.press(Keys.ENTER)
    (said,) = store.judgments()
    shown = [said.order[place] for place in range(3)]
    assert ranks_shown(store) == (2, 1, 1)
    assert [said.ratings[place] for place in shown] == [
        {"helpfulness": 5, "tone": 3}, {"helpfulness": 2, "tone": 1}, {"helpfulness": 4, "tone": 2},
    ]  # fmt: skip
    assert said.rewrite == f"{best} And 12 more words"
    assert said.rewrite_of == shown[1]
    assert (said.flags, said.comment) == (("personal data",), "Response 3 is odd\n= 1?")
    assert said.seconds is not None
    assert 0 < said.seconds < 300
    assert said.guideline == store.guideline().hash
    # a flag alone, after a second Enter
    page.press("f", "1", Keys.ENTER)
    assert "press Enter again" in page.text("message")
    page.press(Keys.ENTER)
    flagged = max(store.judgments(), key=lambda one: one.id)
    assert (flagged.ranks, flagged.flags) == (None, ("unsafe",))
    # skip: at once where nothing is begun, else after a second S
    page.press("1", "s")
    assert "Press S again" in page.text("message")
    assert page.text("news") != "All done, thank you!"
    page.press("s")
    assert page.text("news") == "All done, thank you!"
    assert len(store.judgments()) == 2
    assert complaints(driver) == []


def test_an_item_stays_with_who_is_at_work_however_short_the_lease(store, driver, complaints):
    from selenium.webdriver.common.keys import Keys

    store.set_plan(Plan(lease_seconds=3))
    store.add_items(items(1, k=3))
    store.add_annotator("ben")
    with plain(store) as url:
        page = Page(driver, url, store.invite("anna"))
        end = time.monotonic() + 5
        while time.monotonic() < end:
            assert store.lease("ben") == ()
            time.sleep(0.1)
        page.press(*"123", Keys.ENTER)
        assert page.text("news") == "All done, thank you!"
    assert [said.annotator for said in store.judgments()] == ["anna"]
    assert complaints(driver) == []


def test_back_edits_the_last_item_and_goes_on(store, driver, complaints, screenshot):
    from selenium.webdriver.common.keys import Keys

    store.add_items(items(3, k=3))
    with plain(store) as url:
        page = Page(driver, url, store.invite("anna"))
        page.press("b")
        assert page.text("message") == "You have judged no earlier item."
        prompts = []
        for keys in ("123", "3=21"):
            prompts.append(page.text("prompt"))
            page.press(*keys, Keys.ENTER)
        current = page.text("prompt")
        page.press("2")  # a draft of the current item, which waits
        page.press("b")
        assert driver.find_element("id", "earlier").is_displayed()
        assert (page.text("prompt"), page.text("ranking")) == (prompts[1], "2 = 3 > 1")
        screenshot(driver, "label-earlier-1280")
        page.press("b")
        assert (page.text("prompt"), page.text("ranking")) == (prompts[0], "1 > 2 > 3")
        page.press("b")
        assert page.text("prompt") == prompts[0]
        page.press(Keys.BACKSPACE, "=", "3", Keys.ENTER)
        assert (page.text("prompt"), page.text("ranking")) == (current, "2")
        assert len(store.judgments()) == 2
        assert len(store.judgments(superseded=True)) == 3
        assert ranks_shown(store) == (1, 2, 2)
        page.press("b")
        page.click("leave_earlier")
        assert (page.text("prompt"), page.text("ranking")) == (current, "2")
        assert len(store.judgments(superseded=True)) == 3
    assert complaints(driver) == []


def test_nothing_is_said_while_a_submission_is_under_way(store, url, driver, complaints):
    """What came after it was sent would be neither stored nor kept."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    store.add_items(items(2, k=2))
    page = Page(driver, url, store.invite("anna"))
    for place in range(2):
        for row in range(2):
            driver.find_element("css selector", f"input[name=rating-{place}-{row}][value='2']").click()
    page.press("c")
    driver.find_element("id", "comment").send_keys("First")
    page.press(Keys.ESCAPE, *"f112")
    driver.execute_script(
        "const real = window.fetch; window.fetch = async (path, settings) => {"
        "if (path === 'api/judgments') await new Promise((go) => { window.go = go; }); return real(path, settings); };"
    )
    ActionChains(driver).send_keys(Keys.ENTER).perform()
    wait_for(lambda: driver.execute_script("return typeof window.go") == "function")
    driver.find_element("id", "comment").send_keys(" and more")
    driver.find_element("css selector", "input[name=rating-0-0][value='5']").click()
    driver.find_element("css selector", "#flags input").click()  # would take the flag back
    assert driver.find_element("id", "comment").get_property("value") == "First"
    assert driver.find_element("css selector", "input[name=rating-0-0][value='2']").is_selected()
    assert driver.find_element("css selector", "#flags input").is_selected()
    driver.execute_script("window.go()")
    page.settled()
    wait_for(lambda: page.text("count") == "1 done, 1 left")
    (judgment,) = store.judgments()
    assert (judgment.comment, judgment.flags) == ("First", ("unsafe",))
    page.press("c")
    driver.find_element("id", "comment").send_keys("Second")
    assert driver.find_element("id", "comment").get_property("value") == "Second"


def test_two_annotators_in_two_browsers(store, new_browser, complaints):
    from selenium.webdriver.common.keys import Keys

    store.add_items(items(3, k=4), overlap=2)
    with plain(store) as url:
        anna, ben = (Page(new_browser(), url, store.invite(name)) for name in ("anna", "ben"))
        for _ in range(3):
            assert anna.text("prompt") == ben.text("prompt")
            anna.press("1", "2")
            ben.press("4", "=", "3", "2")
            assert anna.text("ranking") == "1 > 2"
            anna.press("3", "4", Keys.ENTER)
            ben.press("1", Keys.ENTER)
        assert anna.text("news") == ben.text("news") == "All done, thank you!"
        said = store.judgments()
        assert sorted((one.item, one.annotator) for one in said) == [
            (n, who) for n in (1, 2, 3) for who in ("anna", "ben")
        ]
        expected = {"anna": (1, 2, 3, 4), "ben": (3, 2, 1, 1)}
        for one in said:
            assert one.ranks is not None
            assert tuple(one.ranks[place] for place in one.order) == expected[one.annotator]
        assert len({one.order for one in said}) > 1  # each in an order of their own
        for page in (anna, ben):
            assert complaints(page.browser) == []


def test_one_item_goes_to_one_and_the_other_is_told_to_wait(store, new_browser):
    store.add_items(items(1))
    with plain(store) as url:
        anna, ben = (Page(new_browser(), url, store.invite(name)) for name in ("anna", "ben"))
        assert ben.text("news") == "Nothing to do right now: others are at work on what is left."
        prompt = anna.text("prompt")
        anna.press("s")
        ben.click("look_again")
        assert ben.text("prompt") == prompt


def test_a_reload_in_the_middle_loses_nothing(store, url, driver, complaints):
    from selenium.webdriver.common.keys import Keys

    store.add_items(items(2, k=5))
    page = Page(driver, url, store.invite("anna"))
    page.press(*"4=2")
    driver.find_element("css selector", "input[name=rating-1-1][value='3']").click()
    page.press("f", "3", "c")
    driver.find_element("id", "comment").send_keys("half a thou")
    page.press(Keys.ESCAPE, "e")
    driver.find_element("id", "rewrite").send_keys(" Better.")
    before = page.shown(), page.text("ranking"), page.text("prompt")
    rewrite = driver.find_element("id", "rewrite").get_property("value")
    time.sleep(1.1)
    driver.refresh()
    page.settled()
    assert (page.shown(), page.text("ranking"), page.text("prompt")) == before
    assert page.text("ranking") == "4 = 2"
    assert driver.find_element("css selector", "input[name=rating-1-1][value='3']").is_selected()
    assert driver.find_element("id", "comment").get_property("value") == "half a thou"
    assert driver.find_element("id", "rewrite").get_property("value") == rewrite
    assert [box.is_selected() for box in driver.find_elements("css selector", "#flags input")] == [False, False, True]
    kept = driver.execute_script("return Object.values(localStorage)[0]")
    assert json.loads(kept)["seconds"] >= 1  # the time before the reload counts
    page.press("1")
    assert page.text("ranking") == "4 = 2 > 1"
    assert complaints(driver) == []


def test_a_server_that_is_away_for_a_moment_costs_nothing(store, tmp_path, driver):
    from selenium.webdriver.common.keys import Keys

    store.add_items(items(2, k=3))
    with plain(store) as url:
        page = Page(driver, url, store.invite("anna"))
        page.press(*"213")
    page.press(Keys.ENTER)  # nobody listens
    assert "can't be reached" in page.text("message")
    assert page.text("ranking") == "2 > 1 > 3"
    config = LabelConfig()
    with served(create_app(store, Project(), config), config, port=int(url.rpartition(":")[2])):
        page.press(Keys.ENTER)
        assert ranks_shown(store) == (2, 1, 3)
        assert len(store.judgments(superseded=True)) == 1


def test_thirty_hostile_texts_are_texts(store, new_browser, complaints, screenshot):
    """As responses, prompts, flags, criteria, title and guidelines: shown to the letter, none of them markup."""
    assert len(set(HOSTILE)) >= 30
    groups = [HOSTILE[start : start + 8] for start in range(0, len(HOSTILE), 8)]
    for number, texts in enumerate(groups):
        turns = [{"role": "user", "content": f"{number} {texts[0]}"}, {"role": "assistant", "content": texts[-1]},
                 {"role": "user", "content": texts[1]}]  # fmt: skip
        store.add_items([Item(turns, tuple(Candidate(text) for text in texts))])
    hostile = "<img src=x onerror='window.owned = 1'>"
    criteria = (Criterion(hostile, ("<b>1</b>", "<i>2</i>"), "' onclick='window.owned = 1"),)
    project = Project(hostile, "\n\n".join(HOSTILE), criteria, (hostile, "</div><script>window.owned=1</script>"))
    seen = set()
    with page_server(store, project) as url:
        browser = new_browser()
        page = Page(browser, url, store.invite("anna"))
        elements = "return document.querySelectorAll(arguments[0]).length"
        for number in range(len(groups)):
            seen |= set(page.shown())
            count = len(page.cards())
            for tag in MARKUP:
                assert browser.execute_script(elements, f"#work {tag}, header {tag}") == 0
            assert browser.execute_script(elements, "[onerror], [onload], [onclick], [onfocus], [ontoggle]") == 0
            assert browser.execute_script(elements, "#prompt .text") == 3
            assert browser.execute_script(elements, ".card input") == 2 * count
            assert browser.execute_script("return window.owned === undefined")
            assert browser.find_element("id", "work").is_displayed()
            assert page.wide() <= 0
            screenshot(browser, f"label-hostile-{number}-1280")
            page.press("s")
        assert browser.title == page.text("title") == hostile
        assert complaints(browser) == []
    assert seen == set(HOSTILE), "a text was changed"


def test_by_mouse_alone(store, url, driver, complaints):
    store.add_items(items(2, k=4))
    page = Page(driver, url, store.invite("anna"))

    def choose(*numbers: int) -> None:
        for number in numbers:
            page.cards()[number - 1].find_element("css selector", ".choose").click()

    choose(2, 4)
    page.click("tie")
    page.cards()[0].find_element("css selector", ".text").click()  # anywhere on the card
    assert page.text("ranking") == "2 > 4 = 1"
    choose(2)  # and out of it again
    assert page.text("ranking") == "4 = 1"
    page.click("undo")
    choose(3)
    assert page.text("ranking") == "4 = 3"
    choose(1, 2)
    for place in range(4):
        for row in range(2):
            driver.find_element("css selector", f"input[name=rating-{place}-{row}][value='2']").click()
    assert page.text("ranking") == "4 = 3 > 1 > 2"  # a click on a rating ranks nothing
    page.click("flag")
    driver.find_elements("css selector", "#flags input")[1].click()
    page.click("note")
    page.click("submit")
    (said,) = store.judgments()
    assert (ranks_shown(store), said.flags) == ((2, 3, 1, 1), ("personal data",))
    page.click("back")
    assert page.text("ranking") in ("3 = 4 > 1 > 2", "4 = 3 > 1 > 2")
    page.click("leave_earlier")
    page.click("help")
    page.click("close_keys")
    page.click("skip")
    assert page.text("news") == "All done, thank you!"
    assert complaints(driver) == []


def test_a_phone(store, new_browser, complaints, screenshot):
    store.add_items(items(1, k=9))
    store.add_items(
        [Item([{"role": "user", "content": "long " + "word" * 300}], (Candidate("x" * 3000), Candidate("b")))]
    )
    with page_server(store) as url:
        browser = new_browser(375, 800, touch=True)
        page = Page(browser, url, store.invite("anna"))
        screenshot(browser, "label-begin-375")

        def tap(element: Any) -> None:
            script = """const [element, done] = arguments
                element.scrollIntoView({block: 'center'})
                const box = () => element.getBoundingClientRect()
                const then = () => done([box().x + box().width / 2, box().y + box().height / 2])
                requestAnimationFrame(() => requestAnimationFrame(then))  // a finger lands on what is drawn"""
            box = browser.execute_async_script(script, element)
            point = [{"x": box[0], "y": box[1]}]
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": point})
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
            page.settled()
            time.sleep(0.35)  # or two taps are a double one

        assert browser.execute_script("return innerWidth") == 375
        assert page.wide() <= 0
        for number in (9, 1, 2, 3, 4, 5, 6, 7, 8):
            tap(page.cards()[number - 1].find_element("css selector", ".choose"))
            wait_for(lambda last=str(number): page.text("ranking").endswith(last))
        wait_for(lambda: page.text("ranking") == "9 > 1 > 2 > 3 > 4 > 5 > 6 > 7 > 8")
        tap(browser.find_element("id", "undo"))
        tap(browser.find_element("id", "tie"))
        tap(page.cards()[7].find_element("css selector", ".choose"))
        wait_for(lambda: page.text("ranking").endswith("6 > 7 = 8"))
        tap(browser.find_element("id", "flag"))
        tap(browser.find_element("id", "note"))
        browser.find_element("id", "comment").send_keys("from a phone")
        assert page.wide() <= 0
        screenshot(browser, "label-full-375")
        for name in ("flag", "edit", "note", "back", "help", "submit", "skip", "tie", "undo"):
            size = browser.find_element("id", name).rect
            assert size["height"] >= 36, name
        tap(browser.find_element("id", "help"))
        screenshot(browser, "label-keys-375")
        assert page.wide() <= 0
        tap(browser.find_element("id", "close_keys"))
        tap(browser.find_element("id", "skip"))
        tap(browser.find_element("id", "skip"))
        wait_for(lambda: len(page.cards()) == 2)
        assert page.wide() <= 0  # words of thousands of letters break
        screenshot(browser, "label-long-375")
        assert complaints(browser) == []


def test_nobody_without_an_invitation_sees_anything(store, url, driver, screenshot):
    store.add_items(items(1))
    for address in (f"{url}/", f"{url}/#invite=guessed"):
        driver.get(address)
        page = Page.__new__(Page)
        page.browser = driver
        page.settled()
        assert page.text("news") == "Please open your invitation link in this browser."
        assert "Rome" not in driver.page_source
    screenshot(driver, "label-nobody-1280")
    token = store.invite("anna")
    driver.execute_script(f"location.hash = 'invite={token}'")  # a link that is opened in the tab that is here
    wait_for(lambda: driver.find_element("id", "work").is_displayed())
    assert token not in driver.current_url
    assert token not in driver.page_source


def test_who_leaves_takes_the_drafts_along(store, url, driver):
    store.add_items(items(1))
    page = Page(driver, url, store.invite("anna"))
    page.press("1", "?")
    page.click("leave")
    assert page.text("news").startswith("You have left")
    assert driver.execute_script("return localStorage.length") == 0
    driver.refresh()
    page.settled()
    assert page.text("news") == "Please open your invitation link in this browser."


def test_a_single_response_is_reviewed_not_ranked(store, new_browser):
    from rlhf.collection.review import project_of

    store.add_items(items(1, k=1))
    with page_server(store, project_of(["insult"])) as url:
        page = Page(new_browser(), url, store.invite("anna"))
        assert page.text("ranking") == "Press 1 or tap the response, then rate it."
        page.press("1")
        page.browser.find_elements("css selector", ".card input[type=radio]")[1].click()
        page.press("f", "1")
        page.click("submit")
        wait_for(lambda: store.judgments())
    (said,) = store.judgments()
    assert (said.ratings[0], said.flags) == ({"decision": 2}, ("insult",))
