"""The sections of the report: from the files of a run to paragraphs, charts and tables."""
