"""What the libraries see of the models: their list, and each by its id, with a slash too."""

from __future__ import annotations

import pytest
from tests.support.official_clients import OfficialClient, need_clients
from tests.support.programs import Program

need_clients()
pytestmark = pytest.mark.smoke


def test_it_lists_models(client: OfficialClient, rehearsal: Program) -> None:
    told = client.call("models", f"{rehearsal.url}/v1", str(rehearsal.key))
    ids = [one["id"] for one in told.result["data"]]
    assert {"org/steady", "fails"} <= set(ids)
    assert all({"id", "object", "created", "owned_by"} <= one.keys() for one in told.result["data"])
    assert told.statuses == [200]


@pytest.mark.parametrize("model", ["org/steady", "fails"])
def test_it_finds_a_model_by_its_id(client: OfficialClient, rehearsal: Program, model: str) -> None:
    told = client.call("model", f"{rehearsal.url}/v1", str(rehearsal.key), model=model)
    assert (told.result["id"], told.result["object"]) == (model, "model")


@pytest.mark.parametrize("model", ["org/none", "none"])
def test_a_model_that_nobody_serves_is_not_found(client: OfficialClient, rehearsal: Program, model: str) -> None:
    error = client.call("model", f"{rehearsal.url}/v1", str(rehearsal.key), model=model).error
    assert "NotFoundError" in error.classes
    assert error.code == "model_not_found"
