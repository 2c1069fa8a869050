"""A model as a page: what headless Chromium hears with it, from a file and from a microphone, against PyTorch."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from browser import LAPTOP, PHONE, Browser, find_browser
from conftest import refusal
from test_export_c import FAST, FRONT_END, RATE, SAMPLES, SMALL, clips, made

from dcase import export
from dcase.data.logmel import LogMelConfig
from dcase.deployment import c_format, page_format
from dcase.export import ExportConfig, Mismatch
from dcase.model.quantisation import rounded

missing = [name for name in ("clang", "wasm-ld") if not shutil.which(name)]
needs_clang = pytest.mark.skipif(bool(missing), reason=f"no {' and '.join(missing)} on PATH: apt install clang lld")
DENY = "--use-fake-ui-for-media-stream=deny"
TONE = 1500  # Hz
LIMIT = 1_000_000  # bytes
HEARD = "heard.map(one => [one.end, ...one.logits])"


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c_format, "FLAGS", FAST)
        yield


@pytest.fixture(scope="module")
def module():
    return made("aum_nano_8bit", FRONT_END, RATE, 41, ("a",), **SMALL)


@pytest.fixture(scope="module")
def page(module, tmp_path_factory) -> Path:
    if missing:
        pytest.skip(f"no {' and '.join(missing)} on PATH: apt install clang lld")
    path = tmp_path_factory.mktemp("page") / "scenes.html"
    parity = export.export_page(module, 8, clips(2, SAMPLES), path, "run <b>one</b>")
    assert parity.clips == 3 and parity.difference < 1e-5 and [*path.parent.iterdir()] == [path]
    return path


def browser_with(*flags: str):
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium on the PATH: `make browser` installs it where apt can")
    return Browser(path, *flags)


@pytest.fixture(scope="module")
def browser():
    with browser_with() as found:
        yield found


def wait(browser: Browser, condition: str):
    """Return the value of a JavaScript expression as soon as it is true."""
    end = time.monotonic() + 60
    while not (value := browser.run(condition)):
        assert time.monotonic() < end, (condition, browser.run("document.body.innerText"), browser.complaints())
        time.sleep(0.05)
    return value


def opened(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    wait(browser, "text('status') === 'Ready.'")


def give(browser: Browser, path: Path) -> None:
    root = browser.do("DOM.getDocument")["root"]["nodeId"]
    node = browser.do("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    browser.do("DOM.setFileInputFiles", nodeId=node, files=[str(path)])


def trouble(browser: Browser) -> str:
    return wait(browser, "!get('trouble').hidden && text('trouble')")


def logits(module, sound: np.ndarray, device: str = "general") -> np.ndarray:
    """Return PyTorch's logits of windows (n, samples)."""
    model = module.device_models[device] if device != "general" else module.model
    with torch.no_grad():
        model.load_state_dict(rounded(model.state_dict(), 8))
        return model(export.log_mels(module, torch.from_numpy(sound))).numpy()


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """Three windows and a part of a fourth one, in two channels, and their mean."""
    x = 0.3 * clips(4, SAMPLES).numpy()[[3, 1, 2, 3]].flatten()[: 3 * SAMPLES + 2500]
    path = tmp_path_factory.mktemp("sound") / "street.wav"
    soundfile.write(path, np.stack([0.5 * x, 1.5 * x], 1), RATE, subtype="FLOAT")
    return path, x


def test_a_file_has_pytorchs_logits(browser, page, module, recording):
    path, x = recording
    windows = np.stack([x[i : i + SAMPLES] for i in (0, SAMPLES, 2 * SAMPLES, len(x) - SAMPLES)])
    browser.screen(LAPTOP)
    opened(browser, page)
    for device, name in enumerate(["general", "a"]):
        browser.run(f"get('device').value = {device}")
        give(browser, path)
        wait(browser, f"text('status').startsWith('Heard all') && heard.every(one => one.device === {device})")
        found, expected = np.array(browser.run(HEARD)), logits(module, windows, name)
        assert found[:, 0].tolist() == [SAMPLES, 2 * SAMPLES, 3 * SAMPLES, len(x)]
        assert np.abs(found[:, 1:] - expected).max() < 1e-4
    shares = torch.from_numpy(expected).softmax(1).numpy()
    table = browser.run("rows.map(row => [...row.cells].map(cell => cell.textContent))")
    scenes = module.labels.scenes
    assert [row[0] for row in table] == list(scenes)
    for row, last, mean in zip(table, shares[-1], shares.mean(0), strict=True):
        assert abs(float(row[2][:-2]) - 100 * last) < 0.06 and abs(float(row[3][:-2]) - 100 * mean) < 0.06
    assert browser.run("text('scene')") == scenes[shares[-1].argmax()]
    assert scenes[shares.mean(0).argmax()] in browser.run("text('average')")
    assert browser.complaints() == []
    assert {request for request in browser.requests() if not request.startswith("blob:")} == {page.as_uri()}
    assert "run <b>one</b>" in browser.run("document.querySelector('footer').textContent")


