"""Started by torchrun: trains the tiny student with losses on layers and experts and with rollouts; see test_parallel_terms.

torchrun --nproc-per-node 2 parallel_terms_run.py FOLDER [ddp] [fsdp]    one after the other: starting the processes is what costs
"""

import json
import sys
from functools import reduce
from pathlib import Path

import torch

from moe_edge.contracts.config import OnPolicyConfig, StageConfig
from moe_edge.distillation.expert_terms import EXPERT_TERMS
from moe_edge.distillation.feature_terms import FEATURE_TERMS
from moe_edge.distillation.rollouts import Rollouts
from moe_edge.distillation.teacher import LiveTeacher
from moe_edge.distillation.terms import Needs, TermContext, TermInputs
from moe_edge.distillation.trainer import DistillationTrainer, DistillationTrainingArguments, Parts, RowDataset
from tests.distillation.parts import rows, tiny_student, tiny_teacher
from tests.distillation.sharding import shard_on_cpu

TABLE = {"cka": FEATURE_TERMS["cka"], "procrustes": FEATURE_TERMS["procrustes"], **EXPERT_TERMS}
STEPS = 3


def main(folder: Path, backend: str) -> None:
    torch.manual_seed(0)
    arguments = DistillationTrainingArguments(
        output_dir=str(folder / backend),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        ddp_find_unused_parameters=False,
        distillation_alpha=1.0,
        loss_weights={"reverse_kl": 1.0} | dict.fromkeys(TABLE, 1.0),
    )
    student, teacher = tiny_student(), tiny_teacher()
    inputs = TermInputs(ids_NS=torch.from_numpy(rows()[:4]).long())
    context = TermContext(student, teacher, StageConfig(stage_name="s"), inputs)
    terms = [build(context) for build in TABLE.values()]
    live = LiveTeacher(teacher, reduce(Needs.__or__, (term.needs for term in terms), Needs()))
    rollouts = Rollouts(student, OnPolicyConfig(share=0.5, prompt_tokens=4, new_tokens=(4, 12)), STEPS, 0)
    parts = Parts(terms=terms, hooks=[rollouts], observers=[rollouts])
    trainer = DistillationTrainer(student, arguments, RowDataset(rows()), teacher=live, parts=parts)
    if backend == "fsdp":
        shard_on_cpu(trainer)
    trainer.train()
    kind = type(next(trainer.model.parameters())).__name__
    trainer.save_model(str(folder / backend / "model"))
    if trainer.is_world_process_zero():
        log = {"steps": trainer.state.log_history[:STEPS], "parameter": kind}
        (folder / backend / "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        main(Path(sys.argv[1]), wanted)
