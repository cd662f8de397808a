"""Two hundred readers at once while a sweep writes: no error, and 99 of 100 answers within 300 ms."""

import re
import subprocess
import sys

import pytest

READERS, SECONDS, LIMIT = 200, 20, 0.3
# Readers and writer are processes of their own: what they take must not be taken for the server's time.
LOAD = """
import asyncio, sys, time
host, port, readers, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
paths = sys.argv[5:]
took, wrong = [], []

async def answer(reader):
    head = await reader.readuntil(b"\\r\\n\\r\\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\\r\\n")[0])
    await reader.readexactly(length)
    return head

async def read(number, end):
    reader, writer = await asyncio.open_connection(host, port)
    turn = number
    await asyncio.sleep(number / readers)
    while time.monotonic() < end:
        path = paths[turn % len(paths)]
        turn += 1
        begun = time.monotonic()
        writer.write(f"GET {path} HTTP/1.1\\r\\nHost: {host}\\r\\nAccept-Encoding: gzip\\r\\n\\r\\n".encode())
        head = await answer(reader)
        took.append(time.monotonic() - begun)
        if not head.startswith(b"HTTP/1.1 200"):
            wrong.append(head.split(b"\\r\\n")[0])
        await asyncio.sleep(1.0)  # a reader reads
    writer.close()

async def main():
    end = time.monotonic() + seconds
    await asyncio.gather(*(read(number, end) for number in range(readers)))
    took.sort()
    print(len(took), len(wrong), took[int(0.99 * len(took))], took[-1])

asyncio.run(main())
"""
SWEEP = """
import sys, time
from nervure.spec import Job, Measurement, Record, Status
from nervure.store import Store
end = time.monotonic() + float(sys.argv[2])
with Store.open(sys.argv[1]) as store:
    seed = 100
    while time.monotonic() < end:
        values = {"ticket": 0.9, "reinit": 0.84, "shuffled": 0.83, "dense": 0.85, "signs flipped": 0.5}
        points = [Measurement(arm=arm, metric="accuracy", value=value) for arm, value in values.items()]
        points += [Measurement(arm="ticket", metric="curve", value=0.1, step=n) for n in range(50)]
        job = Job(target="claim:lottery-ticket/winning-ticket", arm="*", case="-", seed=seed)
        store.add(Record(job=job, status=Status.DONE, measurements=tuple(points), started="2026-11-20T13:00:00"))
        seed += 1
        time.sleep(0.1)
print(seed - 100)
"""


@pytest.mark.slow
@pytest.mark.alone
def test_two_hundred_readers_while_a_sweep_writes(tmp_path, filled):
    folder = filled(tmp_path)
    words = [sys.executable, "-m", "nervure.cli", "web", "--port", "0", "--store", "store.db", "--report", "reports"]
    server = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        port = re.search(r"127\.0\.0\.1:(\d+)", server.stdout.readline())[1]
        paths = ["/", "/paper/lottery-ticket", "/runs", "/networks", "/static/page.js", "/leaderboards"]
        seconds = str(SECONDS)
        sweep = subprocess.Popen(
            [sys.executable, "-c", SWEEP, "store.db", seconds], cwd=folder, stdout=subprocess.PIPE, text=True
        )
        found = subprocess.run(
            [sys.executable, "-c", LOAD, "127.0.0.1", port, str(READERS), seconds, *paths],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        written = int(sweep.communicate(timeout=60)[0])
    finally:
        server.terminate()
        server.wait(20)
        server.stdout.close()
    count, wrong, p99, worst = (float(part) for part in found.stdout.split())
    print(f"{count:.0f} answers, p99 {1000 * p99:.0f} ms, worst {1000 * worst:.0f} ms, {written} records written")
    assert wrong == 0
    assert written > 10
    assert count > READERS * SECONDS / 4
    assert p99 < LIMIT
