"""The passes and LoRA products in all their forms: see bench/kernels.py."""

from phi3_dist.bench.card.checks import Group

__all__ = ["kernels"]


def kernels(group: Group) -> None:
    from phi3_dist.bench.kernels import checks

    for name, check in checks(cpu=group.cpu):
        group.check(name, check)
