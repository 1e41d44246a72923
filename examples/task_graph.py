"""The solver alone, on plain data: a chain of tasks with skip connections, forward and backward."""

from graphopt import solvers


def chain(length: int) -> solvers.TaskGraph:
    """Forward tasks 0..n-1, backward tasks n..2n-1; backward task i reads forward value i."""
    forward = [
        solvers.Task(duration=10, inputs=(i - 1,) if i else (), outputs=(i,), name=f"f{i}")
        for i in range(length)
    ]
    backward = [
        solvers.Task(
            duration=20,
            inputs=(i, length + (length - 1 - i) - 1) if i < length - 1 else (i,),
            outputs=(length + (length - 1 - i),),
            name=f"b{i}",
        )
        for i in reversed(range(length))
    ]
    values = [solvers.Value(bytes=100, producer=k) for k in range(2 * length)]
    return solvers.TaskGraph(tuple(forward + backward), tuple(values))


def main() -> None:
    graph = chain(12)
    plain = solvers.check(graph, range(len(graph.tasks)))
    print(f"as it is: peak {plain.peak}, duration {plain.duration}")
    for share in (0.8, 0.6, 0.5, 0.4):
        plan = solvers.solve(graph, int(share * plain.peak), time_limit=5)
        extra, needed = plan.duration - plain.duration, plan.lower_bound - plain.duration
        print(
            f"{share:.0%}: peak {plan.peak}, {extra} recomputed, "
            f"at least {needed} needed ({plan.status})"
        )
        assert not solvers.check(graph, plan.sequence).errors


if __name__ == "__main__":
    main()
