"""One rank of a process group that steps Muon: muon_ranks.py OUT {whole,sharded}."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from vidworld.trainer import optim

# Of one shape five, which two ranks cannot halve; of another only one, so that a rank has nothing to do.
SHAPES = [(8, 24)] * 5 + [(24, 8)] + [(16, 16)] * 2


def main() -> None:
    out, how = sys.argv[1:]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    orthogonalised = []
    plain = optim.orthogonalise

    def counted(matrices_NRC: torch.Tensor, steps: int = 5) -> torch.Tensor:
        orthogonalised.append(len(matrices_NRC))
        return plain(matrices_NRC, steps)

    optim.orthogonalise = counted
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    muon = optim.Muon(matrices, lr=0.02, weight_decay=0.1, sharded=how == "sharded")
    for _ in range(4):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        muon.step()
    moments = [muon.state[matrix]["momentum_buffer"] for matrix in matrices]
    found = {"weights": [m.detach() for m in matrices], "moments": moments, "done": sum(orthogonalised)}
    torch.save(found, os.path.join(out, f"{how}-{rank}.pt"))
    dist.barrier()
    # All is saved. Threads of gloo now and then abort a process that is on its way out.
    os._exit(0)


if __name__ == "__main__":
    main()
