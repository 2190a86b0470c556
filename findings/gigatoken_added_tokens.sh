#!/usr/bin/env bash
# gigatoken 0.10.0: options of a tokenizer.json that change ids are read over without an error: an added token's single_word and
# normalized, and a BPE model's dropout.
# Expected: what tokenizers 0.23.3 makes of the same file, or an error that names the option.
# Seen:
#   single_word: tokenizers spells "concat" in letters, gigatoken finds the token "cat" in it
#   normalized: tokenizers finds the added token after NFC, gigatoken does not
#   dropout 1.0: tokenizers merges nothing, gigatoken merges
# Whoever takes gigatoken for its speed has to compare ids on text that meets each option, or to refuse them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check gigatoken==0.10.0 tokenizers==0.23.3
"$work/env/bin/python" - "$work" <<'PY'
from importlib.metadata import version

import gigatoken
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

print("versions: gigatoken", version("gigatoken"), "tokenizers", version("tokenizers"))


def model(dropout=None):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, "ab"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")], dropout=dropout))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def both(made, text):
    ids = made.encode(text, add_special_tokens=False).ids
    return ids, [int(i) for i in gigatoken.Tokenizer.from_json(made.to_str()).encode(text)]


word = model()
word.add_tokens([AddedToken("cat", single_word=True)])
composed = model()
composed.normalizer = normalizers.NFC()
composed.add_tokens([AddedToken("e\u0301x", normalized=True)])
seen = {
    "single_word": both(word, "concat cat"),
    "normalized": both(composed, "\u00e9x"),
    "dropout 1.0": both(model(dropout=1.0), "abab"),
}
same = both(model(), "abab")
print("without them:", *same)
assert same[0] == same[1], "this has changed"
for what, (wanted, found) in seen.items():
    print(f"{what}: tokenizers {wanted}, gigatoken {found}")
assert all(wanted != found for wanted, found in seen.values()), "this has changed"
PY
