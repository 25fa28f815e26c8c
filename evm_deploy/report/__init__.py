"""Records and bundles side by side: tables, verdicts, one HTML page, comparisons, history. `evm-report` prints them."""
