"""What every room stands on: configuration, run folders, files, the hub, the registry of models."""
