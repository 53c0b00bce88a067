"""Pages of files on a telephone: a wide table scrolls without a tall head, and a card's facts are read one by one."""

from __future__ import annotations

import pytest

from rlhf.run import page as html

pytestmark = pytest.mark.browser

FACT = ["sft: rank of its LoRA adapter (none: full weights)", "0123456789abcdef" * 4,
        "sft/manifest.json: /inputs/config/lora_rank"]  # fmt: skip


def test_tables_on_a_narrow_screen(tmp_path, new_browser):
    headers = ["", "reference", "since", "found soonest", "of the way to an alarm, at most"]
    wide = html.table((headers, [["refusal rate, rise", "5.0%", "35.0% [29.8, 40.6]", "17.7%", "alarm"]]))
    card = html.table((["what", "value", "from"], [FACT]), "card")
    hashes = html.table((["file", "sha256"], [["contamination/contamination.json", "0123456789abcdef" * 4]]), "card")
    file = html.write(tmp_path / "page.html", html.page("A page", wide + card + hashes))
    browser = new_browser(width=375, touch=True)
    browser.get(file.as_uri())
    size = "return [...document.querySelectorAll(arguments[0])].map(one => [one.clientWidth, one.clientHeight])"
    assert all(height < 50 for _, height in browser.execute_script(size, "table:not(.card) th"))
    widths = [width for width, _ in browser.execute_script(size, ".card td")]
    assert len(widths) == 5
    # a fact's parts stand one above the other: neither letter under letter nor out of sight
    assert all(300 < width < 375 for width in widths)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 375
