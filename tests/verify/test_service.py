"""The HTTP service: what it answers, what it refuses, and that nothing else gets out."""

import asyncio
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import threading

import numpy as np
import pytest
from verify.stub import DIGEST, Stub

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from fastapi.testclient import TestClient

from speechbrain_qmargin.embeddings import Embeddings
from speechbrain_qmargin.verify.people import People
from speechbrain_qmargin.verify.service import make_app, read_token, serve
from speechbrain_qmargin.verify.system import System
from speechbrain_qmargin.verify.threshold import measure_threshold
from speechbrain_qmargin.verify.verifier import Verifier

TOKEN = "a token of the tests"
SYSTEM = measure_threshold(
    Embeddings(*Stub().embeddings([f"person{n}" for n in range(24)], 3)), DIGEST, 0.05
).system


def client_of(verifier, token=TOKEN, **options):
    app = make_app(verifier, TOKEN, hosts=("testserver",), **options)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return TestClient(app, headers=headers, raise_server_exceptions=False)


@pytest.fixture
def verifier(tmp_path):
    return Verifier(Stub(), People(tmp_path / "people.sqlite"), SYSTEM)


@pytest.fixture
def client(verifier):
    return client_of(verifier)


def files(*contents, field="files"):
    return [(field, (f"../../etc/{n}.wav", content)) for n, content in enumerate(contents)]


def refusal(answer, status, code):
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    assert answer.json()["error"]["code"] == code
    return answer.json()["error"]["message"]


def test_a_port_that_is_taken_or_none_is_named_before_an_address_is_printed(verifier, capsys):
    pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"^127\.0\.0\.1:{port}: .*; give another --port"):
            serve(verifier, port=port)
    with pytest.raises(ValueError, match="port 99999: ports are from 0 to 65535"):
        serve(verifier, port=99999)
    assert capsys.readouterr().out == ""


def test_from_enrolment_to_erasure(client, verifier):
    answer = client.post("/v1/people/Ann", files=files(b"ann 1", b"ann 2"))
    assert (answer.status_code, answer.json()["recordings"]) == (201, 2)
    assert client.post("/v1/people/Ann", files=files(b"ann 3")).json()["recordings"] == 3
    client.post("/v1/people/Bob", files=files(b"bob 1"))
    people = client.get("/v1/people").json()
    assert [(one["name"], one["recordings"]) for one in people] == [("Ann", 3), ("Bob", 1)]

    found = client.post("/v1/people/Ann/verify", files=files(b"ann 7", field="file")).json()
    expected = verifier.verify("Ann", b"ann 7")
    assert (found["score"], found["accept"]) == (expected.score, True)
    assert found["llr"] == pytest.approx(expected.llr)
    assert found["quality"] == {"seconds": 2.0, "faults": []}
    other = client.post("/v1/people/Ann/verify", files=files(b"bob 7", field="file")).json()
    assert not other["accept"]

    found = client.post("/v1/identify?max_candidates=1", files=files(b"bob 7", field="file")).json()
    assert (found["name"], found["searched"], len(found["candidates"])) == ("Bob", 2, 1)
    pair = {"one": ("x", b"ann 1"), "other": ("y", b"ann 2")}
    assert client.post("/v1/compare", files=pair).json()["accept"]
    assert len(client.get("/v1/people/Ann").json()["recordings"]) == 3
    assert client.delete("/v1/people/Ann").json() == {"name": "Ann", "recordings": 3}
    refusal(client.get("/v1/people/Ann"), 404, "not_enrolled")


def test_an_erasure_just_after_an_enrolment_does_not_change_its_answer(client, verifier):
    enrol = verifier.people.enrol

    def then_erased(name, *given):
        count = enrol(name, *given)
        verifier.people.delete(name)
        return count

    verifier.people.enrol = then_erased
    answer = client.post("/v1/people/Ann", files=files(b"ann 1", b"ann 2"))
    assert (answer.status_code, answer.json()["recordings"]) == (201, 2), answer.text
    assert [one["seconds"] for one in answer.json()["added"]] == [2.0, 2.0]


