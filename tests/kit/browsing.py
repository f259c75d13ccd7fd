"""What tests do in a real browser (the fixture `browser`)."""


def js(browser, text, *arguments):
    return browser.execute_script(text, *arguments)


def fits(browser, address, width, *, dark):
    """Whether a page is no wider than the screen, a phone's below 500 pixels, and as light or dark as is asked for."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    try:
        browser.get(address)
        wide = js(browser, "return document.scrollingElement.scrollWidth")
        ink = js(browser, "return getComputedStyle(document.body).color")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    return wide <= width and (_red(ink) > 128) is dark


def _red(colour):
    return int(colour.split("(")[1].split(",")[0])


def faults(browser):
    """What the page's console says is wrong."""
    lines = browser.get_log("browser")
    return [line for line in lines if line["level"] == "SEVERE" and "favicon" not in line["message"]]
