"""What writing an adapter takes of memory: a layer of it, however many layers there are."""

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from pathlib import Path
import torch
from moetrain.models import read_model
from moetrain.models.adapter import AdapterSpec, adapter_table
from moetrain.testing.tiny import CONFIGS
from moetrain.weights.adapter_init import table_shapes
from moetrain.weights.peft_writer import write_peft

sizes = dict(hidden_size=512, moe_intermediate_size=512, num_experts=16, vocab_size=64)
hf = CONFIGS["qwen3_moe"] | sizes | {"num_hidden_layers": int(sys.argv[2])}
architecture = {"architectures": ["Qwen3MoeForCausalLM"]}
table = adapter_table(read_model(hf | architecture), AdapterSpec(32, 64))

def peak():
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in one)
    return int(line.split()[1]) / 1024  # MiB

def tensors():
    for name, shape in table_shapes(table).items():
        yield name, torch.full(shape, 0.5)

before = peak()
write_peft(tensors(), dict.fromkeys(table.places, torch.float32), Path(sys.argv[1]), table, "base")
size = (Path(sys.argv[1]) / "adapter_model.safetensors").stat().st_size / 2**20
print(size, peak() - before)
"""


def written(folder: Path, num_layers: int) -> tuple[float, float]:
    """(MiB of the file, MiB that the peak of memory grew by)."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), str(num_layers)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    size, grown = map(float, done.stdout.splitlines()[-1].split())
    return size, grown


def test_an_adapter_is_written_a_layer_at_a_time(tmp_path: Path) -> None:
    size, grown = written(tmp_path / "adapter", 24)
    assert size > 120, size
    assert grown < size / 3, (size, grown)
