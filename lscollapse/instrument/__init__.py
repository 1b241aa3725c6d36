"""One model put through variants and measured."""
