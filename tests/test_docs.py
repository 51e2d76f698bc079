"""The documents: their links, commands, settings and examples match this release."""

import asyncio
import importlib
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import grpc
import psycopg
import pytest
import typer
import yaml
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.message import Message
from markdown_it import MarkdownIt
from markdown_it.token import Token

import clinic.frontdesk.v1
from clinic.frontdesk.v1 import error_reason_pb2
from frontdesk.cli import app
from frontdesk.errors import REFUSALS
from frontdesk.process.postgres_programs import installation
from frontdesk.rpc.status import code_of
from frontdesk.settings import Settings
from tests.clinic import Front
from tests.servers import Cluster, Service, directories, free_port
from tests.waiting import until

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
WIDEST = 160
"""Maximum characters per line, including table rows."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def tokens(page: Path) -> list[Token]:
    """The tokens of a page, including the inline ones."""
    blocks = MarkdownIt("gfm-like", {"linkify": False}).parse(page.read_text())
    return [token for block in blocks for token in (block, *(block.children or ()))]


def code(page: Path, language: str | None = None) -> list[str]:
    """The code blocks in a language; without one, all code blocks and everything in backticks."""
    if language is not None:
        return [token.content for token in tokens(page) if token.type == "fence" and token.info == language]
    return [token.content for token in tokens(page) if token.type in ("fence", "code_inline")]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    found: Counter[str] = Counter()
    names = set()
    for opened, heading in pairwise(tokens(page)):
        if opened.type == "heading_open":
            said = "".join(part.content for part in heading.children or ())
            slug = re.sub(r"[^\w\- ]", "", said.lower()).replace(" ", "-")
            names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
            found[slug] += 1
    return names


@cache
def paths() -> set[str]:
    """All files and directories of the repository and those in .gitignore, and the ends of their paths."""
    roots = [path for path in ROOT.iterdir() if not path.name.startswith(".") or path.name == ".ci"]
    known = {str(path.relative_to(ROOT)) for root in roots for path in (root, *root.rglob("*"))}
    known |= {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    return {"/".join(parts[n:]) for name in known for parts in [name.split("/")] for n in range(len(parts))}


@pages
def test_lines_fit_the_screen(page: Path) -> None:
    """No line or table row is too wide for a terminal or a review."""
    wide = {number: len(line) for number, line in enumerate(page.read_text().splitlines(), 1) if len(line) > WIDEST}
    assert not wide


@pages
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link leads to a file, and every anchor to a heading."""
    for token in tokens(page):
        if token.type == "link_open":
            href = str(token.attrs["href"])
            if re.match(r"[a-z]+:", href):
                continue
            path, _, anchor = href.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), href
            assert not anchor or anchor in anchors(target), href


@pages
def test_paths_exist(page: Path) -> None:
    """Every path in backticks is that of a file or directory of the repository, or the end of one."""
    for said in code(page):
        looks_so = re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?|[\w-]+/|[\w-]+\.(py|sql|proto|md|ya?ml|json|toml|csv)", said)
        if looks_so and not re.match(r"\.venv/|(text|application)/", said):
            assert said.strip("/") in paths(), said


