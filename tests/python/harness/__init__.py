"""What the tests share: agents with registered memory, peers in other processes, bounded waits, counted resources."""
