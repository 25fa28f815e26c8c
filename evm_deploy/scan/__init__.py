"""`evm::selective_scan`: the op, the float64 loop that defines it, and its lowerings to standard ops."""
