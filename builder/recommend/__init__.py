"""The cheapest recipe within a budget of loss and bytes, found by measuring."""
