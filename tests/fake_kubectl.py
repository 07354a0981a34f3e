#!/usr/bin/env -S python3 -S -E
"""A kubectl for tests: answers from a folder of objects, and notes every call.

FAKE_KUBECTL names the folder. In it:
  objects.json  {"rayjobs.ray.io/train-demo": {...}, ...}: what get and delete work on
  rules.json    [[REGEX, {"out": ..., "err": ..., "rc": ..., "sleep": ...}], ...]: the first rule
                whose regex is found in the call's words answers; "times" limits how often,
                "set" changes objects (null removes one), "hang" keeps the connection open
                "when" names an object and the jobDeploymentStatus it must have
  calls.txt     every call's words; applied.yaml what apply was given last
``kustomize`` is passed on to the real kubectl.
"""

import json
import os
import re
import sys
import time

FOLDER = os.environ["FAKE_KUBECTL"]


def read(name):
    try:
        with open(os.path.join(FOLDER, name), encoding="utf-8") as stream:
            return json.load(stream)
    except FileNotFoundError:
        return {}


def write(name, value):
    temporary = os.path.join(FOLDER, f".{name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(value, stream)
    os.replace(temporary, os.path.join(FOLDER, name))


def change(changes):
    objects = read("objects.json")
    for key, value in changes.items():
        if value is None:
            objects.pop(key, None)
        else:
            objects[key] = value
    write("objects.json", objects)


def scripted(line):
    """Whether a rule answered."""
    for number, (pattern, answer) in enumerate(read("rules.json") or []):
        if not re.search(pattern, line):
            continue
        if "when" in answer:
            key, wanted = answer["when"]
            status = read("objects.json").get(key, {}).get("status", {})
            if status.get("jobDeploymentStatus") != wanted:
                continue
        counter = os.path.join(FOLDER, f"used-{number}")
        used = os.path.getsize(counter) if os.path.exists(counter) else 0
        if used >= answer.get("times", 1 << 30):
            continue
        with open(counter, "a", encoding="utf-8") as stream:
            stream.write("x")
        time.sleep(answer.get("sleep", 0))
        sys.stdout.write(answer.get("out", ""))
        sys.stdout.flush()
        sys.stderr.write(answer.get("err", ""))
        change(answer.get("set", {}))
        if answer.get("hang"):
            time.sleep(60)
        sys.exit(answer.get("rc", 0))


def selected(value, selector):
    labels = value["metadata"].get("labels", {})
    return all(labels.get(k) == v for k, _, v in (s.partition("=") for s in selector.split(",")))


def get(words, flags):
    objects = read("objects.json")
    kind = words[0]
    if len(words) > 1:
        found = objects.get(f"{kind}/{words[1]}")
        if found is not None:
            print(json.dumps(found))
        return
    items = [value for key, value in objects.items() if key.rpartition("/")[0] == kind]
    if "--selector" in flags:
        items = [item for item in items if selected(item, flags["--selector"])]
    if "--output" in flags and flags["--output"].startswith("go-template"):
        print("".join(map(pod_line, items)), end="")
        return
    if flags.get("--output") == "name":
        print("\n".join(f"{kind}/{item['metadata']['name']}" for item in items))
        return
    if "--field-selector" in flags:
        name = re.search(r"involvedObject\.name=([^,]+)", flags["--field-selector"])[1]
        items = [item for item in items if item["involvedObject"]["name"] == name]
    print(json.dumps({"items": items}))


def pod_line(pod):
    """What cluster.launch.room.POD_LINES makes of a pod that is not over."""
    if pod["status"].get("phase") in ("Succeeded", "Failed"):
        return ""
    parts = [pod["spec"].get("nodeName", "")]
    for field in ("containers", "initContainers"):
        resources = [c.get("resources", {}) for c in pod["spec"].get(field, [])]
        asked = [{**r.get("limits", {}), **r.get("requests", {})} for r in resources]
        parts.append("".join("".join(f"{k}={v}," for k, v in a.items()) + ";" for a in asked))
    return "|".join(parts) + "\n"


def apply(flags):
    text = sys.stdin.read()
    with open(os.path.join(FOLDER, "applied.yaml"), "w", encoding="utf-8") as stream:
        stream.write(text)
    name = re.search(r"kind: RayJob\nmetadata:\n(?:  .*\n)*?  name: (\S+)", text)[1]
    run = re.search(r"babelray\.dev/run: (\S+)", text)[1]
    labels = {"app.kubernetes.io/name": "babelray"}
    metadata = {"name": name, "uid": "new", "labels": labels}
    metadata["annotations"] = {"babelray.dev/run": run}
    change({f"rayjobs.ray.io/{name}": {"metadata": metadata, "spec": {"backoffLimit": 2}}})


def main():
    words = sys.argv[1:]
    line = " ".join(words)
    with open(os.path.join(FOLDER, "calls.txt"), "a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    plain = [w for w in words if not w.startswith("--")]
    flags = dict(w.split("=", 1) for w in words if w.startswith("--") and "=" in w)
    scripted(line)
    if plain[0] == "kustomize":
        os.execv(os.environ["REAL_KUBECTL"], ["kubectl", *words])
    elif plain[0] == "get":
        get(plain[1:], flags)
    elif plain[0] == "apply":
        apply(flags)
    elif plain[0] == "delete":
        if len(plain) > 2:
            change({f"{plain[1]}/{plain[2]}": None})
    elif plain[:2] == ["auth", "can-i"]:
        print("yes")
    elif plain[0] == "version":
        print(json.dumps({"clientVersion": {"gitVersion": "v1.34.0"}}))
    elif plain[0] == "config":
        view = {
            "current-context": "prod",
            "contexts": [{"name": "prod", "context": {"namespace": "team"}}],
            "clusters": [{"cluster": {"server": "https://k8s.test"}}],
        }
        print("team" if "jsonpath" in line else json.dumps(view))
    else:
        sys.exit(f"error: the fake kubectl knows no answer to: {line}")


if __name__ == "__main__":
    main()
