"""Charts of the report, as SVG that lives in the page."""
