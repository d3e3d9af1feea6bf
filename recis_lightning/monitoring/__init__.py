"""Tables and metrics of a run, as records, charts and a page."""
