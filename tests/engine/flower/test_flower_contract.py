"""What kilotune uses of Flower's internal API is still there and still does what it did."""

import importlib
import inspect

import flwr
import pytest

from kilotune.engine.flower import superlink
from kilotune.engine.flower.messages import Request, encode_request

USED = {
    "flwr.superlink.main": {"create_app": ["config", "superlink_lifespan_class"]},
    "flwr.superlink.grid.inmemory_grid.InMemoryGrid": {"_check_message": ["message"], "set_run": ["run"]},
    "flwr.server.superlink.linkstate.InMemoryLinkState": {
        "__init__": ["federation_manager", "object_store"],
        "activate_node": ["node_id", "heartbeat_interval"],
        "deactivate_node": ["node_id"],
        "get_message_ins": ["node_id", "limit", "run_id"],
        "store_message_res": ["message"],
        "acknowledge_node_heartbeat": ["node_id", "heartbeat_interval"],
        "create_node": ["owner_aid", "owner_name", "public_key", "heartbeat_interval", "location", "name"],
        "start_session": ["run_id"],
        "store_message_and_object_tree": ["message", "object_tree", "session_id"],
        "delete_messages": ["message_ins_ids"],
        "delete_sessions_in_run": ["run_id"],
        "claim_task": ["task_id"],
        "activate_task": ["task_id"],
    },
    "flwr.supernode.fleet_http_client.FleetHttpClient": {
        "ActivateNode": ["request"],
        "DeactivateNode": ["request"],
        "SendNodeHeartbeat": ["request"],
        "PullMessages": ["request"],
        "PushMessages": ["request"],
    },
    "flwr.supernode.node_auth_http_interceptor.NodeAuthHttpInterceptor": {
        "__init__": ["private_key", "public_key"],
        "intercept": ["context", "call_next"],
    },
}


def find(path):
    module, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", USED)
def test_flowers_internals_have_the_signatures_kilotune_calls(path):
    """Kills: a new Flower version that would fail in the middle of somebody's federation instead of here."""
    advice = f"flwr {flwr.__version__} changed {path}: adapt engine/flower/superlink.py or fleet.py, or pin flwr lower."
    try:
        owner = find(path)
        found = {name: list(inspect.signature(getattr(owner, name)).parameters) for name in USED[path]}
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{advice} ({error})")
    for name, parameters in USED[path].items():
        assert [p for p in found[name] if p != "self"] == parameters, f"{advice} ({name})"


def test_flowers_run_never_ends_and_forgets_what_was_exchanged():
    """Kills: a run that Flower fails after a minute without a ServerApp; memory that grows with every message."""
    _, state, grid = superlink._flower()
    state.report = lambda what, which: None
    node = state.add(b"key")
    assert state.activate_node(node, 30.0)
    assert state.activate_node(node, 30.0)  # again while it is online: a client that was killed and restarted
    assert state.task_token_store == {}  # nothing that could expire
    run_id = grid.run.run_id
    assert state.get_run_status({run_id})[run_id].status == "running"
    for number in range(3):
        message = encode_request(Request("train"), run_id, node, f"{number:064x}", 1.8e9)
        assert list(grid.push_messages([message])) == [f"{number:064x}"]
        assert state.get_message_ins(node, 1) == [message]
        assert state.get_message_ins(node, 1) == []
        assert state.activate_node(node, 30.0)
        assert state.get_message_ins(node, 1) == [message]  # fetched by a process that died: fetched again
        grid.drop([f"{number:064x}"])
    grid.tidy()
    assert len(state.object_store) == 0
    assert state.num_message_ins() == state.num_message_res() == 0
    assert state._object_push_sessions == {}
