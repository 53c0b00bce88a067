"""What people do on the chat page and on the labelling page trains a reward model, in one store."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser.test_chat_page import Page as ChatPage
from browser.test_chat_page import chat_server
from browser.test_label_page import Page as LabelPage
from reference import recipe, tiny_chain
from reference.labelling import items
from reference.served import served, wait_for

from rlhf.collection.app import LabelConfig, create_app
from rlhf.collection.project import Project
from rlhf.collection.store import Plan, Store
from rlhf.rows.jsonl import read_rows

pytestmark = pytest.mark.browser


def chat(driver, store: Path) -> None:
    """Ask four times and compare; PPO's answer wins, and its sender agrees three times. Then a thumb."""
    with chat_server(store=store, speak=lambda policy, *_: "Better." if policy == "ppo" else "Worse.") as (url, _):
        page = ChatPage(driver, url)
        page.click("#compare")
        for n in range(4):
            page.ask(f"Question {n}")
            if n < 3:
                page.click(".agree")
            better = ["Better." in side.text for side in page.all(".sides .answer")].index(True)
            page.all(".better")[better].click()
            wait_for(lambda: page.one(".sides") is None)
        page.click("#compare")
        page.ask("Question 5")
        page.all(".good")[-1].click()
        page.click(".agree")
        page.click(".send-thumb")
        wait_for(lambda: page.one(".panel") is None)


def label(driver, file: Path) -> None:
    """Rank the responses to six questions by keys alone."""
    from selenium.webdriver.common.keys import Keys

    with Store(file) as store:
        store.set_plan(Plan(seed=1, gold_share=0.0))
        store.add_items(items(6, k=3))
        config = LabelConfig()
        with served(create_app(store, Project("Ranking", "", (), ()), config), config) as url:
            page = LabelPage(driver, url, store.invite("anna"))
            for _ in range(6):
                page.press(*"3=12", Keys.ENTER)
            assert page.text("news") == "All done, thank you!"


def test_labels_and_feedback_train_a_reward_model(tmp_path, new_browser, tiny_model, tiny_tokenizer):
    from reward_models import RewardModel

    store = tmp_path / "labels.db"
    chat(new_browser(), store)
    label(new_browser(), store)
    base = tiny_chain.save_base(tmp_path, tiny_model, tiny_tokenizer)
    out = tmp_path / "exported"
    for kind, count in (("rankings", 6 + 3), ("kto", 6 * 3 + 3 * 2 + 1)):
        done = recipe.run("collected", "export", "--store", store, "--format", kind, "--output_dir", out)
        assert done.code == 0, done.err
        assert len([*read_rows(out / f"{kind}.jsonl")]) == count, kind
    rows = [row for _, row in read_rows(out / "rankings.jsonl")]
    said = [row for row in rows if row["labeler_kind"] == "user"]
    for row in said:
        assert row["responses"][row["ranks"].index(1)] == "Better."
        assert row["policy"][row["ranks"].index(1)] == "ppo"
    assert {row["labeler"] for row in rows if row not in said} == {"anna"}
    folder = tmp_path / "my" / "reward_model"
    trained = recipe.run(
        "reward_model", "--model", base, "--train_data", out / "rankings.jsonl", "--output_dir", folder,
        "--prompts_per_batch", 2, "--preflight", "false",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    score = RewardModel.load(folder)
    assert all(abs(value) < 100 for value in score(["Question 9", "Question 9"], ["Yes.", "No."]))
