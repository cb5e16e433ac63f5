"""A Hub that is hijacked, broken or slow, or a server that is not a Hub: each fault soon ends in one of our errors;
nothing outside of the cache is written or deleted; and the same command works once the Hub does.

The jobs run as in a build (builder/hub/download.py with the real huggingface_hub), but in forks of one process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault, Hub

from builder.core import errors

DATA = Path(__file__).parents[1] / "data"
SMALL = DATA / "arch-variants" / "qwen2"
REPO = "tiny/qwen2"
FOREVER = 10**6
LIMIT = 4.0  # seconds, of the job
PATIENT = 60.0  # of the test, on a busy machine
DEEP = b"[" * 100_000 + b"]" * 100_000
HTML = {"Content-Type": "text/html; charset=utf-8"}
PORTAL = b"<html><body>Welcome to Hotel Wi-Fi</body></html>"

FORKS = """
import json, os, sys
from huggingface_hub import constants
from builder.hub import download as hub
for line in sys.stdin:
    cache, job = json.loads(line)
    if not (child := os.fork()):
        constants.HF_HUB_CACHE = cache
        os._exit(hub.main(json.dumps(job)))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(int(os.environ["BUILDER_PROGRESS_FD"]), (json.dumps({"exit": code}) + "\\n").encode())
"""


@dataclass
class Jobs:
    """Runs jobs of builder/hub/download.py and returns their events merged, with the exit code as "exit"."""

    hub: Hub
    child: subprocess.Popen[str]
    events: Any
    root: Path
    number: int = 0

    @property
    def cache(self) -> Path:
        return self.root / f"case-{self.number}" / "hf" / "hub"

    def run(self, job: str, commit: str, **more: Any) -> dict[str, Any]:
        asked = {"job": job, "repo": REPO, "revision": None, "commit": commit, "waits": [0.01, 0.01], "stall": LIMIT}
        assert self.child.stdin
        self.child.stdin.write(json.dumps([str(self.cache), {**asked, "limit": LIMIT, **more}]) + "\n")
        self.child.stdin.flush()
        found: dict[str, Any] = {}
        while "exit" not in found:
            found |= json.loads(self.events.readline())
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    root = tmp_path_factory.mktemp("faults")
    read, write = os.pipe()
    with Hub() as hub, open(root / "log", "wb") as log, os.fdopen(read, encoding="utf-8") as events:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment = {
            **kept,
            "HF_ENDPOINT": hub.endpoint.replace("//", "//mirror:drowssapterces@"),
            "HF_HOME": str(root / "home"),
            "NO_PROXY": "*",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "BUILDER_PROGRESS_FD": str(write),
        }
        child = subprocess.Popen(
            [sys.executable, "-c", FORKS],
            stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True, pass_fds=[write], env=environment,
        )  # fmt: skip
        os.close(write)
        yield Jobs(hub, child, events, root)
        assert child.stdin
        child.stdin.close()
        child.wait(PATIENT)
    assert b"drowssapterces" not in (root / "log").read_bytes()


@pytest.fixture
def jobs(server: Jobs) -> Iterator[Jobs]:
    server.number += 1
    server.hub.faults.clear()
    server.hub.repos.clear()
    server.cache.mkdir(parents=True)
    yield server
    shutil.rmtree(server.cache)


def outside(jobs: Jobs) -> dict[str, bytes]:
    """All files, with their content, outside of the cache's directories for this repository."""
    own = [
        jobs.cache / f"models--{REPO.replace('/', '--')}",
        jobs.cache / ".locks" / f"models--{REPO.replace('/', '--')}",
    ]
    files = (
        p for p in [*jobs.root.rglob("*"), *Path("/tmp").glob("planted*")] if p.is_file() and p != jobs.root / "log"
    )
    ignored = ("CACHEDIR.TAG", "version.txt", ".agent_harnesses.json")
    return {
        str(p): p.read_bytes() for p in files if not any(p.is_relative_to(o) for o in own) and p.name not in ignored
    }


def headers(pattern: str, method: str = "HEAD", **changes: Any) -> Fault:
    named = {name.replace("_", "-"): value for name, value in changes.items()}
    return Fault(pattern, "headers", FOREVER, method, headers=named)


def etag(value: str, pattern: str = "/resolve/.*/config.json") -> Fault:
    return headers(pattern, ETag=value)


def entry(**changes: Any) -> Fault:
    return Fault("/tree/", "entry", FOREVER, entry=changes)


def body(pattern: str, content: bytes, status: int = 200, **more: Any) -> Fault:
    return Fault(pattern, "body", FOREVER, "*", status=status, body=content, headers=more)


def status(pattern: str, code: int, **more: str) -> Fault:
    return Fault(
        pattern, "status", FOREVER, "*", status=code, headers={k.replace("_", "-"): v for k, v in more.items()}
    )


