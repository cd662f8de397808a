"""Distillation against its formula in double precision and its known gradient."""

import math

import pytest
import torch

from nervure._kit import UsageError
from nervure.core.distillation import distillation


def softmax(row, temperature):
    powers = [math.exp(value / temperature) for value in row]
    return [value / sum(powers) for value in powers]


def test_the_formula_written_out():
    draw = torch.Generator().manual_seed(0)
    scores, teacher = torch.randn(2, 5, 4, generator=draw, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 2, 2])
    total = 0.0
    for row, wise, label in zip(scores.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        p, q = softmax(wise, 3.0), softmax(row, 3.0)
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        total += 0.7 * -math.log(softmax(row, 1.0)[label]) + 0.3 * 9 * divergence
    found = distillation(scores, teacher, labels, temperature=3.0, share=0.3)
    assert found.item() == pytest.approx(total / 5, rel=1e-12)


def test_a_student_equal_to_its_teacher_feels_nothing():
    scores = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    distillation(scores, scores.detach(), torch.zeros(6, dtype=torch.long), share=1.0).backward()
    assert float(scores.grad.abs().max()) < 1e-15


def test_the_gradient_does_not_shrink_with_the_temperature():
    """T^2 makes up for the two factors 1 / T: for a high temperature the gradient tends to a constant."""
    scores, teacher, labels = torch.zeros(1, 3), torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0])
    sizes = []
    for temperature in (50.0, 500.0):
        student = scores.clone().requires_grad_()
        distillation(student, teacher, labels, temperature=temperature, share=1.0).backward()
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_numbers_out_of_range():
    with pytest.raises(UsageError, match="no such distillation"):
        distillation(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), temperature=0.0)
