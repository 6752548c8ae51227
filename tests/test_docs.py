"""The documents name files that exist, link to pages and sections that exist, and stay short."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import jel

ROOT = Path(__file__).parent.parent
DOCUMENTS = {p.relative_to(ROOT).as_posix(): p for p in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")))}
OURS = ("nanochat/", "jel/", "scripts/", "tests/", "docs/", ".ci/")  # what starts like this is a path in the repository
FILES = {p.name for folder in (".", *OURS) for p in (ROOT / folder).rglob("*") if ".venv" not in p.parts}


def links(text: str) -> list[str]:
    """Targets of links and images inside the repository; what stands in code is no link."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    return [url for url in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"[a-z]+://", url)]


def paths(text: str) -> set[str]:
    """Paths and file names in `code`, in links and in command lines; not those that a run writes."""
    words = re.findall(r"(?<![\w/.~$}>-])[\w.-]+(?:/[\w.-]+)*/?", text)
    words = {word.rstrip(".") for word in words}
    return {w for w in words if w.startswith(OURS) or re.fullmatch(r"[\w-]+\.(py|sh|toml)", w)}


def anchors(text: str) -> set[str]:
    """The names that headings get on the web: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_all_documents_are_there():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/design.md", "docs/history.md"} <= DOCUMENTS.keys()
    assert "MIT License" in (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    document = DOCUMENTS[name]
    for url in links(document.read_text()):
        page, _, section = url.partition("#")
        target = document.parent / page if page else document
        assert target.exists(), f"{name} links to {url}"
        assert not section or section in anchors(target.read_text()), f"{name} links to {url}: no such heading"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_exist(name):
    found = paths(DOCUMENTS[name].read_text())
    missing = [p for p in sorted(found) if not ((ROOT / p).exists() if "/" in p else p in FILES)]
    assert not missing, f"{name} names {missing}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_programs_that_are_named_exist(name):
    for module in re.findall(r"-m ((?:scripts|nanochat)\.[\w.]+)", DOCUMENTS[name].read_text()):
        assert importlib.util.find_spec(module), f"{name} names {module}"


def test_paths_are_found_in_text():
    text = (
        "see `jel/knobs.py`, [x](docs/design.md#a), jel/tasks/pretrain.py. `jel/learn/` `~/docs/x` runs/a.py setup.sh"
    )
    expected = {"jel/knobs.py", "docs/design.md", "jel/tasks/pretrain.py", "jel/learn/", "setup.sh"}
    assert paths(text) == expected and links(text) == ["docs/design.md#a"]


@pytest.mark.parametrize("name, most", [("README.md", 199), ("docs/design.md", 219), ("CONTRIBUTING.md", 60)])
def test_documents_stay_short(name, most):
    assert len(DOCUMENTS[name].read_text().splitlines()) <= most


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_number_is_left_to_fill_in(name):
    assert not re.findall(r"\{\{.*?\}\}", DOCUMENTS[name].read_text())


def test_the_readme_says_where_a_learning_rate_is_multiplied():
    section = DOCUMENTS["README.md"].read_text().partition("## Where a learning rate is multiplied")[2]
    named = re.findall(r"`(\w+)`[^`\n]*\(\[`(\w+/\w+\.py)`\]", section)
    assert {"apply_multipliers", "base_hparams", "train_step"} <= {function for function, _ in named}
    for function, path in named:
        text = (ROOT / path).read_text()
        assert f"def {function}" in text, f"{path} has no {function}"
    hook = (ROOT / "scripts/base_train.py").read_text()
    assert re.search(r"the hook.*base_hparams\(.*apply_multipliers\(.*end of the hook", hook, re.S)


def test_the_controller_in_the_readme_keeps_the_contract():
    code = re.search(r"```python\n(.*?)```", DOCUMENTS["README.md"].read_text(), re.S)[1]
    names: dict = {}
    exec(code, names)
    controller = names["HalveLate"]()
    assert set(controller.observes) <= jel.OBSERVATIONS
    for progress, lr in ((0.0, 40.0), (0.9, 20.0)):
        multipliers = controller.decide({"progress": progress})
        group = {"name": "head", "lr": 0.0, "weight_decay": 0.0}
        jel.apply_multipliers([group], [{"lr": 1e-3, "weight_decay": 1e-2}], multipliers)
        assert group == {"name": "head", "lr": 1e-3 * lr, "weight_decay": 1e-2}
