"""The page in a real browser, from the disk: keys, slider, narrow and dark screens, and no error in its console."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_runs import make_run

from rlcm_fast.report import read_runs, write_report

pytestmark = pytest.mark.browser

EVIL = "<script>document.title = 'broken into'</script><img src=x onerror=\"document.title = 'broken into'\">"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write_report(read_runs([make_run(folder / "run", prompts=[EVIL, "a blue square"])]), folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    runs = [make_run(folder / f"run_{seed}", seed=seed) for seed in (0, 1)]
    write_report(read_runs([*runs, make_run(folder / "other", 15)]), folder / "report.html")
    return folder / "report.html"


def open_page(browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get_log("browser")  # forgets what earlier pages said
    browser.get(path.as_uri())


def shown_frames(browser: Any) -> list[str]:
    script = "return [...document.querySelectorAll('[data-frame]')].filter(f => !f.hidden).map(f => f.dataset.frame)"
    return browser.execute_script(script)


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("which", ["report", "comparison"])
def test_it_opens_from_the_disk_without_an_error_and_without_sideways_scrolling(browser, request, which, width):
    open_page(browser, request.getfixturevalue(which), width)
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert (
        browser.execute_script(
            "return performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:'))"
        )
        == []
    )


def test_every_image_is_drawn(browser, report):
    open_page(browser, report)
    browser.execute_script("document.querySelectorAll('img').forEach(i => { i.loading = 'eager'; })")
    script = "return Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
    widths = browser.execute_async_script(script.replace("return ", "") + ".then(arguments[0], e => arguments[0]([0]))")
    assert len(widths) > 20 and min(widths) > 0


def test_the_slider_moves_with_the_keyboard_alone(browser, report):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    open_page(browser, report)
    assert shown_frames(browser) == ["10"]
    slider = browser.find_element(By.CSS_SELECTOR, "input[type=range]")
    slider.send_keys(Keys.HOME)
    assert shown_frames(browser) == ["0"]
    slider.send_keys(Keys.ARROW_RIGHT)
    assert shown_frames(browser) == ["5"]
    assert slider.get_attribute("aria-valuetext") == "after 5 iterations"
    assert browser.find_element(By.TAG_NAME, "output").text == "5"
    assert slider.accessible_name == "Finished iterations"


def test_the_first_tab_skips_to_the_report_and_the_second_opens_numbers(browser, report):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    open_page(browser, report)
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.switch_to.active_element.text == "Skip to the report"
    ActionChains(browser).send_keys(Keys.ENTER, Keys.TAB).perform()
    first = browser.switch_to.active_element
    assert first.tag_name == "summary" and "Numbers of" in first.get_attribute("textContent")
    ActionChains(browser).send_keys(Keys.ENTER, Keys.TAB).perform()
    table = browser.switch_to.active_element  # can be scrolled with the arrow keys
    assert table.aria_role == "region" and table.accessible_name.startswith("Numbers of")


def test_a_prompt_cannot_break_in(browser, report):
    open_page(browser, report)
    assert browser.title == "Run run"
    assert EVIL in browser.execute_script("return document.body.textContent")
    injected = (
        "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s)"
    )
    browser.execute_script(injected)  # as if escaping had failed: the page's own policy stops it
    assert browser.execute_script("return window.broken === undefined")
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out(browser, report, scheme):
    open_page(browser, report, scheme=scheme)
    script = """
        const style = getComputedStyle(document.documentElement);
        const names = ['--ink', '--muted', '--link', '--good', '--mixed', '--bad', '--series-0', '--series-1',
                       '--series-2', '--series-3', '--series-4', '--series-5'];
        return ['--paper', '--raised', ...names].map(name => [name, style.getPropertyValue(name).trim()]);
    """
    colours = dict(browser.execute_script(script))
    for name, colour in colours.items():
        least = 3.0 if name.startswith("--series") else 4.5  # WCAG 2.2: graphics, text
        if name not in ("--paper", "--raised"):
            for ground in ("--paper", "--raised"):
                assert contrast(colour, colours[ground]) >= least, (scheme, name, ground)
    stroke = browser.execute_script(
        "return getComputedStyle(document.querySelector('.chart > svg path[style*=series]')).stroke"
    )
    assert stroke.startswith("rgb"), "the chart does not know the page's colours"


def contrast(one: str, other: str) -> float:
    """Returns the contrast ratio of two #rrggbb colours (WCAG 2.2)."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_without_motion_nothing_moves(browser, report):
    media = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    open_page(browser, report)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    script = "return getComputedStyle(document.documentElement).scrollBehavior"
    assert browser.execute_script(script) == "auto"
