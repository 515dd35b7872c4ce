"""The page in headless Chromium: real files, a recording, and what it shows of the scores."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml
from verify.chromium import BROWSER, Chromium

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from speechbrain_qmargin.embeddings import Embeddings
from speechbrain_qmargin.export.encoder import SpeakerEncoder
from speechbrain_qmargin.verify.people import People
from speechbrain_qmargin.verify.readers import SpeechReader
from speechbrain_qmargin.verify.service import make_app
from speechbrain_qmargin.verify.threshold import measure_threshold
from speechbrain_qmargin.verify.verifier import Verifier

pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium")
TOKEN = "a token of the tests"
YAML = """
compute_features: !new:speechbrain.lobes.features.Fbank {n_mels: 40}
mean_var_norm: !new:speechbrain.processing.features.InputNormalization {norm_type: sentence}
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: 40
    channels: [8, 8, 8, 8, 24]
    attention_channels: 8
    lin_neurons: 16
"""


@pytest.fixture(scope="module")
def place(voices, tmp_path_factory):
    """The address of a service with an encoder of random weights."""
    import uvicorn

    torch.manual_seed(0)
    reader = SpeechReader(SpeakerEncoder(load_hyperpyyaml(YAML), definition="random"))
    named = {f"{who}/{n // 2}/{n}": file for who, all_ in voices.items()
             for n, file in enumerate(all_)}  # fmt: skip
    rows = reader.embed([reader.read(file) for file in named.values()])
    system = measure_threshold(Embeddings(named, rows), reader.digest, 0.2).system
    people = People(tmp_path_factory.mktemp("people") / "people.sqlite")
    app = make_app(Verifier(reader, people, system), TOKEN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}/", Verifier(reader, people, system)
    server.should_exit = True
    thread.join()


@pytest.mark.slow  # starts a browser
def test_two_files_and_a_recording(place, voices, tmp_path):
    address, verifier = place
    one, two = voices["mv20001"][0], voices["mv20001"][2]
    samples, rate = soundfile.read(two)
    soundfile.write(tmp_path / "microphone.wav", samples, rate)
    fake = [
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={tmp_path / 'microphone.wav'}",
    ]
    with Chromium(tmp_path / "profile", *fake) as browser:
        browser.open(address)
        browser.wait_for("!document.getElementById('login').hidden")  # no token yet
        browser.open("about:blank")
        browser.open(f"{address}#token={TOKEN}")
        browser.wait_for("!document.getElementById('work').hidden")
        assert TOKEN not in browser.run("location.href + document.documentElement.outerHTML")
        text = browser.run("document.body.innerText")
        point = verifier.system.point
        assert f"cosine, threshold {point.threshold:.4f}" in text
        assert f"{100 * point.far:.2f} % (95 % interval" in text
        assert browser.run("document.querySelectorAll('#histogram path').length") == 2

        browser.choose("#one input", one)
        assert browser.run("document.getElementById('compare').disabled")
        browser.choose("#other input", two)
        browser.wait_for("!document.getElementById('compare').disabled")
        browser.run("document.getElementById('compare').click()")
        browser.wait_for("!document.getElementById('result').hidden")
        found = verifier.compare(one, two)
        text = browser.run("document.getElementById('result').innerText")
        assert f"cosine {found.score:.4f}" in text
        assert ("Accepted" if found.accept else "Rejected") in text
        assert browser.run("document.querySelectorAll('#histogram .score').length") == 1
        where = os.environ.get("QMARGIN_SCREENSHOT")
        browser.picture(Path(where) if where else tmp_path / "page.png")

        (tmp_path / "noise.txt").write_text("no audio")
        browser.choose("#other input", tmp_path / "noise.txt")
        browser.run("document.getElementById('compare').click()")
        browser.wait_for("!document.getElementById('problem').hidden")
        assert "not wav, flac" in browser.run("document.getElementById('problem').innerText")

        browser.run("document.querySelector('#other .record').click()")
        browser.wait_for("document.querySelector('#other .record').textContent == 'Stop'")
        time.sleep(2.5)
        browser.run("document.querySelector('#other .record').click()")
        browser.wait_for("document.getElementById('problem').hidden")
        browser.run("document.getElementById('compare').click()")
        browser.wait_for("!document.getElementById('result').hidden")
        failed = [one for one in browser.errors if "401" not in one and "422" not in one]
        assert failed == []
