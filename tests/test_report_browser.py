"""The report in a real browser: Chromium from `file://`, driven by Selenium."""

from __future__ import annotations

import shutil

import pytest
from test_report import judged, start
from test_sae_understand import hostile_event

from interp_rlhf.report import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed (Debian: chromium, chromium-driver)"
)
HOSTILE = "</p></textarea><script>document.title='taken'</script><img src=http://127.0.0.1:9/x>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(tmp_path, browser):
    for arm in ("warmth", "sham"):
        log = start(tmp_path / arm, arm=arm)
        for step in (1, 2, 3):
            log.append(
                "metric",
                step=step,
                metrics={"reward": step / 3, "interp/measure/vader/mean": 0.1, f"other/{arm}": step},
            )
            points = {f"model.layers.{i}": {"cosine": 1 - step * i / 100, "cka": 0.9} for i in range(4)}
            log.append("drift", step=step, texts=4, tokens=99, hook_points=points, monitors={"m": {"frozen_auroc": 0.8}},
                       moved={"m": [{"prompt": f"p{step}", "completion": HOSTILE, "change": float(step)}]},
                       overhead_seconds=0.1)  # fmt: skip
        tokens = {"pieces": [HOSTILE, " word"], "scores": {"m": [0.1, 3.0]}}
        log.append(
            "samples", step=3, when="after", rows=[{"prompt": HOSTILE, "completion": HOSTILE, "tokens": tokens}]
        )
        judged(log, 3)
    write_report(tmp_path, tmp_path / "report.html")
    browser.get_log("performance")
    browser.get((tmp_path / "report.html").as_uri())
    return browser


def test_it_loads_nothing_and_complains_of_nothing(page):
    import json

    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []  # data: what the page itself holds
    assert len([url for url in asked if url.startswith("file://")]) == 1
    assert page.get_log("browser") == []


def test_model_text_is_text(page):
    assert page.title != "taken"
    assert page.find_elements("css selector", "main img, main textarea") == []
    assert page.find_element("css selector", "#samples .text").text == HOSTILE
    assert page.execute_script("return document.scripts.length") == 1


def test_tables_sort_and_filter_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    table = page.find_element("css selector", "#moved table")
    button = next(b for b in table.find_elements("css selector", "button.sort") if b.text.startswith("change"))
    button.send_keys(Keys.ENTER)

    def changes():
        return [
            float(row.find_elements("tag name", "td")[-1].text)
            for row in table.find_elements("css selector", "tbody tr")
        ]

    assert changes() == sorted(changes())
    button.send_keys(Keys.SPACE)
    assert changes() == sorted(changes(), reverse=True)
    assert table.find_element("css selector", "th[aria-sort]").get_attribute("aria-sort") == "descending"
    box = page.find_element("css selector", "#moved input")
    box.send_keys("p2")
    shown = [row for row in table.find_elements("css selector", "tbody tr") if row.is_displayed()]
    assert len(shown) == 2
    assert "2 of 6" in page.find_element("css selector", "#moved .filter").text
    box.clear()


@pytest.mark.parametrize("width", [360, 1600])
def test_nothing_sticks_out_on_a_phone_or_a_wide_screen(page, width):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    size = page.execute_script(
        "return parseFloat(getComputedStyle(document.querySelector('#samples .text')).fontSize)"
    )
    assert size >= 14
    for section in page.find_elements("css selector", "main > section"):
        assert section.rect["width"] <= width
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture
def latents(tmp_path, browser):
    """A page of many latents, as `sae inspect` writes it."""
    from interp_rlhf.runlog.log import RunLog

    event = hostile_event()
    (page,) = event["latents"]
    wide = {**page["top"][0], "pieces": ["<b>", "w" * 300, "\n"]}
    event["latents"] = [
        {**page, "index": 1000 + i, "maximum": 2.0 + i % 7, "top": [*page["top"], wide]} for i in range(30)
    ]
    log = RunLog(tmp_path / "inspect.events.jsonl")
    log.append("run", title="Latents", arm="sae inspect", model="tiny")
    log.append("latents", **event)
    log.append("end", seconds=1)
    write_report(log.path, tmp_path / "inspect.html")
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get((tmp_path / "inspect.html").as_uri())
    return browser


def test_latents_are_text_and_load_nothing(latents):
    import json

    messages = [json.loads(entry["message"])["message"] for entry in latents.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []
    assert latents.get_log("browser") == []
    assert latents.title == "Latents"
    assert latents.execute_script("return document.scripts.length") == 1
    tokens = latents.find_element("css selector", "#latent-1-0 .acts")
    assert "<script>document.title='taken'</script> & </p>" in tokens.text
    assert tokens.find_element("css selector", ".peak").get_attribute("title") == "2"
    assert latents.find_elements("css selector", "main b, main img") == []


def test_latents_sort_filter_and_open_by_keyboard(latents):
    from selenium.webdriver.common.keys import Keys

    table = latents.find_element("css selector", "#latents table")
    button = next(b for b in table.find_elements("css selector", "button.sort") if b.text.startswith("maximum"))
    button.send_keys(Keys.ENTER)
    button.send_keys(Keys.ENTER)
    first = table.find_element("css selector", "tbody tr th a")
    assert first.text == "1006"  # of 1006, 1013, 1020 and 1027, whose maximum is 8
    first.send_keys(Keys.ENTER)
    assert latents.current_url.endswith("#latent-1-6")
    near = latents.find_element("css selector", "#latent-1-6 > details:not([open]) > summary")
    near.send_keys(Keys.ENTER)
    assert "-0.125" in latents.find_element("css selector", "#latent-1-6").text
    box = latents.find_element("css selector", "#latents input")
    box.send_keys("1029")
    shown = [row for row in table.find_elements("css selector", "tbody tr") if row.is_displayed()]
    assert len(shown) == 1


@pytest.mark.parametrize("width", [360, 1600])
def test_latents_fit_a_phone_and_a_wide_screen(latents, width):
    latents.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    latents.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert latents.execute_script("return document.documentElement.scrollWidth") <= width
    for card in latents.find_elements("css selector", ".latent")[:3]:
        assert card.rect["width"] <= width
    latents.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
