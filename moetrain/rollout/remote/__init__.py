"""Files that run under `rollout.python`, where vLLM is and moetrain need not be. They are found by
their folder, as `moetrain_server` and `moetrain_worker`, and import nothing of ours.
"""