@pages
def test_targets_of_make_exist(page: Path) -> None:
    """Every target of `make` that the page names is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for said in code(page):
        for name in re.findall(r"(?:^|[;&]\s*|\w=\S+ )make ([a-z-]+)", said, re.M):
            assert name in targets, name


def commands() -> dict[str, set[str]]:
    """The subcommands of `frontdesk`, such as `watch` and `keys create`, with their options."""
    group: Any = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():
        within = getattr(command, "commands", {})
        for path, one in ({name: command} | {f"{name} {inner}": one for inner, one in within.items()}).items():
            found[path] = {option for parameter in one.params for option in parameter.opts} | {"--help"}
    return found


@pages
def test_commands_exist(page: Path) -> None:
    """Every subcommand of `frontdesk` that the page names exists, with these options, and so does every module."""
    known = commands()
    for said in code(page):
        for words, rest in re.findall(r"(?:^|/|[;&]\s*|\w=\S+ )frontdesk ([a-z]+(?: [a-z]+)?)([^|;&\n]*)", said, re.M):
            name = words if words in known else words.partition(" ")[0]
            assert name in known, words
            assert set(re.findall(r"--[a-z][a-z-]*", rest)) <= known[name], (name, rest)
        for module in re.findall(r"python -m ([\w.]+)", said):
            assert find_spec(module), module


@pages
def test_tests_exist(page: Path) -> None:
    """Every test that the page names exists."""
    known = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    for said in code(page):
        assert set(re.findall(r"(?<![\w/])test_[a-z_]+\b(?!\.py)", said)) <= known, said


def test_readme_names_every_command() -> None:
    """The README names every subcommand."""
    rows = {said.split()[1] for said in code(ROOT / "README.md") if re.match(r"frontdesk [a-z]+", said)}
    assert rows == {name.partition(" ")[0] for name in commands()}


@pages
def test_variables_exist(page: Path) -> None:
    """Every FRONTDESK_* variable that the page names is a setting."""
    known = {f"FRONTDESK_{name.upper()}" for name in Settings.model_fields}
    for said in code(page):
        assert set(re.findall(r"\bFRONTDESK_[A-Z_]*[A-Z]", said)) <= known, said


def test_every_setting_is_listed() -> None:
    """docs/settings.md lists each setting once, with its default, and its range or choices if it has any."""
    rows: dict[str, tuple[str, str]] = {}
    for line in (ROOT / "docs" / "settings.md").read_text().splitlines():
        if line.startswith("| `FRONTDESK_"):
            variable, default, allowed, meaning = (cell.strip() for cell in line.strip("|").split("|"))
            assert variable not in rows, variable
            assert meaning, variable
            rows[variable.strip("`")] = default, allowed
    assert set(rows) == {f"FRONTDESK_{name.upper()}" for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        default, allowed = rows[f"FRONTDESK_{name.upper()}"]
        if field.default_factory is not None:
            assert default
        elif field.default is None:
            assert default == "not set", name
        else:
            shown = f"{field.default:.0f}" if isinstance(field.default, float) else str(field.default)
            assert default == f"`{shown}`", name
        bounds = {side: getattr(rule, side) for rule in field.metadata for side in ("ge", "le") if hasattr(rule, side)}
        if bounds:
            assert allowed == f"{bounds['ge']:,} to {bounds['le']:,}", name
        if get_origin(field.annotation) is Literal:
            assert allowed == ", ".join(f"`{choice}`" for choice in get_args(field.annotation)), name


def test_readme_names_reasons_that_exist() -> None:
    """Every reason that the README gives as an example is in the public list."""
    named = {said for said in code(ROOT / "README.md") if re.fullmatch(r"[A-Z]+(_[A-Z]+)+", said)}
    named -= {f"FRONTDESK_{name.upper()}" for name in Settings.model_fields}
    assert named
    assert named <= {
        name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.DESCRIPTOR.values_by_name
    }


def test_alerts_name_what_exists() -> None:
    """Each panel, setting and other alert that an alert names exists."""
    said = (ROOT / "docs" / "operations" / "alerts.yaml").read_text()
    rules = [rule for group in yaml.safe_load(said)["groups"] for rule in group["rules"]]
    advice = "\n".join(rule["annotations"]["action"] for rule in rules)
    board = json.loads((ROOT / "docs" / "operations" / "dashboard.json").read_text())
    for form, known in (
        (r"`([A-Z][a-z ]+)`", {panel["title"] for panel in board["panels"]}),
        (r"\bFRONTDESK_[A-Z_]+", {f"FRONTDESK_{name.upper()}" for name in Settings.model_fields}),
        (r"\bFrontdesk\w+", {rule["alert"] for rule in rules}),
    ):
        named = set(re.findall(form, advice))
        assert named, form
        assert named <= known


def messages(method: str) -> tuple[type[Message], type[Message]]:
    """The request and response of SERVICE/METHOD."""
    for module in pkgutil.iter_modules(clinic.frontdesk.v1.__path__, "clinic.frontdesk.v1."):
        importlib.import_module(module.name)
    service, _, name = method.partition("/")
    found = descriptor_pool.Default().FindServiceByName(f"clinic.frontdesk.v1.{service}").methods_by_name[name]
    return message_factory.GetMessageClass(found.input_type), message_factory.GetMessageClass(found.output_type)


def test_console_examples_fit_the_contract() -> None:
    """Each request in the README is valid, as is each answer that is printed whole; each refusal has today's text."""
    texts = {refusal.__doc__: code_of(refusal).name.lower() for refusal in REFUSALS.values()}
    whole = refused = 0
    calls = [
        call
        for block in code(ROOT / "README.md", "console")
        for call in re.findall(r"^\$ call (\S+) '([^']+)'\n(.*?)(?=^\$|\Z)", block, re.M | re.S)
    ]
    assert len(calls) >= 5
    for method, request, answer in calls:
        asked, answered = messages(method)
        json_format.Parse(request, asked())
        if said := re.search(r'"code": "(.*)",\s+"message": "(.*)"', answer):
            assert texts[said[2]] == said[1]
            refused += 1
        elif "…" not in answer:
            json_format.Parse(answer, answered())
            whole += 1
    assert whole >= 2
    assert refused


async def test_python_example_runs(front: Front, tmp_path: Path) -> None:
    """The README's program books and follows the queue; on the second run the booking is refused as a duplicate."""
    await front.doctor()
    program, _ = code(ROOT / "README.md", "python")
    assert program.count("127.0.0.1:50051") == 1
    path = tmp_path / "example.py"
    path.write_text(program.replace("127.0.0.1:50051", f"127.0.0.1:{front.port}"))
    for first in ("number 1", "DUPLICATE_BOOKING"):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-u", path, stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL
        )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(60):
                said = [(await process.stdout.readline()).decode().strip() for _ in range(2)]
        finally:
            process.kill()
            await process.wait()
        assert said[0].startswith(first)
        assert said[1] == "0 waiting"


