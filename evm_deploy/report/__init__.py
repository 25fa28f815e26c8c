"""Reports on records and bundles for `evm-report`: tables, verdicts, the HTML page, comparisons and the history."""
