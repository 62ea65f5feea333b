"""Commands that compute nothing do not wait for torch."""

from __future__ import annotations

import json
import subprocess
import sys

MODULES = (
    "quorate.client.policy.site_config",
    "quorate.client.node.enrolment",
    "quorate.client.node.site_start",
    "quorate.client.health.site_status",
    "quorate.deploy.provision.provisioning",
    "quorate.deploy.server.server_status",
    "quorate.server.federation.folder",
)


def test_operating_a_server_or_a_site_imports_nothing_heavy() -> None:
    program = f"import json, sys, {', '.join(MODULES)}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "flwr"} & set(json.loads(done.stdout))