def test_the_way_to_a_network(tmp_path: Path) -> None:
    """The README's commands lead to a service with TLS, an API key, and an administrator who logs in."""
    (commands,) = [block for block in code(ROOT / "README.md", "sh") if "openssl" in block]
    port = free_port()
    for old, new in {
        ".venv/bin/frontdesk": f"{sys.executable} -m frontdesk.cli",
        ".venv/bin/buf": str(Path(sys.executable).parent / "buf"),
        "--schema protos": f"--schema {ROOT / 'protos'}",
        "50051": str(port),
        # Not every machine finds its own name.
        "$(hostname)": "localhost",
        ".data &\n": '.data & until FRONTDESK_CLIENT_CA=cert.pem health; do sleep 0.2; done\necho "key $KEY"\n',
    }.items():
        assert old in commands
        commands = commands.replace(old, new)
    health = f"health() {{ {sys.executable} -m frontdesk.cli health --target localhost:{port}; }}\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FRONTDESK_")}
    service = subprocess.Popen(
        ["bash", "-ec", f"trap 'kill 0' EXIT\n{health}{commands}\necho done\nwait"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert service.stdout is not None
        said = [*iter(lambda: service.stdout.readline().strip(), "done")]  # type: ignore[union-attr]
        assert f"frontdesk (access: required) serves on 0.0.0.0:{port}" in said
        (key,) = [line.removeprefix("key ") for line in said if line.startswith("key ")]
        _, program = code(ROOT / "README.md", "python")
        for old, new in {"desk.example.com:50051": f"localhost:{port}", "fdk_…": key, '"…"': f'"{said[0]}"'}.items():
            assert old in program
            program = program.replace(old, new)
        program += """
from clinic.frontdesk.v1 import auth_pb2, clinic_pb2

assert service.clinics.ListClinics(clinic_pb2.ListClinicsRequest()).clinics
print(person.auth.GetProfile(auth_pb2.GetProfileRequest()).user.email)
"""
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.stdout == "you@example.com\n", done.stderr
    finally:
        with suppress(ProcessLookupError):
            os.killpg(service.pid, signal.SIGTERM)
        service.communicate(timeout=60)


def shell(commands: str, **environment: str) -> str:
    """What these commands print; `psql` is that of the tests' PostgreSQL. Each of them must succeed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FRONTDESK_", "PG"))}
    path = f"{installation() / 'bin'}:{os.environ['PATH']}"
    functions = f"""
frontdesk() {{ {sys.executable} -m frontdesk.cli "$@"; }}
psql() {{ command psql -v ON_ERROR_STOP=1 "$@"; }}
"""
    done = subprocess.run(
        ["bash", "-ec", functions + commands],
        env={**clean, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_roles_of_a_database_of_ones_own(tmp_path: Path) -> None:
    """The guide's statements make an owner and a service's role, which serves and cannot change the log."""
    blocks = code(ROOT / "docs" / "operations.md", "sh")
    (create,) = [block for block in blocks if "create database clinic owner frontdesk" in block]
    (divide,) = [block for block in blocks if "create role frontdesk_owner" in block]
    (find,) = [block for block in blocks if "where backend_xid is not null" in block]
    with directories() as make, Cluster(make("own")) as postgres:
        await asyncio.to_thread(postgres.start)
        place = f"127.0.0.1:{postgres.port}/clinic"
        # The guide's name is that of the cluster's own administrator.
        postgres.sql("create role administrator superuser login password 'x'")
        administrator = f"postgresql://administrator:x@127.0.0.1:{postgres.port}/postgres"
        with psycopg.connect(administrator, autocommit=True) as connection:
            connection.execute("alter role frontdesk rename to bootstrap")
        urls = {
            "ADMIN_URL": administrator,
            "OWNER_URL": f"postgresql://frontdesk_owner:change%20me%20too@{place}",
        }
        service_url = f"postgresql://frontdesk:change%20me@{place}"
        assert "frontdesk:change%20me@" in create
        for commands in (create[: create.index("export ")], divide):
            await asyncio.to_thread(shell, commands, **urls)
        # After an upgrade the grants are made again.
        await asyncio.to_thread(shell, divide[divide.rindex("psql ") :], **urls)
        with Service(tmp_path / "log", service_url, access="open") as service:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
                front = Front(channel, service_url, service.port)
                doctor, patient = await front.doctor(), await front.patient()
                await front.book(patient.id, doctor.id)
            await until(lambda: front.sql("select count(*) from seal")[0][0] >= 4)
            for table in ("log", "seal"):
                for change in (f"delete from {table}", f"truncate {table}", f"update {table} set id = id"):
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        front.sql(change)
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                front.sql("create table mine ()")
            assert front.sql("show statement_timeout") == [("10s",)], "the role's own setting"
            await asyncio.to_thread(service.stop)
        commands = "frontdesk audit verify; frontdesk maintain"
        said = await asyncio.to_thread(shell, commands, FRONTDESK_DATABASE_URL=service_url)
        assert "nothing was changed up to" in said
        assert "0 events of the audit" in said
        assert "(0 rows)" in await asyncio.to_thread(shell, find, **urls)
