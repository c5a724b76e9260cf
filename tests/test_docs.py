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
    """In an empty folder; trainings are cut short."""
    monkeypatch.chdir(tmp_path)
    fit = sd.fit
    monkeypatch.setattr(
        sd, "fit", lambda *args, steps=2000, **options: fit(*args, steps=min(steps, 20), **options)
    )
    pyro.clear_param_store()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    pyro.clear_param_store()
    plt.close("all")


def check_readme(names, out, files):
    assert names["forecast"].times.shape == (2, 6)
    assert names["idata"]["posterior"]["z"].sizes["draw"] == 500
    assert all(
        re.search(rf"^(good|fair|bad|-) +{check} ", out, re.M) for check in ("gap", "k-hat", "training")
    )


def check_diagnostics(names, out, files):
    assert files == {"diagnosis.png", "losses.png", "forecast.png", "phase.png", "calibration.png", "fit.nc"}
    assert "k-hat 0." in out
    assert re.search(r"The posterior cannot be believed: .*jumps\.", out)
    assert names["idata"]["posterior"]["z"].dims == ("chain", "draw", "subject", "time", "state")


def check_fitting(names, out, files):
    assert "model site 'y' (observed" in out
    assert len(names["fit"].validation) > 1


def check_testing(names, out, files):
    assert "G G' / dt of a short step, against g g': got [[0.19" in out


CHECKS = {
    "README.md": check_readme,
    "diagnostics.md": check_diagnostics,
    "fitting.md": check_fitting,
    "testing.md": check_testing,
}


@pytest.mark.skipif(not PAGES[0].exists(), reason="an installed package has no pages")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_snippets_of_a_page_run(page, tmp_path, capsys):
    names = run(page)
    check = CHECKS.get(page.name)
    if check is not None:
        check(names, capsys.readouterr().out, {file.name for file in tmp_path.iterdir()})


@pytest.mark.skipif(not PAGES[0].exists(), reason="an installed package has no pages")
def test_links_lead_to_files():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_a_broken_snippet_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as error:
        run(page)
    assert error.traceback[-1].lineno + 1 == 10
    page.write_text("```console\nmake demo\n```\n")
    assert list(snippets(page.read_text())) == []
