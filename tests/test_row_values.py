"""What a method works out for a batch's rows is worked out once, for all layers, and kept for two batches."""

from types import SimpleNamespace

import torch

from statespan.methods.row_values import RowValues


def made(layers=3):
    asked = []

    def of_row(layer, length):
        asked.append((layer, length))
        return torch.full((2,), 100.0 * layer + length, dtype=torch.float64)

    return RowValues(layers, of_row), asked


def inputs(*lengths, dtype=torch.float32):
    return SimpleNamespace(dt=torch.zeros(1, dtype=dtype), span=SimpleNamespace(prompt_lengths=lengths))


def test_each_row_gets_its_layers_values_by_its_own_length():
    values, _ = made()
    assert values(2, inputs(5, 9, 5)).tolist() == [[205.0] * 2, [209.0] * 2, [205.0] * 2]
    assert values(0, inputs(5, 9, 5)).tolist() == [[5.0] * 2, [9.0] * 2, [5.0] * 2]


def test_a_batch_is_asked_for_once_with_all_layers_and_every_length_once():
    values, asked = made()
    for layer in (1, 2, 0):
        values(layer, inputs(5, 9, 5))
    assert sorted(asked) == [(layer, length) for layer in range(3) for length in (5, 9)]


def test_two_batches_are_kept_and_no_third():
    values, asked = made(1)
    for length in (1, 2, 1, 3, 2, 1):
        values(0, inputs(length))
    assert [length for _, length in asked] == [1, 2, 3, 1] and len(values._kept) == 2


def test_values_are_as_wide_as_the_steps_and_can_meet_gradients():
    values, _ = made()
    assert values(0, inputs(5, dtype=torch.bfloat16)).dtype == torch.float32
    with torch.inference_mode():
        found = values(0, inputs(5, dtype=torch.float64))
    assert found.dtype == torch.float64 and not found.is_inference()
