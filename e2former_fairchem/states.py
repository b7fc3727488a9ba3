"""Charges and spin multiplicities that training has seen, and what is said of structures with others."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["SeenStates", "described"]

State = tuple[int, int]
_NAMED = 12


def described(states: Iterable[Sequence[int]]) -> str:
    """Pairs of charge and multiplicity as a card has them."""
    return ", ".join(f"{charge:+d} and {multiplicity}" for charge, multiplicity in states)


@dataclass
class SeenStates:
    """Pairs of charge (e) and spin multiplicity that a checkpoint's trainings have seen, from its card.

    They are kept on the host, where a batch's charges and spins are read anyway. Among a checkpoint's weights they are
    rows of charge, multiplicity, and 1 for the last training or 2 for those that only an earlier one saw: [n, 3] int64.

    last: of the last training. before: of earlier trainings only. said: those that a warning has named.
    """

    last: frozenset[State]
    before: frozenset[State] = frozenset()
    said: set[State] = field(default_factory=set)

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> SeenStates | None:
        """None where one of the trainings has no list of them: nothing is known then."""
        trainings = [training.get("states") for training in (*card.get("trained_before", ()), card)]
        if not all(trainings):
            return None
        *earlier, last = (frozenset(map(tuple, states)) for states in trainings)
        return cls(last, frozenset().union(*earlier) - last)

    @classmethod
    def from_rows(cls, rows: Tensor) -> SeenStates:
        """From what `rows` gave."""
        last, before = (frozenset((q, m) for q, m, kind in rows.tolist() if kind == wanted) for wanted in (1, 2))
        return cls(last, before)

    def rows(self) -> Tensor:
        """As an entry of a state dict."""
        kinds = ((self.last, 1), (self.before, 2))
        return torch.tensor([(*state, kind) for states, kind in kinds for state in sorted(states)], dtype=torch.int64)

    def check(self, states: Set[State], structures: Sequence[State], strict: bool) -> None:
        """Name the states of a batch that the last training never saw, each one once; or refuse them.

        Args:
            states: of the batch, each once.
            structures: those of its structures.
            strict: refuse.

        Raises:
            ValueError: names the states and the first structure of each.
        """
        strange = states - self.last
        if strict and strange:
            got = "; ".join(
                f"{_name(state)}{' of an earlier training' if state in self.before else ''} (structure "
                f"{structures.index(state)})"
                for state in sorted(strange)
            )
            raise ValueError(
                f"charge and spin: expected pairs that training has seen (strict_elements), {self._expected()}, got "
                f"{got}"
            )
        strange -= self.said
        if not strange:
            return
        self.said |= strange
        if never := strange - self.before:
            logging.warning(
                f"e2former_v2: {_names(never)}: not among those of the training ({self._expected()}), so that "
                "predictions for structures with these are guesses. The backbone's key strict_elements: true refuses "
                "them."
            )
        if before := strange & self.before:
            logging.warning(
                f"e2former_v2: {_names(before)}: among those of an earlier training only: forces on structures with "
                "these rest on it, and their energies are of its level of theory. The backbone's key strict_elements: "
                "true refuses them."
            )

    def _expected(self) -> str:
        """Those of the last training, small charges first."""
        states = sorted(self.last, key=lambda state: (abs(state[0]), *state))
        rest = f" and {len(states) - _NAMED} more" if len(states) > _NAMED else ""
        return described(states[:_NAMED]) + rest


def _name(state: State) -> str:
    return f"charge {state[0]:+d}, multiplicity {state[1]}"


def _names(states: Iterable[State]) -> str:
    return "; ".join(map(_name, sorted(states)))
