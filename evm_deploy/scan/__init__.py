"""The selective scan: the op `evm::selective_scan`, its float64 reference, and its lowerings to standard ops."""
