"""The modules that run as processes of their own: `python -m MODULE`. No other file names one.

Workers hold what the command itself must not: torch and transformers, code that comes with a model, the Hub's token. A
test checks that each of these is a module that can be started, and that no other string in the package names one.
"""

from __future__ import annotations

from typing import Final

QUANTIZE: Final = "builder.quantize.worker"
QUANTIZE_STREAMED: Final = "builder.quantize.streamed_worker"
LEARN_ROTATIONS: Final = "builder.transform.learning_worker"
SCALES: Final = "builder.quantize.scales_worker"
EVALUATE: Final = "builder.evaluate.runners.worker"
PARTS: Final = "builder.evaluate.parts.worker"
MIXTURES: Final = "builder.evaluate.mixtures.worker"
SENSITIVITY: Final = "builder.evaluate.sensitivity.worker"
TASK_NAMES: Final = "builder.evaluate.task_names"
TASKS: Final = "builder.evaluate.tasks_worker"
QUALITY: Final = "builder.quality.worker"
MODEL_ARCHITECTURE: Final = "builder.model.architecture_worker"
TOKENIZER: Final = "builder.tokenizer.worker"
CHAT_TEMPLATE: Final = "builder.tokenizer.chat_template_worker"
VOCABULARY: Final = "builder.grammar.vocabulary_worker"
GRAMMAR: Final = "builder.grammar.check_worker"
HUB_DOWNLOAD: Final = "builder.hub.download"
HUB_DATASET: Final = "builder.calibration.hub_dataset"
