"""Eight programs publish to one repository of the Hub: nothing is lost, and of one name one wins."""

import json
import os
import subprocess
import sys

import pytest
from hub_server.fixtures import ALICE

SCRIPT = """
import json, sys
from pathlib import Path
from mole.experts import Conflict
from mole.experts.backends.hub import HubBackend
repo_id, name, folder = sys.argv[1:]
backend = HubBackend(repo_id)
print(flush=True)
sys.stdin.readline()
outcomes = []
for one in (name, "shared"):
    try:
        backend.publish(one, Path(folder))
        outcomes.append(backend.card(one)[0].revision)
    except Conflict:
        outcomes.append("conflict")
print(json.dumps(outcomes))
"""


@pytest.mark.slow
def test_of_eight_processes_one_wins_a_name_and_all_publish_their_own(hub_backend, hub, repo_id, make, tmp_path):
    repo = hub.create(repo_id)
    processes = []
    for number in range(8):
        make(number).save(tmp_path / f"e{number}")
        command = [sys.executable, "-c", SCRIPT, repo_id, f"own-{number}", str(tmp_path / f"e{number}")]
        environment = {**os.environ, **hub.environment(ALICE), "HF_HUB_DISABLE_XET": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outcomes = [json.loads(process.communicate(timeout=600)[0]) for process in processes]
    assert [own for own, _ in outcomes] == [hub_backend.card(f"own-{number}")[0].revision for number in range(8)]
    (winner,) = [shared for _, shared in outcomes if shared != "conflict"]
    assert hub_backend.card("shared")[0].revision == winner
    assert len(hub_backend.cards()) == 9
    assert len(repo.log()) == 1 + 9
