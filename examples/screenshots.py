"""Take the pictures in docs/images: plots, and TensorBoard in a headless Chromium.

Run ``python examples/screenshots.py``. It needs the extra "plot" and the program chromium
(Debian: ``apt install chromium``), trains the small Llama of examples/train_llama.py on
this machine, and writes next to the documentation. What is to be seen is measured here
and now, so the numbers differ from machine to machine; on a busy one the script refuses.
Beside the pictures pictures.json says how busy it was.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
WIDTH, HEIGHT = 1420, 980  # pixels of a screenshot
PATIENCE_S = 60.0  # until a page shows what it should

_OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]

# TensorBoard's pages are nested shadow trees, which neither innerText nor
# querySelectorAll look into.
_WALK = """
function* walk(node) {
  yield node;
  if (node.shadowRoot) yield* walk(node.shadowRoot);
  for (const child of node.childNodes) yield* walk(child);
}"""
_TEXT = (
    _WALK
    + """
[...walk(document.body)]
  .filter(x => x.nodeType === 3 && !/STYLE|SCRIPT|TEMPLATE/.test(x.parentNode.nodeName))
  .map(x => x.textContent.trim()).filter(Boolean).join(' ')"""
)
_IMAGES = (
    _WALK
    + """
[...walk(document.body)].filter(x => x.nodeName === 'IMG' && x.complete)
  .map(x => x.naturalWidth).filter(Boolean)"""
)


_ACTUAL_SIZE = (
    _WALK
    + """
[...walk(document.body)]
  .find(x => x.nodeName === 'PAPER-CHECKBOX' && /actual image/.test(x.textContent))
  ?.click()"""
)


class Browser:
    """Chromium, driven by the DevTools protocol over its pipe; no package is needed."""

    def __init__(self) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        self._process = _start_chromium(self._profile.name, commands, answers)
        os.close(commands)
        os.close(answers)
        self._number = 0
        self._unread = b""
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def __enter__(self) -> Self:
        """Use it in a with block, which ends the program."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the browser and all of its processes."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._read_message())
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _read_message(self) -> bytes:
        while b"\0" not in self._unread:
            part = os.read(self._answers, 2**16)
            if not part:
                raise RuntimeError("chromium ended; does it start on its own?")
            self._unread += part
        message, self._unread = self._unread.split(b"\0", 1)
        return message

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        return result["result"].get("value")

    def show(self, url: str, *, words: list[str], images: int = 0) -> str:
        """Open a page and wait until it shows these words and as many images.

        Returns:
            all of its text.
        """
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", mobile=False, **size)
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        text = ""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            text = self.evaluate(_TEXT) or ""
            enough = len(self.evaluate(_IMAGES) or []) >= images
            if enough and all(word in text for word in words):
                return text
            time.sleep(0.2)
        missing = [word for word in words if word not in text]
        raise TimeoutError(
            f"{url} does not show {missing or 'its images'}: {text[:500]}"
        )

    def screenshot(self, path: Path) -> None:
        """Write what is to be seen as a PNG file."""
        time.sleep(1)  # for what still moves into its place
        path.write_bytes(b64decode(self.call("Page.captureScreenshot")["data"]))


