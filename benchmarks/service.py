"""The HTTP service under load, and killed between enrolments.

    python benchmarks/service.py ENCODER RECORDINGS [--people 20] [--clients 4] [--seconds 30]

ENCODER is a folder with a threshold (`qmargin threshold`), RECORDINGS a folder <person>/... of
speech. People are enrolled from two recordings each; then clients verify, each with a connection of
its own, and requests a second and latencies are printed. Last, a service is killed (SIGKILL) in the
middle of enrolments, several times: whoever was acknowledged must be there whole, everybody else
whole or not at all.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from speechbrain_qmargin.data.audio import inspect_audio
from speechbrain_qmargin.export.recordings import find_recordings
from speechbrain_qmargin.trials import speaker_in
from speechbrain_qmargin.verify.people import People

TOKEN = "the token of the benchmark"


class Service:
    """`qmargin serve` in a process of its own."""

    def __init__(self, encoder: str, people: Path, folder: Path) -> None:
        token = folder / "token"
        token.write_text(TOKEN)
        token.chmod(0o600)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            sys.executable,
            "-c",
            "from speechbrain_qmargin.cli import main; main()",
            "serve",
        ]
        command += [encoder, f"--people={people}", f"--port={self.port}", f"--token_file={token}"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while True:
            try:
                self.client().request("GET", "/health")
                return
            except ConnectionRefusedError:
                if self.process.poll() is not None:
                    raise SystemExit("the service did not start") from None
                time.sleep(0.1)

    def client(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)


def form(field: str, contents: list[bytes]) -> tuple[bytes, dict[str, str]]:
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{field}"; filename="x"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for content in contents
    ]
    headers = {
        "Content-Type": "multipart/form-data; boundary=b",
        "Authorization": f"Bearer {TOKEN}",
    }
    return b"".join(parts) + b"--b--\r\n", headers


def post(client, path: str, field: str, contents: list[bytes]) -> tuple[int, dict]:
    client.request("POST", f"/v1/{path}", *form(field, contents))
    answer = client.getresponse()
    return answer.status, json.loads(answer.read())


def fit_recordings(folder: Path, wanted: int) -> dict[str, list[Path]]:
    """People with three recordings or more of a second or more."""
    found = defaultdict(list)
    for name, path in find_recordings(folder).items.items():
        if inspect_audio(path)[0] >= 1:
            found[speaker_in(name)].append(path)
    able = {name: files for name, files in found.items() if len(files) >= 3}
    return dict(list(able.items())[:wanted])


def load(service: Service, people: dict[str, list[Path]], clients: int, seconds: float) -> None:
    kept, client = [], service.client()
    for name, files in people.items():
        contents = [file.read_bytes() for file in files[:2]]
        status, answer = post(client, f"people/{name}", "files", contents)
        if status == 201:
            kept.append(name)
        else:
            print(f"{name}: {answer['error']['message']}")
    print(f"{len(kept)} of {len(people)} people enrolled")
    took, failed, stop = [], [], time.monotonic() + seconds
    heard = []

    def work(number: int) -> None:
        own, draw = service.client(), random.Random(number)
        while time.monotonic() < stop:
            name = draw.choice(kept)
            file = draw.choice(people[name][2:])
            content = file.read_bytes()
            begin = time.monotonic()
            status, answer = post(own, f"people/{name}/verify", "file", [content])
            took.append(time.monotonic() - begin)
            if status == 200:
                heard.append(answer["quality"]["seconds"])
            else:
                failed.append(answer["error"]["message"])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(clients)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.monotonic() - begin
    middle, high = (1000 * float(np.percentile(took, q)) for q in (50, 95))
    print(
        f"{clients} clients, {wall:.0f} s: {len(took) / wall:.1f} requests/s, median "
        f"{middle:.0f} ms, p95 {high:.0f} ms; recordings of "
        f"{np.mean(heard):.1f} s; {len(failed)} refused"
    )


def killed(encoder: str, people: dict[str, list[Path]], folder: Path, times: int) -> None:
    contents = [file.read_bytes() for file in next(iter(people.values()))[:3]]
    file, acknowledged = folder / "killed.sqlite", set()
    for number in range(times):
        service = Service(encoder, file, folder)
        after = random.Random(number).uniform(0.3, 3.0)
        timer = threading.Timer(after, os.kill, (service.process.pid, signal.SIGKILL))
        client = service.client()
        for count in range(100_000):
            name = f"person {number} {count}"
            try:
                status, _ = post(client, f"people/{name.replace(' ', '%20')}", "files", contents)
            except (http.client.HTTPException, OSError):
                break
            assert status == 201, status
            acknowledged.add(name)
            if not count:
                timer.start()
        service.process.wait()
        held = {one.name: one.recordings for one in People(file).list()}
        lost = acknowledged - set(held)
        halves = [name for name, recordings in held.items() if recordings != len(contents)]
        assert not lost, f"lost: {sorted(lost)[:5]}"
        assert not halves, f"enrolled in part: {halves[:5]}"
    print(
        f"killed {times} times: {len(acknowledged)} enrolments acknowledged, none lost; "
        f"{len(held) - len(acknowledged)} not acknowledged are there, whole"
    )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (one.partition(":")[2].strip() for one in lines if one.startswith("model name")), ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("encoder")
    parser.add_argument("recordings", type=Path)
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--kills", type=int, default=5)
    args = parser.parse_args()
    print(f"{processor()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    people = fit_recordings(args.recordings, args.people)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.clients:
            service = Service(args.encoder, folder / "people.sqlite", folder)
            try:
                for clients in args.clients:
                    load(service, people, clients, args.seconds)
            finally:
                service.process.terminate()
                service.process.wait()
        killed(args.encoder, people, folder, args.kills)


if __name__ == "__main__":
    main()
