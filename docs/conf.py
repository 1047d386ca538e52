"""The documentation site: `make docs` builds it into build/site."""

import actcache

project = "actcache"
author = copyright = "The actcache authors"
release = version = actcache.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = False

html_theme = "furo"
html_title = "actcache"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme_options = {
    "source_repository": "https://github.com/actcache/actcache",
    "source_branch": "main",
    "source_directory": "docs/",
}

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]
suppress_warnings = ["myst.header"]

autodoc_typehints = "signature"
maximum_signature_line_length = 100  # a parameter a line in longer ones
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # or a dataclass's attributes are described twice
copybutton_prompt_text = "$ "