def _start_chromium(
    profile: str, commands: int, answers: int
) -> "subprocess.Popen[bytes]":
    if CHROMIUM is None:
        raise RuntimeError("there is no program chromium; install it, or skip this")
    # The browser reads commands from descriptor 3 and answers on 4. Both might be among
    # those that are moved, so they go to higher ones first.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]

    def move() -> None:
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    process = subprocess.Popen(  # noqa: S603
        [CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=move,  # noqa: PLW1509 - it only moves descriptors
        close_fds=False,  # it would close what was moved
        start_new_session=True,
    )
    for end in ends:
        os.close(end)
    return process


class TensorBoard:
    """TensorBoard on a free port.

    Attributes:
        url: where it answers.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        command = ["-m", "tensorboard.main", "--logdir", os.fspath(folder)]
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, *command, "--port", "0", "--reload_interval", "1"],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.url = self._read_url()

    def _read_url(self) -> str:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            found = re.search(r"at (http://\S+?)/? ", line)
            if found:
                return found[1]
        raise RuntimeError("TensorBoard did not start; is the extra plot installed?")

    def __enter__(self) -> Self:
        """Use it in a with block, which ends the program."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End TensorBoard and the processes that it started."""
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()


# What each tab shows of a run of fp8tune: the tab's address, words, number of images.
TABS = {
    "text": ("#text", ["speedup", "outcome", "converted"], 0),
    "scalars": (
        "#scalars&_smoothingWeight=0",
        ["fp8tune/step_ms", "fp8tune/converted_share"],
        0,
    ),
    "images": ("#images", ["fp8tune/speedups", "fp8tune/heat_map"], 2),
}


# Shares of a second: what a free machine spends on others, with room for its services.
MOST_BUSY = 0.1


def busy_share(seconds: float = 2.0) -> float:
    """Share of the cores' time that other processes use, as /proc/stat counts it."""

    def read() -> tuple[int, int]:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        ticks = [int(word) for word in words[1:9]]
        return sum(ticks), ticks[3] + ticks[4]  # all, idle and waiting for a disk

    before, idle_before = read()
    time.sleep(seconds)
    after, idle_after = read()
    return 1 - (idle_after - idle_before) / max(after - before, 1)


def refuse_under_load() -> float:
    """The share that others use; ends the program where it is no free machine."""
    share = busy_share()
    if share > MOST_BUSY:
        sys.exit(
            f"the machine is busy: other processes use {share:.0%} of its cores, and "
            "pictures of times would show that; run this on an idle machine"
        )
    return share


def note(output: Path, shares: list[float], plan: Any) -> None:
    """Write beside the pictures under which load they were taken."""
    environment = dict(plan.environment)
    steady = max(shares) <= MOST_BUSY
    sidecar = {"steady": steady, "busy_shares": shares, "environment": environment}
    text = json.dumps(sidecar, indent=1) + "\n"
    (output / "pictures.json").write_text(text, encoding="utf-8")


def train(folder: str, steps: int, output: Path) -> Any:
    """Train the small Llama with a log in the folder, plot its plan and return it."""
    import torch  # noqa: PLC0415 - so that a browser alone needs no torch
    from train_llama import CPU_SIZES, Llama, Trainer  # noqa: PLC0415

    from fp8tune import AutoFloat8, TuneConfig  # noqa: PLC0415
    from fp8tune.report import plot  # noqa: PLC0415

    torch.manual_seed(0)
    # More time than usual, for pictures that show something on a busy machine too.
    config = TuneConfig(max_seconds=4.0)
    auto = AutoFloat8(Llama(CPU_SIZES), "bf16", tensorboard=folder, config=config)
    Trainer(auto, CPU_SIZES, "cpu").train(steps)
    plan = auto.freeze()
    title = plot.title_of(
        plan.environment, plan.recipe, plan.timing, emulated=plan.emulated
    )
    plot.save(plot.picture(plan.decisions, plan.decisions, title), output)
    auto.report().to_html("report.html")
    return plan


def take_page(browser: Browser, output: Path) -> None:
    """The page of one file, in light and in dark colours."""
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.call("Emulation.setEmulatedMedia", features=[feature])
        browser.show(Path("report.html").absolute().as_uri(), words=["layers in"])
        browser.screenshot(output / f"page-{scheme}.png")
        print(f"wrote {output / f'page-{scheme}.png'}")


def main() -> int:
    """Write all pictures; returns the exit code."""
    parser = argparse.ArgumentParser(description="Take the pictures in docs/images.")
    parser.add_argument("--steps", type=int, default=40, help="training steps")
    parser.add_argument("--output", type=Path, default=IMAGES, help="a folder")
    arguments = parser.parse_args()
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    before = refuse_under_load()
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        folder = "runs/llama"  # TensorBoard shows the name
        plan = train(folder, arguments.steps, output / "plot.png")
        note(output, [before, refuse_under_load()], plan)
        with TensorBoard(folder) as board, Browser() as browser:
            for name, (tab, words, images) in TABS.items():
                browser.show(f"{board.url}/{tab}", words=words, images=images)
                if images:
                    browser.evaluate(_ACTUAL_SIZE)
                browser.screenshot(output / f"tensorboard-{name}.png")
                print(f"wrote {output / f'tensorboard-{name}.png'}")
            take_page(browser, output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