INFO = "/api/models/[^/]*/[^/]*(/revision/.*)?$"
TREE = "/tree/"
CONFIG = "/resolve/.*/config.json"
WEIGHTS = "/resolve/.*/model.safetensors"
LINKED = "X_Linked_ETag"
VICTIM = "{root}/victim"
FAR = "Fri, 31 Dec 9999 23:59:59 GMT"
NO_HASH = "is not a hash"
NO_COMMIT = "which is not a commit"
UNCLEAR = "can't parse the response"
SLOW = "took more than|stuck|stalled"

FAULTS: list[tuple[str, str, Fault, str]] = [
    # An ETag becomes the path of a blob, of its partial file and of a lock.
    ("absolute ETag", "download", etag('"' + VICTIM + '"'), NO_HASH),
    ("absolute ETag, weak", "download", etag('W/"' + VICTIM + '"'), NO_HASH),
    ("absolute ETag, bare", "download", etag(VICTIM), NO_HASH),
    ("ETag upwards", "download", etag('"../../../../planted"'), NO_HASH),
    ("ETag upwards from a hash", "download", etag('"' + "a" * 40 + '/../../../../planted"'), NO_HASH),
    ("ETag with a folder", "download", etag('"a/b"'), NO_HASH),
    ("ETag of a dot", "download", etag('"."'), NO_HASH),
    ("ETag of two dots", "download", etag('".."'), NO_HASH),
    ("ETag of a glob", "download", etag('"*"'), NO_HASH),
    ("ETag that is empty", "download", etag('""'), NO_HASH),
    ("ETag of 39 digits", "download", etag('"' + "a" * 39 + '"'), NO_HASH),
    ("ETag of 41 digits", "download", etag('"' + "a" * 41 + '"'), NO_HASH),
    ("ETag of 65 digits", "download", etag('"' + "a" * 65 + '"'), NO_HASH),
    ("ETag of capitals", "download", etag('"' + "A" * 40 + '"'), NO_HASH),
    ("ETag of 10,000 letters", "download", etag('"' + "x" * 10_000 + '"'), NO_HASH),
    ("ETag with a code", "download", etag('"\x1b[2J"'), ""),
    ("ETag of S3 parts", "download", etag('"d41d8cd98f00b204e9800998ecf8427e-12"'), NO_HASH),
    ("no ETag", "download", headers(CONFIG, ETag=None), ""),
    ("linked ETag", "download", headers(WEIGHTS, **{LINKED: '"' + VICTIM + '"'}), NO_HASH),
    ("linked ETag upwards", "download", headers(WEIGHTS, **{LINKED: '"../../../../planted"'}), NO_HASH),
    ("another file's ETag", "download", etag('"' + "a" * 40 + '"'), ""),
    # A commit becomes a directory, in snapshots/ and (for a 404) in .no_exist/.
    ("commit upwards", "download", headers(CONFIG, X_Repo_Commit="../../../../planted"), NO_COMMIT),
    ("commit upwards of a GET", "download", headers(CONFIG, "GET", X_Repo_Commit="../../../../planted"), NO_COMMIT),
    ("commit of a 404", "download", Fault(CONFIG, "status", FOREVER, "*", status=404, headers={
        "X-Error-Code": "EntryNotFound", "X-Repo-Commit": "../../../../../planted"}), NO_COMMIT),
    ("absolute commit of a 404", "download", Fault(CONFIG, "status", FOREVER, "*", status=404, headers={
        "X-Error-Code": "EntryNotFound", "X-Repo-Commit": VICTIM}), NO_COMMIT),
    ("another commit", "download", headers(CONFIG, X_Repo_Commit="b" * 40), "was requested"),
    ("no commit", "download", headers(CONFIG, X_Repo_Commit=None), ""),
    # A listing.
    ("listed hash upwards", "download", entry(oid="../../../../planted"), NO_HASH),
    ("listed hash absolute", "download", entry(oid=VICTIM), NO_HASH),
    ("listed LFS hash", "download", entry(lfs={"oid": VICTIM, "size": 1, "pointerSize": 1}), NO_HASH),
    ("listed hash of a number", "download", entry(oid=5), NO_HASH),
    ("listed hash of another file", "download", entry(oid="c" * 40), "size or hash"),
    ("listed Xet hash", "download", entry(xetHash="../../../planted"), ""),
    ("listed size below zero", "download", entry(size=-1), "size"),
    ("listed size of text", "download", entry(size="x"), "size"),
    ("listed size of 1e30", "download", entry(size=10**30), "size"),
    ("listed size of none", "download", entry(size=None), ""),
    ("other listed sizes", "download", entry(size=5), "size or hash"),
    ("listed names upwards", "download", entry(path="../../../../planted"), "no config.json"),
    ("listed names absolute", "download", entry(path=VICTIM), "no config.json"),
    ("listed names with a backslash", "download", entry(path="..\\..\\planted"), "no config.json"),
    ("listed names with codes", "download", entry(path="\x1b]0;x\x07.json"), "no config.json"),
    ("listed names of 5,000 letters", "download", entry(path="x" * 5000), "no config.json"),
    ("listed names of half a pair", "download", entry(path="\ud800.json"), "no config.json"),
    ("listed names of numbers", "download", entry(path=5), ""),
    ("listed types", "download", entry(type="link"), ""),
    ("listing of text", "download", body(TREE, b'"text"'), ""),
    ("listing of null", "download", body(TREE, b"null"), UNCLEAR),
    ("listing of numbers", "download", body(TREE, b"[1, 2]"), UNCLEAR),
    ("listing of an object", "download", body(TREE, b'{"a": 1}'), ""),
    ("listing of nothing", "download", body(TREE, b"[]"), "no config.json"),
    ("listing without a body", "download", body(TREE, b""), UNCLEAR),
    ("listing cut", "download", body(TREE, b'[{"type": "file", "oid"'), UNCLEAR),
    ("listing of 100,000 levels", "download", body(TREE, DEEP), UNCLEAR),
    ("listing of no UTF-8", "download", body(TREE, b'["\xff"]'), ""),
    ("listing of zeros", "download", body(TREE, b"\0" * 1000), UNCLEAR),
    ("listing without end", "download", Fault(TREE, "pages", FOREVER), "endless listing|took more than"),
    ("a byte at a time", "download", Fault(TREE, "drip", FOREVER), SLOW),
    ("listing compressed unasked", "download", headers(TREE, "GET", Content_Encoding="gzip"), "encoding"),
    # What is asked first.
    ("resolving at a byte at a time", "resolve", Fault(INFO, "drip", FOREVER), SLOW),
    ("a portal's page", "resolve", body(INFO, PORTAL, **HTML), "captive portal"),
    ("a portal's redirect", "resolve", body(INFO, b"", 302, Location="/login"), ""),
    ("info of 100,000 levels", "resolve", body(INFO, DEEP), UNCLEAR),
    ("info of a list", "resolve", body(INFO, b"[]"), UNCLEAR),
    ("info of no JSON", "resolve", body(INFO, b"no such luck"), UNCLEAR),
    ("info of nothing", "resolve", body(INFO, b"{}"), ""),
    ("Retry-After: soon", "resolve", status(INFO, 429, Retry_After="soon"), "limits the rate"),
    ("Retry-After below zero", "resolve", status(INFO, 429, Retry_After="-5"), "limits the rate"),
    ("Retry-After of a year", "resolve", status(INFO, 429, Retry_After="31536000"), "wait another 10000000 s"),
    ("Retry-After of 400 digits", "resolve", status(INFO, 429, Retry_After="9" * 400), "wait another 10000000 s"),
    ("Retry-After of a far date", "resolve", status(INFO, 429, Retry_After=FAR), "wait another 10000000 s"),
    ("Retry-After of no date", "resolve", status(INFO, 429, Retry_After="Fri, 99 Foo 9999 99:99:99 GMT"), "limits"),
    ("Retry-After of a superscript", "resolve", status(INFO, 429, Retry_After="\xb2"), "limits the rate"),
    ("ratelimit of a year", "resolve", status(INFO, 429, ratelimit='"api";r=0;t=31536000'), "wait another 10000000 s"),
    ("503 and a year", "download", status(CONFIG, 503, Retry_After="31536000"), "answered 503"),
    ("429 and a year for a file", "download", status("/cdn/", 429, Retry_After="31536000"), "limits the rate"),
    # Files.
    ("a portal's page for a file", "download", body(CONFIG, PORTAL, **HTML), ""),
    ("a portal's page for the weights", "download", body("/cdn/", PORTAL, **HTML), "captive portal"),
    ("config.json damaged", "download", Fault(CONFIG, "wrong-bytes", FOREVER), r"^config\.json of .* size or hash"),
    ("config.json cut", "download", Fault(CONFIG, "short", FOREVER), ""),
    ("config.json a byte at a time", "download", Fault(CONFIG, "drip", FOREVER), SLOW),
    ("config.json hangs", "download", Fault(CONFIG, "hang", FOREVER, after=10), SLOW),
    ("weights damaged", "download", Fault("/cdn/", "wrong-bytes", FOREVER), r"^model\.safetensors of .* size or hash"),
    ("a redirect to itself", "download", body(CONFIG, b"", 302, Location="config.json"), ""),
    ("a redirect to a file", "download", headers(WEIGHTS, Location="file:///etc/passwd"), ""),
    ("a redirect to nowhere", "download", headers(WEIGHTS, Location="http://127.0.0.1:9/x"), ""),
    ("a redirect of codes", "download", headers(WEIGHTS, Location="http://[::bad/\x1b[2J"), ""),
    ("a linked size below zero", "download", headers(WEIGHTS, X_Linked_Size="-1"), ""),
    ("a linked size of text", "download", headers(WEIGHTS, X_Linked_Size="x"), ""),
    ("401 for a file", "download", status(CONFIG, 401), ""),
    ("404 for a file", "download", status(CONFIG, 404), ""),
    ("416 for a file", "download", status("/cdn/", 416), ""),
    ("999 for a file", "download", status(CONFIG, 999), ""),
]  # fmt: skip


