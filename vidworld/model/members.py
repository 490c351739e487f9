"""Members of an ensemble that share a trunk: each adds a change of low rank to every matrix of the blocks.

LoRA (Hu et al. 2021) as an ensemble (Wang et al. 2023; Mühlematter et al. 2024), and BatchEnsemble (Wen et
al. 2020) with a rank above one. Shapes: B rows, n tokens of a row, J members, r rank, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

START = 0.1
"""Size of a member's change over the trunk's own weights at the start (Frobenius): members must differ from
the first step on, or they would learn the same."""


class MemberLinear(nn.Linear):
    """y = W x + U_j V_j x, without a bias: `member_B` says which member each row is of.

    Rows of all members go through the trunk W in one product, and through their members' factors in a batched
    one. Without `member_B`, or with no members, it is W alone.
    """

    def __init__(self, inputs: int, outputs: int, *, members: int = 0, rank: int = 0) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.members = members
        if members:
            self.in_JrI = nn.Parameter(torch.randn(members, rank, inputs) * inputs**-0.5)
            self.out_JOr = nn.Parameter(torch.randn(members, outputs, rank) * START * rank**-0.5)

    def forward(self, x: Tensor, member_B: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Outputs of tokens [G, ..., I], where rows of B come before all else that is folded into G."""
        y = F.linear(x, self.weight)
        if member_B is None or not self.members:
            return y
        x_BnI = x.reshape(len(member_B), -1, x.shape[-1])
        change_BnO = (x_BnI @ self.in_JrI[member_B].mT) @ self.out_JOr[member_B].mT
        return y + change_BnO.reshape(y.shape)

    @torch.no_grad()
    def merged(self, member: int) -> Tensor:
        """The weights of one member by itself."""
        return self.weight + self.out_JOr[member] @ self.in_JrI[member]
