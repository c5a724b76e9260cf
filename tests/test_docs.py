"""Every Python snippet of the README and the pages runs as a reader would run it: in order, in one namespace."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pytest
import torch

import stochdyn as sd

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(text):
    """Blocks of Python, with the lines above them blank so that an error names the line of the page."""
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield "\n" * text.count("\n", 0, match.start(1)) + match.group(1)


def run(page, names=None):
    names = {"__name__": "__main__"} if names is None else names
    for source in snippets(page.read_text()):
        exec(compile(source, str(page), "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _as_a_reader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    pyro.clear_param_store()
    plt.close("all")


@pytest.mark.skipif(not PAGES[0].exists(), reason="an installed package has no pages")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_snippets_of_a_page_run(page):
    run(page)


def test_the_readme(capsys):
    names = run(PAGES[0])
    assert names["forecast"].times.shape == (2, 6)
    assert "posterior" in names["idata"].groups()
    evidence, elbo = map(float, re.findall(r"-?\d+\.\d+", capsys.readouterr().out)[-2:])
    assert elbo < evidence + 0.5


def test_diagnostics_write_what_they_say(tmp_path, capsys):
    names = run(ROOT / "docs" / "diagnostics.md")
    assert {f.name for f in tmp_path.iterdir()} == {"losses.png", "forecast.png", "phase.png", "fit.nc"}
    assert "k-hat 0." in capsys.readouterr().out
    assert names["idata"]["posterior"]["z"].dims == ("chain", "draw", "subject", "time", "state")


def test_fitting_says_where_it_broke(capsys):
    names = run(ROOT / "docs" / "fitting.md")
    assert "model site 'y' (observed" in capsys.readouterr().out
    assert isinstance(names["fit"], sd.Fit)


def test_a_broken_snippet_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as error:
        run(page)
    assert error.traceback[-1].lineno + 1 == 10
    page.write_text("```console\nmake demo\n```\n")
    assert list(snippets(page.read_text())) == []
