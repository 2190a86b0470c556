#!/usr/bin/env python3
"""Whether gigatoken gives transformers' ids: generated texts by the tokenizer of every chat
template that the tests know, or by those in folders that are named. Prints a table; exits 1 on a
difference.

    python tools/same_ids.py --texts 100000 [FOLDER ...]

The texts are those that an index looks at before it takes gigatoken, and more of them: every
character of Unicode in five surroundings (shared among the tokenizers), added tokens whole and in
part, long words, every token's own text, and mixtures (moetrain/data/odd_texts.py).
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator
from itertools import batched, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from chat_templates import KNOWN, folder

from moetrain.data import assets, odd_texts, same_tokens, text_tokenizer, tokenizer
from moetrain.data.text_tokenizer import Fast, TextTokenizer


def texts(read: TextTokenizer, num: int, seed: int, part: slice) -> Iterator[str]:
    every = [code for code in range(sys.maxunicode + 1) if code not in odd_texts.SURROGATES]
    yield from odd_texts.of_characters(every[part])
    yield from same_tokens.special_cases(read, num, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--texts", type=int, default=100_000, help="of each tokenizer (100,000)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    args = parser.parse_args()
    places = {path.name: path for path in args.folders}
    if not places:
        places = {"builtin:stdlib-tokenizer": assets.resolve("builtin:stdlib-tokenizer")}
        places |= {name: folder(name) for name in KNOWN}
    print(f"seed {args.seed}\n\n| tokenizer | texts | MB | different | s |\n|" + " --- |" * 5)
    total = 0
    for i, (name, place) in enumerate(places.items()):
        loaded, read = tokenizer.load(place), same_tokens.compared(text_tokenizer.read(place))
        if isinstance(read, str):
            print(f"| {name} | {read} | | | |")
            continue
        fast, started = Fast(read), time.perf_counter()
        num = size = different = 0
        all_of_it = texts(read, args.texts, args.seed, slice(i, None, len(places)))
        for part in batched(islice(all_of_it, args.texts), 1000):
            right: Any = loaded(list(part), add_special_tokens=False, verbose=False)["input_ids"]
            for text, a, b in zip(part, right, fast(part), strict=True):
                num, size = num + 1, size + len(text.encode())
                if a != b.tolist():
                    different += 1
                    print(f"{name}: {text!r}", file=sys.stderr)
        seconds = time.perf_counter() - started
        print(f"| {name} | {num:,} | {size / 1e6:.1f} | {different} | {seconds:.0f} |", flush=True)
        total += different
    sys.exit(total > 0)


if __name__ == "__main__":
    main()
