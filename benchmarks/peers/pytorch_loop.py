"""The floor: federated averaging as a plain loop in PyTorch, without a framework around it.

One process, or several (launched by torchrun) that train a share of the cohort each and add their sums up by gloo.
"""

import platform
import time

import torch
from pytorch_models import accuracy, images, model_of
from torch.nn import functional
from workload import (
    BATCH,
    CLIP_NORM,
    COHORT,
    EXAMPLES,
    LEARNING_RATE,
    NOISE_MULTIPLIER,
    answer,
    load,
    read_arguments,
    timed,
)


def main() -> None:
    begun = time.perf_counter()
    arguments = read_arguments()
    workload = load(arguments.data, arguments.model)
    rank = 0
    if arguments.processes > 1:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
    module = model_of(workload)
    weights = [parameter.detach() for parameter in module.parameters()]
    parameters = list(module.parameters())
    x, y = images(workload.x), torch.from_numpy(workload.y)
    told = [weight.clone() for weight in weights]
    total = [torch.zeros_like(weight) for weight in weights]
    delta = [torch.empty_like(weight) for weight in weights]
    generator = torch.Generator().manual_seed(1)

    def train(client: int) -> None:
        torch._foreach_copy_(weights, told)
        for start in range(0, EXAMPLES, BATCH):
            batch = slice(start, start + BATCH)
            loss = functional.cross_entropy(module(x[client, batch]), y[client, batch])
            torch._foreach_add_(weights, torch.autograd.grad(loss, parameters), alpha=-LEARNING_RATE)

    def add() -> None:
        if not arguments.private:
            torch._foreach_add_(total, weights)
            torch._foreach_sub_(total, told)
            return
        torch._foreach_copy_(delta, weights)
        torch._foreach_sub_(delta, told)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(delta)))
        torch._foreach_add_(total, delta, alpha=min(1.0, CLIP_NORM / max(float(norm), 1e-12)))

    def run(number: int) -> None:
        torch._foreach_zero_(total)
        for client in workload.cohorts[number][rank :: arguments.processes]:
            train(int(client))
            add()
        if arguments.processes > 1:
            for leaf in total:
                torch.distributed.all_reduce(leaf)
        if arguments.private:
            for leaf, noise in zip(total, delta, strict=True):
                leaf.add_(noise.normal_(0.0, NOISE_MULTIPLIER * CLIP_NORM, generator=generator))
        torch._foreach_add_(told, total, alpha=1 / COHORT)

    startup = time.perf_counter() - begun
    seconds = timed(arguments.rounds, run)
    torch._foreach_copy_(weights, told)
    if rank == 0:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        answer(seconds, startup, accuracy(module, workload), versions)
    if arguments.processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
