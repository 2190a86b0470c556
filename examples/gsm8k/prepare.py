"""GSM8K's train.jsonl -> instruction data and preference pairs, with the last records held out.

python examples/gsm8k/prepare.py train.jsonl runs/gsm8k/data

The chosen answer of a pair is the right one; the rejected one has another number in its last line.
"""

import json
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NUM_HELD_OUT = 473
NUM_PAIRS = 2000  # about as many as the 200 steps of dpo.yaml learn from; each has its reference
FINAL = re.compile(r"#### (-?[\d,]+)\s*$")


def corrupted(answer: str, rng: random.Random) -> str:
    """The same answer that ends in another number of about the same size."""
    found = FINAL.search(answer)
    assert found is not None, answer
    right = int(found.group(1).replace(",", ""))
    reach = max(5, abs(right) // 3)
    wrong = right
    while wrong == right:
        wrong = max(0, right + rng.randint(-reach, reach))
    return answer[: found.start()] + f"#### {wrong}"


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def main(source: Path, folder: Path) -> None:
    """Write {sft,pairs}-{train,eval}.jsonl into `folder`."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rng = random.Random(5)
    folder.mkdir(parents=True, exist_ok=True)
    for part, own in (("train", rows[:-NUM_HELD_OUT]), ("eval", rows[-NUM_HELD_OUT:])):
        plain = [{"prompt": row["question"], "completion": row["answer"]} for row in own]
        pairs = [
            {
                "prompt": row["question"],
                "chosen": row["answer"],
                "rejected": corrupted(row["answer"], rng),
            }
            for row in own
        ]
        write(folder / f"sft-{part}.jsonl", plain)
        write(folder / f"pairs-{part}.jsonl", pairs[:NUM_PAIRS])
        print(f"{folder}: {len(own)} records and {min(len(own), NUM_PAIRS)} pairs to {part} on")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/gsm8k/prepare.py TRAIN.jsonl FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