def test_the_timeline_goes_back_and_plays(browser, page, recording):
    path, x = recording
    browser.screen(LAPTOP)
    opened(browser, page)
    give(browser, path)
    wait(browser, "text('status').startsWith('Heard all')")
    sounds = browser.run("heard.map(one => Array.from(one.sound.subarray(one.sound.length - one.fresh)))")
    assert np.array_equal(np.concatenate(sounds).astype(np.float32), x)
    assert browser.run("text('when')") == "At 1.71 s" and browser.run("isFollowing")
    browser.run("get('chosen').focus()")
    browser.press("ArrowLeft")
    wait(browser, "text('when') === 'At 1.50 s'")
    assert not browser.run("isFollowing")
    assert browser.run("get('chosen').getAttribute('aria-valuetext')").startswith("1.50 s: ")
    x0 = browser.run("(box => box.x + width / 2)(get('roll').getBoundingClientRect())")
    y0 = browser.run("get('roll').scrollIntoView(), get('roll').getBoundingClientRect().y + 10")
    for kind in ("mousePressed", "mouseReleased"):
        browser.do("Input.dispatchMouseEvent", type=kind, x=x0, y=y0, button="left", clickCount=1)
    wait(browser, "text('when') === 'At 0.50 s'")
    browser.click("#play")
    wait(browser, "playing && text('play') === 'Stop playing'")
    wait(browser, "!playing && text('when') === 'At 1.71 s'")  # it has gone on to the end
    browser.click("#follow")
    wait(browser, "isFollowing && get('follow').getAttribute('aria-pressed') === 'true'")
    drawn = "get('log-mel').getContext('2d').getImageData(5, 5, 60, 60).data"
    assert browser.run(f"new Set(new Uint32Array({drawn}.buffer)).size") > 50
    assert browser.complaints() == []


@pytest.mark.parametrize("size, dark", [(LAPTOP, True), (PHONE, False), (PHONE, True)])
def test_it_fits_every_screen(browser, page, recording, size, dark):
    browser.screen(size, dark)
    opened(browser, page)
    give(browser, recording[0])
    wait(browser, "text('status').startsWith('Heard all')")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    small = "[...document.querySelectorAll('button, select, input:not([hidden])')].filter(e => e.offsetHeight < 44)"
    assert browser.run(f"{small}.map(e => e.id)") == []
    assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    clipped = "[...document.querySelectorAll('th, td, #names span')].filter(e => e.scrollWidth > e.clientWidth + 1)"
    assert browser.run(f"{clipped}.map(e => e.textContent)") == []


def test_files_that_are_no_use_are_told(browser, page, tmp_path):
    opened(browser, page)
    (tmp_path / "notes.wav").write_bytes(b"RIFF, but no sound" * 50)
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "short.wav", np.zeros(SAMPLES - 1), RATE)
    wrong = np.zeros(2 * SAMPLES, np.float32)
    wrong[SAMPLES + 7] = np.nan
    soundfile.write(tmp_path / "nan.wav", wrong, RATE, subtype="FLOAT")
    said = {
        "notes.wav": "notes.wav is no sound that this browser reads: try WAV",
        "empty.wav": "empty.wav is no sound that this browser reads",
        "short.wav": "short.wav is too short: it has 0.50 s, and the model needs 0.50 s",
        "nan.wav": "At 1 s a sample is not finite, or far beyond full scale: that part is left out.",
    }
    for name, line in said.items():
        give(browser, tmp_path / name)
        wait(browser, f"text('trouble').startsWith({json.dumps(line)})")
    assert browser.run("heard.length") == 1 and browser.complaints() == []


def test_a_file_is_dropped(browser, page):
    opened(browser, page)
    drop = """(what => dispatchEvent(new DragEvent('drop', {cancelable: true, dataTransfer: what})))"""
    browser.run(f"{drop}((t => (t.items.add(new File(['x'], 'x.txt')), t))(new DataTransfer()))")
    assert trouble(browser).startswith("x.txt is no sound")
    browser.run(f"{drop}(new DataTransfer())")
    assert trouble(browser) == "What was dropped is no file."


def test_a_browser_that_calculates_something_else_is_told(browser, page, tmp_path):
    text = page.read_text()
    start = text.index('"expected": [[') + len('"expected": [[')
    end = text.index(",", start)
    faulty = tmp_path / "faulty.html"
    faulty.write_text(text[:start] + str(float(text[start:end]) + 0.001) + text[end:])
    browser.open(faulty.as_uri())
    assert trouble(browser).startswith("This browser calculates other logits than the trained model (by up to 0.00")
    assert browser.run("get('microphone').disabled && get('open').disabled")


# The microphone


def microphone(path: Path) -> tuple[str, ...]:
    fake = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    return (*fake, f"--use-file-for-fake-audio-capture={path}")