def test_the_system_says_what_it_promises(client):
    found = client.get("/v1/system").json()
    assert found["threshold"] == SYSTEM.point.threshold
    assert found["promise"] == SYSTEM.point.promise()
    assert found["histogram"]["targets"] == SYSTEM.histogram.targets
    assert found["modality"] == "speech"


@pytest.mark.parametrize("token", ["", "another token, as long", TOKEN + "x", "t\u00f6ken" * 4])
def test_without_the_token_nothing_is_answered(verifier, token):
    verifier.enrol("Ann", b"ann 1")
    client = client_of(verifier, "")
    headers = {"Authorization": f"Bearer {token}".encode()} if token else {}
    for method, path in (("GET", "people"), ("GET", "system"), ("DELETE", "people/Ann"),
                         ("POST", "people/Eve"), ("POST", "compare")):  # fmt: skip
        answer = client.request(method, f"/v1/{path}", headers=headers)
        assert "token" in refusal(answer, 401, "unauthorised")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert [one.name for one in verifier.people.list()] == ["Ann"]


@pytest.mark.parametrize("header", [[], [(b"authorization", b"Bearer not the token")]])
def test_without_the_token_no_body_is_read(verifier, header):
    """Or anybody could fill the disk with what they send."""
    scope = {"type": "http", "method": "POST", "path": "/v1/people/Ann", "query_string": b"",
             "headers": [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; "
                         b"boundary=b"), *header]}  # fmt: skip
    sent = []

    async def receive():
        raise AssertionError("the body is read")

    async def send(message):
        sent.append(message)

    asyncio.run(make_app(verifier, TOKEN)(scope, receive, send))
    assert sent[0]["status"] == 401


def test_answers_are_not_kept_by_a_cache(client):
    for path in ("system", "people", "people/Eve"):
        assert client.get(f"/v1/{path}").headers["cache-control"] == "no-store"


def test_a_fault_of_the_service_is_json_and_says_nothing(client, verifier, monkeypatch):
    def fails(*_):
        raise RuntimeError("secret of the inside")

    monkeypatch.setattr(verifier.people, "list", fails)
    assert "secret" not in refusal(client.get("/v1/people"), 500, "internal")


def test_a_fault_of_the_file_of_enrolments_is_503_and_names_no_place(client, verifier, caplog):
    client.post("/v1/people/Ann", files=files(b"ann 1"))
    place = str(verifier.people.path)
    other = sqlite3.connect(place)
    other.execute("UPDATE recordings SET embedding = x'00'")
    other.commit()
    for path in ("people/Ann/verify", "identify"):
        answer = client.post(f"/v1/{path}", files=files(b"ann 2", field="file"))
        assert place not in refusal(answer, 503, "unavailable")
        assert place in caplog.text
        caplog.clear()
    verifier.people._db.execute("PRAGMA busy_timeout=1")
    other.execute("BEGIN EXCLUSIVE")
    assert place not in refusal(client.delete("/v1/people/Ann"), 503, "unavailable")
    assert "locked" in caplog.text
    other.close()


def test_a_token_is_long_and_in_a_file_of_its_owners(verifier, tmp_path):
    for token in ("short", "t\u00f6ken" * 8, "line\n" * 8):
        with pytest.raises(ValueError, match="16 characters or more"):
            make_app(verifier, token)
    file = tmp_path / "token"
    file.write_text("\n")
    file.chmod(0o600)
    with pytest.raises(ValueError, match="no token in its first line"):
        read_token(file)
    file.write_text(f" {TOKEN} \nmore")
    assert read_token(file) == TOKEN
    if os.name == "posix":
        file.chmod(0o644)
        with pytest.raises(ValueError, match="others may read it; chmod 600"):
            read_token(file)


def test_large_requests_are_refused_whatever_they_say(verifier):
    client = client_of(verifier, max_bytes=1000)
    assert "1,000 bytes" in refusal(
        client.post("/v1/people/Ann", files=files(b"x" * 2000)), 413, "too_large"
    )

    def chunks():  # no Content-Length
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield b"x" * 100

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    refusal(client.post("/v1/people/Ann", content=chunks(), headers=headers), 413, "too_large")
    many = files(*[b"a"] * 21)
    assert "at most 20 files" in refusal(
        client_of(verifier).post("/v1/people/Ann", files=many), 422, "invalid"
    )
    assert verifier.people.list() == []


