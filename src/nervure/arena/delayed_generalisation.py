"""compare delayed-generalisation: how long after memorising do optimizers and regularisers let a network generalise?"""

from __future__ import annotations

import time

from nervure.arena.contest import Contest, Trial
from nervure.inspect._delayed_tasks import delayed

# Steps a run may take, so that none lasts much over 20 seconds on one core.
STEPS = {
    "addition": 1500,
    "s4": 6000,
    "words": 8000,
    "streaming-parity": 1500,
    "polynomial": 10000,
    "random table": 3000,
}

ENTRANTS = {
    "adamw, none": "AdamW without decay",
    "adamw, decay": "AdamW with decoupled weight decay 1",
    "adamw, strong decay": "AdamW with decoupled weight decay 3",
    "adamw, l2": "AdamW with a squared penalty in the loss",
    "adamw, l1": "AdamW with an absolute penalty in the loss",
    "sgd, none": "gradient descent with momentum",
    "sgd, decay": "gradient descent with momentum and the same shrinkage a step as AdamW's decay",
    "rmsprop, decay": "AdamW without momentum, with decay",
}


def measure(trial: Trial) -> None:
    """Train every combination on one task.

    Args:
        trial: Its case is the task.
    """
    steps = STEPS[trial.case] // (5 if trial.quick else 1)

    def enter(name: str) -> dict[str, float]:
        optimizer, regulariser = name.split(", ")
        began = time.process_time()
        found = delayed(trial.case, optimizer=optimizer, regulariser=regulariser, seed=trial.seed, steps=steps)
        for place, step in enumerate(found.recorder.steps):
            for part in ("train", "test"):
                trial.measure(f"{name}: {part}", step=step, score=float(found.recorder.curve(part)[place].mean()))
        return {
            "time": found.generalise.time / steps,
            "generalised": float(found.generalise.observed),
            "memorise": found.memorise.time / steps,
            "delay": found.delay,
            "final": found.recorder.last("test"),
            "seconds": time.process_time() - began,
        }

    trial.each(enter)


CONTEST = Contest(
    name="delayed-generalisation",
    title="Time until a network generalises that has memorised",
    metric="time",
    better="lower",
    baselines=("adamw, none",),
    entrants=ENTRANTS,
    cases={
        "addition": "a + b modulo 53, 60% of the pairs",
        "s4": "composition in the symmetric group of four, 80% of the pairs",
        "words": "the word a b a^-1 in the same group",
        "streaming-parity": "parity of words of bits, read one by one",
        "polynomial": "a square of a linear form of 32 inputs from 200 samples",
        "random table": "a table without a rule: nobody may generalise",
    },
    quick=("addition", "random table"),
    seeds=5,
    protocol="Every entrant trains the same first weights on the same data, at the task's own rates, until it "
    "generalises or its steps are used up. The time is the first step at which the test score is reached, as a share "
    "of the steps allowed; a run that never reaches it counts as all of them (a restricted mean). On the random "
    "table every time must be 1.",
    measure=measure,
    columns={
        "generalised": "share of seeds that generalised",
        "memorise": "time to memorise (share of the steps)",
        "delay": "generalise / memorise",
        "final": "test score at the end",
        "seconds": "CPU seconds",
    },
)