def test_a_microphone_is_heard(page, module, tmp_path):
    t = np.arange(4 * 48000) / 48000
    soundfile.write(tmp_path / "tone.wav", 0.3 * np.sin(2 * np.pi * TONE * t), 48000, subtype="PCM_16")
    with browser_with(*microphone(tmp_path / "tone.wav")) as browser:
        opened(browser, page)
        browser.click("#microphone")
        wait(browser, "heard.length >= 5")
        assert browser.run("text('microphone')") == "Stop microphone"
        assert browser.run("text('status')").startswith("Listening. Scene: ")
        (tmp_path / "x.wav").write_bytes(b"no sound")  # does not end what is heard, and stays to be read
        give(browser, tmp_path / "x.wav")
        assert trouble(browser).startswith("x.wav is no sound")
        n = browser.run("heard.length")
        wait(browser, f"heard.length > {n} + 1")
        assert browser.run("text('status')").startswith("Listening. Scene: ") and trouble(browser).startswith("x.wav")
        browser.click("#microphone")
        assert browser.run("text('status')") == "Stopped."
        sounds = np.array(browser.run("heard.map(one => Array.from(one.sound))"), np.float32)
        spectrum = np.abs(np.fft.rfft(sounds[2:] * np.hanning(SAMPLES))).mean(0)
        assert abs(spectrum.argmax() * RATE / SAMPLES - TONE) <= 4
        found = np.array(browser.run(HEARD))
        assert np.array_equal(found[:, 0], SAMPLES * np.arange(1, len(found) + 1))
        assert np.abs(found[:, 1:] - logits(module, sounds)).max() < 1e-4
        assert browser.complaints() == []
        browser.click("#microphone")  # again: a new timeline
        wait(browser, "recording && heard.length === 1")


@pytest.mark.parametrize(
    "flags, line",
    [
        (
            ["--use-fake-device-for-media-stream", DENY],
            "The browser does not let this page use the microphone: allow it",
        ),
        ([], "No microphone was found: connect one"),
    ],
)
def test_a_microphone_that_is_not_allowed_or_not_there_is_told(page, flags, line):
    with browser_with(*flags) as browser:
        opened(browser, page)
        inputs = (
            "navigator.mediaDevices.enumerateDevices().then(all => all.filter(d => d.kind === 'audioinput').length)"
        )
        if not flags and browser.run(inputs):
            pytest.skip("this machine has a microphone")
        browser.click("#microphone")
        assert trouble(browser).startswith(line)
        assert browser.run("text('status')") == "Ready." and browser.run("text('microphone')") == "Start microphone"
        assert browser.complaints() == []


def test_a_browser_that_refuses_the_rate_is_told(page, tmp_path):
    soundfile.write(tmp_path / "tone.wav", np.zeros(48000), 48000)
    with browser_with(*microphone(tmp_path / "tone.wav")) as browser:
        opened(browser, page)
        browser.run("""AudioContext.prototype.createMediaStreamSource = () => {
            throw new DOMException('different sample-rate', 'NotSupportedError'); }""")  # as Firefox does
        browser.click("#microphone")
        assert trouble(browser).startswith("This browser does not record at 12000 Hz, the model's rate")
        browser.run("""OfflineAudioContext = class {
            constructor() { throw new DOMException('no such rate', 'NotSupportedError'); } }""")
        give(browser, tmp_path / "tone.wav")
        wait(browser, "text('trouble').startsWith('This browser does not resample to 12000 Hz')")


# The export


@needs_clang
def test_the_default_model_is_small_enough(browser, tmp_path):
    module = made("aum_nano", LogMelConfig(), 44100, 65)
    export.export_page(module, 16, clips(2, 44100), tmp_path / "page.html", "a new model")
    assert (tmp_path / "page.html").stat().st_size < LIMIT / 3
    opened(browser, tmp_path / "page.html")
    assert "Chosen second" in browser.run("document.body.innerText")


def test_what_is_wrong_leaves_no_page(module, tmp_path, monkeypatch):
    out = tmp_path / "out/page.html"
    assert "--format page takes waveforms" in refusal(lambda: ExportConfig("x", format="page", device_id="a"))
    odd = made("aum_nano", dataclasses.replace(FRONT_END, n_fft=250), RATE, 41, **SMALL)
    assert "must be a power of two" in refusal(c_format.refuse_unknown, odd, 16)
    with monkeypatch.context() as patch:
        patch.setattr(export, "reference", lambda *_: lambda x: torch.zeros(len(x), 10))
        with pytest.raises(Mismatch, match="logits differ"):
            export.export_page(module, 8, clips(2, SAMPLES), out, "")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        message = refusal(page_format.refuse_no_compiler)
        assert message.endswith("with clang and lld: apt install clang lld (clang and wasm-ld not on PATH)")
    if not missing:
        monkeypatch.setattr(page_format, "FLAGS", (*page_format.FLAGS, "--target=no_such_machine"))
        assert "this clang fails: " in refusal(export.export_page, module, 8, clips(2, SAMPLES), out, "")
    assert not out.exists() and [*tmp_path.iterdir()] == []
