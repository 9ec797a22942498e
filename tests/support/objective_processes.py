"""Train with each defense that has an objective, in one or more processes, and write the weights.

python -m torch.distributed.run --nproc-per-node 2 support/objective_processes.py FILE
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import save_file

from stayaligned.defenses import TrainingDefense
from stayaligned.defenses.constrained_sft import ConstrainedSFT
from stayaligned.defenses.der import Der
from stayaligned.defenses.ema import Ema
from stayaligned.defenses.ewc import Ewc
from stayaligned.defenses.kl import Kl
from stayaligned.defenses.safegrad import SafeGrad
from stayaligned.defenses.salora import SaLoRA
from stayaligned.defenses.sbr import Sbr
from support.objectives import fine_tune

DEFENSES: list[TrainingDefense] = [
    *(ConstrainedSFT(), Der(alignment_rows_per_step=3), Ema(rate=0.3), Ewc(strength=20.0), Kl(beta=0.7)),
    *(SafeGrad(), SaLoRA(safety_rank=3), Sbr(alpha=0.05, anchors=2)),
]


def main(out: Path) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    changes = {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 2}
    if processes > 1:
        PartialState(cpu=True, backend="gloo")
        changes["ddp_backend"] = "gloo"  # type: ignore[assignment]
    made = {}
    for defense in DEFENSES:
        with tempfile.TemporaryDirectory() as directory:
            weights = fine_tune(defense, Path(directory), **changes)
        made |= {f"{defense.name} {name}": weight for name, weight in weights.items()}
    save_file(made, out.with_name(f"{out.name}-{os.environ.get('RANK', '0')}"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