def test_there_are_as_many_faults_as_were_tried() -> None:
    assert len({name for name, *_ in FAULTS}) == len(FAULTS) >= 79


@pytest.mark.parametrize(("name", "job", "fault", "says"), FAULTS, ids=[name for name, *_ in FAULTS])
def test_a_fault_ends_in_a_message_and_leaves_nothing(name: str, job: str, fault: Fault, says: str, jobs: Jobs) -> None:
    commit = jobs.hub.add(REPO, SMALL)
    victim = jobs.root / "victim"
    victim.write_text("precious")
    changed = json.loads(json.dumps(vars(fault) | {"body": ""}).replace("{root}", str(jobs.root))) | {
        "body": fault.body
    }
    jobs.hub.fail(Fault(**changed))
    before = outside(jobs)

    start = time.monotonic()
    found = jobs.run(job, commit)
    took = time.monotonic() - start
    assert outside(jobs) == before
    assert victim.read_text() == "precious"
    assert took < PATIENT
    if "stalled" in found:  # the parent begins again, and then says that the transfer is stuck
        assert found["exit"] == 75
        assert says in (SLOW, "")
    elif "error" in found:
        error = found["error"]
        kind = getattr(errors, error["class"])
        assert found["exit"] == kind.exit_code
        text = "\n".join([error["what"], error["why"], error["hint"]])
        assert re.search(says, text, re.DOTALL), text
        assert "drowssapterces" not in text
        assert "Traceback" not in text
    else:  # harmless after all: then what came is right
        assert says == ""
        if job == "download":
            assert_same(found)

    jobs.hub.faults.clear()
    again = jobs.run("download", commit)
    assert again["exit"] == 0, again
    assert_same(again)
    assert outside(jobs) == before
    assert not list(jobs.cache.rglob("*.incomplete"))


