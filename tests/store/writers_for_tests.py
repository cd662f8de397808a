"""Eight processes that write into one store at once: ``python writers_for_tests.py ADDRESS``."""

import multiprocessing
import sys

from nervure.spec import Job, Measurement, Record, Status
from nervure.store import Store

WRITERS, EACH, SHARED = 8, 50, 10


def one(writer, number):
    job = Job(target=f"claim:writer/{writer}", arm="*", case="-", seed=number)
    points = tuple(Measurement(arm="a", metric="m", value=float(writer), step=float(step)) for step in range(5))
    return Record(job=job, status=Status.DONE, measurements=points)


def write(where, writer, barrier):
    with Store.open(where) as store:
        barrier.wait(120)
        for number in range(EACH):
            job = one(writer, number).job.id
            assert store.lease(job)
            assert store.add(one(writer, number))
            if number < SHARED:
                # All writers want this one; one of them gets it.
                store.add(one(99, number))


if __name__ == "__main__":
    # Forked, so that what they need is imported once.
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(WRITERS)
    children = [fork.Process(target=write, args=(sys.argv[1], writer, barrier)) for writer in range(WRITERS)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    sys.exit(any(child.exitcode for child in children))
