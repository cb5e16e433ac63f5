"""A Triton server whose engine is engine_in_c.c, for benchmarks of what stands around an engine.

The engine is a backend in C, so the measured figures are those of Triton, its text models and the gateway.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from builder.core import supervisor
from builder.core.output import Output
from builder.core.store import Store
from builder.recipe import schema
from builder.serving.server import Server, ServerOptions, serve
from builder.triton import repository

SOURCE = Path(__file__).parent / "engine_in_c.c"
QUIET = Output("quiet")
BATCH = 128  # requests that the engine computes at once
# What NVIDIA's tools/fill_template.py gets for each of its models. Versions have different keys.
NVIDIA_VALUES = {
    "preprocessing": "tokenizer_dir:{tokenizer},triton_max_batch_size:{batch},preprocessing_instance_count:1",
    "postprocessing": "tokenizer_dir:{tokenizer},triton_max_batch_size:{batch},postprocessing_instance_count:1",
    "ensemble": "triton_max_batch_size:{batch},logits_datatype:TYPE_FP16",
    "tensorrt_llm_bls": "triton_max_batch_size:{batch},decoupled_mode:True,bls_instance_count:1,"
    "logits_datatype:TYPE_FP16,accumulate_tokens:false,prompt_embedding_table_data_type:TYPE_FP16",
    "tensorrt_llm": "triton_backend:tensorrtllm,triton_max_batch_size:{batch},decoupled_mode:True,max_beam_width:1,"
    "engine_dir:/engine,max_queue_delay_microseconds:0,batching_strategy:inflight_fused_batching,max_queue_size:0,"
    "encoder_input_features_data_type:TYPE_FP16,logits_datatype:TYPE_FP16,prompt_embedding_table_data_type:TYPE_FP16",
}


def make_repository(directory: Path, snapshot: Path) -> repository.Repository:
    """A repository with the snapshot's tokenizer, for an engine that does not exist."""
    build = {"max_batch_size": BATCH, "max_input_len": 1024, "max_seq_len": 2048, "max_beam_width": 1,
             "plugin_config": {"use_paged_context_fmha": False}}  # fmt: skip
    engine = directory / "engine"
    engine.mkdir()
    vocab_size = json.loads((snapshot / "config.json").read_text())["vocab_size"]
    pretrained = {"logits_dtype": "float16", "vocab_size": vocab_size}
    config = {"version": "1.2.1", "pretrained_config": pretrained, "build_config": build}
    (engine / "config.json").write_text(json.dumps(config))

    def make(made: Path) -> dict[str, Any]:
        return repository.write(made / "models", engine, snapshot, schema.Repository())

    return repository.open_repository(Store(directory / "store", QUIET).stage("repository", {}, make).path)


def make_nvidia_repository(models: Path, templates: Path, snapshot: Path) -> None:
    """NVIDIA's templates, filled by its own tool. `templates`: .../all_models/inflight_batcher_llm of a checkout."""
    shutil.copytree(templates, models)
    tool = templates.parents[1] / "tools" / "fill_template.py"
    for model, values in NVIDIA_VALUES.items():
        config = models / model / "config.pbtxt"
        known = [value for value in values.split(",") if f"${{{value.partition(':')[0]}}}" in config.read_text()]
        filled = ",".join(known).format(tokenizer=snapshot.absolute(), batch=BATCH)
        subprocess.run([sys.executable, tool, "-i", config, filled], check=True)


@contextmanager
def engine_server(models: Path, token_seconds: float, log: Path) -> Iterator[Server]:
    """Serves models with the engine in C, which is compiled next to the log."""
    library = log.parent / "engine_in_c.so"
    command = ["cc", "-O2", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    environment = {"ENGINE_TOKEN_SECONDS": str(token_seconds)}
    options = ServerOptions(engine_backend=library, environment=environment, exit_timeout=3)
    with serve(models, out=QUIET, log=log, options=options) as server:
        yield server


def processes(server: Server) -> dict[int, str]:
    """The server's processes: its own as "Triton", and those of Python models by the model's name."""
    found = {}
    for pid in supervisor.descendants(server.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        if words[0].endswith("triton_python_backend_stub"):
            found[pid] = Path(words[1]).parts[-3]
        elif words[0].endswith("tritonserver"):
            found[pid] = "Triton"
    return found


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> float:
    """The memory of a process in MB: its own pages, and its part of those that it shares (PSS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def make_snapshot(directory: Path, source: Path, vocabulary: int) -> Path:
    """A model's directory without weights, whose byte-level BPE tokenizer has so many tokens.

    The tokens beyond the source's are pairs of others, as large vocabularies have them.
    """
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    content = json.loads((directory / "tokenizer.json").read_text())
    added = content["added_tokens"]
    vocab, merges, choose = content["model"]["vocab"], content["model"]["merges"], random.Random(0)
    tokens = list(vocab)
    while len(vocab) + len(added) < vocabulary:
        first, second = choose.choice(tokens), choose.choice(tokens)
        if len(first + second) < 14 and first + second not in vocab:
            vocab[first + second] = len(vocab)
            tokens.append(first + second)
            merges.append([first, second])
    moved = {}  # added tokens come after all others
    for token in added:
        old, token["id"] = token["id"], vocabulary - len(added) + added.index(token)
        moved[old] = token["id"]
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    for name in ("config.json", "generation_config.json"):
        config = json.loads((directory / name).read_text())
        config |= {key: _moved(value, moved) for key, value in config.items() if key.endswith("_token_id")}
        (directory / name).write_text(
            json.dumps(config | ({"vocab_size": vocabulary} if "vocab_size" in config else {}))
        )
    return directory


def _moved(ids: Any, moved: dict[int, int]) -> Any:
    return [moved[id] for id in ids] if isinstance(ids, list) else moved.get(ids)
