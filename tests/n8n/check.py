#!/usr/bin/env python3
"""Hold the workflows of examples/n8n to what n8n's own nodes say of themselves: check.py N8N-NODES-BASE.tgz

The package n8n-nodes-base describes every node: its versions, its parameters and their choices, its credentials. A node of a
workflow that is not described so would be shown as broken after the import. Exits 1 and names what is wrong.
"""

import json
import sys
import tarfile
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/n8n"


def described(package):
    """Descriptions by the node's type and version."""
    with tarfile.open(package) as files:
        nodes = json.load(files.extractfile("package/dist/types/nodes.json"))
    found = {}
    for node in nodes:
        versions = node["version"] if isinstance(node["version"], list) else [node["version"]]
        found.update({(f"n8n-nodes-base.{node['name']}", version): node for version in versions})
    return found


def shown(parameter, values):
    """Whether a parameter is there beside these values of the others."""
    conditions = parameter.get("displayOptions", {}).get("show", {})
    return all(values.get(name) in choices for name, choices in conditions.items() if not name.startswith("@"))


def wrong_in(node, description):
    values = {parameter["name"]: parameter.get("default") for parameter in description["properties"]}
    values.update(node["parameters"])
    for name, value in node["parameters"].items():
        same = [parameter for parameter in description["properties"] if parameter["name"] == name]
        meant = next((parameter for parameter in same if shown(parameter, values)), None)
        if meant is None:
            yield f"has no parameter `{name}` here"
        elif meant["type"] == "options" and value not in [option["value"] for option in meant["options"]]:
            yield f"`{name}` cannot be {value!r}"
        elif meant["type"] == "collection":
            known = {option["name"] for option in meant["options"]}
            yield from (f"`{name}` has no {option!r}" for option in value if option not in known)
    credentials = [credential for credential in description.get("credentials", []) if shown(credential, values)]
    known = {credential["name"] for credential in credentials}
    yield from (f"takes no credential `{kind}`" for kind in node.get("credentials", {}) if kind not in known)
    required = {credential["name"] for credential in credentials if credential.get("required")}
    yield from (f"needs a credential `{kind}`" for kind in required - set(node.get("credentials", {})))


def main():
    nodes, wrong, seen = described(sys.argv[1]), [], 0
    for file in sorted(EXAMPLES.glob("*.json")):
        workflow = json.loads(file.read_text(encoding="utf-8"))
        names = {node["name"] for node in workflow["nodes"]}
        ends = [end["node"] for ways in workflow["connections"].values() for way in ways["main"] for end in way]
        wrong += [f"{file.name}: no node {name}" for name in [*workflow["connections"], *ends] if name not in names]
        for node in workflow["nodes"]:
            seen += 1
            description = nodes.get((node["type"], node["typeVersion"]))
            faults = wrong_in(node, description) if description else ["there is no such node"]
            wrong += [f"{file.name}: {node['name']} ({node['type']} {node['typeVersion']}): {fault}" for fault in faults]
    print("\n".join(wrong), file=sys.stderr)
    print(f"{seen} nodes of n8n, {len(wrong)} wrong")
    return 1 if wrong or not seen else 0


if __name__ == "__main__":
    sys.exit(main())
