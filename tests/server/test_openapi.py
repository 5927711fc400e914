import re

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from fedcompute.monitoring.pages.routes import PAGES
from fedcompute.server.api.guard import is_open
from fedcompute.server.api.operations import OPERATIONS


@pytest.fixture(scope="module")
def document(api):
    response = api.http.get(f"{api.url}/api/v1/openapi.json")
    assert response.status_code == 200
    return response.json()


def described(document):
    return {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}


def test_the_document_is_valid_openapi(document):
    OpenAPIV31SpecValidator(document).validate()


def test_every_route_that_is_no_devices_is_described_and_nothing_else_is(run_server, document):
    app = run_server().app
    served = {
        (method, route.path)
        for route in app.routes
        for method in route.methods - {"HEAD"}
        # Devices' routes are open and outside the document; orchestrators' are open and in it.
        if not is_open(route.path) or route.path in ("/ready", "/healthz")
    }
    pages = {(one.method, one.path) for one in PAGES}
    assert described(document) == served - pages


def test_the_document_names_role_and_parameters_of_every_operation(document):
    for operation in OPERATIONS:
        found = document["paths"][operation.path][operation.method.lower()]
        assert found.get("x-role") == (operation.role and operation.role.value)
        assert bool(found["security"]) == (operation.role is not None)
        in_path = {one["name"] for one in found["parameters"] if one["in"] == "path"}
        assert in_path == set(re.findall(r"{(\w+)}", operation.path))
        assert found["summary"].endswith((".", ":", ",")) or len(found["summary"]) > 10


def test_answers_are_what_the_document_says(api, hand_made, document):
    process = hand_made.process_of()
    task_id = api.open_task("described", process, goal=1, rounds=2)
    api.contribute("described", hand_made.update_of(process, hand_made.initial))
    api.wait_for("described", task_id, "COMPLETED", iteration=1)
    budget = {"epsilon": 5.0, "delta": 1e-6, "assumption": "CLAIMED"}
    api.http.put(f"{api.url}/api/v1/populations/described/budget", json=budget)
    made = api.http.post(f"{api.url}/api/v1/api-keys", json={"label": "l", "role": "viewer"}).json()
    values = {"population": "described", "task": task_id, "key": made["api_key"]["id"]}
    looked_at = 0
    for operation in OPERATIONS:
        is_json = "application/json" in operation.answer
        if operation.method != "GET" or not is_json or not set(re.findall(r"{(\w+)}", operation.path)) <= set(values):
            continue
        path = re.sub(r"{(\w+)}", lambda found: str(values[found[1]]), operation.path)
        response = api.http.get(api.url + path, headers={"accept": "application/json"})
        assert response.status_code == operation.status, response.text
        content = document["paths"][operation.path]["get"]["responses"][str(operation.status)]["content"]
        conforms(response.json(), content["application/json"]["schema"], document)
        looked_at += 1
    assert looked_at >= 12
    for verb in ("pause", "resume", "cancel", "clone"):
        path = f"/api/v1/tasks/{{population}}/{{task}}/{verb}"
        response = api.http.post(api.url + path.format(**values))
        found = document["paths"][path]["post"]["responses"][str(response.status_code)]
        conforms(response.json(), found["content"]["application/json"]["schema"], document)
    refused = api.http.post(f"{api.url}/api/v1/tasks/described/{task_id}/pause")
    conforms(refused.json(), {"$ref": "#/components/schemas/Error"}, document)


def conforms(answer, schema, document):
    OAS31Validator({**schema, "components": document["components"]}).validate(answer)
