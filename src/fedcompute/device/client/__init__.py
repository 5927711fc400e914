"""What a device says to servers: check-in, download, report, upload, keys, vendor data."""
