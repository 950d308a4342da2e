"""What routing telemetry and the teacher's routing policies cost, as ratios measured in one run on the demo teacher.

    python -m tests.benchmarks.bench_routing [--rows 4] [--length 256] [--repetitions 7]

Telemetry: a training step (forward and backward) of the demo model pruned to half with and without it, interleaved.
Policies: a forward pass of the whole teacher with all experts, or all but one, over its own top-k.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from moe_edge.contracts.config import TeacherRoutingConfig
from moe_edge.demo import demo_teacher_path
from moe_edge.distillation.teacher_routing import AllExperts, KnowledgeAugmentation
from moe_edge.distillation.telemetry import RoutingTelemetry
from moe_edge.models.loading import load_model
from moe_edge.models.pruning import prune
from moe_edge.models.students import use_fastest_experts
from moe_edge.models.views import moe_layers


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()  # of one thread: other work on the machine does not count
    run()
    return time.process_time() - start


def interleaved(runs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median processor seconds of each, after one warm-up, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            spent = seconds(run)
            if repetition:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def telemetry_runs(ids_BS: torch.Tensor) -> dict[str, Callable[[], object]]:
    student = load_model(demo_teacher_path())
    prune(student, {view.index: list(range(view.count // 2)) for view in moe_layers(student)})
    use_fastest_experts(student)
    student.train()
    telemetry = RoutingTelemetry(student)

    def step(watched: bool) -> None:
        with telemetry.recording(student) if watched else nullcontext():
            loss = student(ids_BS, labels=ids_BS).loss
        loss.backward()
        student.zero_grad()
        telemetry.read()

    return {"plain step": lambda: step(False), "with telemetry": lambda: step(True)}


def policy_runs(ids_BS: torch.Tensor) -> dict[str, Callable[[], object]]:
    teacher = load_model(demo_teacher_path())
    use_fastest_experts(teacher)
    policies = {"all": AllExperts(), "ka": KnowledgeAugmentation(TeacherRoutingConfig(policy="ka"), 0)}

    @torch.no_grad()
    def forward(policy: AllExperts | None) -> None:
        with policy.routing(teacher, 0) if policy else nullcontext():
            teacher.model(ids_BS, use_cache=False)

    return {"own": lambda: forward(None)} | {
        name: (lambda policy=policy: forward(policy)) for name, policy in policies.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ids_BS = torch.randint(3, 4096, (args.rows, args.length))
    for runs in (telemetry_runs(ids_BS), policy_runs(ids_BS)):
        medians = interleaved(runs, args.repetitions)
        base = next(iter(medians.values()))
        for name, value in medians.items():
            print(json.dumps({"what": name, "processor_ms": round(1000 * value, 1), "ratio": round(value / base, 3)}))


if __name__ == "__main__":
    main()
