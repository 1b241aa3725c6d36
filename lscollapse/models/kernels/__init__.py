"""The package's own Mamba-2 blocks and the scan behind them, by device, and their check."""
