"""tools/tpu: the exact commands that the scripts would run, and that those commands do their work on a worker."""

import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tools" / "tpu"


def call(script, *args, env=None, check=True, home="/nowhere"):
    """One script with a clean environment: no variable of this machine names a TPU."""
    clean = {"PATH": os.environ["PATH"], "HOME": str(home), **(env or {})}
    done = subprocess.run([SCRIPTS / script, *args], env=clean, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == check, done.stderr
    return done.stdout if check else done.stderr


def dry(script, *args, env=None):
    return call(script, "--dry-run", "--name", "pod", "--zone", "us-west4-a", *args, env=env).splitlines()


GOLDEN = [
    (
        ("create.sh", "--type", "v5litepod-16"),
        [
            "gcloud compute tpus tpu-vm create pod --zone us-west4-a --accelerator-type v5litepod-16 "
            "--version v2-alpha-tpuv5-lite"
        ],
    ),
    (
        ("create.sh", "--type", "v5p-16", "--queued", "--spot", "--", "--valid-until-duration", "6h"),
        [
            "gcloud compute tpus queued-resources create pod --node-id pod --zone us-west4-a --accelerator-type v5p-16 "
            "--runtime-version v2-alpha-tpuv5 --spot --valid-until-duration 6h",
            "gcloud compute tpus queued-resources describe pod --zone us-west4-a --format 'value(state.state)'",
        ],
    ),
    (
        ("create.sh", "--type", "v6e-64", "--slices", "2", "--project", "mine"),
        [
            "gcloud compute tpus queued-resources create pod --node-count 2 --node-prefix pod --zone us-west4-a "
            "--project mine --accelerator-type v6e-64 --runtime-version v2-alpha-tpuv6e",
            "gcloud compute tpus queued-resources describe pod --zone us-west4-a --project mine "
            "--format 'value(state.state)'",
        ],
    ),
    (
        ("setup.sh", "--bucket", "my-bucket"),
        [
            "git archive --format tar.gz --output /tmp/jaxpost.tar.gz HEAD",
            "gcloud compute tpus tpu-vm scp /tmp/jaxpost.tar.gz pod:jaxpost.tar.gz --zone us-west4-a --worker all",
            "gcloud compute tpus tpu-vm ssh pod --zone us-west4-a --worker all --command 'mkdir -p ~/jaxpost && "
            "tar -xzf ~/jaxpost.tar.gz -C ~/jaxpost && bash ~/jaxpost/tools/tpu/worker.sh bucket my-bucket'",
        ],
    ),
    (
        ("run.sh", "--", "train", "configs/sft/x.yaml", "--run.dir", "~/shared/{name}"),
        [
            "gcloud compute tpus tpu-vm ssh pod --zone us-west4-a --worker all --command 'cd ~/jaxpost && "
            "if [ -e ~/jaxpost.pid ] && kill -0 $(cat ~/jaxpost.pid) 2>/dev/null; then "
            "echo $(hostname): a run is going on, stop it first >&2; exit 1; fi; "
            "{ env JAXPOST_DISTRIBUTED=auto PYTHONUNBUFFERED=1 setsid nohup .venv/bin/jaxpost train configs/sft/x.yaml "
            r"--run.dir ~/'\''shared/{name}'\'' >> ~/jaxpost.log 2>&1 < /dev/null & echo $! > ~/jaxpost.pid; }'"
        ],
    ),
    (
        ("logs.sh", "--slices", "2", "--lines", "9", "--follow"),
        [
            f"gcloud compute tpus tpu-vm ssh pod-{i} --zone us-west4-a --worker 0 "
            "--command 'tail -n 9 -f ~/jaxpost.log'"
            for i in range(2)
        ],
    ),
    (
        ("stop.sh",),
        [
            "gcloud compute tpus tpu-vm ssh pod --zone us-west4-a --worker all --command '[ -e ~/jaxpost.pid ] && "
            "kill -TERM $(cat ~/jaxpost.pid) && while kill -0 $(cat ~/jaxpost.pid) 2>/dev/null; do sleep 1; done; "
            "tail -n 3 ~/jaxpost.log'"
        ],
    ),
    (("delete.sh",), ["gcloud compute tpus tpu-vm delete pod --zone us-west4-a --quiet"]),
    (
        ("delete.sh", "--slices", "2"),
        ["gcloud compute tpus queued-resources delete pod --zone us-west4-a --force --quiet"],
    ),
]


@pytest.mark.parametrize(("args", "expected"), GOLDEN, ids=lambda x: " ".join(x)[:40] if isinstance(x, tuple) else "")
def test_the_dry_run_prints_the_exact_commands(args, expected):
    assert dry(*args) == expected


def test_variables_stand_in_for_flags():
    env = {"TPU_NAME": "pod", "TPU_ZONE": "us-west4-a", "TPU_TYPE": "v5litepod-16", "TPU_RUNTIME": "own"}
    assert call("create.sh", "--dry-run", env=env) == (
        "gcloud compute tpus tpu-vm create pod --zone us-west4-a --accelerator-type v5litepod-16 --version own\n"
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("create.sh",), "which TPU? give --name or set TPU_NAME"),
        (("create.sh", "--name", "pod"), "give --zone or set TPU_ZONE"),
        (("create.sh", "--name", "pod", "--zone", "z", "--dry-run"), "give --type"),
        (("create.sh", "--name", "pod", "--zone", "z", "--type", "v9-1", "--dry-run"), "give --runtime"),
        (("create.sh", "--name"), "--name needs a value"),
        (("delete.sh", "--nmae", "pod"), "unknown flag --nmae"),
        (("delete.sh", "--name", "pod", "--zone", "z", "--slices", "two", "--dry-run"), "must be a number"),
        (("run.sh", "--name", "pod", "--zone", "z", "--dry-run"), "what should run?"),
    ],
)
def test_errors_say_what_to_do(args, words):
    assert words in call(*args, check=False)


