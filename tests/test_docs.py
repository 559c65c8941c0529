"""What the pages say can be done: links lead somewhere, commands are understood, Python compiles, flags exist.

An indented block is shell, a fence says what it is. `…` in a command stands for what the reader has: it is left out,
and what a host cannot do without is put in. A command of a kind that is not known here fails, so that somebody thinks
of it.
"""

import ast
import dataclasses
import functools
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from markdown_it import MarkdownIt
from torch.distributed.run import get_args_parser as torchrun_parser

import codistill
import fairseq_codistill
import timm_codistill
from codistill import CodistillConfig, DataConfig, cli, flag
from tests.command_lines import fairseq_arguments, stand_in, timm_arguments

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEMPLATES = sorted((ROOT / "recipes").rglob("*.in.md"))
RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.md")) if path not in TEMPLATES]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES, *RECIPES]  # their commands are looked at
TEXTS = [*GUIDES, *TEMPLATES]
LANGUAGES = ("shell", "console", "python", "yaml", "json", "text")
FLAGS = {flag(item.name) for kind in (CodistillConfig, DataConfig) for item in dataclasses.fields(kind)}
FLAGS |= {"--codistill-label-smoothing"}  # fairseq's alone
DIR = ["--codistill-dir", "/shared/codistill"]


def name(path):
    return str(path.relative_to(ROOT))


# ---- Markdown


@functools.cache
def tokens(path):
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def inline(path):
    """Text, links and code within paragraphs, headings and cells."""
    return [child for token in tokens(path) for child in token.children or ()]


def links(path):
    return [unquote(str(token.attrs.get("href") or token.attrs.get("src"))) for token in inline(path) if token.attrs]


def anchors(path):
    """What a code host makes of the headings, which is what the site makes of them as long as they are ASCII."""
    found, times = set(), Counter()
    for opening, title in pairwise(tokens(path)):
        if opening.type == "heading_open":
            text = "".join(child.content for child in title.children)
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(f"{slug}-{times[slug]}" if times[slug] else slug)
            times[slug] += 1
    return found


def blocks(path):
    """Where each block of code is, its language, its text."""
    for token in tokens(path):
        if token.type in ("fence", "code_block"):
            language = token.info.strip() if token.type == "fence" else "shell"
            yield f"{name(path)}:{token.map[0] + 1}", language, token.content


def folder(path):
    """Where the page lies that a text becomes."""
    return DOCS if path.name.endswith(".in.md") else path.parent


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(path):
    for link in links(path):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        place = (folder(path) / file).resolve() if file else path
        assert place.exists(), link
        assert not anchor or (anchor.isascii() and anchor in anchors(place)), link


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_a_page_links_to_nothing_outside_docs_where_the_site_has_nothing(path):
    assert [link for link in links(path) if link.startswith("..")] == []


def test_every_page_is_in_the_nav_of_the_site_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(page for entry in nav for page in entry.values()) == [path.name for path in PAGES]


def test_every_block_of_code_says_what_it_is():
    unknown = [(where, language) for path in GUIDES for where, language, _ in blocks(path) if language not in LANGUAGES]
    assert unknown == []


# ---- commands


def shell_lines(language, text):
    """Whole lines of shell; in `console` what is behind `$`."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line[2:] for line in lines if line.startswith("$ ")] if language == "console" else lines


def commands(line):
    """The simple commands of a line, as words; loops and assignments are taken off them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";&|"):
            while words and (words[0] in ("do", "done") or re.match(r"[A-Za-z_]+=", words[0])):
                del words[0]
            if words:
                yield words
            words = []
        else:
            words.append(word)


def expanded(word):
    """A word without `$(…)`, each of which is a command too, and without variables."""
    for inner in re.findall(r"\$\(([^)]*)\)", word):
        for command in commands(inner):
            understand(command)
    word = re.sub(r"\$\(codistill user-dir fairseq\)", str(Path(fairseq_codistill.__file__).resolve().parent), word)
    return re.sub(r"\$[a-z]+", "0", word)


def understand(words):
    """Fail when a command is not one that its program would take."""
    words = [expanded(word) for word in words]
    if "/" in words[0] and not words[0].startswith("-"):
        assert os.access(ROOT / words[0], os.X_OK), f"{words[0]} is not a program of this repository"
        if words[0].startswith("recipes/"):
            by_recipe(words)
        return
    assert words[0] in KINDS, f"{words[0]}: a kind of command that this test does not know"
    KINDS[words[0]](words[1:], [word for word in words[1:] if word != "…"])