def assert_same(found: dict[str, Any]) -> None:
    root = Path(found["result"]["root"])
    assert len(found["result"]["files"]) >= 4
    for name in found["result"]["files"]:
        assert (root / name).read_bytes() == (SMALL / name).read_bytes(), name


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("how", ["a bit", "empty", "html"])
def test_a_damaged_small_file_of_the_cache_is_fetched_again(name: str, how: str, jobs: Jobs) -> None:
    commit = jobs.hub.add(REPO, SMALL)
    first = jobs.run("download", commit)
    path = Path(first["result"]["root"]) / name
    content = path.read_bytes()
    damaged = {"a bit": bytes([content[0] ^ 1]) + content[1:], "empty": b"", "html": PORTAL}[how]
    path.resolve().write_bytes(damaged)
    again = jobs.run("download", commit)
    assert again["exit"] == 0, again
    assert_same(again)
    assert len(jobs.hub.downloads(name)) >= 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_small_file_damaged_on_the_way_is_fetched_again(name: str, jobs: Jobs) -> None:
    commit = jobs.hub.add(REPO, SMALL)
    jobs.hub.fail(Fault(f"/resolve/.*/{name}", "wrong-bytes", 1))
    found = jobs.run("download", commit)
    assert found["exit"] == 0, found
    assert_same(found)


def test_a_damaged_index_of_the_cache_is_fetched_again(jobs: Jobs) -> None:
    commit = jobs.hub.add(REPO, DATA / "tiny-qwen3")
    first = jobs.run("download", commit)
    index = Path(first["result"]["root"]) / "model.safetensors.index.json"
    content = index.read_bytes()
    index.resolve().write_bytes(b"{" + content[1:-1] + b"]")
    again = jobs.run("listing", commit)
    assert again["exit"] == 0, again
    assert index.read_bytes() == content


def test_links_out_of_the_cache_are_not_followed(jobs: Jobs) -> None:
    """A damaged file is removed from the cache, but not the target of a planted link."""
    commit = jobs.hub.add(REPO, SMALL)
    first = jobs.run("download", commit)
    victim = jobs.root / "victim"
    victim.write_text("precious")
    path = Path(first["result"]["root"]) / "tokenizer.json"
    path.unlink()
    path.symlink_to(victim)
    again = jobs.run("download", commit)
    assert victim.read_text() == "precious"
    assert again["exit"] == 0, again
    assert_same(again)
