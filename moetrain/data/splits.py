"""Which split of a data set a name means: `gsm8k_train`, `mathTest`, `valset-00000-of-00003`.

Words that stand alone say it, and so do those glued to a noun for data. Another word that begins or
ends so (`mathtest`, but `latest` too) says it where the same name is there with another split; else
it is in doubt, unless English has the word.
"""

import re
from collections.abc import Iterable, Iterator

TRAIN = ("train", "training")
VALIDATION = ("validation", "valid", "val", "dev")
TEST = ("test", "testing", "eval", "evaluation", "heldout", "held")
# The first that a name has a word of. What is held out comes first, so that a doubtful name
# (train_test) is not learned from unasked.
KINDS = {"test": TEST, "validation": VALIDATION, "train": TRAIN}
DOUBTFUL = "?"

# What is glued to other words, the longest first: not `held`, as in upheld.
_GLUED = {
    "test": ("evaluation", "heldout", "testing", "test", "eval"),
    "validation": ("validation", "valid", "val", "dev"),
    "train": ("training", "train"),
}
_DATA = re.compile(
    r"(data)?(sets?|splits?|files?|parts?|rows?|records?|samples?|examples?|problems?|questions?"
    r"|prompts?|prefs?|pairs?|sft|json|jsonl)|data"
)
# Words of English that hold one of these by chance: superlatives, `contest`, `retrieval`, `device`.
_ENGLISH = re.compile(
    r"(la|grea|fas|shor|smar|ligh|brigh|tigh|sof|swee|quie|nea|cu|hot|fit|wet|fat|flat|stric|exac"
    r"|straigh|vas|sligh|stou|swif|whi|poli|remo|comple|ap|con|pro|at|de)test"
    r"|(con|pro|at|de)testing"
    r"|test(aments?|ify|imon(y|ies|ials?)|ers?|ed|able|ability|bed|bench)"
    r"|(festi|carni|inter|arri|ri|revi|survi|remo|appro|disappro|retrie|medie|uphea|na|o|che|lar"
    r"|archi|adjecti|prime|coe)val"
    r"|val(ues?|ued|uable|uations?|uators?|leys?|et|or|ves?|iant|entine|ence|idat(e|es|ed|ing|ors?)"
    r"|ity|idity|idly)"
    r"|invalid|(in|re)validation"
    r"|dev(elop\w*|ices?|ils?|ilish|ised?|oid|ot(e|ed|ion)|our|out|iat(e|ed|ions?)|ious|ops|ast\w*"
    r"|anagari)"
    r"|(re|de)?evaluat(e|es|ed|ing|ions?|ors?)"
)


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """Name -> test, validation or train, "" where it says nothing, DOUBTFUL where it may. The names
    are those of one folder, without endings.
    """
    every = sorted(set(names))
    kinds = {name: _plain(name) for name in every}
    rest = [name for name in every if not kinds[name]]
    # Which splits the same name is there with: {"math*": {"train", "test"}}.
    splits: dict[str, set[str]] = {}
    for name in rest:
        for kind, frame, _ in _parts(name):
            splits.setdefault(frame, set()).add(kind)
    for name in rest:
        parts = list(_parts(name))
        sure = [kind for kind, frame, _ in parts if len(splits[frame]) > 1]
        doubts = [k for k, _, word in parts if k != "train" and not _ENGLISH.fullmatch(word)]
        kinds[name] = next((kind for kind in KINDS if kind in sure), DOUBTFUL if doubts else "")
    return kinds


def words_of(name: str) -> list[str]:
    """`gsm8kTrain_SFTSet` as gsm, k, train, sft, set."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return [word for word in re.split(r"[^a-z]+", parted.lower()) if word]


def _plain(name: str) -> str:
    """By words that stand alone, or before a noun for data."""
    words = words_of(name)
    for kind, known in KINDS.items():
        if any(word in known or _of_data(word, known) for word in words):
            return kind
    return ""


def _of_data(word: str, known: Iterable[str]) -> bool:
    return any(word.startswith(prefix) and _DATA.fullmatch(word, len(prefix)) for prefix in known)


def _parts(name: str) -> Iterator[tuple[str, str, str]]:
    """(kind, the name without it, the word) of each word that begins or ends with a split."""
    for word in words_of(name):
        for kind, known in _GLUED.items():
            prefix = next((prefix for prefix in known if word.startswith(prefix)), "")
            if prefix and not _ENGLISH.fullmatch(word):  # trainer and tester are no splits
                yield kind, _frame(name, word, f"*{word.removeprefix(prefix)}"), word
            suffix = next((suffix for suffix in known if word.endswith(suffix)), "")
            if suffix:
                yield kind, _frame(name, word, f"{word.removesuffix(suffix)}*"), word


def _frame(name: str, word: str, other: str) -> str:
    """The name with another word, without what tells shards apart."""
    return re.sub(r"\d+(-of-\d+)?$", "", name.lower().replace(word, other, 1))
