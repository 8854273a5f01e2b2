"""The pictures of README and site: `python tests/pictures.py` opens the run notebooks in a real JupyterLab,
runs them, and writes nbs/pictures/*.png."""

import sys
import tempfile
from pathlib import Path

from helpers import NBS, copy_tree
from lab.labharness import Lab

SHOW = ".cb-strip [aria-label='what is shown']"
HIDE = (
    "() => { const app = window.jupyterapp; app.commands.execute('application:toggle-left-area'); "
    "app.commands.execute('statusbar:toggle') }"
)


def masks(page):
    page.locator(SHOW).first.select_option("difference")
    page.locator(".cb-view").first.focus()
    page.keyboard.press("d")


def answers(page):
    page.locator(".cb-answers .an-chip[data-word=changed]").first.click()
    page.locator(".cb-answers .an-list").first.focus()


def as_it_opens(page):
    pass


# notebook: (what is done in it, the output to show: the first that holds this)
PICTURES = {
    "explore_masks": (masks, ".cb-strip"),
    "explore_kl": (as_it_opens, ".cb-strip"),
    "explore_answers": (answers, ".cb-answers"),
    "train": (as_it_opens, ".jp-RenderedHTMLCommon:has-text('weighted')"),
}

if __name__ == "__main__":
    (NBS / "pictures").mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Lab(copy_tree(Path(folder) / "cbnb") / "nbs", width=1300, height=1150) as lab,
    ):
        for name in sys.argv[1:] or PICTURES:
            act, what = PICTURES[name]
            nb = lab.open(f"{name}.ipynb")
            nb.run_all(timeout=1800)
            nb.page.evaluate(HIDE)
            act(nb.page)
            nb.page.locator(what).first.evaluate(
                "e => e.closest('.jp-OutputArea').scrollIntoView({block: 'start'})"
            )
            nb.page.wait_for_timeout(1000)
            nb.shot(NBS / "pictures" / f"{name}.png")
            lab.assert_offline()
            nb.page.close()
            print(NBS / "pictures" / f"{name}.png")