def asked(app, path, body, receive=None):
    """One request with content, as a coroutine: its status, headers and JSON."""
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"",
             "headers": [(b"host", b"testserver"), (b"authorization", b"Bearer " + TOKEN.encode()),
                         (b"content-type", b"multipart/form-data; boundary=b")]}  # fmt: skip
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def whole():
        return parts.pop() if parts else {"type": "http.disconnect"}

    async def answer():
        sent = []

        async def send(message):
            sent.append(message)

        await app(scope, receive or whole, send)
        return sent[0]["status"], dict(sent[0]["headers"]), json.loads(sent[1]["body"])

    return answer()


def form(*contents, field="files"):
    head = f'Content-Disposition: form-data; name="{field}"; filename="a"'.encode()
    parts = [b"--b\r\n" + head + b"\r\n\r\n" + content + b"\r\n" for content in contents]
    return b"".join(parts) + b"--b--\r\n"


def test_under_load_it_refuses_at_once_and_decodes_a_few(tmp_path):
    """30 requests of 5 recordings each, of which 6 may run and 3 recordings be decoded."""
    inside, most, lock, go = 0, 0, threading.Lock(), threading.Event()

    class Slow(Stub):
        def read(self, source):
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
            assert go.wait(20)
            with lock:
                inside -= 1
            return super().read(source)

    verifier = Verifier(Slow(), People(tmp_path / "people.sqlite"), SYSTEM, at_once=3)
    app = make_app(verifier, TOKEN, hosts=("testserver",), at_once=6)

    async def load():
        names = [f"person{n}" for n in range(30)]
        bodies = [form(*(f"{name} {k}".encode() for k in range(5))) for name in names]
        tasks = [
            asyncio.ensure_future(asked(app, f"/v1/people/{name}", body))
            for name, body in zip(names, bodies, strict=True)
        ]
        while sum(task.done() for task in tasks) < 24 or inside < 3:
            await asyncio.sleep(0.01)
        go.set()
        answers = await asyncio.gather(*tasks)
        return answers, await asked(app, "/v1/people/later", form(b"later 1"))

    answers, later = asyncio.run(load())
    refused = [one for one in answers if one[0] == 503]
    assert [one[0] for one in answers].count(201) == 6
    assert len(refused) == 24
    for _, headers, content in refused:
        assert content["error"]["code"] == "busy"
        assert headers[b"retry-after"] == b"1"
    assert later[0] == 201
    assert most == 3
    assert [one.recordings for one in verifier.people.list()] == [1] + 6 * [5]


def test_a_slow_client_does_not_keep_its_place(verifier):
    app = make_app(verifier, TOKEN, hosts=("testserver",), at_once=1, max_seconds=0.05)
    begun = [{"type": "http.request", "body": form(b"ann 1")[:40], "more_body": True}]

    async def slow():
        return begun.pop() if begun else await asyncio.Event().wait()

    async def both():
        first = asyncio.ensure_future(asked(app, "/v1/people/Ann", b"", slow))
        await asyncio.sleep(0)
        between = await asked(app, "/v1/people/Bob", form(b"bob 1"))
        return between, await first, await asked(app, "/v1/people/Bob", form(b"bob 1"))

    between, first, after = asyncio.run(both())
    assert (between[0], between[2]["error"]["code"]) == (503, "busy")
    assert (first[0], first[2]["error"]["code"]) == (408, "too_slow")
    assert after[0] == 201
    assert [one.name for one in verifier.people.list()] == ["Bob"]


def test_limits_must_be_positive(verifier):
    for limit in ("max_bytes", "max_seconds", "at_once"):
        with pytest.raises(ValueError, match="limits must be positive"):
            make_app(verifier, TOKEN, **{limit: 0})


