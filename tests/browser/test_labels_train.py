"""What people do on the chat page and on the labelling page trains a reward model, in one store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reference import recipe, tiny_chain
from reference.labelling import items
from reference.policy_server import ScriptedEngine, serving
from reference.served import served, wait_for

from rlhf.collection.app import LabelConfig, create_app
from rlhf.collection.project import Project
from rlhf.collection.store import Plan, Store
from rlhf.rows.jsonl import read_rows
from rlhf.serving.app import Service
from rlhf.serving.config import ServingConfig
from rlhf.serving.keeping import Keeper

pytestmark = pytest.mark.browser


def chat(driver: Any, store: Path) -> None:
    """Ask four times and compare; PPO's answer wins, and its sender agrees three times. Then a thumb."""
    from selenium.webdriver.common.keys import Keys

    def one(selector: str) -> Any:
        return next(iter(driver.find_elements("css selector", selector)), None)

    def click(selector: str, place: int = 0) -> None:
        button = driver.find_elements("css selector", selector)[place]
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)  # not under the page's foot
        button.click()

    def ask(question: str, shown: str) -> None:
        one("#question").send_keys(question, Keys.ENTER)
        wait_for(lambda: one("#turns").get_attribute("aria-busy") != "true" and question in one("#turns").text)
        wait_for(lambda: one(shown))

    engine = ScriptedEngine(speak=lambda policy, *_: "Better." if policy == "ppo" else "Worse.")
    config = ServingConfig(store=str(store))
    with serving(Service(engine, config, Keeper(config, engine.models))) as url:
        driver.get(url)
        wait_for(lambda: one("#model option"))
        click("#compare")
        for n in range(4):
            ask(f"Question {n}", ".better:not([disabled])")
            if n < 3:
                click(".agree")
            sides = driver.find_elements("css selector", ".sides .answer")
            better = ["Better." in side.text for side in sides].index(True)
            click(".better", better)
            wait_for(lambda: one(".sides") is None)
        click("#compare")
        ask("Question 5", ".good")
        click(".good", -1)
        click(".agree")
        click(".send-thumb")
        wait_for(lambda: one(".panel") is None)


def label(driver: Any, file: Path) -> None:
    """Rank the responses to six questions by keys alone: the third and the first tie, the second is last."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def settled() -> bool:
        return driver.find_element("tag name", "body").get_attribute("aria-busy") == "false"

    with Store(file) as store:
        store.set_plan(Plan(seed=1, gold_share=0.0))
        store.add_items(items(6, k=3))
        config = LabelConfig()
        with served(create_app(store, Project("Ranking", "", (), ()), config), config) as url:
            driver.get(f"{url}/#invite={store.invite('anna')}")
            wait_for(settled)
            for key in (*"3=12", Keys.ENTER) * 6:
                ActionChains(driver).send_keys(key).perform()
                wait_for(settled)
            assert driver.find_element("id", "news").text == "All done, thank you!"


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
        "--prompts_per_batch", 4, "--preflight", "false",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    score = RewardModel.load(folder)
    assert all(abs(value) < 100 for value in score(["Question 9", "Question 9"], ["Yes.", "No."]))
