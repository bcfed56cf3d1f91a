"""Lengths of workloads that the literature publishes as figures, where the data themselves cannot be had here.

Each says where its numbers are from, and what had to be assumed.
"""

from __future__ import annotations

from .lengths import IndependentLengths, Length, Quantiles

SHAREGPT = IndependentLengths(Length("lognormal", 1, 756, 0.54), Length("lognormal", 1, 200, 0.69), max_total=2048)
"""Like ShareGPT as DistServe serves it to OPT (OSDI '24, Figure 7: prompts of 755.5 and answers of 200.3 tokens on average,
within the model's 2,048 positions).

The paper prints no more than the means. The shape is an assumption: lognormal, with the coefficients of variation of the
300 conversation requests under 2,048 tokens on which DistServe's own simulator was run (Azure 2023; prompts 784.7 tokens
and 0.54, answers 229.4 tokens and 0.69)."""

SPLITWISE_CODE = IndependentLengths(
    Quantiles(((0.0, 3), (0.1, 147), (0.5, 1469), (0.9, 5186), (0.99, 7436), (1.0, 7500))),
    Quantiles(((0.0, 1), (0.1, 7), (0.5, 13), (0.75, 20), (0.9, 55), (0.99, 249), (1.0, 335))),
)
"""Like the coding traffic of Splitwise (ISCA '24, Figure 3): prompts with mean 2,048 and deciles 147 / 1,469 / 5,186 (10, 50
and 90%), 99% below 7,436; answers with mean 28, deciles 7 / 13 / 55, 99% below 249.

Assumed: both ends, and that 75% of the answers have at most 20 tokens, without which these deciles have no mean of 28."""

WORKLOADS = {"sharegpt": SHAREGPT, "splitwise-code": SPLITWISE_CODE}
"""By the name under which the command line knows them."""