@pytest.mark.parametrize(
    ("path", "sent", "status", "code", "message"),
    [
        ("people/Ann", files(b"noise"), 422, "unfit", "the content: no speech"),
        ("people/Ann", files(b"broken"), 422, "undecodable", "cannot be decoded"),
        ("people/Ann", [], 422, "malformed", "body.files"),
        ("people/%0A", files(b"ann 1"), 422, "invalid", "a name has 1 to 200"),
        ("people/Andr%E9", files(b"ann 1"), 422, "invalid", "was not written in UTF-8"),
        ("people/Andr%E8/verify", files(b"a 1", field="file"), 404, "not_enrolled", "Andr"),
        ("people/a%00b", files(b"ann 1"), 422, "invalid", "control characters"),
        ("people/Eve/verify", files(b"a 1", field="file"), 404, "not_enrolled", "'Eve'"),
        ("people/Old/verify", files(b"a 1", field="file"), 409, "other_encoder", "anew"),
        ("people/Old", files(b"a 1"), 409, "other_encoder", "anew"),
        ("identify", files(b"a 1", field="file"), 422, "invalid", "nobody is enrolled"),
        ("nothing", files(b"a"), 404, "not_found", "Not Found"),
    ],
)
def test_faults_are_json(client, verifier, path, sent, status, code, message):
    verifier.people.enrol("Old", np.eye(1, 32, dtype="f"), "another encoder")
    assert message in refusal(client.post(f"/v1/{path}", files=sent), status, code)


def test_what_is_no_form_is_said_so(client):
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = client.post("/v1/people/Ann", content=b"no form", headers=form)
    assert "multipart" in refusal(answer, 400, "malformed")
    form["Content-Type"] = "multipart/form-data"
    answer = client.post("/v1/people/Ann", content=b"no form", headers=form)
    assert "boundary" in refusal(answer, 400, "malformed")


def test_a_path_is_never_read(client, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("ann 1")
    for sent in ({"data": {"files": str(secret)}}, {"json": {"files": [str(secret)]}}):
        refusal(client.post("/v1/people/Ann", **sent), 422, "malformed")
    for path in ("/v1/people/..%2f..%2fetc%2fpasswd", "/page/page.js", "/..%2fservice.py"):
        assert client.get(path).status_code == 404


def test_without_a_threshold_it_enrols_and_decides_nothing(tmp_path):
    verifier = Verifier(
        Stub(), People(tmp_path / "p.sqlite"), lambda: System.load(tmp_path, DIGEST)
    )
    client = client_of(verifier)
    assert client.post("/v1/people/Ann", files=files(b"ann 1")).status_code == 201
    answer = client.post("/v1/people/Ann/verify", files=files(b"ann 1", field="file"))
    assert "qmargin threshold" in refusal(answer, 409, "no_threshold")


def test_other_hosts_are_refused(verifier):
    """A page that a user visits cannot speak to a service on the user's machine."""
    client = TestClient(make_app(verifier, TOKEN), base_url="http://evil.example")
    assert client.get("/health").status_code == 400
    for host in ("127.0.0.1", "localhost"):
        local = TestClient(make_app(verifier, TOKEN), base_url=f"http://{host}:8000")
        assert local.get("/health").json() == {"status": "ok"}


def test_openapi_describes_it_without_a_cdn(client):
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/v1/people",
        "/v1/people/{name}",
        "/v1/people/{name}/verify",
        "/v1/compare",
        "/v1/identify",
        "/v1/system",
    }
    enrol = described["paths"]["/v1/people/{name}"]["post"]
    assert "multipart/form-data" in enrol["requestBody"]["content"]
    assert enrol["security"] == [{"HTTPBearer": []}]
    assert {"401", "409", "413", "422"} <= set(enrol["responses"])
    for path in ("/docs", "/redoc"):
        assert client.get(path).status_code == 404


def test_the_page_is_whole_and_asks_nobody_else(client):
    client.headers.pop("Authorization")
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("page.js", "page.css", "recorder.js"):
        answer = client.get(f"/{name}")
        assert answer.status_code == 200
        assert "https://" not in answer.text
        assert TOKEN not in answer.text
    assert "text/javascript" in client.get("/page.js").headers["content-type"]
    assert "<script>" not in page.text


@pytest.mark.skipif(not shutil.which("node"), reason="no node")
def test_the_script_is_one():
    from scripts import ROOT

    for name in ("page.js", "recorder.js"):
        file = ROOT / "speechbrain_qmargin/verify/page" / name
        subprocess.run(["node", "--check", str(file)], check=True)
