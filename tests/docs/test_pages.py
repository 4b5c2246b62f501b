"""What can be read off the pages without running them: links, numbers, files that follow from others."""

import importlib
import json
import re

import pytest
import yaml

from documented import FENCE, ROOT, RUN, blocks, pages, runnable

PAGES = [*pages(), "docs/options.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/EXPERIMENTS.md"]
LINK = re.compile(r"(?<!`)\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
WORDS = {"sparlow", "one", "of"}


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


def text_of(page):
    return (ROOT / page).read_text("utf-8")


def anchors(page):
    """The anchors of a page's headings that GitHub and MkDocs name alike."""
    words = [re.sub(r"[`*\[\]]|\(.*?\)", "", heading) for heading in HEADING.findall(FENCE.sub("", text_of(page)))]
    plain = [re.sub(r"[^\w\s-]", "", each).strip().lower() for each in words]
    return {re.sub(r"\s", "-", each) for each in plain} & {re.sub(r"[-\s]+", "-", each) for each in plain}


# Links


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", text_of(page))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), target
        if anchor:
            assert anchor in anchors(file.resolve().relative_to(ROOT).as_posix()), target


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "scripts"])
def test_pages_that_the_code_names_are_there(folder):
    named = re.compile(r"\bdocs/[\w/-]+\.(?:md|svg)\b")
    files = [path for path in (ROOT / folder).rglob("*.py") if path.name != "test_pages.py"]
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in named.findall(path.read_text("utf-8"))
        if not (ROOT / name).is_file()
    }
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_scripts_that_a_page_names_are_there(page):
    for name in re.findall(r"\bpython (?!-m)((?:benchmarks|tests|scripts)/[\w/]+\.py)\b", text_of(page)):
        assert (ROOT / name).is_file(), name


def test_the_navigation_has_every_page():
    site = yaml.safe_load(text_of("mkdocs.yml"))

    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        return [leaf for each in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(each)]

    there = {path.name for path in (ROOT / "docs").glob("*.md")} - set(site["exclude_docs"].split())
    listed = leaves(site["nav"])
    assert there == {leaf for leaf in listed if not leaf.startswith("repository/")}
    assert all((ROOT / leaf.removeprefix("repository/")).is_file() for leaf in listed if leaf not in there)


# Blocks


@pytest.mark.parametrize("page", pages())
def test_a_block_that_cannot_be_run_says_why(page):
    for block in runnable(page):
        if block.language != "python":
            assert not block.unknown, f"{page}, line {block.line}: put <!-- not run here: why --> above it"
    assert text_of(page).count("<!-- not run here") == sum(block.why is not None for block in blocks(page))


def test_most_blocks_are_run():
    every = [block for page in pages() for block in blocks(page) if block.language in RUN]
    run = [block for block in every if block.why is None]
    print(f"{len(run)} of {len(every)} blocks of commands and Python are run")  # noqa: T201 - to be seen with -s
    assert len(run) >= 0.6 * len(every)
    assert {words[1] for block in run if block.language != "python" for words in block.commands} >= {
        *("compress", "plan", "compare", "evaluate", "generate", "benchmark", "finetune", "export", "inspect")
    }


# Numbers and files that follow from others


def test_the_readme_is_one_screen_and_shows_measured_figures():
    readme = text_of("README.md")
    assert len(readme.splitlines()) <= 150
    rows = json.loads(text_of("benchmarks/results/frontier/frontier.json"))["rows"]
    zeros = json.loads(text_of("benchmarks/results/comparison/16to32.json"))["rows"][-1]
    measured = {(f"{row['bytes'] / 1e6:.1f}", f"{row['perplexity']:.2f}") for row in rows}
    measured.add((f"{zeros['bytes'] / 1e6:.1f}", f"{zeros['perplexity']['wikitext2_test.raw']:.2f}"))
    shown = re.findall(r"^\| ([\d.]+) MB \| [\d.]*\s?\| \**([\d.]+)\** \|", readme, re.MULTILINE)
    assert len(shown) == 13
    assert set(shown) <= measured


