"""What pages print works: commands parse, settings exist, Python compiles, generated tables are those of the code."""

import ast
import inspect
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
import yaml

import fedunlearn
from docs import generate
from fedunlearn.apps.simulate import app_folder
from fedunlearn.cli import SCHEMAS, cli
from fedunlearn.federation.strategy import strategy_class, strategy_names
from fedunlearn.schema import check_names, fields_of, name_of
from fedunlearn.study.dag.settings import StudySettings
from fedunlearn.words import split_words

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Flower's options are of an earlier typer
    from flwr.cli.app import app as flower_cli

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/**/*.md")), REPOSITORY / "CONTRIBUTING.md"]
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
FEDERATION = {
    "num-supernodes",
    "client-resources-num-cpus",
    "client-resources-num-gpus",
}  # what --federation-config has
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|\.\.\.|/absolute/|path/of/")


def fences(language: str) -> Iterator[tuple[str, str]]:
    """Every code block of a language, with the page that it is on."""
    for page in PAGES:
        for _, named, content in FENCE.findall(page.read_text()):
            if named == language:
                yield str(page.relative_to(REPOSITORY)), content


def commands() -> Iterator[tuple[str, str]]:
    """Every command line in a shell block, and every `fedunlearn` command within text."""
    for page, content in fences("sh"):
        for line in re.sub(r"\\\n\s*", " ", content).splitlines():
            if words := shlex.split(line, comments=True):
                yield page, shlex.join(words)
    for page in PAGES:
        text = FENCE.sub("", page.read_text())
        for code in re.findall(r"(?<!`)`(fedunlearn [^`]+|flwr run [^`]+)`", text):
            if not PLACEHOLDER.search(code):
                yield str(page.relative_to(REPOSITORY)), " ".join(code.split())


COMMANDS = list(dict.fromkeys(commands()))
PYTHON = list(fences("python"))


def parsed(app: typer.Typer, words: list[str]) -> tuple[str, dict[str, object]]:
    """The name of the command that `words` call, and its arguments; click.UsageError where they do not fit.

    A command that is only named has no arguments.
    """
    command, path = typer.main.get_command(app), []
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        path.append(words[0])
        _, command, words = command.resolve_command(click.Context(command), words)
    if not words:
        return " ".join(path), {}
    if not path:  # an option of the command itself, which would be carried out
        assert any(words[0] in option.opts for option in command.params)
        return "", {}
    return " ".join(path), command.make_context(path[-1], list(words)).params


def check_words(command: str, words: list[str]) -> None:
    """Raise UserError for a word that names no setting of a command, or none of the strategy that it chooses."""
    schema = SCHEMAS[command.split()[-1]]()
    check_names(words, schema)
    values = {name_of(word): word.partition("=")[2] for word in words}
    for name in values:
        if name.startswith("unlearn."):
            strategy, setting = values.get("strategy", "subset"), name.removeprefix("unlearn.")
            if issubclass(schema, StudySettings):
                strategy, _, setting = setting.partition(".")
            if strategy in strategy_names():
                assert setting in strategy_class(strategy).Settings.model_fields, name


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_on_a_page_has_the_options_and_settings_of_the_code(page, line):
    words = shlex.split(line)
    while re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    program, *rest = words
    if line.startswith("python -m fedunlearn.forget"):
        program, rest = "fedunlearn", ["forget", *rest[2:]]
    if program == "fedunlearn":
        command, given = parsed(cli, rest)
        if "app" in given and command == "run" and not PLACEHOLDER.search(str(given["app"])):
            app_folder(given["app"])
        if command.split()[-1:] and command.split()[-1] in SCHEMAS:
            check_words(command, list(given.get("words") or []))
    elif program == "flwr":
        _, given = parsed(flower_cli, rest)
        assert (REPOSITORY / str(given["app"]) / "app.py").is_file() or PLACEHOLDER.search(str(given["app"]))
        for text in given["run_config_overrides"] or ():
            (overrides,) = re.fullmatch(r'overrides="(.*)"', text).groups()
            check_words("run", split_words(overrides))
        for text in given["federation_config_overrides"] or ():
            assert {word.partition("=")[0] for word in text.split()} <= FEDERATION
    elif program == "make":
        targets = re.findall(r"^([\w.]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets)
    elif program.startswith("simulations/deployment/"):
        assert (REPOSITORY / program).is_file()
    elif line.startswith("python -m benchmarks."):
        assert (REPOSITORY / f"{words[2].replace('.', '/')}.py").is_file()
    else:
        assert program in ("source", "python", "rm", "ray", "nvidia-cuda-mps-control"), "check it, and name it here"


@pytest.mark.parametrize(("page", "content"), PYTHON)
def test_python_on_a_page_compiles_and_names_what_there_is(page, content):
    owners = {"fedunlearn": fedunlearn, "run": fedunlearn.LiveRun, "federation": fedunlearn.Federation}
    tree = ast.parse(content)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in owners:
            owner, name = owners[node.value.id], f"{node.value.id}.{node.attr}"
            if node.attr not in getattr(owner, "__dataclass_fields__", {}):
                member = getattr(owner, node.attr)
                assert id(node) in called or not inspect.isfunction(member), f"{name} is called"


@pytest.mark.parametrize("path", generate.pages(), ids=lambda path: path.name)
def test_generated_tables_are_those_of_the_code(path):
    text = path.read_text()
    assert generate.renewed(text) == text, "python -m docs.generate"


def test_the_page_of_settings_has_every_setting_of_every_command():
    text = (REPOSITORY / "docs" / "settings.md").read_text()
    for name, schema in generate.SCHEMAS.items():
        for setting, _ in fields_of(schema):
            assert f"| `{setting}` |" in text, name


@pytest.mark.parametrize("name", strategy_names())
def test_every_strategy_has_a_page_with_its_settings_and_what_it_shares(name):
    text = (REPOSITORY / "docs" / "strategies" / f"{name}.md").read_text()
    assert {f"settings {name}", f"shares {name}"} == {found[1] for found in generate.MARKED.findall(text)}
    assert f"strategies/{name}.md" in (REPOSITORY / "docs" / "strategies.md").read_text()
    assert f"strategies/{name}.md" in (REPOSITORY / "mkdocs.yml").read_text()


def test_what_strategies_ask_for_is_found_in_their_code():
    assert generate.asked_by(strategy_class("leave")) == set()
    assert {"fisher", "class_counts", "evaluate"} <= generate.asked_by(strategy_class("ssd"))
    assert {"climb", "train", "class_counts"} <= generate.asked_by(strategy_class("pga"))
    assert {"relabel", "repair"} <= generate.asked_by(strategy_class("subset"))
    assert {"train", "evaluate"} <= generate.asked_in(generate.ROUNDS)
    assert {"evaluate", "class_counts", "batch_norm_statistics"} <= generate.asked_in(generate.FRAME)


def test_the_page_on_privacy_says_what_every_task_reveals():
    text = (REPOSITORY / "docs" / "privacy.md").read_text()
    by_hand = text.partition("## What each of them reveals")[2]
    for name in strategy_names():
        for task in generate.tasks_of(strategy_class(name)):
            assert f"| `{task}` |" in by_hand


def test_every_page_is_in_the_navigation():
    def files(entry):
        if isinstance(entry, str):
            return {entry}
        return {file for below in (entry.values() if isinstance(entry, dict) else entry) for file in files(below)}

    nav = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    pages = {str(path.relative_to(REPOSITORY / "docs")) for path in REPOSITORY.glob("docs/**/*.md")}
    assert pages <= files(nav)
