"""Speed, measured side by side on the device at hand."""