def by_fairseq(given, flags):
    if "…" in given:
        flags = flags if flags[:1] and not flags[0].startswith("-") else ["DATA", *flags]
        needed = {"--arch": ["transformer"], "--criterion": ["codistill"], "--codistill-dir": DIR[1:]}
        flags = [*flags, *(word for one, value in needed.items() if one not in flags for word in (one, *value))]
    fairseq_arguments(flags)


def by_timm(given, flags):
    assert flags[0].endswith("train.py")
    lacks_dir = "…" in given and "--codistill" in flags and DIR[0] not in flags
    timm_arguments(stand_in(), [*flags[1:], *(DIR if lacks_dir else ())])


def by_recipe(words):
    """A script at the paper's scale: it names the jobs that it would train or submit, or the data that are not here."""
    needs = {"DRY_RUN": "1", "DATA": "/data", "TIMM_TRAIN_SCRIPT": "train.py"}
    done = subprocess.run(
        [ROOT / words[0], *words[1:]],
        cwd=ROOT,
        env={**os.environ, **needs},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 or "no such f" in done.stderr, done.stderr


def by_torchrun(_, words):
    script = words.index("-m") + 1
    torchrun_parser().parse_args(words[: script + 1])
    assert words[script] == "timm_codistill"
    by_timm(["…"], words[script + 1 :])


def by_both(_, flags):
    by_fairseq(["…"], flags)
    by_timm(["…"], ["train.py", "--codistill", *flags])


def by_codistill(_, words):
    cli._parser().parse_args(words)


@functools.cache
def makefile():
    """The variables, and for each target the module that it starts."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):[^\n]*## [^\n]*\n((?:\t[^\n]*\n)*)", text, flags=re.MULTILINE)
    modules = {target: re.findall(r"-m ([\w.]+)", recipe) for target, recipe in targets}
    return set(re.findall(r"^([A-Z]+) \?=", text, flags=re.MULTILINE)), modules


def by_make(_, words):
    variables, modules = makefile()
    given = dict(word.split("=", 1) for word in words if "=" in word)
    targets = [word for word in words if "=" not in word]
    assert given.keys() <= variables
    assert targets
    assert set(targets) <= modules.keys(), f"the targets are {', '.join(modules)}"
    if "FIG" in given:
        from recipes.embedded.reproduce.figures import FIGURES

        assert given["FIG"] in {figure.key for figure in FIGURES}
    if "ARGS" in given:
        for target in targets:
            passed_on(modules[target], shlex.split(given["ARGS"]))


def passed_on(modules, words):
    """`make TARGET ARGS=…`: pytest is trusted with its flags, our programs must have theirs."""
    assert modules, "this target starts no program that ARGS could go to"
    if modules == ["pytest"]:
        assert all((ROOT / word).exists() for word in words if "/" in word)
        return
    spec = importlib.util.find_spec(modules[-1])
    if spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{modules[-1]}.__main__")
    source = Path(spec.origin).read_text(encoding="utf-8")
    for word, before in zip(words, ["", *words], strict=False):
        if word == "--help":
            continue
        if word.startswith("-"):
            assert f'"{word}"' in source, f"{modules[-1]} has no {word}"
        elif modules == ["benchmarks"] and not before.startswith("-"):
            from benchmarks.__main__ import QUESTIONS

            assert word in QUESTIONS, f"the questions are {', '.join(QUESTIONS)}"
        else:
            assert before.startswith("-"), f"{word}: what should it be to {modules[-1]}?"


def by_python(_, words):
    assert words[0] == "-m", "python is started with -m here"
    assert importlib.util.find_spec(words[1]), f"no module {words[1]}"


@functools.cache
def extras():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    (literal,) = [node.value for node in ast.parse(text).body if ast.unparse(node).startswith("EXTRAS = ")]
    return {*ast.literal_eval(literal), *re.findall(r'^EXTRAS\["(\w+)"\] = ', text, flags=re.MULTILINE)}


def by_pip(_, words):
    assert words[0] == "install"
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for word in words[1:]:
        if word.startswith("-"):
            assert word == "--no-build-isolation"
            continue
        project, asked = re.fullmatch(r"([\w.-]+)(?:\[([\w,]+)\])?", word).groups()
        assert project in (".", "codistill", *map(str.lower, pinned))
        assert not asked or set(asked.split(",")) <= extras(), f"the extras are {', '.join(sorted(extras()))}"


def by_export(_, words):
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "codistill").rglob("*.py")]
    recipes = [path.read_text(encoding="utf-8") for path in (ROOT / "recipes").rglob("*.sh")]
    for word in words:
        name = word.split("=")[0]
        read = any(f'"{name}"' in source for source in sources) or any(f"${{{name}:" in recipe for recipe in recipes)
        assert read, f"nothing reads {word}"


def not_ours(*_):
    """A program of others, or a word of the shell."""


KINDS = {
    "fairseq-train": by_fairseq,
    "timm-codistill": by_timm,
    "torchrun": by_torchrun,
    "…": by_both,  # flags alone
    "codistill": by_codistill,
    "make": by_make,
    "python": by_python,
    "pip": by_pip,
    "export": by_export,
    "for": not_ours,
    "jq": not_ours,
    "test": not_ours,
    "tensorboard": not_ours,
}
# In running text these are looked at, too, with the variables that are set before them.
SPANS = re.compile(r"([A-Z_]+=\S+ )*(make|pip|python -m|torchrun|fairseq-train|timm-codistill|recipes/\S+) ")


def trouble(line):
    """What is wrong with a line of shell; empty when nothing is."""
    try:
        for command in commands(line):
            understand(command)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:  # it was asked for help
            return ""
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("path", GUIDES, ids=name)
def test_every_command_is_one_that_its_program_takes(path, capsys):
    shell = [block for block in blocks(path) if block[1] in ("shell", "console")]
    found = [(where, line) for where, language, text in shell for line in shell_lines(language, text)]
    spans = [token.content for token in inline(path) if token.type == "code_inline"]
    found += [(name(path), span) for span in spans if SPANS.match(span)]
    wrong = [f"{where}: {line.strip()}\n  {reason}" for where, line in found if (reason := trouble(line))]
    assert not wrong, "\n".join([*wrong, capsys.readouterr().err])


@pytest.mark.parametrize(
    "line",
    [
        "fairseq-train DATA … --criterion codistill --codistill-alpha lots",
        "fairseq-train DATA … --codistill-intervall 5",
        "fairseq-train DATA … --codistill-peer 2",
        "timm-codistill train.py … --codistill --codistill-intervall 5",
        "timm-codistill train.py … --codistill-interval 5",
        "… --codistill-topology star",
        "codistill stat s3://bucket/experiment",
        "codistill status",
        'fairseq-train DATA … --user-dir "$(codistill user-dir timm)"',
        "make benches",
        "make bench ARGS=speed",
        "make demo ARGS=--often",
        "make demo TIMES=2",
        "make reproduce FIG=99",
        "python -m recipes.embedded.swaps",
        "python loop.py",
        "pip install '.[fairsq]'",
        "export CODISTILL_KEYS=1",
        "recipes/imagenet/figure-99.sh all",
        "recipes/imagenet/figure-02.sh codistill resnet18",
        "recipes/slurm/submit.sh --time=1:00:00 recipes/imagenet/figure-07.sh codistill interval-1",
        "torchrun --workers 4 -m timm_codistill train.py …",
        "torchrun --nproc-per-node 4 -m timm_codistill train.py … --codistill-intervall 5",
        "export DATUM=/data",
        "kubectl apply",
        "for rank in 0 1; do make benches & done",
    ],
)
def test_a_command_that_its_program_would_not_take_is_found(line):
    assert trouble(line)


# ---- Python, flags, names


@pytest.mark.parametrize("path", GUIDES, ids=name)
def test_python_compiles_and_takes_from_our_packages_what_they_have(path):
    packages = {"codistill": codistill.__all__, "timm_codistill": timm_codistill.__all__}
    for where, language, text in blocks(path):
        if language != "python":
            continue
        compile(text, where, "exec")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module in packages:
                assert {one.name for one in node.names} <= set(packages[node.module]), where
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in packages:
                assert node.attr in packages[node.value.id], where


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_every_flag_that_is_named_exists(path):
    assert set(re.findall(r"--codistill-[a-z][a-z-]*[a-z]", path.read_text(encoding="utf-8"))) <= FLAGS
    for _, language, text in blocks(path):
        if language == "yaml":
            for options in yaml.safe_load(text).values():
                given = {key for key in options if key.startswith("codistill_")}
                assert {"--" + key.replace("_", "-") for key in given} <= FLAGS
        elif language == "json":
            json.loads(text)


def test_the_page_of_options_has_every_flag_in_its_table_once():
    rows = re.findall(r"^\| (`--.*?) \|", (DOCS / "options.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(re.findall(r"--[a-z-]+", " ".join(rows))) == sorted(FLAGS)


def test_the_api_page_has_every_public_name():
    shown = set(re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for package in (codistill, timm_codistill):
        assert {f"{home}.{public}" for public, home in package._HOMES.items()} <= shown


# ---- the site


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        html = (tmp_path / "site" / f"{page.stem}.html").read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="?https?://', html) == []
