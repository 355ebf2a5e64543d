"""How Sphinx builds this site: ``make docs``."""

import memsafe

project = "memsafe"
project_copyright = "the memsafe authors, Apache-2.0"
release = memsafe.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings give the units, which types do not
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # or a dataclass's fields would be documented twice
# Each field is looked up among all names that end as it does, and two classes may have one of the same name.
suppress_warnings = ["ref.python"]
default_role = "code"
add_module_names = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"memsafe {release}"
html_show_sphinx = False
html_copy_source = False
