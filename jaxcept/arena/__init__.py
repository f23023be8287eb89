"""Every policy on the same requests, in simulated time or on the device; tables and plots."""