def test_the_picture_is_that_of_the_figures(scripts):
    assert text_of("docs/perplexity_against_bytes.svg") == scripts("picture").picture()


def test_the_page_of_the_package_index_is_that_of_the_readme(scripts):
    script = scripts("package_page")
    page = script.current()
    assert text_of("docs/package_page.md") == page
    assert not re.findall(r"\]\((?!https://|#)", page)
    with_address = script.package_page("[a](docs/x.md) ![b](docs/x.svg) [c](https://d)", "https://host/r")
    assert (
        with_address
        == "[a](https://host/r/blob/HEAD/docs/x.md) ![b](https://host/r/raw/HEAD/docs/x.svg) [c](https://d)"
    )


def test_one_version_everywhere():
    import tomllib

    version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    assert f"version: {version}\n" in text_of("CITATION.cff")
    assert re.search(r"^## ([\d.]+)", text_of("CHANGELOG.md"), re.MULTILINE)[1] == version


def test_what_the_papers_users_install_is_there():
    requirements = text_of("requirements.txt").splitlines()
    (own,) = [line for line in requirements if line.startswith(".[")]
    import tomllib

    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    assert set(own[2:-1].split(",")) <= set(extras)
    assert "-c constraints.txt" in requirements
    environment = yaml.safe_load(text_of("environment.yml"))
    assert {"pip": ["-r requirements.txt"]} in environment["dependencies"]


def test_the_arguments_of_run_py_are_in_its_page():
    arguments = re.findall(r'^    Argument\(\s*"(\w+)"', text_of("run.py").split("\nOWN = ")[0], re.MULTILINE)
    assert len(arguments) >= 20
    missing = [name for name in arguments if f"--{name}" not in text_of("docs/from-the-paper.md")]
    assert missing == ["per_device_eval_batch_size"]  # which decides nothing


# What is written by scripts


@pytest.mark.parametrize(
    ("raw", "left"),
    [
        ("one\r\ntwo\r\n", "one\ntwo"),
        ("\x1b[1;31mred\x1b[0m and plain", "red and plain"),
        ("blocks 1 of 2\rblocks 2 of 2\r\n", "blocks 2 of 2"),
        ("a\r\nb\r\n\x1b[2A\x1b[2Kdone\r\n\x1b[2Krest", "done\nrest"),  # as rich redraws two bars
        ("long line\r\x1b[Kshort", "short"),
        ("\x1b[?25lhidden cursor\x1b[?25h", "hidden cursor"),
        ("ab\x1b[1Gc", "cb"),
        ("x" * 80 + "y\r\nz", "x" * 80 + "\ny\nz"),
    ],
)
def test_the_screen_shows_what_a_terminal_would(raw, left, scripts):
    assert scripts("terminal").screen(raw) == left


def test_the_page_of_the_terminal_takes_one_command_at_a_time(scripts, tmp_path, monkeypatch):
    script = scripts("terminal")
    monkeypatch.setattr(script, "PAGE", tmp_path / "terminal.md")
    for name, text in (("compare", "table"), ("plan", "old"), ("plan", "new")):
        script.put_into_page(name, text)
    page = script.PAGE.read_text("utf-8")
    assert page.startswith("# What the terminal shows\n")
    assert page.index("## plan\n") < page.index("## compare\n")
    assert max(map(len, page.split("```text")[1].split("```")[0].splitlines())) <= 80
    assert page.count("\nnew\n") == 1
    assert "old" not in page


def test_a_site_link_is_followed_out_of_the_docs_and_back(scripts):
    pytest.importorskip("mkdocs")
    links = scripts("site_links")
    assert links.place_on_site("results.md", "../benchmarks/results/x.json") == "repository/benchmarks/results/x.json"
    assert links.place_on_site("results.md", "bits.md") is None
    assert links.place_on_site("repository/CONTRIBUTING.md", "docs/notation.md") == "notation.md"
    assert links.place_on_site("repository/benchmarks/LEADERBOARD.md", "https://host/x") is None
