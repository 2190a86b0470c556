"""How vLLM is asked for an answer, and what is read of it. Imported in the server, which has no
moetrain. Written for vLLM 0.32.
"""

import base64
import math
from typing import Any

LEVEL = 64  # tokens level with the last of top_k, which are drawn from, too, that are recorded
LOGPROBS = {"logprobs": 0, "detokenize": False, "ignore_eos": True}  # of the drawn token alone


def params_of(request: dict[str, Any], on_cpu: bool) -> Any:
    """vLLM's parameters of a request."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    more: dict[str, Any] = dict(LOGPROBS)
    if request["kept"]:
        more["logprobs"] = request["top_k"] + LEVEL
    if request["stop"]:
        more |= {"stop": request["stop"], "detokenize": True, "skip_special_tokens": False}
    if request["routes"] and on_cpu:
        more["skip_reading_prefix_cache"] = True  # what comes from it passes no router
    return SamplingParams(
        max_tokens=request["max_tokens"],
        temperature=request["temperature"],
        top_p=request["top_p"],
        top_k=request["top_k"],
        min_p=request["min_p"],
        repetition_penalty=request["repetition_penalty"],
        seed=request["seed"],
        stop_token_ids=request["stop_ids"],
        output_kind=RequestOutputKind.FINAL_ONLY,
        **more,
    )


def answer_of(out: Any, *, kept: bool = False) -> dict[str, Any]:
    """An answer as JSON; with `kept` the tokens that could be drawn at each place: how many, and
    their ids.
    """
    one = out.outputs[0]
    drawn = zip(one.token_ids, one.logprobs or [], strict=True)
    answer = {
        "tokens": list(one.token_ids),
        "logprobs": [entry[token].logprob for token, entry in drawn],
        "finish": one.finish_reason,
    }
    if kept:
        places = [list(entry) for entry in one.logprobs or []]
        ids = [token for place_ids in places for token in place_ids]
        answer["kept"] = {
            "sizes": _packed([len(place_ids) for place_ids in places]),
            "ids": _packed(ids),
        }
    return answer


def _packed(numbers: list[int]) -> str:
    import numpy as np

    return base64.b64encode(np.array(numbers, "<i4").tobytes()).decode()


def keep_what_could_be_drawn() -> None:
    """vLLM makes an object of each log-prob that was asked for, and most are -inf: what sampling
    left out. From now on it makes those of the others alone.
    """
    from vllm.v1.engine.logprobs import LogprobsProcessor

    original = LogprobsProcessor._update_sample_logprobs

    def update(self: Any, lists: Any) -> None:
        rows = [row > -math.inf for row in lists.logprobs]
        ids = [row_ids[keep] for row_ids, keep in zip(lists.logprob_token_ids, rows, strict=True)]
        logps = [row_ids[keep] for row_ids, keep in zip(lists.logprobs, rows, strict=True)]
        original(self, lists._replace(logprob_token_ids=ids, logprobs=logps))

    LogprobsProcessor._update_sample_logprobs = update
