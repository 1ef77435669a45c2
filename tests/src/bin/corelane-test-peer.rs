//! The second process of a test: does what its standard input says, one command a line, and answers each with a line.

use corelane_tests::{CountingAllocator, run_script};

#[global_allocator]
static ALLOCATIONS: CountingAllocator = CountingAllocator::new();

fn main() {
    run_script(|| ALLOCATIONS.count());
}
