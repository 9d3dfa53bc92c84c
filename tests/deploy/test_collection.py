"""The Ansible collection: clean by its own tools, and whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

COLLECTION = Path(__file__).parents[2] / "deploy/ansible"
ROLE = COLLECTION / "roles/nbd_reactor"
PLAYBOOKS = sorted((COLLECTION / "playbooks").glob("*.yml"))
BIN = Path(sys.executable).parent


def run(*words: str | Path, home: Path, status: int = 0) -> str:
    """Run a command of Ansible's in the collection, with nothing of this user's settings."""
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(home),
        "ANSIBLE_HOME": str(home / "ansible"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        [BIN / words[0], *words[1:]],
        cwd=COLLECTION,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_the_linter_has_no_complaint(tmp_path: Path) -> None:
    run("ansible-lint", "--offline", "--strict", "--profile", "production", home=tmp_path)


@pytest.mark.parametrize("playbook", PLAYBOOKS, ids=lambda path: path.stem)
def test_playbooks_have_no_syntax_error(playbook: Path, tmp_path: Path) -> None:
    run("ansible-playbook", "--syntax-check", playbook, home=tmp_path)


@pytest.mark.parametrize(
    ("disks", "said"),
    [
        ({"data": "malloc"}, "backend: malloc, unlike data."),
        ({"data": {"path": 5}, "other": {"path": "/srv/a/b"}}, "text, unlike that of data."),
        ({"data": {"path": "/data.img"}}, "directory of their own, not /."),
        ({"data": {"path": "/srv/../home/data.img"}}, "sees no home"),
        ({"data": {"path": "data.img"}}, "unlike data.img."),
        ({True: {}, 7: {}, 1.5: {}}, "in quotes, unlike True, 1.5."),
        ({7: {"device": "/dev/nbd16"}}, "16 devices do not include all of /dev/nbd16;"),
    ],
)
def test_disks_that_cannot_be_right_are_refused_with_their_names(
    disks: dict, said: str, tmp_path: Path
) -> None:
    assert said in preflight({"nbd_reactor_disks": disks}, tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nbd_reactor_options=--cores=0-1"], "nbd_reactor_options: a list is meant, with -e in"),
        (["nbd_reactor_nbds_max=32769"], "the driver has at most 32768 devices."),
        (["nbd_reactor_packages=a,b"], "nbd_reactor_packages: a list is meant"),
        (['nbd_reactor_disks={"data": {}}'], "nbd_reactor_disks: keys and values are meant."),
        (["nbd_reactor_defaults=direct=true"], "nbd_reactor_defaults: keys and values are meant."),
        (['{"nbd_reactor_version": 1.0}'], "nbd_reactor_version: text is meant"),
        (['{"nbd_reactor_options": null}'], "nbd_reactor_options: a list is meant"),
        (['{"nbd_reactor_python": null}'], "nbd_reactor_python: the path of a Python is meant."),
        (["nbd_reactor_python=/no/python"], "/no/python cannot look at the host: "),
        (
            ["nbd_reactor_nbds_max=8", '{"nbd_reactor_disks": {"data": {"device": "/dev/nbd8"}}}'],
            "8 devices do not include all of /dev/nbd8;",
        ),
    ],
)
def test_text_of_the_command_line_is_cast_or_refused(
    words: list[str], said: str, tmp_path: Path
) -> None:
    assert said in preflight({}, tmp_path, *words)


@pytest.mark.skipif(os.geteuid() != 0, reason="the role needs root")
def test_cores_that_the_host_does_not_have_are_refused(tmp_path: Path) -> None:
    assert "core 99999 is not online" in preflight(
        {"nbd_reactor_options": ["--cores", 99999]}, tmp_path
    )


def test_a_start_is_given_up_within_half_of_the_time_that_io_can_wait(tmp_path: Path) -> None:
    for patience, seconds in ((600, 300), (400, 200), (900, 300), (20, 60), (0, 60)):
        variables = {"nbd_reactor_patience": {"stdout": f"{patience}\n"}}
        assert f'"msg": "{seconds} s"' in evaluate(
            "{{ nbd_reactor_start_seconds }} s", variables, tmp_path
        )


@pytest.mark.parametrize(("word", "removed"), [("", False), ("false", False), ("true", True)])
def test_images_are_removed_only_when_that_is_said(
    word: str, *, removed: bool, tmp_path: Path
) -> None:
    words = [f"nbd_reactor_remove_images={word}"] if word else []
    said = evaluate("{{ nbd_reactor_made | join(' ') }}", {}, tmp_path, *words)
    assert "/etc/nbd-reactor/disks.yaml" in said
    assert ("/var/lib/nbd-reactor" in said) == removed


@pytest.mark.parametrize("playbook", ["install", "upgrade", "add_disk"])
def test_the_tags_choose_in_every_playbook_that_has_the_role(playbook: str, tmp_path: Path) -> None:
    words = ("--tags", "nbd_reactor_preflight", "--extra-vars", "nbd_reactor_options=text")
    said = play(COLLECTION / f"playbooks/{playbook}.yml", {}, tmp_path, *words, status=2)
    assert "nbd_reactor_options: a list is meant" in said


def test_a_wheel_lies_beside_what_it_needs(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("nbd_reactor-1.0.1", "nbd_reactor-1.0.2", "msgpack-1.1.0"):
        (wheels / f"{name}-py3-none-any.whl").write_text(name)
    wheel = str(wheels / "nbd_reactor-1.0.2-py3-none-any.whl")
    variables = {
        "nbd_reactor_wheels": str(wheels),
        "nbd_reactor_wheel": wheel,
        "nbd_reactor_host": {"stdout": '{"python": "3.11.2"}'},
        "ansible_python_interpreter": sys.executable,
    }
    choose = {"include_role": {"name": str(ROLE), "tasks_from": "source.yml", "public": True}}
    show = {"debug": {"msg": "{{ nbd_reactor_own }} and {{ nbd_reactor_files | length }} in all"}}
    said = play(write(tmp_path, [choose, show]), variables, tmp_path)
    assert f"['{wheel}'] and 2 in all" in said


def test_a_wheel_of_something_else_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "msgpack-1.1.0-py3-none-any.whl"
    wheel.touch()
    choose = {"include_role": {"name": str(ROLE), "tasks_from": "source.yml"}}
    variables = {
        "nbd_reactor_wheel": str(wheel),
        "ansible_python_interpreter": sys.executable,
    }
    said = play(write(tmp_path, [choose]), variables, tmp_path, status=2)
    assert "must be or hold one wheel of nbd-reactor" in said


def test_disks_are_not_blamed_where_there_is_no_program(tmp_path: Path) -> None:
    check = {"include_role": {"name": str(ROLE), "tasks_from": "check.yml"}}
    variables = {"nbd_reactor_prefix": "/no/release", "nbd_reactor_disks": {}}
    said = play(write(tmp_path, [check]), variables, tmp_path, status=2)
    assert "nbd-reactor --check does not run: " in said
    assert "Correct" not in said


def preflight(variables: dict, home: Path, *extra: str) -> str:
    """Return what the role's preflight says, which refuses this host."""
    task = {"include_role": {"name": str(ROLE), "tasks_from": "preflight.yml"}}
    return play(write(home, [task]), variables, home, *given(extra), status=2)


