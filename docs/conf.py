"""The documentation site: ``make docs`` builds docs/ into build/docs."""

from sphinx.application import Sphinx

from fp8tune import __version__

project = "fp8tune"
author = "the fp8tune developers"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["schema"]
# Anchors as GitHub makes them, so that links work in both places.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# What the arguments of public functions are annotated with is often long and of torch.
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_ivar = True

suppress_warnings = [
    # The blocks marked "python notest" have a language that is none.
    "misc.highlighting_failure",
    # Links to files of the repository are offered for download.
    "myst.xref_missing_download",
]

html_theme = "pydata_sphinx_theme"
html_title = f"fp8tune {version}"
html_show_sourcelink = False
html_theme_options = {
    "navigation_depth": 2,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
}
# A site that asks nothing of any other is one that can be read on a cluster.
html_static_path: list[str] = []


def setup(app: Sphinx) -> None:
    """Links to CONTRIBUTING.md of the repository lead to the page that holds it."""

    def redirect(app: Sphinx, name: str, source: list[str]) -> None:
        del app, name
        source[0] = source[0].replace("(../CONTRIBUTING.md", "(contributing.md")

    app.connect("source-read", redirect)
