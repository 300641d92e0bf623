"""A loss of one term as an nn.Module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..dispatch import check_impl
from ..options import flag, whole_label


class LossModule(nn.Module):
    """Holds the keywords of a loss function and calls it with them.

    term: the term's options, whose weight is left out: the module is the unweighted term. impl: None for a function
    that has one implementation. Its ``label`` is what a report calls it.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        term: Any,
        ignore_index: int,
        align_corners: bool,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        self.function = function
        self.label: str = term.label
        self.options: dict[str, Any] = {
            **{name: value for name, value in vars(term).items() if name != "weight"},
            "ignore_index": whole_label(ignore_index),
            "align_corners": flag("align_corners", align_corners),
        }
        if impl is not None:
            self.options["impl"] = check_impl(impl)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, C, h, w) and labels (N, H, W), a scalar."""
        return self.function(logits, target, **self.options)

    def extra_repr(self) -> str:
        """The keywords, as they would be passed."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
