"""The report in a real browser, as a person uses it: hover, zoom, log scale, playing, a phone, a page that renews."""

import numpy as np
import pytest
from browsing import faults, fits, js
from waiting import wait_until

from cogcommon.files.locks import open_locked
from cogcommon.media.video import write_mp4
from cogtrain.report.page import write_report
from cogtrain.runs.folder import LOCK_FILE, asked_to_stop

LABELS = "return [...document.querySelectorAll('#plot-loss svg text')].map(text => text.textContent)"


def points_shown(browser):
    return js(
        browser, "return document.querySelector('#plot-loss polyline.raw').getAttribute('points').split(' ').length"
    )


def test_a_page_answers(browser, recorded_run):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    browser.get(f"file://{write_report(recorded_run)}")
    svg = browser.find_element(By.CSS_SELECTOR, "#plot-loss svg")
    wait_until(lambda: "drawn" in svg.get_attribute("class"))
    ActionChains(browser).move_to_element(svg).perform()
    tip = browser.find_element(By.CSS_SELECTOR, "#plot-loss .tip")
    wait_until(tip.is_displayed)
    assert "each step: 0.0" in tip.text and "held out: 0.15" in tip.text
    everything = points_shown(browser)
    ActionChains(browser).move_to_element(svg).click_and_hold().move_by_offset(200, 0).release().perform()
    assert 2 < points_shown(browser) < everything / 2
    browser.find_element(By.CSS_SELECTOR, "#plot-loss .back").click()
    assert points_shown(browser) == everything
    linear = js(browser, LABELS)
    browser.find_element(By.CSS_SELECTOR, "#plot-loss .log").click()
    assert js(browser, LABELS) != linear
    before = js(browser, "return document.querySelector('#plot-loss polyline.smooth').getAttribute('points')")
    js(browser, "const s = document.querySelector('.smoothing'); s.value = 2; s.dispatchEvent(new Event('input'))")
    assert js(browser, "return document.querySelector('#plot-loss polyline.smooth').getAttribute('points')") != before


def test_videos_are_still_until_they_are_played_and_then_all_at_once(browser, recorded_run, served):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    frames = (np.arange(9)[:, None, None, None] * 20 + np.zeros((9, 64, 96, 3))).astype(np.uint8)
    for name in ("clips/0.mp4", "step-000000/0.mp4", "step-000020/0.mp4"):
        (recorded_run / "validation" / name).parent.mkdir(parents=True, exist_ok=True)
        write_mp4(recorded_run / "validation" / name, frames, 8)
    with served(recorded_run) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        labels = wait_until(
            lambda: js(browser, "return [...document.querySelectorAll('.row figcaption')].map(c => c.innerText)")
        )
        assert labels == ["the clip itself", "step 20", "base model"]  # live: the newest first
        videos = "return [...document.querySelectorAll('video')]"
        wait_until(lambda: js(browser, f"{videos}.every(v => v.readyState >= 2)"))
        assert js(browser, f"{videos}.every(v => v.paused && !v.controls)")
        ActionChains(browser).move_to_element(browser.find_element(By.CSS_SELECTOR, "video")).perform()
        wait_until(lambda: js(browser, f"{videos}.map(v => v.controls)") == [True, False, False])
        browser.find_element(By.CSS_SELECTOR, ".together").click()
        wait_until(lambda: js(browser, f"{videos}.every(v => !v.paused && v.currentTime > 0)"))


def test_a_live_page_renews_itself_and_keeps_what_is_looked_at(browser, recorded_run, served, step_line):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    with served(recorded_run) as port, open_locked(recorded_run / LOCK_FILE):
        browser.get(f"http://127.0.0.1:{port}/")
        svg = browser.find_element(By.CSS_SELECTOR, "#plot-loss svg")
        wait_until(lambda: "drawn" in svg.get_attribute("class"))
        ActionChains(browser).move_to_element(svg).click_and_hold().move_by_offset(150, 0).release().perform()
        zoomed = js(browser, LABELS)
        state = browser.find_element(By.CSS_SELECTOR, "[data-part=state]")
        assert "38 of 40 steps" in state.text and "left" in state.text
        with (recorded_run / "metrics.jsonl").open("a") as stream:
            stream.write(step_line(39))
        wait_until(lambda: "39 of 40 steps" in state.text)
        assert js(browser, LABELS) == zoomed
        browser.find_element(By.CSS_SELECTOR, ".stop").click()
        wait_until(lambda: "asked to save and stop" in state.text)
        assert asked_to_stop(recorded_run)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_fits_a_phone_in_light_and_dark(browser, recorded_run, width, dark):
    assert fits(browser, f"file://{write_report(recorded_run)}", width, dark=dark)
    assert faults(browser) == []
