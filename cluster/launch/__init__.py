"""Jobs on a cluster: a ``Target`` takes one, follows it, and runs commands where its files are."""
