"""The name under which rematerialisation may keep what the backward kernels need of the forward."""

from typing import TypeVar

from jax.ad_checkpoint import checkpoint_name

KEPT = "attention"

Results = TypeVar("Results")


def kept(results: Results) -> Results:
    """Names a forward kernel's results in its VJP rule, as outputs and as residuals alike.

    A policy that saves `KEPT` then runs no forward kernel in the backward pass; every other policy
    treats them like any array.
    """
    return checkpoint_name(results, KEPT)
