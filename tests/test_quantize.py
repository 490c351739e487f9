"""Weights in fewer bytes: bounds that hold for every entry, and files that fit together."""

import pytest
import torch

from vidworld.quantize import SCALE, compress, relative_errors, restore, rounded


def weights():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(48, 64, generator=generator) * torch.logspace(-3, 2, 48)[:, None]
    matrix[5] = 0
    return {
        "matrix": matrix,
        "kernel": torch.randn(32, 16, 3, 3, generator=generator),
        "bias": torch.randn(48, generator=generator),
        "table": torch.randn(2, 64, generator=generator),
        "count": torch.arange(3),
    }


def test_every_entry_of_int8_is_within_half_a_step_of_its_row():
    given = weights()
    stored = compress(given, "int8")
    assert stored["matrix"].dtype == stored["kernel"].dtype == torch.int8
    back = restore(stored)
    for name in ("matrix", "kernel"):
        step_R = given[name].flatten(1).abs().amax(1) / 127
        apart_RX = (back[name] - given[name]).flatten(1).abs()
        assert (apart_RX <= 0.501 * step_R[:, None]).all()
        # A scale for the whole matrix would be worse: the rows differ by five orders of magnitude.
    whole = given["matrix"].abs().max() / 127
    assert ((given["matrix"] / whole).round() * whole)[0].eq(0).all()
    assert back["matrix"][0].ne(0).any()
    assert torch.equal(back["matrix"][5], torch.zeros(64))


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 0.0), ("bf16", 2**-8), ("int8", 0.01)])
def test_what_is_kept_and_how_far_off_the_rest_is(precision, bound):
    given = weights()
    back = rounded(given, precision)
    for name in ("bias", "count", *(["table"] if precision != "bf16" else [])):
        assert torch.equal(back[name], given[name])
    errors = relative_errors(given, precision)
    assert max(errors.values()) <= bound
    assert {name: tensor.dtype for name, tensor in back.items()} == {
        name: tensor.dtype for name, tensor in given.items()
    }
    again = rounded(back, precision)
    assert all(torch.equal(again[name], tensor) for name, tensor in back.items())


def test_int8_takes_a_quarter_of_the_bytes():
    given = {"matrix": torch.randn(256, 512)}
    size = sum(tensor.nbytes for tensor in compress(given, "int8").values())
    assert size < 0.26 * given["matrix"].nbytes


def test_files_that_do_not_fit_together_are_refused():
    stored = compress(weights(), "int8")
    with pytest.raises(ValueError, match="belongs to no tensor"):
        restore({name: tensor for name, tensor in stored.items() if name != "matrix"})
    with pytest.raises(ValueError, match="one float32 scale a row"):
        restore(stored | {"matrix" + SCALE: torch.ones(47)})
    with pytest.raises(ValueError, match="compressed already"):
        compress(stored, "int8")


def test_what_is_not_finite_stays_so():
    matrix = torch.ones(16, 16)
    matrix[3, 4] = float("nan")
    matrix[7, 1] = float("inf")
    back = rounded({"matrix": matrix}, "int8")["matrix"]
    assert (~back.isfinite()).any(1).nonzero().flatten().tolist() == [3, 7]