def test_scripts_parse_and_explain_themselves():
    for script in sorted(SCRIPTS.glob("*.sh")):
        subprocess.run(["bash", "-n", script], check=True)
        if script.name not in ("common.sh", "worker.sh"):
            assert f"tools/tpu/{script.name} --name NAME --zone ZONE" in call(script.name, "--help")


FAKE_GCLOUD = """#!/usr/bin/env bash
# Runs what ssh would run, in this machine's shell, with the fake worker's home.
while [ $# -gt 0 ]; do
  if [ "$1" = --command ]; then exec bash -c "$2"; fi
  shift
done
"""
FAKE_JAXPOST = """#!/usr/bin/env bash
printf '<%s>' "$@"
echo " distributed=$JAXPOST_DISTRIBUTED token=$HF_TOKEN"
trap 'echo saved; exit 143' TERM
while true; do sleep 0.1; done
"""


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_a_run_is_started_watched_and_stopped(tmp_path):
    """Words keep their spaces and quotes all the way; a second start is refused; stop lets the run save."""
    home = tmp_path / "home"
    program(tmp_path / "bin" / "gcloud", FAKE_GCLOUD)
    program(home / "jaxpost" / ".venv" / "bin" / "jaxpost", FAKE_JAXPOST)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TPU_NAME": "pod", "TPU_ZONE": "z"}
    words = ["train", "p.yaml", "--run.dir", "~/shared/{name}", "--prompts", 'it\'s "so" $HOME', ""]
    call("run.sh", "--env", "HF_TOKEN=a b", "--", *words, env=env, home=home)
    try:
        log, deadline = home / "jaxpost.log", time.monotonic() + 20
        while "token" not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        words[3] = f"{home}/shared/{{name}}"
        expected = "".join(f"<{w}>" for w in words) + " distributed=auto token=a b\n"
        assert call("logs.sh", env=env, home=home) == expected
        assert "a run is going on" in call("run.sh", "--", "train", "p.yaml", env=env, home=home, check=False)
    finally:
        output = call("stop.sh", env=env, home=home)
    assert output.endswith("saved\n")