def evaluate(expression: str, variables: dict, home: Path, *extra: str) -> str:
    """Return what the role's variables make of an expression."""
    role = {"import_role": {"name": str(ROLE)}, "tags": ["never"]}
    task = {"debug": {"msg": expression}}
    return play(write(home, [role, task]), variables, home, *given(extra))


def given(extra: tuple[str, ...]) -> list[str]:
    return [word for each in extra for word in ("--extra-vars", each)]


def write(home: Path, tasks: list[dict]) -> Path:
    path = home / "play.yml"
    path.write_text(yaml.safe_dump([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    return path


def play(playbook: Path, variables: dict, home: Path, *words: str, status: int = 0) -> str:
    """Run a playbook against this host, with variables as an inventory has them."""
    inventory = home / "inventory.yml"
    host = {"ansible_connection": "local", "ansible_become": False, **variables}
    group = {"nbd_reactor": {"hosts": {"localhost": host}}}
    inventory.write_text(yaml.safe_dump(group))
    options = ("--inventory", inventory, *words)
    return run("ansible-playbook", *options, playbook, home=home, status=status)


def test_the_readme_names_every_playbook() -> None:
    text = (COLLECTION / "README.md").read_text()
    assert PLAYBOOKS
    assert not [path.stem for path in PLAYBOOKS if f"| `{path.stem}` |" not in text]


def test_the_readme_leads_to_nothing_that_the_collection_does_not_hold() -> None:
    links = re.findall(r"\]\(([^)]+)\)", (COLLECTION / "README.md").read_text())
    outside = [link for link in links if link.startswith(("..", "/"))]
    assert not outside


def test_the_specification_says_what_the_defaults_are() -> None:
    specification = load(ROLE / "meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    said = {name: option["default"] for name, option in specification.items()}
    assert said == load(ROLE / "defaults/main.yml")
    assert not [name for name, option in specification.items() if not option["description"]]


def test_the_example_is_a_config_without_problems(tmp_path: Path) -> None:
    example = load(COLLECTION / "inventory/group_vars/nbd_reactor.yml")
    config = tmp_path / "disks.yaml"
    config.write_text(yaml.safe_dump({"disks": example["nbd_reactor_disks"]}))
    command = [sys.executable, "-m", "reactor", "--check", "--config", config]
    subprocess.run(command, check=True, capture_output=True)


def test_the_collection_holds_the_role_and_the_playbooks(tmp_path: Path) -> None:
    run("ansible-galaxy", "collection", "build", "--output-path", tmp_path, home=tmp_path)
    (package,) = tmp_path.glob("nbd_reactor-nbd_reactor-*.tar.gz")
    with tarfile.open(package) as archive:
        names = {member.name for member in archive if member.isfile()}
    role = [path for path in ROLE.rglob("*") if path.is_file()]
    wanted = [*role, *PLAYBOOKS, COLLECTION / "meta/runtime.yml"]
    names_wanted = {str(path.relative_to(COLLECTION)) for path in wanted} | {"CHANGELOG.md"}
    assert not names_wanted - names
    assert not [name for name in names if name.endswith((".pyc", ".retry"))]
    assert not [name for name in names if name.startswith(("inventory", "results"))]
    run("ansible-galaxy", "collection", "install", "--offline", package, home=tmp_path)
    installed = run(
        *("ansible-doc", "--type", "role", "nbd_reactor.nbd_reactor.nbd_reactor"), home=tmp_path
    )
    assert "nbd_reactor_state" in installed


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text())
