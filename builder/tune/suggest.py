"""A program for AIPerf's environment, which has Optuna: reads finished trials, prints the settings to try next.

It is stateless: the trials are told to a new study (Optuna's TPE sampler) each time, so a search that was interrupted
continues in the same way. Input and output are one JSON object:

    {"sizes": {NAME: number of values}, "trials": [{"indices": {NAME: index}, "value": number or null}], "seed": number}
    {"indices": {NAME: index}} or {"indices": null} when everything was tried
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

ASKS = 50  # until a suggestion is new; then the first that was not tried


def main() -> None:
    """Reads stdin and prints the suggestion."""
    print(json.dumps({"indices": suggest(json.load(sys.stdin))}))


def suggest(told: dict[str, Any]) -> dict[str, int] | None:
    """The next indices; None if every combination was tried."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sizes: dict[str, int] = told["sizes"]
    tried = [tuple(trial["indices"][name] for name in sizes) for trial in told["trials"]]
    left = [one for one in itertools.product(*(range(size) for size in sizes.values())) if one not in set(tried)]
    if not left:
        return None
    sampler = optuna.samplers.TPESampler(seed=told["seed"] + len(tried), n_startup_trials=4)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    ranges: dict[str, Any] = {name: optuna.distributions.IntDistribution(0, size - 1) for name, size in sizes.items()}
    for trial in told["trials"]:
        failed = trial["value"] is None
        state = optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE
        value = {} if failed else {"value": trial["value"]}
        study.add_trial(optuna.trial.create_trial(state=state, params=trial["indices"], distributions=ranges, **value))
    for _ in range(ASKS):
        asked: dict[str, int] = study.ask(ranges).params
        if tuple(asked[name] for name in sizes) in left:
            return asked
    return dict(zip(sizes, left[0], strict=True))


if __name__ == "__main__":
    main()
