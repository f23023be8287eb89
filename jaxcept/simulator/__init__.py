"""The shipped Engine and Scheduler on a virtual clock, with a runner that charges a cost model."""
