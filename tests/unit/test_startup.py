"""Commands that compute nothing do not wait for torch."""

from __future__ import annotations

import json
import subprocess
import sys

MODULES = (
    "quorate.client.config",
    "quorate.client.enrol",
    "quorate.client.node.start",
    "quorate.client.node.status",
    "quorate.deploy.provision.provision",
    "quorate.deploy.server.status",
    "quorate.server.federation",
)


def test_operating_a_server_or_a_site_imports_nothing_heavy() -> None:
    program = f"import json, sys, {', '.join(MODULES)}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "flwr"} & set(json.loads(done.stdout))
