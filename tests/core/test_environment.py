"""Secrets planted in our environment reach no worker process, except for the Hub's token where it is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.core import process
from builder.core.environment import child_environment
from builder.core.output import Output
from builder.serving.server import serve
from tests.serving.test_server import children, one_model

SECRET = "s3cr3t-value"
# Of every kind that a machine may hold: with the words that a list of secrets would know, and without.
PLANTED = [
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_ENDPOINT",
    "HF_INFERENCE_ENDPOINT",
    "PGPASSWORD",
    "PGPASSFILE",
    "MYSQL_PWD",
    "REDISCLI_AUTH",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SESSION_TOKEN",
    "AZURE_CLIENT_SECRET",
    "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY",
    "WANDB_API_KEY",
    "NGC_CLI_API_KEY",
    "GITHUB_TOKEN",
    "GH_TOKEN",
    "NETRC",
    "DATABASE_URL",
    "DSN",
    "SLURM_JWT",
    "SSH_AUTH_SOCK",
    "GPG_AGENT_INFO",
    "BASH_ENV",
    "ENV",
    "KUBECONFIG",
    "VAULT_ADDR",
    "HTTP_PROXY",
    "https_proxy",
    "SENTRY_DSN",
    "AIP_MODE",
    "TRITON_AUTH",
    "TORCH_HUB_TOKEN",
    "NVIDIA_API_KEY",
    "CUDA_SECRET",
    "BUILDER_PASSWORD",
    "PYTHON_KEYRING_PASS",
]


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BUILDER_CHILD_ENV", raising=False)
    for name in PLANTED:
        monkeypatch.setenv(name, f"http://user:{SECRET}@127.0.0.1:9")


def test_a_job_gets_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in its own environment, nor in its supervisor's, nor in those of its descendants."""
    plant(monkeypatch)
    code = "cat /proc/self/environ /proc/$PPID/environ; sh -c 'cat /proc/$PPID/environ'"
    process.run(process.Command(["sh", "-c", code], env={"OF_THE_JOB": "1"}), log=tmp_path / "log")
    said = (tmp_path / "log").read_text().partition("\n")[2]
    assert said.count("OF_THE_JOB=1") == 3
    assert SECRET not in said


def test_a_server_gets_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with serve(one_model(tmp_path / "models"), out=Output("quiet"), log=tmp_path / "log") as server:
        processes = [server.pid, *children(server.pid)]
        assert len(processes) == 3
        for pid in processes:
            assert SECRET.encode() not in Path(f"/proc/{pid}/environ").read_bytes()


def test_jobs_of_the_hub_get_its_token_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    found = {name for name, value in child_environment("hub").items() if SECRET in value}
    tokens = {"HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"}
    assert found == tokens | {"HF_ENDPOINT", "HTTP_PROXY", "https_proxy"}
    public = child_environment("public")
    assert not [name for name, value in public.items() if SECRET in value]
    assert public["HF_ENDPOINT"] == "http://127.0.0.1:9"
    assert {name for name, value in child_environment("docker").items() if SECRET in value} == {"SSH_AUTH_SOCK"}


def test_the_gateway_gets_the_collectors_key_and_no_model_server_does() -> None:
    given = dict.fromkeys(["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_HEADERS", "OTEL_SERVICE_NAME"], "1")
    assert child_environment("gateway", given) == given
    assert child_environment("gateway", dict.fromkeys(PLANTED, SECRET)) == {}
    assert child_environment("work", given) == {}


@pytest.mark.parametrize(
    ("address", "left"),
    [
        ("https://user:pass@proxy:3128", "https://proxy:3128"),
        ("user:p@ss@proxy:3128", "proxy:3128"),
        ("https://token@hub.example/path@x", "https://hub.example/path@x"),
        ("http://proxy:3128", "http://proxy:3128"),
        ("localhost,.example.org", "localhost,.example.org"),
    ],
)
def test_addresses_lose_their_credentials(address: str, left: str) -> None:
    assert child_environment("public", {"HTTPS_PROXY": address}) == {"HTTPS_PROXY": left}


def test_what_the_work_needs_passes() -> None:
    """Variables of CUDA, MPI, TensorRT-LLM, threads, caches, the Hub's certificates, and those that the user names."""
    needed = [
        "PATH",
        "HOME",
        "TMPDIR",
        "LANG",
        "LC_ALL",
        "USER",
        "LD_LIBRARY_PATH",
        "PYTHONPATH",
        "XDG_CACHE_HOME",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_DATASETS_CACHE",
        "TRANSFORMERS_OFFLINE",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER",
        "CUDA_HOME",
        "NVIDIA_VISIBLE_DEVICES",
        "NCCL_DEBUG",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "TORCHINDUCTOR_CACHE_DIR",
        "PYTORCH_CUDA_ALLOC_CONF",
        "TRITON_CACHE_DIR",
        "TLLM_LOG_LEVEL",
        "TRTLLM_ENABLE_PDL",
        "OMPI_MCA_btl",
        "OPAL_PREFIX",
        "PMIX_MCA_gds",
        "UCX_TLS",
        "BUILDER_OUTPUT",
        "TOKENIZERS_PARALLELISM",
        "CUBLAS_WORKSPACE_CONFIG",
    ]
    given = dict.fromkeys([*needed, "MY_SITE", "OTHER"], "1") | {"BUILDER_CHILD_ENV": "MY_SITE, NOT_THERE"}
    assert child_environment("work", given).keys() == {*needed, "MY_SITE", "BUILDER_CHILD_ENV"}
    network = dict.fromkeys(["HF_ENDPOINT", "no_proxy", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"], "1")
    assert child_environment("work", network) == {}
    assert child_environment("hub", network) == network
